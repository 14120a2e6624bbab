//! The results of the commands, as records that serialize to JSON. Every number is computed here or in the
//! rooms below, never in `cli`.

mod adapter;
mod calibrate;
pub mod card;
pub mod columns;
pub mod earlier;
mod eval;
pub mod gate;
mod generate;
mod heal;
mod importance;
mod inspect;
mod narrow;
pub(crate) mod notes;
pub mod page;
mod publish;
pub mod schema;
mod sizes;
mod sweep;
mod tasks;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::{Fingerprint, LeftOut};
pub use adapter::{AdapterRecord, AdapterReport, DeltaRecord, LEFT_OUT_BY_FLAG, TruncatedModule, TruncationRecord};
pub use calibrate::{CalibrateReport, CalibrationRecord};
pub use eval::{
    Agreement, AllConventionsReport, Distribution, DivergenceRecord, EncoderReport, FidelityRecord, PerplexityReport,
    PseudoPerplexity,
};
pub use generate::{GenerateReport, GeneratedRecord, Stop};
pub use heal::{
    HealRecord, HealedClosed, HealedHalf, HealedModel, HealedPart, HealedStep, HealedText, HeldOutPerplexity,
};
pub use importance::{BlockImportance, ChannelImportance, ExpertImportance, GroupImportance, ImportanceRecord};
pub use inspect::{BelowThreshold, EnergyRank, Figures, InspectReport, PowerLaw, Spectrum, SpectrumRecord};
pub use narrow::{NarrowRecord, NarrowedUnit};
pub use publish::{Published, publish};
pub(crate) use publish::{concluded, stopped};
pub use sizes::{Sizes, Timings, peak_memory_bytes};
pub use sweep::{SweepPoint, SweepReport};
pub use tasks::{StageName, StageRecord, TaskPlan, TaskRecord};

/// Also marks a folder as an output of lrc, which `--force` may replace.
pub use crate::checkpoint::REPORT_FILE;

/// Incremented when a field changes its meaning or is removed.
pub const SCHEMA_VERSION: u32 = 3;

/// Version of lrc that wrote a record.
pub const LRC_VERSION: &str = env!("CARGO_PKG_VERSION");

/// `lrc-report.json`. Identical in every run, except for seconds and peak memory.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CompressReport {
    /// Version of the fields of this report.
    pub schema_version: u32,
    /// Version of lrc that wrote the report.
    pub lrc_version: String,
    /// The model as the user named it.
    pub source: String,
    /// SHA-256 of the config and weight files of the source.
    pub source_files: Fingerprint,
    /// How another tool had quantized the weights, by method and layouts: `gptq: int4-g128`. lrc worked on
    /// the values of the codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_quantization: Option<String>,
    /// The full recipe with all defaults, as a recipe file has it.
    pub recipe: Value,
    /// The calibration text, if one was run through the model.
    pub calibration: Option<CalibrationRecord>,
    /// Bytes of the weight files of the output: `sizes.file_bytes_after`.
    #[serde(default)]
    pub size_bytes: u64,
    /// `sizes.keep`.
    #[serde(default)]
    pub keep: f64,
    /// Sizes before and after.
    pub sizes: Sizes,
    /// All targeted linears together.
    #[serde(default)]
    pub linear: LinearSummary,
    /// One entry per targeted linear, in the order of the model.
    pub linears: Vec<LinearRecord>,
    /// Tensors of the source that are copied unchanged, because they hold no matrix of a targeted linear.
    #[serde(default)]
    pub passed_through: Vec<String>,
    /// Copied tensors with NaN or infinite values; the model cannot be run.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub non_finite: Vec<String>,
    /// Files and folders of the source, other than weights, that are not in the output.
    #[serde(default)]
    pub left_out: Vec<LeftOutRecord>,
    /// A model of the same size without factors, if quantized linears have factors.
    #[serde(alias = "control", skip_serializing_if = "Option::is_none", default)]
    pub equal_bytes_baseline: Option<EqualBytesBaseline>,
    /// The adapter of `--adapter`, which is merged into the source.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub adapter: Option<AdapterRecord>,
    /// Set by `lrc delta`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub delta: Option<DeltaRecord>,
    /// Set by `--structure narrow`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub narrow: Option<NarrowRecord>,
    /// Set by `lrc truncate`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub truncated: Option<TruncationRecord>,
    /// Set by `lrc heal`: the last healing.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub healed: Option<HealRecord>,
    /// The healings before the last one, the first one first.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub healed_before: Vec<HealRecord>,
    /// SHA-256 of every other file of the output.
    pub output_files: Fingerprint,
    /// Seconds per stage.
    pub timings: Timings,
    /// Wall-clock seconds of the command.
    pub elapsed_seconds: f64,
    /// Peak resident memory of the process in bytes; Linux only.
    pub peak_memory_bytes: Option<u64>,
}

