//! A truncation to run: its source and output.

use std::path::Path;

use crate::checkpoint::{Checkpoint, Existing};

/// The source and the output of a truncation.
pub struct TruncateJob<'a> {
    /// An output in the format `factored`, or an elastic one of narrower modules.
    pub checkpoint: &'a Checkpoint,
    /// Share of the parameters of the targeted linears in the source.
    pub keep: f64,
    /// The output folder, which appears whole or not at all.
    pub output: &'a Path,
    /// How an output of an earlier run is treated.
    pub existing: Existing,
    /// Largest size of a file of weights, except for a tensor that is larger by itself.
    pub max_shard_bytes: u64,
}
