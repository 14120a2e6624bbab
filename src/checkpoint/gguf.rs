//! GGUF files: the tensors of a mapped file, under the names that the caller gives them. Their bytes are
//! [`crate::codecs::gguf`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value};

use super::error::{CheckpointError, Result};
use super::reader::Shard;
use super::tensor::{Encoded, TensorInfo};
use super::view::model_dtype;
use crate::codecs::gguf::{self, Arrangement, Damage, Description, Element, Entry, Header};
use crate::codecs::peft::Factor;

/// A tensor of a GGUF file as a checkpoint has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownTensor {
    /// The name in a checkpoint.
    pub name: String,
    /// How its values are stored in the GGUF file.
    pub arrangement: Arrangement,
    /// Whether checkpoints store it as (in, out).
    pub is_transposed: bool,
}

/// A caller's knowledge of the models in GGUF files.
#[derive(Debug, Clone, Copy)]
pub struct OfGguf {
    /// The tensor of a checkpoint with this config for a name of a GGUF file; `None` if it has none.
    pub tensor: fn(&str, &Map<String, Value>) -> Option<ShownTensor>,
    /// The config of the model in a file that has none beside it, or a clause that says why there is none.
    pub config: fn(&Description<'_>) -> Result<Map<String, Value>, String>,
    /// The files that a checkpoint of this config has besides weights and config, by name; or a clause that says
    /// why they cannot be made.
    pub files: fn(&Description<'_>, &Map<String, Value>) -> Result<MadeFiles, String>,
}

/// Files by name, with their content.
pub type MadeFiles = BTreeMap<String, Vec<u8>>;

/// The config of the model that a file describes in its metadata; `others` are the other files of a split model.
///
/// # Errors
/// A file is damaged, or the first describes no model that `of` knows.
pub(super) fn described_config(first: &Shard, others: &[Arc<Shard>], of: OfGguf) -> Result<Map<String, Value>> {
    let path = first.path();
    let header = header(path, first.bytes())?;
    let others: Vec<(&[u8], Header)> = others
        .iter()
        .map(|shard| Ok((shard.bytes(), self::header(shard.path(), shard.bytes())?)))
        .collect::<Result<_>>()?;
    (of.config)(&Description::new(first.bytes(), &header).with_others(&others))
        .map_err(|reason| CheckpointError::ForeignGguf { path: path.into(), reason })
}

/// Checks that these are all files of a model, in their order, as far as their metadata say.
///
/// # Errors
/// A file is damaged, or `split.count`, `split.no` or `split.tensors.count` of one says otherwise.
pub(super) fn expect_split(shards: &[Arc<Shard>]) -> Result<()> {
    let headers = shards.iter().map(|shard| header(shard.path(), shard.bytes())).collect::<Result<Vec<_>>>()?;
    let n_tensors: usize = headers.iter().map(|header| header.tensors.len()).sum();
    for (number, (shard, header)) in shards.iter().zip(&headers).enumerate() {
        let (path, description) = (shard.path(), Description::new(shard.bytes(), header));
        // Files that were joined again have a count of 0.
        let count = description.count("split.count").map(|count| count.max(1));
        if let Some(count) = count.filter(|&count| count > 1 && shards.len() == 1) {
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            return Err(CheckpointError::LoneShard { path: path.into(), count });
        }
        let wrong = |key: &str, found: u64, expected: String| CheckpointError::ForeignGguf {
            path: path.into(),
            reason: format!("`{key}` is {found}, expected {expected}"),
        };
        if let Some(count) = count.filter(|&count| count != shards.len() as u64) {
            return Err(wrong("split.count", count, format!("{}, the number of files", shards.len())));
        }
        if let Some(no) = description.count("split.no").filter(|&no| no != number as u64) {
            return Err(wrong("split.no", no, number.to_string()));
        }
        if let Some(count) = description.count("split.tensors.count").filter(|&count| count != n_tensors as u64) {
            return Err(wrong("split.tensors.count", count, format!("{n_tensors}, the number of tensors")));
        }
    }
    Ok(())
}

fn header(path: &Path, file: &[u8]) -> Result<Header> {
    if let Some(reason) = gguf::unread(file) {
        return Err(CheckpointError::ForeignGguf { path: path.into(), reason });
    }
    gguf::read(file).map_err(|reason| CheckpointError::GgufHeader { path: path.into(), reason })
}

/// The files beside the weights that a file describes in its metadata. They are made when the
/// first of them is asked for.
#[derive(Debug)]
pub(super) struct Made {
    of: OfGguf,
    files: OnceLock<MadeFiles>,
}

impl Made {
    pub fn new(of: OfGguf) -> Self {
        Self { of, files: OnceLock::new() }
    }

    /// The same for another config, with nothing made yet.
    pub fn anew(&self) -> Self {
        Self::new(self.of)
    }

    /// The files of the model with this config.
    ///
    /// # Errors
    /// The file is damaged, or describes no tokenizer that is known.
    pub fn files(&self, path: &Path, file: &[u8], config: &Map<String, Value>) -> Result<&MadeFiles> {
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        let files = described_files(path, file, config, self.of)?;
        Ok(self.files.get_or_init(|| files))
    }
}

fn described_files(path: &Path, file: &[u8], config: &Map<String, Value>, of: OfGguf) -> Result<MadeFiles> {
    let header = header(path, file)?;
    (of.files)(&Description::new(file, &header), config)
        .map_err(|reason| CheckpointError::ForeignGguf { path: path.into(), reason })
}

/// The tensors of a mapped GGUF file under the names of a checkpoint, in the order of their data. The names and the
/// number of heads come from `config`.
///
/// # Errors
/// The file is damaged, or holds a tensor of an unknown name or type.
pub(super) fn read_header(
    path: &Path,
    file: &[u8],
    shard_idx: usize,
    config: &Map<String, Value>,
    of: OfGguf,
) -> Result<Vec<TensorInfo>> {
    let header = header(path, file)?;
    let source = Source { path, len: file.len(), shard_idx, header: &header, config, of };
    let stored: Vec<&Entry> = header.tensors.iter().filter(|entry| !gguf::is_rope_factors(&entry.name)).collect();
    let mut tensors = Vec::new();
    for entry in stored {
        tensors.extend(source.tensors(entry)?.into_iter().map(|info| (info, entry.name.as_str())));
    }
    let places = tensors.iter().map(|(info, name)| ((info.begin, info.end), *name));
    gguf::expect_apart(places.collect()).map_err(|reason| CheckpointError::GgufHeader { path: path.into(), reason })?;
    tensors.sort_by_key(|(info, _)| info.begin);
    Ok(tensors.into_iter().map(|(info, _)| info).collect())
}

/// A file whose tensors are read.
struct Source<'a> {
    path: &'a Path,
    /// Bytes of the file.
    len: usize,
    shard_idx: usize,
    header: &'a Header,
    config: &'a Map<String, Value>,
    of: OfGguf,
}

impl Source<'_> {
    fn foreign(&self, reason: String) -> CheckpointError {
        CheckpointError::ForeignGguf { path: self.path.into(), reason }
    }

