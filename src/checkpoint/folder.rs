//! The output folder that appears whole or not at all, and what is left of it when a run is killed.
//!
//! ```text
//! OUT.partial/lock      held by the run that writes
//! OUT.partial/output/   becomes OUT
//! OUT.partial/scratch/  files of this run alone
//! OUT.partial/job.json  which run it is, where it can be gone on with, and
//! OUT.partial/pieces/   what it has finished
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use serde_json::Value;

use super::error::{CheckpointError, io};
use super::{Fingerprint, sha256_file};

type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// An output folder under construction: `<out>.partial`, of which [`OutputFolder::finish`] makes the output, removed when dropped.
#[derive(Debug)]
pub struct OutputFolder {
    target: PathBuf,
    partial: PathBuf,
    /// Held as long as the folder is written.
    _lock: File,
    force: bool,
    is_kept: bool,
    unfinished: Unfinished,
}

const LOCK: &str = "lock";
const OUTPUT: &str = "output";
const SCRATCH: &str = "scratch";
const JOB: &str = "job.json";
const PIECES: &str = "pieces";

impl OutputFolder {
    /// Checks that `target` may be written, before any work.
    ///
    /// # Errors
    /// It exists and `force` is false, or it exists and is not an output of `lrc` (`mark` is a file that those have).
    pub fn check(target: &Path, force: bool, mark: &str) -> Result<()> {
        let is_free = !target.exists() || (force && target.join(mark).is_file()) || was_stopped_at_the_end(target);
        if is_free {
            return Ok(());
        }
        remove_remains(target);
        Err(CheckpointError::OutputExists { path: target.into() })
    }

    /// Begins an output, replacing what a killed run left of it.
    ///
    /// # Errors
    /// `target` may not be written (see [`Self::check`]), another run writes it, an unfinished run could still be gone on with,
    /// or the disk refuses.
    pub fn create(target: &Path, force: bool, mark: &str) -> Result<Self> {
        Self::check(target, force, mark)?;
        let partial = partial_of(target);
        if was_stopped_at_the_end(target) && !force {
            return Err(CheckpointError::OutputExists { path: target.into() });
        }
        if partial.join(JOB).is_file() {
            return Err(CheckpointError::Unfinished { path: partial });
        }
        Self::begin(target, force, partial, true)
    }

    /// Begins the output of `job`, or goes on with it where a run of the same job was stopped; with `restart` what it left is
    /// thrown away.
    ///
    /// # Errors
    /// As [`Self::create`], or what is there belongs to another job.
    pub fn resume(target: &Path, force: bool, mark: &str, job: &Value, restart: bool) -> Result<Self> {
        Self::check(target, force, mark)?;
        let partial = partial_of(target);
        let path = partial.join(JOB);
        let found = fs::read(&path).ok().filter(|_| !restart);
        // A description that a power cut tore is of nobody's.
        let found: Option<Value> = found.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let mut differences = Vec::new();
        if let Some(found) = &found {
            compare(found, job, "", &mut differences);
        }
        let is_ended = was_stopped_at_the_end(target);
        let is_same = found.is_some() && differences.is_empty();
        if is_ended && !is_same && !force {
            return Err(CheckpointError::OutputExists { path: target.into() });
        }
        if !differences.is_empty() {
            return Err(CheckpointError::OtherJob { path: partial, differences: differences.join(", ") });
        }
        let folder = Self::begin(target, force, partial, found.is_none())?;
        if is_ended && is_same {
            let output = folder.path();
            fs::remove_dir(&output).map_err(io("remove", &output))?;
            fs::rename(target, &output).map_err(io("rename", target))?;
        }
        folder.unfinished.set_resumable();
        if found.is_none() {
            let pieces = folder.pieces();
            fs::create_dir_all(&pieces).map_err(io("create", &pieces))?;
            let torn = path.with_extension("partial");
            fs::write(&torn, job.to_string()).map_err(io("write", &torn))?;
            fs::rename(&torn, &path).map_err(io("rename", &torn))?;
        } else {
            tracing::info!("going on with `{}`", folder.partial.display());
        }
        Ok(folder)
    }

