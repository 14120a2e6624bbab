//! Folders under construction, for whoever ends the process early.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Folders that an interrupt would leave behind, and whether a later run may resume them.
static UNFINISHED: Mutex<BTreeMap<PathBuf, bool>> = Mutex::new(BTreeMap::new());

fn unfinished() -> MutexGuard<'static, BTreeMap<PathBuf, bool>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder that goes when the process is interrupted.
#[derive(Debug)]
pub(super) struct Unfinished(PathBuf);

impl Unfinished {
    pub fn new(path: &Path) -> Self {
        unfinished().insert(path.into(), false);
        Self(path.into())
    }

    /// It stays, for a later run.
    pub fn set_resumable(&self) {
        unfinished().insert(self.0.clone(), true);
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        unfinished().remove(&self.0);
    }
}

/// To be called when the process is about to end early: removes the folders under construction, but for those that a later
/// run may resume, which it gives back.
pub fn abandon() -> Vec<PathBuf> {
    // Held for good: no folder is begun from here on.
    let folders = std::mem::ManuallyDrop::new(unfinished());
    let (kept, removed): (Vec<_>, Vec<_>) = folders.iter().partition(|(_, is_resumable)| **is_resumable);
    for (path, _) in removed {
        // Other threads may still be writing: what they make meanwhile takes another try.
        for _ in 0..3 {
            if fs::remove_dir_all(path).is_ok() {
                break;
            }
        }
    }
    kept.into_iter().map(|(path, _)| path.clone()).collect()
}
