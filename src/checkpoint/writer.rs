//! Sharded safetensors, streamed tensor by tensor.
//!
//! Every tensor's place is known before the first byte is written, so tensors may come in any order and memory
//! holds one of them. The header is written by ourselves: the library orders `__metadata__` at random and sets
//! mode 0600, and the same input must give the same bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, json};

use super::error::{CheckpointError, io};
use super::files::ShardIndex;
use super::paths::{INDEX_FILE, SINGLE_FILE, file_name, folder_of};
use super::place::{create_file, create_folder_of, open_to_write};
use super::unfinished::Unfinished;
use crate::codecs::cast::{self, Dtype};

type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name in the file.
    pub name: String,
    /// The dtype in the file.
    pub dtype: Dtype,
    /// Row-major; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// The product of the shape.
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }

    /// Bytes of its values, without its entry in the header.
    pub fn n_bytes(&self) -> u64 {
        cast::n_bytes(self.dtype, self.shape.iter().product()).expect("invariant: an output tensor fits in memory")
    }
}

/// The place of one tensor.
#[derive(Debug)]
struct Slot {
    /// The name in the header.
    tensor: String,
    shard_idx: usize,
    offset: u64,
    n_bytes: u64,
    is_written: bool,
}

/// Writes the tensors of a checkpoint into their shards, in any order.
#[derive(Debug)]
pub struct SafetensorsWriter {
    folder: PathBuf,
    files: Vec<(PathBuf, File)>,
    slots: BTreeMap<String, Slot>,
}

impl SafetensorsWriter {
    /// Lays out `specs`, in their order, over shards of at most `max_shard_bytes` and writes the headers. Tensors that
    /// an earlier run wrote into the same shards stay there.
    pub fn create(folder: &Path, specs: &[TensorSpec], max_shard_bytes: u64) -> Result<Self> {
        Self::create_named(folder, SINGLE_FILE, specs, max_shard_bytes)
    }

    /// The same, where a single shard is named `single`.
    pub fn create_named(folder: &Path, single: &str, specs: &[TensorSpec], max_shard_bytes: u64) -> Result<Self> {
        let shards = split(specs, max_shard_bytes);
        let mut files = Vec::new();
        let mut slots = BTreeMap::new();
        for (shard_idx, shard) in shards.iter().enumerate() {
            let path = folder.join(shard_name(single, shard_idx, shards.len()));
            let (header, offsets) = header(shard);
            let mut file = open_to_write(&path)?;
            file.write_all(&header).map_err(io("write", &path))?;
            for (spec, offset) in offsets {
                let offset = header.len() as u64 + offset;
                let (tensor, n_bytes) = (spec.name.clone(), spec.n_bytes());
                let slot = Slot { tensor, shard_idx, offset, n_bytes, is_written: false };
                let previous = slots.insert(spec.name.clone(), slot);
                assert!(previous.is_none(), "invariant: output tensor `{}` is named once", spec.name);
            }
            files.push((path, file));
        }
        Ok(Self { folder: folder.into(), files, slots })
    }

    /// Lets a tensor be written in pieces of equal size, one after the other, under `names` of their own.
    ///
    /// # Panics
    /// When it was not announced, or cannot be divided: faults of the caller.
    pub fn divide(&mut self, tensor: &str, names: &[String]) {
        let whole = self.slots.remove(tensor).unwrap_or_else(|| panic!("invariant: tensor `{tensor}` was announced"));
        let n_bytes = whole.n_bytes / names.len().max(1) as u64;
        assert_eq!(n_bytes * names.len() as u64, whole.n_bytes, "invariant: `{tensor}` is made of its pieces");
        for (i, name) in names.iter().enumerate() {
            let slot = Slot {
                tensor: tensor.into(),
                shard_idx: whole.shard_idx,
                offset: whole.offset + i as u64 * n_bytes,
                n_bytes,
                is_written: false,
            };
            assert!(self.slots.insert(name.clone(), slot).is_none(), "invariant: output tensor `{name}` is named once");
        }
    }

    /// Counts a tensor as written, by an earlier run.
    ///
    /// # Panics
    /// When `name` was not announced: a fault of the caller.
    pub fn skip(&mut self, name: &str) {
        self.slots.get_mut(name).unwrap_or_else(|| panic!("invariant: tensor `{name}` was announced")).is_written =
            true;
    }