    fn begin(target: &Path, force: bool, partial: PathBuf, anew: bool) -> Result<Self> {
        let lock_path = partial.join(LOCK);
        let busy = || CheckpointError::OutputBusy { path: partial.clone() };
        if let Ok(file) = File::open(&lock_path) {
            file.try_lock().map_err(|_| busy())?;
        }
        if anew && partial.exists() {
            fs::remove_dir_all(&partial).map_err(io("remove", &partial))?;
        }
        fs::create_dir_all(&partial).map_err(io("create", &partial))?;
        let lock = File::create(&lock_path).map_err(io("create", &lock_path))?;
        lock.try_lock().map_err(|_| busy())?;
        let unfinished = Unfinished::new(&partial);
        let folder = Self { target: target.into(), partial, _lock: lock, force, is_kept: false, unfinished };
        let work = folder.work();
        if work.exists() {
            fs::remove_dir_all(&work).map_err(io("remove", &work))?;
        }
        for path in [work, folder.path()] {
            fs::create_dir_all(&path).map_err(io("create", &path))?;
        }
        folder.remove_hidden()?;
        Ok(folder)
    }

    /// Files that were being made under other names when an earlier run was killed.
    fn remove_hidden(&self) -> Result<()> {
        let output = self.path();
        for entry in fs::read_dir(&output).map_err(io("list", &output))? {
            let path = entry.map_err(io("list", &output))?.path();
            if super::file_name(&path).starts_with('.') {
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Where files go until [`Self::finish`].
    pub fn path(&self) -> PathBuf {
        self.partial.join(OUTPUT)
    }

    /// For files that no other run needs.
    pub fn work(&self) -> PathBuf {
        self.partial.join(SCRATCH)
    }

    /// For what a later run may go on from.
    pub fn pieces(&self) -> PathBuf {
        self.partial.join(PIECES)
    }

    /// Leaves the folder to a later run that goes on, where there is anything to go on from: where that is.
    pub fn keep(&mut self) -> Option<&Path> {
        let mut pieces = std::fs::read_dir(self.pieces()).ok()?;
        self.is_kept = pieces.next().is_some();
        self.is_kept.then_some(&self.partial)
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
        let path = self.path().join(name);
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

    /// SHA-256 of every file so far but `report`, those of folders included. The report tells of the others, and a run that was
    /// killed at its end may have left one.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn hashes(&self, report: &str) -> Result<Fingerprint> {
        let output = self.path();
        let mut files = Vec::new();
        let mut folders = vec![output.clone()];
        while let Some(at) = folders.pop() {
            for entry in fs::read_dir(&at).map_err(io("list", &at))? {
                let path = entry.map_err(io("list", &at))?.path();
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        files.retain(|path| *path != output.join(report));
        let name = |path: &Path| path.strip_prefix(&output).unwrap_or(path).to_string_lossy().into_owned();
        files.par_iter().map(|path| Ok((name(path), sha256_file(path)?))).collect()
    }

    /// Renames the output to its target: from here on it is there, and whole.
    ///
    /// # Errors
    /// The disk refuses; what was made is then removed.
    pub fn finish(self) -> Result<()> {
        let mut replaced = self.partial.as_os_str().to_owned();
        replaced.push("-replaced");
        let replaced = PathBuf::from(replaced);
        if self.force && self.target.exists() {
            fs::rename(&self.target, &replaced).map_err(io("rename", &self.target))?;
        }
        fs::rename(self.path(), &self.target).map_err(io("rename", &self.path()))?;
        let job = self.partial.join(JOB);
        if job.exists() {
            fs::remove_file(&job).map_err(io("remove", &job))?;
        }
        if self.force && replaced.exists() {
            fs::remove_dir_all(&replaced).map_err(io("remove", &replaced))?;
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
        if !self.is_kept
            && self.partial.exists()
            && let Err(error) = fs::remove_dir_all(&self.partial)
        {
            tracing::warn!(path = %self.partial.display(), %error, "could not remove the partial output");
        }
    }
}

fn partial_of(target: &Path) -> PathBuf {
    let mut partial = target.as_os_str().to_owned();
    partial.push(".partial");
    PathBuf::from(partial)
}

/// Whether a run was killed between its last step and its end: the output is there, and whole.
fn was_stopped_at_the_end(target: &Path) -> bool {
    let partial = partial_of(target);
    target.exists() && partial.join(JOB).is_file() && !partial.join(OUTPUT).exists()
}

/// A run that was killed while it tidied up behind its output has left what is of no use to anyone.
fn remove_remains(target: &Path) {
    let partial = partial_of(target);
    let is_held = || File::open(partial.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_err());
    if target.exists() && partial.exists() && !partial.join(JOB).exists() && !is_held() {
        // It is in nobody's way: where it cannot be removed, it stays.
        let _ = fs::remove_dir_all(&partial);
    }
}

/// Where two descriptions of a job differ, in words.
fn compare(was: &Value, is: &Value, at: &str, differences: &mut Vec<String>) {
    match (was, is) {
        (Value::Object(was), Value::Object(is)) => {
            let names = was.keys().chain(is.keys().filter(|name| !was.contains_key(*name)));
            for name in names {
                let at = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                let of = |fields: &serde_json::Map<String, Value>| fields.get(name).cloned().unwrap_or_default();
                compare(&of(was), &of(is), &at, differences);
            }
        }
        (was, is) if was == is => {}
        (was, is) => differences.push(format!("`{at}` was {was}, is {is}")),
    }
}

/// Folders that an interrupt would leave behind, and whether a later run may go on with them.
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
    fn set_resumable(&self) {
        unfinished().insert(self.0.clone(), true);
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        unfinished().remove(&self.0);
    }
}

/// To be called when the process is about to end early: removes the folders under construction, but for those that a later
/// run may go on with, which it gives back.
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn jobs_are_told_apart_by_name() {
        let mut differences = Vec::new();
        let was = json!({"keep": 0.8, "files": {"a": "1", "b": "2"}, "same": [1]});
        let is = json!({"keep": 0.7, "files": {"a": "1", "c": "3"}, "same": [1]});
        compare(&was, &is, "", &mut differences);
        let expected = ["`keep` was 0.8, is 0.7", "`files.b` was \"2\", is null", "`files.c` was null, is \"3\""];
        assert_eq!(differences, expected);
    }

    #[test]
    fn what_can_be_gone_on_with_is_kept_for_its_own_job() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let resume = |n: u32, restart| OutputFolder::resume(&target, false, "x", &json!({"n": n}), restart);
        let mut first = resume(1, false).unwrap();
        fs::write(first.pieces().join("a"), "a").unwrap();
        fs::write(first.path().join("tensors"), "t").unwrap();
        fs::create_dir(first.path().join(".made-under-another-name")).unwrap();
        first.keep();
        drop(first);
        assert!(matches!(resume(2, false), Err(CheckpointError::OtherJob { .. })));
        assert!(matches!(OutputFolder::create(&target, false, "x"), Err(CheckpointError::Unfinished { .. })));
        let mut again = resume(1, false).unwrap();
        assert!(again.pieces().join("a").exists() && again.path().join("tensors").exists());
        assert!(!again.path().join(".made-under-another-name").exists());
        again.keep();
        drop(again);
        let anew = resume(2, true).unwrap();
        assert!(!anew.pieces().join("a").exists() && !anew.path().join("tensors").exists());
        anew.finish().unwrap();
        assert!(target.is_dir() && !partial_of(&target).exists());
    }

    #[test]
    fn a_run_killed_after_its_last_step_is_gone_on_with_too() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let resume = |n: u32, restart| OutputFolder::resume(&target, false, "x", &json!({"n": n}), restart);
        let mut first = resume(1, false).unwrap();
        fs::write(first.pieces().join("a"), "a").unwrap();
        fs::write(first.path().join("tensors"), "t").unwrap();
        fs::rename(first.path(), &target).unwrap();
        first.keep();
        drop(first);
        for (n, restart) in [(2, false), (1, true)] {
            assert!(matches!(resume(n, restart), Err(CheckpointError::OutputExists { .. })));
        }
        let again = resume(1, false).unwrap();
        assert!(!target.exists() && again.path().join("tensors").exists());
        again.finish().unwrap();
        assert!(target.join("tensors").exists() && !partial_of(&target).exists());
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
