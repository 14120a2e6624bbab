//! The report of `lrc sweep`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::adapter::AdapterRecord;
use super::eval::DivergenceRecord;
use super::publish::Published;
use super::sizes::{Sizes, Timings, peak_memory_bytes};
use crate::checkpoint::Fingerprint;

/// `lrc sweep`: one method at several budgets.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SweepReport {
    /// Version of the fields of this report.
    pub schema_version: u32,
    /// Version of lrc that wrote the report.
    pub lrc_version: String,
    /// The model as the user named it.
    pub model: String,
    /// How another tool had quantized the weights, by method and layouts: `gptq: int4-g128`. lrc worked on
    /// the values of the codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_quantization: Option<String>,
    /// The adapter of `--adapter`, if it was merged into the model.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub adapter: Option<AdapterRecord>,
    /// The recipe without its budget.
    pub recipe: Value,
    /// Convention of the perplexities, as in `--convention`.
    pub convention: String,
    /// Tokens per window.
    pub seq_len: usize,
    /// SHA-256 of the evaluation text.
    pub text_sha256: String,
    /// Perplexity of the source.
    pub dense_ppl: Option<f64>,
    /// One entry per budget.
    pub points: Vec<SweepPoint>,
    /// Index of the point at the knee of perplexity over bytes: further bytes buy less than those up to it. Null where the
    /// curve has none.
    #[serde(default)]
    pub knee: Option<usize>,
    /// Seconds per stage, for all budgets together.
    pub timings: Timings,
    /// Seconds of the evaluation of all trials and the source.
    pub evaluate_seconds: f64,
    /// SHA-256 of every other file of the output; empty without `--output`.
    #[serde(default)]
    pub output_files: Fingerprint,
    /// Wall-clock seconds of the command.
    pub elapsed_seconds: f64,
    /// Peak resident memory of the process in bytes; Linux only.
    pub peak_memory_bytes: Option<u64>,
}

impl Published for SweepReport {
    fn seal(&mut self, output_files: Fingerprint, elapsed_seconds: f64) {
        (self.output_files, self.elapsed_seconds) = (output_files, elapsed_seconds);
        self.peak_memory_bytes = peak_memory_bytes();
    }
}

/// One budget of a sweep.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SweepPoint {
    /// The requested share; `sizes.keep` is the one reached. Null if budgets are bits.
    pub keep: Option<f64>,
    /// The requested bits per weight; `sizes.bits_per_weight_after` are those reached. Null if budgets are shares.
    #[serde(default)]
    pub bits: Option<f64>,
    /// Perplexity of the trial.
    pub ppl: f64,
    /// Divergence from the source.
    #[serde(flatten)]
    pub divergence: DivergenceRecord,
    /// Sizes before and after.
    pub sizes: Sizes,
    /// Rank per module; null if it stays dense.
    pub ranks: BTreeMap<String, Option<usize>>,
}

impl SweepPoint {
    /// The budget: its name and its value.
    pub fn budget(&self) -> (&'static str, f64) {
        match (self.keep, self.bits) {
            (None, Some(bits)) => ("bits", bits),
            (keep, _) => ("keep", keep.unwrap_or(1.0)),
        }
    }
}