    /// Writes the bytes of one tensor at its place.
    ///
    /// # Panics
    /// When `name` was not announced, was written before, or has another size: faults of the caller.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let slot = self.slots.get_mut(name).unwrap_or_else(|| panic!("invariant: tensor `{name}` was announced"));
        assert_eq!(bytes.len() as u64, slot.n_bytes, "invariant: tensor `{name}` has its announced size");
        assert!(!slot.is_written, "invariant: tensor `{name}` is written once");
        slot.is_written = true;
        let (path, file) = &mut self.files[slot.shard_idx];
        file.seek(SeekFrom::Start(slot.offset)).map_err(io("write", path))?;
        file.write_all(bytes).map_err(io("write", path))
    }

    /// Syncs the shards, writes the index if there are several, and returns the names of the files.
    ///
    /// # Panics
    /// When an announced tensor was never written: a fault of the caller.
    pub fn finish(self) -> Result<Vec<String>> {
        if let Some((name, _)) = self.slots.iter().find(|(_, slot)| !slot.is_written) {
            panic!("invariant: tensor `{name}` was written");
        }
        for (path, file) in &self.files {
            file.sync_all().map_err(io("sync", path))?;
        }
        let mut names: Vec<String> = self.files.iter().map(|(path, _)| file_name(path)).collect();
        if names.len() > 1 {
            let total_size: u64 = self.slots.values().map(|s| s.n_bytes).sum();
            let index = ShardIndex {
                metadata: Map::from_iter([("total_size".to_string(), json!(total_size))]),
                weight_map: self.slots.values().map(|s| (s.tensor.clone(), names[s.shard_idx].clone())).collect(),
            };
            let path = self.folder.join(INDEX_FILE);
            let text = serde_json::to_string_pretty(&index).expect("invariant: an index is valid JSON");
            let mut file = create_file(&path).map_err(io("create", &path))?;
            file.write_all((text + "\n").as_bytes()).map_err(io("write", &path))?;
            names.push(INDEX_FILE.into());
        }
        Ok(names)
    }
}

/// Writes one file of tensors under a name of its own, whole or not at all.
///
/// # Errors
/// The error of `bytes`, or the file cannot be written.
pub fn write_file<E: From<CheckpointError>>(
    path: &Path,
    specs: &[TensorSpec],
    bytes: impl Fn(&TensorSpec) -> Result<Vec<u8>, E>,
) -> Result<(), E> {
    let folder = beside(path)?;
    let _unfinished = Unfinished::new(folder.path());
    let mut writer = SafetensorsWriter::create(folder.path(), specs, u64::MAX)?;
    for spec in specs {
        writer.write(&spec.name, &bytes(spec)?)?;
    }
    writer.finish()?;
    fs::rename(folder.path().join(SINGLE_FILE), path).map_err(io("rename a file to", path))?;
    Ok(())
}

/// Writes a text file, whole or not at all.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    let folder = beside(path)?;
    let _unfinished = Unfinished::new(folder.path());
    let made = folder.path().join("text");
    let mut file = create_file(&made).map_err(io("create", &made))?;
    file.write_all(text.as_bytes()).map_err(io("write", &made))?;
    file.sync_all().map_err(io("sync", &made))?;
    fs::rename(&made, path).map_err(io("rename a file to", path))
}

/// A folder to make a file in, on the same disk.
fn beside(path: &Path) -> Result<tempfile::TempDir> {
    let parent = folder_of(path);
    create_folder_of(path)?;
    let folder = tempfile::Builder::new().prefix(".lrc-").tempdir_in(parent);
    folder.map_err(io("create a work folder in", parent))
}

/// Bytes of all files that a [`SafetensorsWriter`] makes of `specs`, headers included; the index
/// of shards is not counted.
pub fn file_bytes(specs: &[TensorSpec], max_shard_bytes: u64) -> u64 {
    let bytes =
        |shard: &Vec<&TensorSpec>| header(shard).0.len() as u64 + shard.iter().map(|t| t.n_bytes()).sum::<u64>();
    split(specs, max_shard_bytes).iter().map(bytes).sum()
}

