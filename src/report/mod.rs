//! What the commands found, as records that serialise to JSON. Every number is computed here or below, never in `cli`.

pub mod card;
pub mod columns;
mod eval;
pub mod gate;
mod inspect;
pub mod page;
pub mod schema;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::{Fingerprint, LeftOut};
pub use eval::{
    Agreement, AllConventionsReport, Distribution, DivergenceRecord, EncoderReport, FidelityRecord, PerplexityReport,
    PseudoPerplexity,
};
pub use inspect::{BelowThreshold, EnergyRank, Figures, InspectReport, PowerLaw, Spectrum, SpectrumRecord};

/// Also the mark by which `--force` knows a folder of ours.
pub use crate::checkpoint::REPORT_FILE;

/// Grows when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 2;

/// Version of the tool that wrote a record.
pub const LRC_VERSION: &str = env!("CARGO_PKG_VERSION");

/// `lrc-report.json`. Everything but the seconds and the peak memory is the same in every run.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CompressReport {
    pub schema_version: u32,
    pub lrc_version: String,
    /// The model as it was named.
    pub source: String,
    /// SHA-256 of the source's config and weight files.
    pub source_files: Fingerprint,
    /// The recipe in full, in the words of its file.
    pub recipe: Value,
    pub calibration: Option<CalibrationRecord>,
    /// Bytes of the weight files of the output: `sizes.file_bytes_after`.
    #[serde(default)]
    pub size_bytes: u64,
    /// `sizes.keep`.
    #[serde(default)]
    pub keep: f64,
    pub sizes: Sizes,
    #[serde(default)]
    pub linear: LinearSummary,
    pub linears: Vec<LinearRecord>,
    /// Tensors of the source that hold no matrix of a targeted linear: passed through.
    #[serde(default)]
    pub passed_through: Vec<String>,
    /// Of these, tensors that hold NaN or infinite values: the model cannot be run.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub non_finite: Vec<String>,
    /// Files and folders beside the weights of the source that are not in the output.
    #[serde(default)]
    pub left_out: Vec<LeftOutRecord>,
    /// Where quantized linears have factors: a model of the same size without factors.
    #[serde(rename = "control", skip_serializing_if = "Option::is_none", default)]
    pub equal_bytes_baseline: Option<EqualBytesBaseline>,
    /// Where `lrc truncate` shortened an earlier output.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub truncated: Option<TruncationRecord>,
    /// SHA-256 of every other file of the output.
    pub output_files: Fingerprint,
    pub timings: Timings,
    pub elapsed_seconds: f64,
    /// Highest resident memory of the process, where the system tells.
    pub peak_memory_bytes: Option<u64>,
}

/// All targeted linears together.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, JsonSchema)]
pub struct LinearSummary {
    pub count: usize,
    /// Of these, not left as they were.
    pub compressed: usize,
    /// Largest and mean relative error.
    pub max_error: f64,
    pub mean_error: f64,
}

/// The baseline of a compensation: a model of the same size, with all bytes spent on quantized bases.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct EqualBytesBaseline {
    /// Mean over the targeted linears; at most that of the output.
    pub bits_per_weight: f64,
    /// False if no choice of bases is this small.
    pub is_reachable: bool,
    /// Squared error of the output over that of the baseline, weighted as in the allocation. Below 1, factors pay off.
    pub weighted_error_ratio: Option<f64>,
    /// KL(original ‖ output) in nats, on windows of the calibration text.
    pub kl: Option<f64>,
    /// KL(original ‖ baseline) in nats, on the same windows.
    #[serde(rename = "control_kl")]
    pub baseline_kl: Option<f64>,
    /// The quantizer of every linear of the baseline.
    pub quant: BTreeMap<String, String>,
}

/// `lrc export`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ExportReport {
    pub schema_version: u32,
    pub lrc_version: String,
    pub source: String,
    /// SHA-256 of the source's config and weight files.
    pub source_files: Fingerprint,
    pub format: String,
    /// Linears that were stored anew; all others, and all other tensors, were passed through.
    pub linears: Vec<String>,
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// Files and folders beside the weights of the source that are not in the output.
    #[serde(default)]
    pub left_out: Vec<LeftOutRecord>,
    /// The report of the compression that was exported, where the source had one.
    pub compressed: Option<Value>,
    /// SHA-256 of every other file of the output.
    pub output_files: Fingerprint,
    pub elapsed_seconds: f64,
}

/// A file, or a folder with all that it holds, that is not in the output.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct LeftOutRecord {
    /// From the root of the source; that of a folder ends in `/`.
    pub path: String,
    pub reason: String,
}

impl From<LeftOut> for LeftOutRecord {
    fn from(left_out: LeftOut) -> Self {
        Self { path: left_out.path, reason: left_out.reason.into() }
    }
}

/// What was observed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CalibrationRecord {
    /// Of every text.
    pub text_sha256: Vec<String>,
    pub windows: usize,
    pub tokens: usize,
}

/// What was shortened.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct TruncationRecord {
    /// The share that was asked for.
    pub keep: f64,
    /// SHA-256 of the config and weight files that were shortened.
    pub source_files: Fingerprint,
}

