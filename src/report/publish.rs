//! The end of every command that writes a folder with a report: its pages, the hashes of its files, and the
//! report, which is written last.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use crate::checkpoint::{Fingerprint, OutputFolder, REPORT_FILE};

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