impl CompressReport {
    /// All healings, the first one first.
    pub fn healings(&self) -> impl Iterator<Item = &HealRecord> {
        self.healed_before.iter().chain(&self.healed)
    }
}

impl Published for CompressReport {
    fn seal(&mut self, output_files: Fingerprint, elapsed_seconds: f64) {
        (self.output_files, self.elapsed_seconds) = (output_files, elapsed_seconds);
        self.peak_memory_bytes = peak_memory_bytes();
    }
}

/// All targeted linears together.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, JsonSchema)]
pub struct LinearSummary {
    /// Number of targeted linears.
    pub count: usize,
    /// Linears that are not left dense.
    pub compressed: usize,
    /// Largest relative error; none if the error of a compressed linear is not known.
    pub max_error: Option<f64>,
    /// Mean relative error; none if the error of a compressed linear is not known.
    pub mean_error: Option<f64>,
}

/// The baseline of a compensation: a model of the same size, with all bytes spent on quantized bases.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct EqualBytesBaseline {
    /// Mean over the targeted linears; at most `sizes.bits_per_weight_after`.
    pub bits_per_weight: f64,
    /// False if no choice of bases is this small.
    pub is_reachable: bool,
    /// Squared error of the output over the squared error of the baseline, weighted as in the allocation.
    /// Below 1, factors pay off.
    pub weighted_error_ratio: Option<f64>,
    /// KL(source ‖ output) in nats, on windows of the calibration text.
    pub kl: Option<f64>,
    /// KL(source ‖ baseline) in nats, on the same windows.
    #[serde(alias = "control_kl")]
    pub baseline_kl: Option<f64>,
    /// The quantizer of every linear of the baseline.
    pub quant: BTreeMap<String, String>,
}

/// `lrc export`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ExportReport {
    /// Version of the fields of this report.
    pub schema_version: u32,
    /// Version of lrc that wrote the report.
    pub lrc_version: String,
    /// The exported output as the user named it.
    pub source: String,
    /// SHA-256 of the config and weight files of the source.
    pub source_files: Fingerprint,
    /// How another tool had quantized the weights, by method and layouts: `gptq: int4-g128`. lrc worked on
    /// the values of the codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_quantization: Option<String>,
    /// The adapter of `--adapter`, if it was merged into the model.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub adapter: Option<AdapterRecord>,
    /// The format that was written, as in `--format`.
    pub format: String,
    /// Linears that were re-encoded; all other tensors were copied unchanged.
    pub linears: Vec<String>,
    /// Bytes of all tensors of the source as stored.
    pub bytes_before: u64,
    /// Bytes of all tensors of the output as stored.
    pub bytes_after: u64,
    /// Files and folders of the source, other than weights, that are not in the output.
    #[serde(default)]
    pub left_out: Vec<LeftOutRecord>,
    /// The report of the exported compression, if the source has one.
    pub compressed: Option<Value>,
    /// SHA-256 of every other file of the output.
    pub output_files: Fingerprint,
    /// Wall-clock seconds of the command.
    pub elapsed_seconds: f64,
}

impl Published for ExportReport {
    fn seal(&mut self, output_files: Fingerprint, elapsed_seconds: f64) {
        (self.output_files, self.elapsed_seconds) = (output_files, elapsed_seconds);
    }
}

/// A file or folder that is not in the output.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct LeftOutRecord {
    /// Path relative to the source; folders end in `/`.
    pub path: String,
    /// The reason, as a phrase.
    pub reason: String,
}

impl From<LeftOut> for LeftOutRecord {
    fn from(left_out: LeftOut) -> Self {
        Self { path: left_out.path, reason: left_out.reason.into() }
    }
}

