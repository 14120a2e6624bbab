//! The end of every command that writes a folder with a report: its pages, the hashes of its files, and the
//! report, which is written last.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use crate::checkpoint::{Fingerprint, OutputFolder, REPORT_FILE};
use crate::error::{self, ExitClass, Failure, exit_class};

/// A report that ends an output folder.
pub trait Published: Serialize {
    /// Sets the fields that are known only after all other files are written.
    fn seal(&mut self, output_files: Fingerprint, elapsed_seconds: f64);
}

/// Writes `pages` (name, content), and the report with the hashes of all other files of the folder.
///
/// # Errors
/// The disk is full or cannot be written.
pub fn publish(
    folder: &OutputFolder,
    report: &mut impl Published,
    pages: &[(&str, String)],
    started: Instant,
) -> Result<()> {
    for (name, content) in pages {
        folder.write(name, content.as_bytes())?;
    }
    report.seal(folder.hashes(REPORT_FILE)?, started.elapsed().as_secs_f64());
    folder.write(REPORT_FILE, (serde_json::to_string_pretty(report)? + "\n").as_bytes())?;
    Ok(())
}

/// Ends a run: its folder becomes the output, or [`stopped`] decides what stays of it.
///
/// # Errors
/// The run failed, or the output cannot be moved to its place.
pub(crate) fn concluded<T>(mut folder: OutputFolder, done: Result<T>) -> Result<T> {
    match done {
        Ok(report) => {
            folder.finish()?;
            Ok(report)
        }
        Err(error) => Err(stopped(&mut folder, error)),
    }
}

/// The error of a run that stopped; if a resource is at fault, finished work is kept.
pub(crate) fn stopped(folder: &mut OutputFolder, error: anyhow::Error) -> anyhow::Error {
    if exit_class(&error) == ExitClass::Resources
        && let Some(kept) = folder.keep()
    {
        let mend = error::hint(&error).map_or(String::new(), |mend| format!("{mend}; "));
        let kept = kept.display();
        let hint = format!("{mend}finished work is kept in `{kept}`; run the same command again to resume");
        return error.context(Failure::new(ExitClass::Resources, "stopped").hint(hint));
    }
    error
}
