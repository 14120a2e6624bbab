//! GGUF files: which tensors a mapped file holds, and a writer that takes tensors in any order. Their bytes are [`crate::codecs::gguf`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::error::{CheckpointError, Result, io};
use super::place::open_to_write;
use super::tensor::{Encoded, TensorInfo, is_sane};
use super::view::model_dtype;
use crate::codecs::gguf::{self, Arrangement, Element, Entry, Family, FamilyOf, GgufTensor, Value};

/// Writes a GGUF file tensor by tensor, in any order.
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    file: File,
    /// Offset and size of every tensor that is still to come.
    slots: BTreeMap<String, (u64, u64)>,
}

impl GgufWriter {
    /// Writes the header of a file whose tensors come later.
    pub fn create(path: &Path, metadata: &[(String, Value)], tensors: &[GgufTensor]) -> Result<Self> {
        let (header, offsets) = gguf::write(metadata, tensors);
        let mut file = open_to_write(path)?;
        file.write_all(&header).map_err(io("write", path))?;
        file.set_len(gguf::file_bytes(metadata, tensors)).map_err(io("write", path))?;
        let slots = tensors.iter().zip(offsets).map(|(t, offset)| (t.name.clone(), (offset, t.n_bytes()))).collect();
        Ok(Self { path: path.into(), file, slots })
    }

    /// Takes a tensor for written: an earlier run did.
    pub fn skip(&mut self, name: &str) {
        self.slots.remove(name);
    }

    /// Writes the bytes of one tensor at its place.
    ///
    /// # Panics
    /// When `name` was not announced, was written before, or has another size: faults of the caller.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (offset, len) =
            self.slots.remove(name).unwrap_or_else(|| panic!("invariant: tensor `{name}` is written once"));
        assert_eq!(bytes.len() as u64, len, "invariant: tensor `{name}` has its announced size");
        self.file.seek(SeekFrom::Start(offset)).map_err(io("write", &self.path))?;
        self.file.write_all(bytes).map_err(io("write", &self.path))
    }

    /// Syncs the file.
    ///
    /// # Panics
    /// When an announced tensor was never written: a fault of the caller.
    pub fn finish(self) -> Result<()> {
        assert!(self.slots.is_empty(), "invariant: tensor `{:?}` was written", self.slots.keys().next());
        self.file.sync_all().map_err(io("sync", &self.path))
    }
}

/// The tensors of a mapped GGUF file under the names of a checkpoint, in the order of their data. The names and the number of heads
/// come from `config`.
///
/// # Errors
/// The file is damaged, or holds a tensor of an unknown name or type.
pub(super) fn read_header(
    path: &Path,
    file: &[u8],
    shard_idx: usize,
    config: &Map<String, Json>,
    families: FamilyOf,
) -> Result<Vec<TensorInfo>> {
    let broken = |reason: String| CheckpointError::GgufHeader { path: path.into(), reason };
    let header = gguf::read(file).map_err(broken)?;
    let source =
        Source { path, file, shard_idx, data_begin: header.data_begin, config, family: Family::of(config, families) };
    let stored: Vec<&Entry> = header.tensors.iter().filter(|entry| entry.name != gguf::ROPE_FACTORS).collect();
    let mut tensors = stored.iter().map(|entry| source.tensor(entry)).collect::<Result<Vec<_>>>()?;
    let mut places: Vec<(usize, usize, &str)> =
        tensors.iter().zip(&stored).map(|(info, entry)| (info.begin, info.end, entry.name.as_str())).collect();
    tensors.sort_by_key(|info| info.begin);
    places.sort_unstable();
    if let Some([(.., first), (.., second)]) = places.array_windows().find(|[(_, end, _), (begin, ..)]| begin < end) {
        return Err(broken(format!("tensors `{first}` and `{second}` overlap")));
    }
    Ok(tensors)
}

/// A file whose tensors are read.
struct Source<'a> {
    path: &'a Path,
    file: &'a [u8],
    shard_idx: usize,
    data_begin: u64,
    config: &'a Map<String, Json>,
    family: &'static Family,
}