    fn damaged(&self, damage: Damage) -> CheckpointError {
        let path = self.path.into();
        match damage {
            Damage::Header(reason) => CheckpointError::GgufHeader { path, reason },
            Damage::Truncated { expected, found } => CheckpointError::Truncated { path, expected, found },
        }
    }

    /// Names and places one tensor, or every matrix of a stack of experts.
    fn tensors(&self, stored: &Entry) -> Result<Vec<TensorInfo>> {
        let name = |index| gguf::matrix_name(&stored.name, index);
        let ([n, matrix @ ..], Some(_)) = (stored.shape.as_slice(), name(0).filter(|_| stored.shape.len() == 3)) else {
            return Ok(vec![self.tensor(stored)?]);
        };
        let element = self.element(stored)?;
        // That the whole is in the file also bounds the number of matrices.
        self.header.place(stored, element, self.len).map_err(|damage| self.damaged(damage))?;
        let entry = |index: usize| {
            let offset = stored.offset + index as u64 * element.n_bytes(matrix);
            Some(Entry { name: name(index)?, shape: matrix.into(), offset, ..stored.clone() })
        };
        (0..*n).filter_map(entry).map(|matrix| self.tensor(&matrix)).collect()
    }

    fn element(&self, stored: &Entry) -> Result<Element> {
        let (name, of) = (&stored.name, stored.type_id);
        Element::of_type_id(of)
            .ok_or_else(|| self.foreign(format!("tensor `{name}` is of type {}", gguf::type_name(of))))
    }