/// One targeted linear.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct LinearRecord {
    /// Name of the module, such as `model.layers.0.mlp.up_proj`.
    pub module: String,
    /// Index of the block, if the name has one.
    pub block: Option<usize>,
    /// (out, in).
    pub shape: [usize; 2],
    /// Dtype of the weight in the source.
    pub dtype: String,
    /// Rank of the factors; none if the linear stays dense.
    pub rank: Option<usize>,
    /// Layout of the factors, a name of `--layout`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub layout: Option<String>,
    /// `LRC` if the linear is low rank, `N-LRC` if not.
    pub component: Component,
    /// The quantizer of the base, if there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub quant: Option<String>,
    /// Stored bits of the base or the dense weight, per weight.
    #[serde(default)]
    pub bits_base: f64,
    /// Stored bits of the low-rank factors, per weight.
    #[serde(default)]
    pub bits_factors: f64,
    /// Elements of the weight.
    pub parameters_before: u64,
    /// Elements of the factors, or of the weight if it stays dense.
    pub parameters_after: u64,
    /// Error over the norm of the weight, both in the metric of the method, without the mean of the inputs if `centered`,
    /// and of the shifted inputs in the sequential mode; none in a dry run that does not compute it.
    pub relative_error: Option<f64>,
    /// Whether the bias was refitted, so that errors are those of inputs without their mean.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub centered: bool,
    /// How and why the result deviates from the recipe.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
    /// Calibration tokens routed to this expert.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expert_tokens: Option<u64>,
    /// Error of rounding the factors to the dtype over the norm of the weight, both in the metric
    /// of the method; 0 in f32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_error: Option<f64>,
    /// The weight of a unit of squared error in the knapsack.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<f64>,
    /// Seconds of the decomposition.
    pub seconds: f64,
}

/// WeLore's classification of a linear (Jaiswal et al. 2024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Component {
    /// Low-rank component: factored.
    #[serde(rename = "LRC")]
    LowRank,
    /// Not a low-rank component: left dense.
    #[serde(rename = "N-LRC")]
    NotLowRank,
}

/// The outcome that a compression would have.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct DryRunReport {
    /// Version of the fields of this report.
    pub schema_version: u32,
    /// Version of lrc that wrote the report.
    pub lrc_version: String,
    /// The model as the user named it.
    pub source: String,
    /// How another tool had quantized the weights, by method and layouts: `gptq: int4-g128`. lrc worked on
    /// the values of the codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_quantization: Option<String>,
    /// The adapter of `--adapter`, if it was merged into the model.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub adapter: Option<AdapterRecord>,
    /// The full recipe with all defaults, as a recipe file has it.
    pub recipe: Value,
    /// Bytes of the weight files of the output: `sizes.file_bytes_after`.
    pub size_bytes: u64,
    /// `sizes.keep`.
    pub keep: f64,
    /// Sizes before and after.
    pub sizes: Sizes,
    /// The source of the ranks in `linears` and the widths in `narrow`, and with them of `sizes`.
    pub ranks: RankSource,
    /// One entry per targeted linear, in the order of the model.
    pub linears: Vec<LinearRecord>,
    /// Tensors of the source that are copied unchanged, because they hold no matrix of a targeted linear.
    pub passed_through: Vec<String>,
    /// Files and folders of the source, other than weights, that would not be in the output.
    pub left_out: Vec<LeftOutRecord>,
    /// Estimate of the peak resident memory in bytes.
    pub expected_memory_bytes: u64,
    /// Largest size of the unfinished output, with the pieces of work that are kept beside it.
    pub expected_disk_bytes: u64,
    /// Estimate for this machine, from its measured speed and the number of operations.
    pub expected_seconds: f64,
    /// Set by `--structure narrow` and `--structure depth`: the widths and blocks, from measurements if `ranks` is exact.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub narrow: Option<NarrowRecord>,
    /// The folder with what `--dry-run=full` measured, from which the run itself resumes.
    pub kept_in: Option<String>,
}

/// The source of the ranks of a dry run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RankSource {
    /// The run will have the same ranks and widths.
    Exact,
    /// The budget is spread evenly; measurements decide ranks, widths and blocks, and `--dry-run=full` shows them.
    Even,
    /// Measurements alone decide the ranks, and `--dry-run=full` shows them. Every linear is counted as it is.
    Unknown,
}

#[cfg(test)]
mod tests;
