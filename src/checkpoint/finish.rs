//! The last step of an output: it appears at its target as a whole, and an earlier output is removed.

use std::fs::{self, File};
use std::path::PathBuf;

use super::error::{CheckpointError, OutputError, io};
use super::folder::OutputFolder;
use super::moving::{self, rename};
use super::paths::folder_of;
use super::place::{self, Existing};
use super::strangers;
use super::work::{self, JOB};

type Result<T, E = CheckpointError> = std::result::Result<T, E>;

impl OutputFolder {
    /// Makes the finished pieces files of the output.
    ///
    /// # Errors
    /// One cannot be moved.
    pub fn publish_pieces(&self) -> Result<()> {
        let (from, to) = (self.pieces(), self.path());
        for name in place::names_in(&from)? {
            // What a killed run was writing was written again under its own name.
            if !name.to_string_lossy().ends_with(work::TORN) {
                rename(&from.join(&name), &to.join(&name))?;
            }
        }
        Ok(())
    }

    /// Makes the complete output appear at its target.
    ///
    /// # Errors
    /// It cannot be moved; the error says where it is.
    pub fn finish(mut self) -> Result<()> {
        // An interrupt keeps everything that the last step needs.
        self.unfinished.set_resumable();
        let moved = self.expect_own_target().and_then(|()| match self.is_within() {
            true => moving::move_up(&self.target, &self.partial, &self.mark, self.existing),
            false => self.rename(),
        });
        if let Err(error) = moved {
            self.is_kept = true;
            let source = std::error::Error::source(&error).map_or(String::new(), |source| format!(": {source}"));
            let (path, reason) = (self.path(), format!("{error}{source}"));
            return Err(OutputError::NotMoved { path, target: self.target.clone(), reason }.into());
        }
        let job = self.partial.join(JOB);
        if job.exists() {
            fs::remove_file(&job).map_err(io("remove", &job))?;
        }
        let replaced = self.replaced();
        if self.existing == Existing::Replace && replaced.exists() {
            strangers::remove_output(&replaced, &self.mark)?;
        }
        // The rename itself must survive a power cut; folders cannot be synced on every system.
        let changed = if self.is_within() { &self.target } else { folder_of(&self.target) };
        if let Ok(changed) = File::open(changed) {
            let _ = changed.sync_all();
        }
        Ok(())
    }

    /// The folder in which an earlier output waits to be removed.
    fn replaced(&self) -> PathBuf {
        if self.is_within() {
            return self.partial.join(work::REPLACED);
        }
        work::replaced_of(&self.partial)
    }

    /// Refuses to remove files that others wrote meanwhile, into the output that is replaced or into the folder where
    /// it waits.
    fn expect_own_target(&self) -> Result<()> {
        if self.existing == Existing::Refuse {
            return Ok(());
        }
        if !self.is_within() {
            strangers::refuse_in_replaced(&self.target, &self.replaced(), &self.mark)?;
        }
        if self.target.exists() { strangers::refuse_in_output(&self.target, &self.mark) } else { Ok(()) }
    }

    fn rename(&self) -> Result<()> {
        let (output, replaced) = (self.path(), self.replaced());
        let has_earlier = self.existing == Existing::Replace && self.target.exists();
        if has_earlier {
            // A run was killed while it removed this folder.
            if replaced.exists() {
                strangers::remove_output(&replaced, &self.mark)?;
            }
            rename(&self.target, &replaced)?;
        }
        rename(&output, &self.target).inspect_err(|_| {
            if has_earlier {
                let _ = fs::rename(&replaced, &self.target);
            }
        })
    }
}
