//! The output folder, which appears whole or not at all, and the remains of a killed run.
//!
//! ```text
//! OUT.partial/lock      held by the run that writes
//! OUT.partial/output/   becomes OUT
//! OUT.partial/scratch/  files of this run alone
//! OUT.partial/job.json  the job, if it can be resumed
//! OUT.partial/pieces/   finished pieces
//! ```
//!
//! A folder that has to stay where it is (see [`place::work_of`]) contains all of that in `OUT/.lrc-partial`, and
//! finished files are moved up into it (see [`moving`]).

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::{CheckpointError, OutputError, io};
use super::job::differences;
use super::moving::{self, rename, write_whole};
use super::paths::{file_name, folder_of};
use super::place::{self, Existing, WITHIN, open_to_write};
use super::strangers;
use super::unfinished::Unfinished;
use super::work::{JOB, LOCK, OUTPUT, PIECES, SCRATCH, replaced_of};

type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// An output folder under construction; removed when dropped, unless [`OutputFolder::finish`] made it the output.
#[derive(Debug)]
pub struct OutputFolder {
    pub(super) target: PathBuf,
    pub(super) partial: PathBuf,
    /// The file that only a complete output has.
    pub(super) mark: String,
    /// The lock, held while the folder is written.
    _lock: File,
    pub(super) existing: Existing,
    pub(super) is_kept: bool,
    pub(super) unfinished: Unfinished,
}

/// Whether the remains of an earlier run are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Earlier {
    /// Finished pieces are read, if the job is the same.
    Resumed,
    /// They are deleted first.
    Discarded,
}

impl OutputFolder {
    /// Checks that `target` may be written, before any work.
    ///
    /// # Errors
    /// It exists and is not to be replaced, or is not an output of `lrc` (which has a file `mark`), or holds other
    /// files; or it cannot be a folder. An empty folder may be written.
    pub fn check(target: &Path, existing: Existing, mark: &str) -> Result<()> {
        Self::expect_free(&place::named(target), existing, mark)
    }

    fn expect_free(target: &Path, existing: Existing, mark: &str) -> Result<()> {
        let is_there = place::expect_folder(target)?;
        let partial = place::work_of(target);
        place::refuse_links(&partial)?;
        strangers::refuse_in_work(target, &partial)?;
        if existing == Existing::Replace {
            strangers::refuse_in_replaced(target, &replaced_of(&partial), mark)?;
        }
        if !is_there {
            return Ok(());
        }
        if moving::is_midway(&partial) && !is_held(&partial) {
            moving::undo(target, &partial)?;
        }
        if place::is_vacant(target) || (was_stopped_at_the_end(target) && existing == Existing::Refuse) {
            return Ok(());
        }
        let is_ours = target.join(mark).is_file();
        if existing == Existing::Replace && is_ours {
            return strangers::refuse_in_output(target, mark);
        }
        remove_remains(target);
        Err(if is_ours { OutputError::Exists { path: target.into() }.into() } else { place::foreign(target) })
    }

    /// Begins an output, and discards the remains of a killed run.
    ///
    /// # Errors
    /// `target` may not be written (see [`Self::check`]), another run writes it, or an unfinished
    /// run could still be resumed.
    pub fn create(target: &Path, existing: Existing, mark: &str) -> Result<Self> {
        let target = &place::named(target);
        Self::expect_free(target, existing, mark)?;
        let partial = place::work_of(target);
        if was_stopped_at_the_end(target) && existing == Existing::Refuse {
            return Err(OutputError::Exists { path: target.into() }.into());
        }
        if partial.join(JOB).is_file() {
            return Err(OutputError::Unfinished { path: partial }.into());
        }
        Self::begin(target, existing, mark, partial, Earlier::Discarded)
    }

