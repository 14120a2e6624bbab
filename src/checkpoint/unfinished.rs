//! Folders under construction, to clean up if the process ends early.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Folders that an interrupt would leave, and whether a later run may resume them.
static UNFINISHED: Mutex<BTreeMap<PathBuf, bool>> = Mutex::new(BTreeMap::new());

fn unfinished() -> MutexGuard<'static, BTreeMap<PathBuf, bool>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder that is removed when the process is interrupted.
#[derive(Debug)]
pub(super) struct Unfinished(PathBuf);

impl Unfinished {
    pub fn new(path: &Path) -> Self {
        unfinished().insert(path.into(), false);
        Self(path.into())
    }

    /// Keeps it for a later run.
    pub fn set_resumable(&self) {
        unfinished().insert(self.0.clone(), true);
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        unfinished().remove(&self.0);
    }
}

/// Removes the folders under construction, except those that a later run may resume, which are returned. Call it when
/// the process is about to end early.
pub fn abandon() -> Vec<PathBuf> {
    // The lock is never released, so no folder is begun from now on.
    let folders = std::mem::ManuallyDrop::new(unfinished());
    let (kept, removed): (Vec<_>, Vec<_>) = folders.iter().partition(|(_, is_resumable)| **is_resumable);
    for (path, _) in removed {
        // Other threads may still write into the folder, so removing it may take a second attempt.
        for _ in 0..3 {
            if fs::remove_dir_all(path).is_ok() {
                break;
            }
        }
    }
    kept.into_iter().map(|(path, _)| path.clone()).collect()
}
