//! The folder that a run works in. [`super::OutputFolder`] says what each part is for.

use std::path::{Path, PathBuf};

pub(super) const LOCK: &str = "lock";
pub(super) const OUTPUT: &str = "output";
pub(super) const SCRATCH: &str = "scratch";
pub(super) const JOB: &str = "job.json";
pub(super) const PIECES: &str = "pieces";
/// The files that are being moved into a target that has to stay.
pub(super) const MOVING: &str = "moving.json";
/// The suffix of a small file of the work folder while it is written.
pub(super) const TORN: &str = ".partial";
/// The place within the work folder where an earlier output waits to be removed.
pub(super) const REPLACED: &str = "replaced";

/// The place beside the work folder where an earlier output waits to be removed.
pub(super) fn replaced_of(partial: &Path) -> PathBuf {
    let mut replaced = partial.as_os_str().to_owned();
    replaced.push("-replaced");
    PathBuf::from(replaced)
}

/// Whether a folder is the work folder of a run, or the remains of one.
pub(super) fn is_unfinished(folder: &Path) -> bool {
    folder.join(LOCK).is_file() && folder.join(PIECES).is_dir() | folder.join(OUTPUT).is_dir()
}
