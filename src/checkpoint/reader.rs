//! Memory-mapped weight files, one tensor at a time. The only `unsafe` of the crate.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};

use super::error::{Result, io};

/// One mapped weight file.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
}

impl Shard {
    /// Maps `path`; no page of it is read yet.
    ///
    /// # Errors
    /// The file cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io("open", path))?;
        // SAFETY: the map is read-only and private to this process. Another process that truncates the file
        // while we read could end us with SIGBUS, as it would end every program that maps checkpoints;
        // nothing in this process writes to it.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map", path))?;
        Ok(Self { path: path.to_path_buf(), map })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Tells the system that the pages of `begin..end` are not needed for now, so that reading a checkpoint
    /// larger than memory does not count against this process. A later read faults them in again.
    pub fn release(&self, begin: usize, end: usize) {
        #[cfg(unix)]
        if end > begin {
            // SAFETY: the map is a shared read-only file mapping, so dropped pages are read again from the
            // file with the same content; no reference into the map changes its value.
            let result = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, end - begin) };
            if let Err(error) = result {
                tracing::debug!(path = %self.path.display(), %error, "madvise was refused");
            }
        }
    }
}