/// Seconds of the stages of a compression.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    pub calibrate_forward: f64,
    pub calibrate_backward: f64,
    pub decompose: f64,
    /// Quantization, with compensation.
    #[serde(rename = "quantise", default)]
    pub quantize: f64,
    /// Sensitivities and ranks.
    pub allocate: f64,
    /// The sequential mode.
    pub anchor: f64,
    pub write: f64,
    /// The equal-bytes baseline without factors.
    #[serde(rename = "control", default)]
    pub equal_bytes_baseline: f64,
}

/// Sizes before and after, in the units that tools disagree about, side by side.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Sizes {
    /// Parameters of the targeted linears: of the matrices, and of their factors or of what stayed dense. The dense format
    /// multiplies factors out again; this counts them all the same.
    pub linear_parameters_before: u64,
    pub linear_parameters_after: u64,
    /// `linear_parameters_after / linear_parameters_before`: what `--keep` asks for.
    pub keep: f64,
    /// Elements of all tensors, as the checkpoint stores them; codes count as the parameters that they stand for.
    pub parameters_before: u64,
    pub parameters_after: u64,
    /// Bytes of all tensors, as the checkpoint stores them.
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// Bytes of the weight files, headers included: what `--target-size` asks for.
    pub file_bytes_after: u64,
    /// Stored bits of the targeted linears over their original number of weights.
    pub bits_per_weight_before: f64,
    pub bits_per_weight_after: f64,
    /// Of these, bits of bases and of linears that stayed dense, and bits of low-rank parts.
    #[serde(default)]
    pub bits_per_weight_base: f64,
    #[serde(default)]
    pub bits_per_weight_factors: f64,
}

/// One targeted linear.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct LinearRecord {
    pub module: String,
    pub block: Option<usize>,
    /// (out, in).
    pub shape: [usize; 2],
    pub dtype: String,
    /// Of the factors; none where the linear stays dense.
    pub rank: Option<usize>,
    /// How the factors are stored: `pivot` or `factors`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub layout: Option<String>,
    pub component: Component,
    /// The quantiser of the base, where there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub quant: Option<String>,
    /// Stored bits over the number of weights: of the base (or the dense weight), and of the low-rank parts.
    #[serde(default)]
    pub bits_base: f64,
    #[serde(default)]
    pub bits_factors: f64,
    pub parameters_before: u64,
    pub parameters_after: u64,
    /// Error in the metric of the method over the norm of the weight in it; none in a dry run that did not need it.
    pub relative_error: Option<f64>,
    /// What was done in another way than was asked for, and why.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
    /// Tokens of the calibration that its expert saw.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expert_tokens: Option<u64>,
    /// Error of rounding to the dtype in the metric of the method, over the norm of the weight in it; 0 in f32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_error: Option<f64>,
    /// What the knapsack took a unit of squared error to cost the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<f64>,
    /// Of the decomposition.
    pub seconds: f64,
}

/// WeLore's words for what became of a linear (Jaiswal et al. 2024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Component {
    /// Low-rank component: factored.
    #[serde(rename = "LRC")]
    LowRank,
    /// Not a low-rank component: left dense.
    #[serde(rename = "N-LRC")]
    NotLowRank,
}

/// What a compression would do.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DryRunReport {
    pub schema_version: u32,
    pub lrc_version: String,
    pub source: String,
    /// The recipe in full, in the words of its file.
    pub recipe: Value,
    /// Bytes of the weight files of the output: `sizes.file_bytes_after`.
    pub size_bytes: u64,
    /// `sizes.keep`.
    pub keep: f64,
    pub sizes: Sizes,
    pub linears: Vec<LinearRecord>,
    /// Tensors of the source that hold no matrix of a targeted linear: passed through.
    pub passed_through: Vec<String>,
    /// Files and folders beside the weights of the source that would not be in the output.
    pub left_out: Vec<LeftOutRecord>,
    pub expected_memory_bytes: u64,
    /// On this machine, from its measured speed and the operations that the job takes.
    pub expected_seconds: f64,
}

/// Highest resident memory of this process so far; only Linux tells.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// `lrc calibrate`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CalibrateReport {
    pub schema_version: u32,
    pub lrc_version: String,
    pub size_bytes: u64,
    pub windows: usize,
    pub tokens: usize,
    pub parts: Vec<String>,
    pub forward_seconds: f64,
    pub backward_seconds: f64,
    pub peak_memory_bytes: Option<u64>,
}

/// `lrc sweep`: one method at many budgets.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SweepReport {
    pub schema_version: u32,
    pub lrc_version: String,
    pub model: String,
    /// The recipe but for its budget.
    pub recipe: Value,
    pub convention: String,
    pub seq_len: usize,
    pub text_sha256: String,
    pub dense_ppl: Option<f64>,
    pub points: Vec<SweepPoint>,
    pub timings: Timings,
    pub evaluate_seconds: f64,
    pub elapsed_seconds: f64,
    pub peak_memory_bytes: Option<u64>,
}

/// One budget of a sweep.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SweepPoint {
    /// The share that was asked for; `sizes.keep` is what was reached.
    pub keep: f64,
    pub ppl: f64,
    #[serde(flatten)]
    pub divergence: DivergenceRecord,
    pub sizes: Sizes,
    /// By module; none where it stays dense.
    pub ranks: BTreeMap<String, Option<usize>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn peak_memory_is_read() {
        assert!(peak_memory_bytes().unwrap() > 1 << 20);
    }
}
