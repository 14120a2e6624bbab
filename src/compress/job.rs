//! A compression to run: its source, recipe and output folder.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::recipe::Recipe;
use crate::checkpoint::{Checkpoint, Earlier, Existing, OutputFolder, expect_apart};
use crate::device::{Device, HOST};
use crate::report::REPORT_FILE;

/// Default memory for hidden states and activations.
pub const DEFAULT_MEMORY_BYTES: u64 = 1 << 30;

/// The source and the output of a compression.
#[derive(Clone)]
pub struct Job<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// The model that is run, if it is not the source: the source may be the difference of two models.
    pub model: Option<&'a Checkpoint>,
    /// The model as the user names it.
    pub source: &'a str,
    /// All settings that determine the bytes of the output.
    pub recipe: &'a Recipe,
    /// The output folder, which appears whole or not at all.
    pub output: &'a Path,
    /// How an output of an earlier run is treated.
    pub existing: Existing,
    /// How the progress of an interrupted run is treated.
    pub earlier: Earlier,
    /// Memory for hidden states and activations; the rest goes to files in the work folder.
    pub memory_bytes: u64,
    /// The device that runs the model.
    pub device: Device,
    /// The file where statistics that are measured are kept.
    pub keep_statistics: Option<&'a Path>,
    /// Folders with pieces of the same job that tasks have finished.
    pub tasks: &'a [PathBuf],
}

impl<'a> Job<'a> {
    /// A job with the defaults of the command line: on the CPU, with [`DEFAULT_MEMORY_BYTES`]. It replaces
    /// nothing, and resumes an interrupted run.
    pub fn new(checkpoint: &'a Checkpoint, source: &'a str, recipe: &'a Recipe, output: &'a Path) -> Self {
        Self {
            checkpoint,
            model: None,
            source,
            recipe,
            output,
            existing: Existing::Refuse,
            earlier: Earlier::Resumed,
            memory_bytes: DEFAULT_MEMORY_BYTES,
            device: HOST,
            keep_statistics: None,
            tasks: &[],
        }
    }

    /// The model that is run.
    pub fn model(&self) -> &'a Checkpoint {
        self.model.unwrap_or(self.checkpoint)
    }

    /// Refuses an output that may not be overwritten, or that contains an input.
    pub(super) fn check_output(&self) -> Result<()> {
        OutputFolder::check(self.output, self.existing, REPORT_FILE)?;
        Ok(expect_apart(self.output, self.recipe.inputs().chain(self.checkpoint.roots()))?)
    }
}
