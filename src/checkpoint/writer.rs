//! Sharded safetensors, streamed tensor by tensor into a folder that appears whole or not at all.
//!
//! Every tensor's place is known before the first byte is written, so tensors may come in any order and memory
//! holds one of them. The header is written by ourselves: the library orders `__metadata__` at random and sets
//! mode 0600, and the same input must give the same bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, json};

use super::cast::{self, Dtype};
use super::error::{CheckpointError, io};
use super::{Fingerprint, INDEX_FILE, SINGLE_FILE, ShardIndex, sha256_file};

type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }

    pub fn n_bytes(&self) -> u64 {
        cast::n_bytes(self.dtype, self.shape.iter().product()).expect("invariant: an output tensor fits in memory")
    }
}

/// An output folder under construction: `<out>.partial`, renamed by [`OutputFolder::finish`], removed when dropped.
#[derive(Debug)]
pub struct OutputFolder {
    target: PathBuf,
    partial: PathBuf,
    lock: Option<File>,
    force: bool,
}

const LOCK_FILE: &str = ".lrc-lock";

impl OutputFolder {
    /// Checks that `target` may be written, before any work.
    ///
    /// # Errors
    /// It exists and `force` is false, or it exists and is not an output of `lrc` (`owned` finds its mark).
    pub fn check(target: &Path, force: bool, mark: &str) -> Result<()> {
        let is_free = !target.exists() || (force && target.join(mark).is_file());
        if is_free { Ok(()) } else { Err(CheckpointError::OutputExists { path: target.into() }) }
    }

    /// Creates `<target>.partial`, replacing what an interrupted run left there.
    ///
    /// # Errors
    /// `target` may not be written (see [`Self::check`]), another run writes it, or the disk refuses.
    pub fn create(target: &Path, force: bool, mark: &str) -> Result<Self> {
        Self::check(target, force, mark)?;
        let mut partial = target.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let lock_path = partial.join(LOCK_FILE);
        let busy = || CheckpointError::OutputBusy { path: partial.clone() };
        if let Ok(file) = File::open(&lock_path) {
            file.try_lock().map_err(|_| busy())?;
        }
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(io("remove", &partial))?;
        }
        fs::create_dir_all(&partial).map_err(io("create", &partial))?;
        let lock = File::create(&lock_path).map_err(io("create", &lock_path))?;
        lock.try_lock().map_err(|_| busy())?;
        Ok(Self { target: target.into(), partial, lock: Some(lock), force })
    }

    /// Where files go until [`Self::finish`].
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Fails early when the disk cannot hold `needed` more bytes.
    ///
    /// # Errors
    /// [`CheckpointError::NoSpace`].
    pub fn require_space(&self, needed: u64) -> Result<()> {
        let available = fs4::available_space(&self.partial).map_err(io("measure the disk of", &self.partial))?;
        if available < needed {
            return Err(CheckpointError::NoSpace { path: self.target.clone(), needed, available });
        }
        Ok(())
    }

    /// Writes and syncs one small file.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.partial.join(name);
        let mut file = File::create(&path).map_err(io("create", &path))?;
        file.write_all(bytes).map_err(io("write", &path))?;
        file.sync_all().map_err(io("sync", &path))
    }

    /// Copies a side file under its own name.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn copy(&self, source: &Path) -> Result<()> {
        let bytes = fs::read(source).map_err(io("read", source))?;
        self.write(&super::file_name(source), &bytes)
    }

    /// SHA-256 of every visible file so far, those of folders in it included.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn hashes(&self) -> Result<Fingerprint> {
        let mut files = Vec::new();
        let mut folders = vec![self.partial.clone()];
        while let Some(at) = folders.pop() {
            for entry in fs::read_dir(&at).map_err(io("list", &at))? {
                let path = entry.map_err(io("list", &at))?.path();
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        let name = |path: &Path| path.strip_prefix(&self.partial).unwrap_or(path).to_string_lossy().into_owned();
        let visible = files.par_iter().filter(|path| !name(path).starts_with('.'));
        visible.map(|path| Ok((name(path), sha256_file(path)?))).collect()
    }

    /// Renames the folder to its target: from here on the output is there, and whole.
    ///
    /// # Errors
    /// The disk refuses; the partial folder is then removed.
    pub fn finish(mut self) -> Result<()> {
        self.lock = None;
        let lock_path = self.partial.join(LOCK_FILE);
        fs::remove_file(&lock_path).map_err(io("remove", &lock_path))?;
        let mut replaced = None;
        if self.force && self.target.exists() {
            let mut old = self.partial.as_os_str().to_owned();
            old.push("-replaced");
            let old = PathBuf::from(old);
            fs::rename(&self.target, &old).map_err(io("rename", &self.target))?;
            replaced = Some(old);
        }
        fs::rename(&self.partial, &self.target).map_err(io("rename", &self.partial))?;
        if let Some(old) = replaced {
            fs::remove_dir_all(&old).map_err(io("remove", &old))?;
        }
        let parent = self.target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // The rename itself must survive a power cut; folders cannot be synced on every system.
        if let Ok(parent) = File::open(parent) {
            let _ = parent.sync_all();
        }
        Ok(())
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        // After `finish` the folder has moved, and there is nothing to remove.
        if self.partial.exists()
            && let Err(error) = fs::remove_dir_all(&self.partial)
        {
            tracing::warn!(path = %self.partial.display(), %error, "could not remove the partial output");
        }
    }
}