    /// Begins the output of `job`, or resumes it where a run of the same job was stopped.
    ///
    /// # Errors
    /// As [`Self::create`], or the folder belongs to another job.
    pub fn resume(target: &Path, existing: Existing, mark: &str, job: &Value, earlier: Earlier) -> Result<Self> {
        let target = &place::named(target);
        Self::expect_free(target, existing, mark)?;
        let partial = place::work_of(target);
        let path = partial.join(JOB);
        let found = fs::read(&path).ok().filter(|_| earlier == Earlier::Resumed);
        // A job file truncated by a power cut matches no job.
        let found: Option<Value> = found.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let differences = found.as_ref().and_then(|found| differences(found, job));
        let is_ended = was_stopped_at_the_end(target);
        let is_same = found.is_some() && differences.is_none();
        if is_ended && !is_same && existing == Existing::Refuse {
            return Err(OutputError::Exists { path: target.into() }.into());
        }
        if let Some(differences) = differences {
            return Err(OutputError::OtherJob { path: partial, differences }.into());
        }
        let earlier = if found.is_some() { Earlier::Resumed } else { Earlier::Discarded };
        let folder = Self::begin(target, existing, mark, partial, earlier)?;
        if is_ended && is_same {
            folder.take_back()?;
        }
        folder.unfinished.set_resumable();
        if found.is_none() {
            let pieces = folder.pieces();
            fs::create_dir_all(&pieces).map_err(io("create", &pieces))?;
            write_whole(&path, job.to_string().as_bytes())?;
        } else {
            tracing::info!("resuming `{}`", folder.partial.display());
        }
        Ok(folder)
    }