impl Source<'_> {
    fn foreign(&self, reason: String) -> CheckpointError {
        CheckpointError::ForeignGguf { path: self.path.into(), reason }
    }

    /// Names and places one tensor.
    fn tensor(&self, stored: &Entry) -> Result<TensorInfo> {
        let (name, shape) = (&stored.name, stored.shape.clone());
        // Factors of an adapter have their own suffixes, and the row order of the weight that they add to.
        let (stem, suffix) = match name.rsplit_once('.') {
            Some((stem, suffix @ ("lora_a" | "lora_b"))) => (stem, suffix),
            _ => (name.as_str(), ""),
        };
        let ours = self
            .family
            .from_gguf(stem)
            .ok_or_else(|| self.foreign(format!("tensor `{name}` has no name in a checkpoint of this `model_type`")))?;
        let element = Element::of_type_id(stored.type_id)
            .ok_or_else(|| self.foreign(format!("tensor `{name}` is of type {}", stored.type_id)))?;
        let (begin, end) = self.place(stored, element)?;
        let arrangement =
            if suffix == "lora_a" { Arrangement::Same } else { Arrangement::of(&ours, self.family, self.config) };
        let dtype = match element {
            Element::Plain(dtype) => dtype,
            Element::Block(_) => model_dtype(self.config),
        };
        let name = if suffix.is_empty() { ours } else { format!("{ours}.{suffix}") };
        let shard_idx = self.shard_idx;
        let info = TensorInfo { name, dtype, shape, shard_idx, begin, end, encoded: None, row_of_i64: Vec::new() };
        // Weights that the family stores as (in, out) are transposed in GGUF: being encoded marks that they no longer are as stored.
        let is_transposed = self.family.is_transposed(&info.name);
        let is_plain = arrangement == Arrangement::Same && matches!(element, Element::Plain(_)) && !is_transposed;
        let encoded = (!is_plain).then(|| Box::new(Encoded::rows(element, arrangement, info.clone())));
        Ok(TensorInfo { encoded, ..info })
    }

    /// First and last byte of a tensor, within the file.
    fn place(&self, stored: &Entry, element: Element) -> Result<(usize, usize)> {
        let broken = |reason: String| CheckpointError::GgufHeader { path: self.path.into(), reason };
        let (name, shape, len) = (&stored.name, &stored.shape, self.file.len());
        let n_elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if !is_sane(shape) || n_elements.is_none_or(|n| n > len * 8) {
            return Err(broken(format!("tensor `{name}` of shape {shape:?} is larger than the file")));
        }
        if let (Element::Block(block), cols) = (element, shape.last().copied().unwrap_or(1))
            && !block.divides(cols)
        {
            let reason =
                format!("rows of {cols} values of tensor `{name}` are not made of whole blocks of `{}`", block.name);
            return Err(broken(reason));
        }
        let begin = self.data_begin.saturating_add(stored.offset).min(len as u64) as usize;
        let end = begin + element.n_bytes(shape) as usize;
        if end > len {
            let (expected, found) = (end as u64, len as u64);
            return Err(CheckpointError::Truncated { path: self.path.into(), expected, found });
        }
        Ok((begin, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codecs::cast::Dtype;
    use crate::quantize::BlockType;

    #[test]
    fn files_come_back_and_have_their_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(gguf::MODEL_FILE);
        let block = BlockType::named("q8_0").unwrap();
        let tensors = [
            GgufTensor { name: "token_embd.weight".into(), element: Element::Plain(Dtype::F32), shape: vec![3, 5] },
            GgufTensor { name: "blk.0.attn_q.weight".into(), element: Element::Block(block), shape: vec![4, 64] },
        ];
        let metadata = [("general.architecture".to_string(), Value::Text("x".into()))];
        let mut writer = GgufWriter::create(&path, &metadata, &tensors).unwrap();
        for (i, tensor) in tensors.iter().enumerate().rev() {
            writer.write(&tensor.name, &vec![i as u8 + 1; tensor.n_bytes() as usize]).unwrap();
        }
        writer.finish().unwrap();
        let file = std::fs::read(&path).unwrap();
        assert_eq!(file.len() as u64, gguf::file_bytes(&metadata, &tensors));
        let config = serde_json::json!({"num_attention_heads": 2});
        let read = |file: &[u8]| read_header(&path, file, 0, config.as_object().unwrap(), |_| None);
        let infos = read(&file).unwrap();
        assert_eq!(infos[0].name, "model.embed_tokens.weight");
        assert!(infos[0].encoded.is_none() && infos[1].encoded.is_some());
        assert!(file[infos[1].begin..infos[1].end].iter().all(|&b| b == 2));
        assert!(infos.iter().all(|info| info.begin % 32 == 0));
        assert!(read(&file[..file.len() - 64]).is_err());
    }
}