/// Where one tensor goes.
#[derive(Debug)]
struct Slot {
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
    /// Lays out `specs`, in their order, over shards of at most `max_shard_bytes` and writes the headers.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn create(folder: &Path, specs: &[TensorSpec], max_shard_bytes: u64) -> Result<Self> {
        let shards = split(specs, max_shard_bytes);
        let mut files = Vec::new();
        let mut slots = BTreeMap::new();
        for (shard_idx, shard) in shards.iter().enumerate() {
            let path = folder.join(shard_name(shard_idx, shards.len()));
            let (header, offsets) = header(shard);
            let mut file = File::create(&path).map_err(io("create", &path))?;
            file.write_all(&header).map_err(io("write", &path))?;
            for (spec, offset) in offsets {
                let offset = header.len() as u64 + offset;
                let slot = Slot { shard_idx, offset, n_bytes: spec.n_bytes(), is_written: false };
                let previous = slots.insert(spec.name.clone(), slot);
                assert!(previous.is_none(), "invariant: output tensor `{}` is named once", spec.name);
            }
            files.push((path, file));
        }
        Ok(Self { folder: folder.into(), files, slots })
    }

    /// Writes the bytes of one tensor at its place.
    ///
    /// # Errors
    /// The disk refuses.
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

    /// Syncs the shards and writes the index, when there is more than one. Gives back the names of the files.
    ///
    /// # Errors
    /// The disk refuses.
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
        let mut names: Vec<String> = self.files.iter().map(|(path, _)| super::file_name(path)).collect();
        if names.len() > 1 {
            let total_size: u64 = self.slots.values().map(|s| s.n_bytes).sum();
            let index = ShardIndex {
                metadata: Map::from_iter([("total_size".to_string(), json!(total_size))]),
                weight_map: self.slots.iter().map(|(name, s)| (name.clone(), names[s.shard_idx].clone())).collect(),
            };
            let path = self.folder.join(INDEX_FILE);
            let text = serde_json::to_string_pretty(&index).expect("invariant: an index is valid JSON");
            fs::write(&path, text + "\n").map_err(io("write", &path))?;
            names.push(INDEX_FILE.into());
        }
        Ok(names)
    }
}

/// Writes one file of tensors under a name of its own, whole or not at all.
///
/// # Errors
/// The disk refuses, or that of `bytes`.
pub fn write_file<E: From<CheckpointError>>(
    path: &Path,
    specs: &[TensorSpec],
    bytes: impl Fn(&TensorSpec) -> Result<Vec<u8>, E>,
) -> Result<(), E> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = tempfile::Builder::new().prefix(".lrc-").tempdir_in(parent);
    let folder = folder.map_err(io("create a work folder in", parent))?;
    let mut writer = SafetensorsWriter::create(folder.path(), specs, u64::MAX)?;
    for spec in specs {
        writer.write(&spec.name, &bytes(spec)?)?;
    }
    writer.finish()?;
    fs::rename(folder.path().join(SINGLE_FILE), path).map_err(io("rename a file to", path))?;
    Ok(())
}

/// Bytes of all files that a [`SafetensorsWriter`] makes of `specs`, headers included; the index of shards is not counted.
pub fn file_bytes(specs: &[TensorSpec], max_shard_bytes: u64) -> u64 {
    let bytes =
        |shard: &Vec<&TensorSpec>| header(shard).0.len() as u64 + shard.iter().map(|t| t.n_bytes()).sum::<u64>();
    split(specs, max_shard_bytes).iter().map(bytes).sum()
}

/// Bytes that a tensor takes in a header, but for the digits that its place has less than `file_bytes`.
pub fn header_entry_bytes(spec: &TensorSpec, file_bytes: u64) -> u64 {
    let entry = json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [file_bytes, file_bytes]});
    // Two quotes, a colon and a comma.
    (spec.name.len() + entry.to_string().len() + 4) as u64
}

fn shard_name(shard_idx: usize, n_shards: usize) -> String {
    if n_shards == 1 { SINGLE_FILE.into() } else { format!("model-{:05}-of-{n_shards:05}.safetensors", shard_idx + 1) }
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

/// The header with its length, padded to 8 bytes, and every tensor's offset behind it. Wide dtypes come first, so
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

    #[test]
    fn the_folder_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let folder = OutputFolder::create(&target, false, "mark").unwrap();
        folder.write("a", b"1").unwrap();
        assert!(matches!(OutputFolder::create(&target, false, "mark"), Err(CheckpointError::OutputBusy { .. })));
        drop(folder);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);

        let folder = OutputFolder::create(&target, false, "mark").unwrap();
        folder.write("mark", b"1").unwrap();
        folder.finish().unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);

        assert!(matches!(OutputFolder::check(&target, false, "mark"), Err(CheckpointError::OutputExists { .. })));
        assert!(matches!(OutputFolder::check(&target, true, "other"), Err(CheckpointError::OutputExists { .. })));
        let folder = OutputFolder::create(&target, true, "mark").unwrap();
        folder.write("new", b"2").unwrap();
        folder.finish().unwrap();
        assert!(target.join("new").exists() && !target.join("mark").exists());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_full_disk_is_noticed_before_work() {
        let parent = tempfile::tempdir().unwrap();
        let folder = OutputFolder::create(&parent.path().join("out"), false, "mark").unwrap();
        assert!(matches!(folder.require_space(u64::MAX), Err(CheckpointError::NoSpace { .. })));
        folder.require_space(1).unwrap();
    }
}
