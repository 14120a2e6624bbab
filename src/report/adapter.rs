//! Adapters and truncations in reports: an adapter that was merged into a model, one that `lrc delta` wrote, and what
//! `lrc truncate` made smaller.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::publish::Published;
use crate::checkpoint::{Checkpoint, CheckpointError, Fingerprint};

/// An adapter that was merged into a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct AdapterRecord {
    /// Its folder, as the user named it.
    pub folder: String,
    /// SHA-256 of its files.
    pub files: Fingerprint,
}

impl AdapterRecord {
    /// The adapter of a checkpoint; `None` if it has none.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<Self>, CheckpointError> {
        let Some(folder) = checkpoint.adapter() else { return Ok(None) };
        Ok(Some(Self { folder: folder.display().to_string(), files: checkpoint.adapter_files()? }))
    }
}

/// The reason in [`DeltaRecord::left_out`] for what a flag left out.
pub const LEFT_OUT_BY_FLAG: &str = "`--others leave-out`";

/// The base of an adapter, and what was changed besides its linears.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DeltaRecord {
    /// The base as the user named it.
    pub base: String,
    /// Changed tensors that are stored whole, because they are not targeted linears.
    pub stored: Vec<String>,
    /// Bytes of these tensors.
    pub stored_bytes: u64,
    /// Tensors that the adapter does not have, although the models differ in them, with a clause for each.
    pub left_out: BTreeMap<String, String>,
    /// Targeted linears with the same weights in both models.
    pub unchanged: usize,
}

/// A truncation of a compressed checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct TruncationRecord {
    /// The requested share.
    pub keep: f64,
    /// SHA-256 of the truncated config and weight files.
    pub source_files: Fingerprint,
}

/// `lrc truncate` of an adapter.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct AdapterReport {
    /// Version of the fields of this report.
    pub schema_version: u32,
    /// Version of lrc that wrote the report.
    pub lrc_version: String,
    /// The adapter as the user named it.
    pub source: String,
    /// SHA-256 of its weight file.
    pub source_files: Fingerprint,
    /// One entry per module with factors, in the order of the file.
    pub modules: Vec<TruncatedModule>,
    /// Norm of everything that was dropped, relative to the norm of all products `B·A`.
    pub relative_error: f64,
    /// Bytes of its weight file.
    pub size_bytes_before: u64,
    /// Bytes of the new weight file.
    pub size_bytes: u64,
    /// Tensors that are not factors, which are copied unchanged.
    pub passed_through: Vec<String>,
    /// SHA-256 of every other file of the output.
    pub output_files: Fingerprint,
    /// Wall-clock seconds of the command.
    pub elapsed_seconds: f64,
}

/// A module of a truncated adapter.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct TruncatedModule {
    /// Its name in the file.
    pub module: String,
    /// [out, in]; convolutions are flattened.
    pub shape: [usize; 2],
    /// Rank in the source.
    pub rank_before: usize,
    /// Rank in the output; 0 if the module was left out.
    pub rank: usize,
    /// Norm of the dropped part of `B·A`, relative to the norm of `B·A`.
    pub relative_error: f64,
}

impl Published for AdapterReport {
    fn seal(&mut self, output_files: Fingerprint, elapsed_seconds: f64) {
        (self.output_files, self.elapsed_seconds) = (output_files, elapsed_seconds);
    }
}