    fn begin(target: &Path, existing: Existing, mark: &str, partial: PathBuf, earlier: Earlier) -> Result<Self> {
        let lock_path = partial.join(LOCK);
        let busy = || CheckpointError::from(OutputError::Busy { path: partial.clone() });
        if let Ok(file) = File::open(&lock_path) {
            file.try_lock().map_err(|_| busy())?;
        }
        strangers::refuse_in_work(target, &partial)?;
        if earlier == Earlier::Discarded && partial.exists() {
            fs::remove_dir_all(&partial).map_err(io("remove", &partial))?;
        }
        fs::create_dir_all(&partial).map_err(place::not_made(target, folder_of(&partial)))?;
        let lock = open_to_write(&lock_path)?;
        lock.try_lock().map_err(|_| busy())?;
        let (unfinished, mark) = (Unfinished::new(&partial), mark.to_string());
        let folder = Self { target: target.into(), partial, mark, _lock: lock, existing, is_kept: false, unfinished };
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

    /// Removes files that an earlier run was writing under temporary names when it was killed.
    fn remove_hidden(&self) -> Result<()> {
        let output = self.path();
        for name in place::names_in(&output)? {
            let path = output.join(name);
            if file_name(&path).starts_with('.') {
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Takes a finished output back under construction.
    fn take_back(&self) -> Result<()> {
        if self.is_within() {
            return moving::undo(&self.target, &self.partial);
        }
        let output = self.path();
        fs::remove_dir(&output).map_err(io("remove", &output))?;
        rename(&self.target, &output)
    }

    /// Whether the work folder is inside the target.
    pub(super) fn is_within(&self) -> bool {
        self.partial == self.target.join(WITHIN)
    }

    /// Whether a path is the output of a run to `target`, or its work folder: such paths are never part of a source.
    pub fn is_own(target: &Path, path: &Path) -> bool {
        let target = place::named(target);
        let is_same = |own: &Path| fs::canonicalize(own).is_ok_and(|own| own == *path);
        is_same(&target) || is_same(&place::work_of(&target))
    }

    /// The path at which the output appears.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Holds the files of the output until [`Self::finish`].
    pub fn path(&self) -> PathBuf {
        self.partial.join(OUTPUT)
    }

    /// The folder for temporary files of this run.
    pub fn work(&self) -> PathBuf {
        self.partial.join(SCRATCH)
    }

    /// The folder for pieces that a later run can resume from.
    pub fn pieces(&self) -> PathBuf {
        self.partial.join(PIECES)
    }

    /// Keeps the folder for a later run to resume if it has pieces, and returns its path.
    pub fn keep(&mut self) -> Option<&Path> {
        let mut pieces = std::fs::read_dir(self.pieces()).ok()?;
        self.is_kept = pieces.next().is_some();
        self.is_kept.then_some(&self.partial)
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

/// Whether a run was killed after its last step: the output exists and is complete.
fn was_stopped_at_the_end(target: &Path) -> bool {
    let partial = place::work_of(target);
    target.exists() && partial.join(JOB).is_file() && !partial.join(OUTPUT).exists()
}

fn is_held(partial: &Path) -> bool {
    File::open(partial.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_err())
}

/// Removes the useless remains of a run that was killed while it cleaned up after its output.
fn remove_remains(target: &Path) {
    let partial = place::work_of(target);
    let is_left = partial.exists() && strangers::refuse_in_work(target, &partial).is_ok();
    if target.exists() && is_left && !partial.join(JOB).exists() && !is_held(&partial) {
        // Harmless if it cannot be removed.
        let _ = fs::remove_dir_all(&partial);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Earlier::{Discarded, Resumed};
    use super::Existing::{Refuse, Replace};
    use super::*;
    use CheckpointError::Output;

    #[test]
    fn what_can_be_resumed_is_kept_for_its_own_job() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let resume = |n: u32, earlier| OutputFolder::resume(&target, Refuse, "x", &json!({"n": n}), earlier);
        let mut first = resume(1, Resumed).unwrap();
        fs::write(first.pieces().join("a"), "a").unwrap();
        fs::write(first.path().join("tensors"), "t").unwrap();
        fs::create_dir(first.path().join(".made-under-another-name")).unwrap();
        first.keep();
        drop(first);
        assert!(matches!(resume(2, Resumed), Err(Output(OutputError::OtherJob { .. }))));
        assert!(matches!(OutputFolder::create(&target, Refuse, "x"), Err(Output(OutputError::Unfinished { .. }))));
        let mut again = resume(1, Resumed).unwrap();
        assert!(again.pieces().join("a").exists() && again.path().join("tensors").exists());
        assert!(!again.path().join(".made-under-another-name").exists());
        again.keep();
        drop(again);
        let anew = resume(2, Discarded).unwrap();
        assert!(!anew.pieces().join("a").exists() && !anew.path().join("tensors").exists());
        anew.finish().unwrap();
        assert!(target.is_dir() && !place::work_of(&target).exists());
    }

    #[test]
    fn a_run_killed_after_its_last_step_is_resumed_too() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let resume = |n: u32, earlier| OutputFolder::resume(&target, Refuse, "x", &json!({"n": n}), earlier);
        let mut first = resume(1, Resumed).unwrap();
        fs::write(first.pieces().join("a"), "a").unwrap();
        fs::write(first.path().join("tensors"), "t").unwrap();
        fs::rename(first.path(), &target).unwrap();
        first.keep();
        drop(first);
        for (n, earlier) in [(2, Resumed), (1, Discarded)] {
            assert!(matches!(resume(n, earlier), Err(Output(OutputError::Exists { .. }))));
        }
        let again = resume(1, Resumed).unwrap();
        assert!(!target.exists() && again.path().join("tensors").exists());
        again.finish().unwrap();
        assert!(target.join("tensors").exists() && !place::work_of(&target).exists());
    }

    #[test]
    fn the_folder_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        let folder = OutputFolder::create(&target, Refuse, "mark").unwrap();
        folder.write("a", b"1").unwrap();
        assert!(matches!(OutputFolder::create(&target, Refuse, "mark"), Err(Output(OutputError::Busy { .. }))));
        drop(folder);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);

        let folder = OutputFolder::create(&target, Refuse, "mark").unwrap();
        folder.write("mark", b"1").unwrap();
        folder.finish().unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&target).unwrap().count(), 1);

        assert!(matches!(OutputFolder::check(&target, Refuse, "mark"), Err(Output(OutputError::Exists { .. }))));
        assert!(matches!(OutputFolder::check(&target, Replace, "other"), Err(Output(OutputError::Unusable { .. }))));
        let folder = OutputFolder::create(&target, Replace, "mark").unwrap();
        folder.write("new", b"2").unwrap();
        // The remains of a run that was killed while it removed the output that it replaced.
        fs::create_dir(parent.path().join("out.partial-replaced")).unwrap();
        fs::write(parent.path().join("out.partial-replaced/mark"), "0").unwrap();
        folder.finish().unwrap();
        assert!(target.join("new").exists() && !target.join("mark").exists());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_full_disk_is_noticed_before_work() {
        let parent = tempfile::tempdir().unwrap();
        let folder = OutputFolder::create(&parent.path().join("out"), Refuse, "mark").unwrap();
        assert!(matches!(folder.require_space(u64::MAX), Err(Output(OutputError::NoSpace { .. }))));
        folder.require_space(1).unwrap();
        // Before there is a folder, or one above it, and where an output is.
        for target in ["out", "no/such/folder", "."].map(|name| parent.path().join(name)) {
            assert!(matches!(OutputFolder::check_space(&target, u64::MAX), Err(Output(OutputError::NoSpace { .. }))));
            OutputFolder::check_space(&target, 1).unwrap();
        }
    }

    #[test]
    fn a_folder_that_is_there_and_empty_is_filled_and_stays_the_same_folder() {
        let parent = tempfile::tempdir().unwrap();
        let target = parent.path().join("out");
        fs::create_dir_all(target.join("lost+found")).unwrap();
        let folder = OutputFolder::create(&target, Refuse, "mark").unwrap();
        folder.write("mark", b"1").unwrap();
        assert!(matches!(OutputFolder::create(&target, Refuse, "mark"), Err(Output(OutputError::Busy { .. }))));
        drop(folder);
        assert_eq!(place::names_in(&target).unwrap(), ["lost+found"]);

        let job = json!({"n": 1});
        let resume = || OutputFolder::resume(&target, Refuse, "mark", &job, Resumed);
        let mut folder = resume().unwrap();
        fs::write(folder.pieces().join("a"), "a").unwrap();
        folder.write("mark", b"1").unwrap();
        folder.keep();
        drop(folder);
        // The run was killed after its last step, and the same job runs again.
        moving::move_up(&target, &target.join(WITHIN), "mark", Refuse).unwrap();
        assert!(matches!(OutputFolder::create(&target, Refuse, "mark"), Err(Output(OutputError::Exists { .. }))));
        let folder = resume().unwrap();
        assert!(folder.path().join("mark").exists() && !target.join("mark").exists());
        folder.finish().unwrap();
        assert_eq!(place::names_in(&target).unwrap(), ["lost+found", "mark"]);
    }

    #[test]
    fn what_others_write_into_the_folder_meanwhile_stays_and_so_does_the_work() {
        let target = tempfile::tempdir().unwrap();
        let folder = OutputFolder::create(target.path(), Refuse, "mark").unwrap();
        folder.write("mark", b"1").unwrap();
        fs::write(target.path().join("theirs"), "2").unwrap();
        let output = folder.path();
        assert!(matches!(folder.finish(), Err(Output(OutputError::NotMoved { .. }))));
        assert!(target.path().join("theirs").exists() && output.join("mark").exists());
    }

    #[test]
    fn what_others_write_meanwhile_into_an_output_that_is_replaced_stays() {
        let parent = tempfile::tempdir().unwrap();
        let (beside, within) = (parent.path().join("out"), parent.path().join("volume"));
        fs::create_dir(&within).unwrap();
        for target in [beside, within] {
            let folder = OutputFolder::create(&target, Replace, "mark").unwrap();
            folder.write("mark", b"1").unwrap();
            folder.finish().unwrap();
            let folder = OutputFolder::create(&target, Replace, "mark").unwrap();
            folder.write("mark", b"2").unwrap();
            fs::write(target.join("theirs"), "3").unwrap();
            let output = folder.path();
            assert!(matches!(folder.finish(), Err(Output(OutputError::NotMoved { .. }))));
            assert!(target.join("theirs").exists() && output.join("mark").exists());
        }
    }
}