    /// Names and places one tensor.
    fn tensor(&self, stored: &Entry) -> Result<TensorInfo> {
        let (name, shape) = (&stored.name, stored.shape.clone());
        // Factors of an adapter have their own suffixes, and the row order of the weight that they add to.
        let (weight, factor) =
            gguf::split_factor(name).map_or((name.as_str(), None), |(weight, factor)| (weight, Some(factor)));
        let shown = (self.of.tensor)(weight, self.config).ok_or_else(|| {
            let whole = gguf::split_matrix(name).map_or(name.clone(), |(stack, _)| stack);
            self.foreign(format!("tensor `{whole}` has no name in a checkpoint of this `model_type`"))
        })?;
        let element = self.element(stored)?;
        let (begin, end) = self.header.place(stored, element, self.len).map_err(|damage| self.damaged(damage))?;
        let arrangement = if factor == Some(Factor::A) { Arrangement::Same } else { shown.arrangement };
        let dtype = match element {
            Element::Plain(dtype) => dtype,
            Element::Block(_) => model_dtype(self.config),
        };
        // Weights that the family stores as (in, out) are transposed in GGUF. Codes stay as they are.
        let transposed = match element {
            Element::Plain(dtype) if shown.is_transposed && factor.is_none() && shape.len() == 2 => Some(dtype),
            _ => None,
        };
        let name = factor.map_or(shown.name.clone(), |factor| gguf::factor_name(&shown.name, factor));
        let shard_idx = self.shard_idx;
        let info = TensorInfo { name, dtype, shape, shard_idx, begin, end, encoded: None, strides: None };
        if let Some(dtype) = transposed {
            let shape = info.shape.iter().rev().copied().collect();
            return Ok(TensorInfo { shape, encoded: Some(Box::new(Encoded::transposed(dtype, info.clone()))), ..info });
        }
        let is_plain = arrangement == Arrangement::Same && matches!(element, Element::Plain(_));
        let encoded = (!is_plain).then(|| Box::new(Encoded::rows(element, arrangement, info.clone())));
        Ok(TensorInfo { encoded, ..info })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codecs::cast::Dtype;
    use crate::codecs::gguf::GgufTensor;
    use crate::quantize::BlockType;

    fn shown(tensor: &str, _: &Map<String, Value>) -> Option<ShownTensor> {
        let name = tensor.strip_prefix("blk.")?.to_string();
        let arrangement = if name == "q" { Arrangement::Interleaved { heads: 2 } } else { Arrangement::Same };
        Some(ShownTensor { is_transposed: name == "t", name, arrangement })
    }

    #[test]
    fn tensors_are_shown_under_the_names_of_the_caller() {
        let block = Element::Block(BlockType::named("q8_0").unwrap());
        let tensor =
            |name: &str, element, shape: &[usize]| GgufTensor { name: name.into(), element, shape: shape.into() };
        let plain = Element::Plain(Dtype::F32);
        let tensors = [
            tensor("blk.a", plain, &[3, 5]),
            tensor("blk.b", block, &[4, 64]),
            tensor("blk.q", plain, &[4, 5]),
            tensor("blk.q.lora_a", plain, &[1, 5]),
            tensor("blk.q.lora_b", plain, &[4, 1]),
            tensor("blk.t", plain, &[4, 5]),
            tensor(gguf::ROPE_FACTORS, plain, &[3]),
        ];
        let (mut file, _) = gguf::write(&[], &tensors);
        file.resize(gguf::file_bytes(&[], &tensors) as usize, 0);
        let of = OfGguf { tensor: shown, config: |_| Err("x".into()), files: |_, _| Ok(MadeFiles::new()) };
        let read = |file: &[u8]| read_header(Path::new("m.gguf"), file, 0, &Map::new(), of);
        let infos = read(&file).unwrap();
        let found: Vec<_> = infos.iter().map(|info| (info.name.as_str(), info.is_encoded())).collect();
        let expected = [("a", false), ("b", true), ("q", true), ("q.lora_a", false), ("q.lora_b", true), ("t", true)];
        assert_eq!(found, expected);
        assert_eq!(infos[5].shape, [5, 4], "transposed");
        assert_eq!(infos[1].dtype, Dtype::F16, "weights in blocks have the dtype of the config, or f16");
        assert!(infos.iter().all(|info| info.begin % 32 == 0));
        assert!(matches!(read(&file[..file.len() - 64]), Err(CheckpointError::Truncated { .. })));
        let (foreign, _) = gguf::write(&[], &[tensor("output", plain, &[1])]);
        assert!(matches!(read(&foreign), Err(CheckpointError::ForeignGguf { .. })));
    }
}
