//! Files of a checkpoint: weights memory-mapped, one tensor at a time, small ones read whole. This file and
//! `process.rs` hold all `unsafe` code of the crate.

use std::fs::{File, FileType};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use memmap2::{Mmap, UncheckedAdvice};
use sha2::{Digest, Sha256};

use super::error::{CheckpointError, Result, io};
use super::hash::hex;
use super::magic::LFS_POINTER;
use super::tensor::TensorInfo;
use crate::codecs::torch;

/// Reads a small file that a checkpoint is described by.
///
/// # Errors
/// It is absent, no regular file, the pointer that Git LFS leaves in its place, or cannot be read.
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    expect_file(path)?;
    let bytes = std::fs::read(path).map_err(io("read", path))?;
    refuse_pointer(path, &bytes)?;
    Ok(bytes)
}

/// Refuses anything but a regular file: opening a pipe would wait for its writer, and a device may be endless.
pub(super) fn expect_file(path: &Path) -> Result<()> {
    let kind = std::fs::metadata(path).map_err(io("open", path))?.file_type();
    if kind.is_file() {
        return Ok(());
    }
    Err(CheckpointError::NotAFile { path: path.into(), kind: name_of(kind) })
}

fn name_of(kind: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a named pipe";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    if kind.is_dir() { "a folder" } else { "something else" }
}

fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(LFS_POINTER) { Err(CheckpointError::LfsPointer { path: path.into() }) } else { Ok(()) }
}

/// One mapped weight file.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    /// Made when it is asked for: the file is read whole.
    sha256: OnceLock<String>,
}

/// Bytes that are hashed before their pages are given back.
const HASH_CHUNK: usize = 16 << 20;

impl Shard {
    /// Maps `path`; no page of it is read yet.
    ///
    /// # Errors
    /// The file cannot be opened or mapped, or is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        expect_file(path)?;
        let file = File::open(path).map_err(io("open", path))?;
        // SAFETY: the map is read-only and private to this process. Another process that truncates the file
        // while we read could end us with SIGBUS, as it would end every program that maps checkpoints;
        // nothing in this process writes to it.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(io("map", path))?;
        refuse_pointer(path, &map)?;
        Ok(Self { path: path.to_path_buf(), map, sha256: OnceLock::new() })
    }

    /// SHA-256 of the file, in hexadecimal digits.
    pub fn sha256(&self) -> &str {
        self.sha256.get_or_init(|| {
            let mut hasher = Sha256::new();
            for (i, chunk) in self.map.chunks(HASH_CHUNK).enumerate() {
                hasher.update(chunk);
                self.release(i * HASH_CHUNK, i * HASH_CHUNK + chunk.len());
            }
            hex(&hasher.finalize())
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Calls `f` with the bytes of a stored tensor, in row-major order, then gives its pages back.
    pub fn with<T>(&self, info: &TensorInfo, f: impl FnOnce(&[u8]) -> T) -> T {
        let bytes = &self.map[info.begin..info.end];
        let value = match &info.strides {
            None => f(bytes),
            Some(strides) => f(&torch::gather(bytes, info.dtype.bitsize() / 8, &info.shape, strides)),
        };
        self.release(info.begin, info.end);
        value
    }

    /// Advises the system that the pages of `begin..end` are not needed for now, so that reading a checkpoint
    /// larger than memory does not count against this process. A later read faults them in again.
    pub fn release(&self, begin: usize, end: usize) {
        #[cfg(unix)]
        if end > begin {
            // SAFETY: the map is a shared read-only file mapping, so dropped pages are read again from the
            // file with the same content; no reference into the map changes its value.
            #[allow(unsafe_code)]
            let result = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, end - begin) };
            if let Err(error) = result {
                tracing::debug!(path = %self.path.display(), %error, "madvise was refused");
            }
        }
    }
}