/// Bytes that a tensor takes in a header, at most: its offsets are counted with as many digits as `file_bytes` has.
pub fn header_entry_bytes(spec: &TensorSpec, file_bytes: u64) -> u64 {
    let entry = json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [file_bytes, file_bytes]});
    // Two quotes, a colon and a comma.
    (spec.name.len() + entry.to_string().len() + 4) as u64
}

fn shard_name(single: &str, shard_idx: usize, n_shards: usize) -> String {
    if n_shards == 1 { single.into() } else { format!("model-{:05}-of-{n_shards:05}.safetensors", shard_idx + 1) }
}

/// Greedy in order; a tensor larger than the limit has a shard of its own.
fn split(specs: &[TensorSpec], max_shard_bytes: u64) -> Vec<Vec<&TensorSpec>> {
    let mut shards: Vec<Vec<&TensorSpec>> = vec![Vec::new()];
    let mut filled = 0;
    for spec in specs {
        let current = shards.last_mut().expect("invariant: there is always a shard");
        if !current.is_empty() && filled + spec.n_bytes() > max_shard_bytes {
            filled = 0;
            shards.push(vec![spec]);
        } else {
            current.push(spec);
        }
        filled += spec.n_bytes();
    }
    shards
}

/// The header with its length, padded to 8 bytes, and every tensor's offset after it. Wide dtypes come first, so
/// that every tensor is aligned to its element.
fn header<'a>(shard: &[&'a TensorSpec]) -> (Vec<u8>, Vec<(&'a TensorSpec, u64)>) {
    let mut ordered: Vec<&TensorSpec> = shard.to_vec();
    ordered.sort_by_key(|spec| std::cmp::Reverse(spec.dtype.bitsize()));
    let mut entries = Map::from_iter([("__metadata__".to_string(), json!({"format": "pt"}))]);
    let mut offsets = Vec::new();
    let mut offset = 0;
    for spec in ordered {
        let end = offset + spec.n_bytes();
        entries.insert(
            spec.name.clone(),
            json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, end]}),
        );
        offsets.push((spec, offset));
        offset = end;
    }
    let mut text = serde_json::to_vec(&entries).expect("invariant: a header is valid JSON");
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    (header, offsets)
}

#[cfg(test)]
mod tests {
    use super::super::Checkpoint;
    use super::*;

    fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }

    fn write_all(folder: &Path, specs: &[TensorSpec], max_shard_bytes: u64) -> Vec<String> {
        let mut writer = SafetensorsWriter::create(folder, specs, max_shard_bytes).unwrap();
        for (i, spec) in specs.iter().enumerate().rev() {
            writer.write(&spec.name, &vec![i as u8; spec.n_bytes() as usize]).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn tensors_written_in_any_order_are_read_back() {
        let specs = [
            spec("bytes", Dtype::U8, &[3]),
            spec("wide", Dtype::I64, &[2]),
            spec("half", Dtype::F16, &[2, 5]),
            spec("empty", Dtype::F32, &[0, 4]),
            spec("scalar", Dtype::F32, &[]),
        ];
        for (limit, n_files) in [(1 << 30, 1), (20, 4)] {
            let folder = tempfile::tempdir().unwrap();
            assert_eq!(write_all(folder.path(), &specs, limit).len(), n_files);
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let weights = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path());
            let weights = weights.filter(|p| p.extension().is_some_and(|e| e == "safetensors"));
            assert_eq!(weights.map(|p| p.metadata().unwrap().len()).sum::<u64>(), file_bytes(&specs, limit));
            for (i, spec) in specs.iter().enumerate() {
                let info = checkpoint.info(&spec.name).unwrap();
                assert_eq!((info.dtype, &info.shape), (spec.dtype, &spec.shape));
                let width = (spec.dtype.bitsize() / 8).max(1);
                assert_eq!(info.begin % width, 0, "`{}` is aligned", spec.name);
                let bytes = checkpoint.with_bytes(&spec.name, <[u8]>::to_vec).unwrap();
                assert!(bytes.iter().all(|&b| b == i as u8));
            }
        }
    }

    #[test]
    fn shards_stay_under_the_limit() {
        let specs: Vec<_> = (0..10).map(|i| spec(&format!("t{i}"), Dtype::F32, &[25])).collect();
        let shards = split(&specs, 250);
        assert_eq!(shards.len(), 5);
        assert!(shards.iter().all(|s| s.iter().map(|t| t.n_bytes()).sum::<u64>() <= 250));
    }
}
