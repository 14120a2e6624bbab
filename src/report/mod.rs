//! What the commands found, as records that serialise to JSON. Every number is computed here or below, never in `cli`.

pub mod card;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::Fingerprint;

/// Name of the report in an output folder; also the mark by which `--force` knows a folder of ours.
pub const REPORT_FILE: &str = "lrc-report.json";

/// Grows when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 2;

/// Version of the tool that wrote a record.
pub const LRC_VERSION: &str = env!("CARGO_PKG_VERSION");

/// `lrc-report.json`. Everything but the seconds and the peak memory is the same in every run.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
    pub sizes: Sizes,
    pub linears: Vec<LinearRecord>,
    /// Where quantised linears have factors: the same bytes without.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub control: Option<ControlRecord>,
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

/// The control of a compensation: its bytes, shared out over bases without factors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ControlRecord {
    /// Mean over the targeted linears; at most that of the output.
    pub bits_per_weight: f64,
    /// False where nothing without factors is as small.
    pub is_reachable: bool,
    /// Error of the output over that of the control, squared and weighted as the budget was shared out: below 1 factors pay.
    pub weighted_error_ratio: Option<f64>,
    /// KL(original ‖ output) and KL(original ‖ control) in nats, on windows of the calibration text.
    pub kl: Option<f64>,
    pub control_kl: Option<f64>,
    /// The base of every linear of the control.
    pub quant: BTreeMap<String, String>,
}

/// `lrc export`.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
    /// The report of the compression that was exported, where the source had one.
    pub compressed: Option<Value>,
    /// SHA-256 of every other file of the output.
    pub output_files: Fingerprint,
    pub elapsed_seconds: f64,
}

/// What was observed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CalibrationRecord {
    /// Of every text.
    pub text_sha256: Vec<String>,
    pub windows: usize,
    pub tokens: usize,
}

/// What was shortened.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TruncationRecord {
    /// The share that was asked for.
    pub keep: f64,
    /// SHA-256 of the config and weight files that were shortened.
    pub source_files: Fingerprint,
}

/// Seconds of the stages of a compression.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Timings {
    pub calibrate_forward: f64,
    pub calibrate_backward: f64,
    pub decompose: f64,
    /// Quantising, with what makes up for it.
    #[serde(default)]
    pub quantise: f64,
    /// Sensitivities and ranks.
    pub allocate: f64,
    /// The anchored sequential mode.
    pub anchor: f64,
    pub write: f64,
    /// The control without factors.
    #[serde(default)]
    pub control: f64,
}

/// Sizes before and after, in the units that tools disagree about, side by side.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinearRecord {
    pub module: String,
    pub block: Option<usize>,
    /// (out, in).
    pub shape: [usize; 2],
    pub dtype: String,
    /// Of the factors; none where the linear stays dense.
    pub rank: Option<usize>,
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
    /// Why the base was made in another way than was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
    /// Error of rounding to the dtype, over the norm of the low-rank matrix; 0 in f32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage_error: Option<f64>,
    /// What the knapsack took a unit of squared error to cost the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<f64>,
    /// Of the decomposition.
    pub seconds: f64,
}

/// WeLore's words for what became of a linear (Jaiswal et al. 2024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Component {
    /// Low-rank component: factored.
    #[serde(rename = "LRC")]
    LowRank,
    /// Not a low-rank component: left dense.
    #[serde(rename = "N-LRC")]
    NotLowRank,
}

/// What a compression would do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DryRunReport {
    pub schema_version: u32,
    pub lrc_version: String,
    pub source: String,
    /// The recipe in full, in the words of its file.
    pub recipe: Value,
    pub sizes: Sizes,
    pub linears: Vec<LinearRecord>,
    pub expected_memory_bytes: u64,
}

/// Highest resident memory of this process so far; only Linux tells.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// `lrc eval`: one measurement of perplexity, with all that decides whether it can be compared with another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PerplexityReport {
    pub schema_version: u32,
    pub lrc_version: String,
    pub model: String,
    pub convention: String,
    /// Perplexity: exp of the mean negative log-likelihood.
    pub ppl: f64,
    /// Standard error of `ppl`, from the spread over scored tokens.
    pub ppl_standard_error: f64,
    /// Σ negative log-likelihood in nats.
    pub nll_sum: f64,
    pub bits_per_byte: f64,
    pub scored_tokens: u64,
    pub windows: usize,
    pub seq_len: usize,
    pub total_tokens: usize,
    /// The policy asked for: `auto` or `never`.
    pub bos: String,
    /// What it meant with this tokenizer: whether a BOS token was there.
    pub bos_added: bool,
    pub compute_dtype: String,
    pub text: String,
    pub text_sha256: String,
    pub tokenizer_sha256: String,
    pub parameters: u64,
    /// Bytes of all tensors, as stored.
    pub size_bytes: u64,
    /// With `--reference`.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub divergence: Option<DivergenceRecord>,
    pub elapsed_seconds: f64,
    pub tokens_per_second: f64,
    pub peak_memory_bytes: Option<u64>,
}

/// How far a model is from a reference, over the scored tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DivergenceRecord {
    pub reference: String,
    pub reference_ppl: f64,
    /// ln(perplexity of the model / perplexity of the reference); its error knows that both are scored on the same tokens.
    pub ln_ppl_ratio: f64,
    pub ln_ppl_ratio_standard_error: f64,
    pub ppl_ratio: f64,
    pub ppl_ratio_standard_error: f64,
    /// KL(reference ‖ model) in nats.
    pub kl: Distribution,
    /// KL(model ‖ reference) in nats.
    pub reverse_kl: Distribution,
    /// Change of the probability of the right token.
    pub delta_p: Distribution,
    pub delta_p_rms: f64,
    /// Share of tokens where both put the same token first.
    pub same_top_1: f64,
    /// Mean share of the five first tokens that both have in common.
    pub top_5_agreement: f64,
}

/// A figure over tokens. Percentiles are interpolated between order statistics.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Distribution {
    pub mean: f64,
    pub standard_error: f64,
    pub max: f64,
    pub p99_9: f64,
    pub p99: f64,
    pub p95: f64,
    pub p90: f64,
    pub median: f64,
    pub p10: f64,
    pub p5: f64,
    pub p1: f64,
    pub p0_1: f64,
    pub min: f64,
}

impl Distribution {
    /// Of at least one value.
    pub fn of(mut values: Vec<f64>) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * (n - 1.0);
            let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Self {
            mean,
            standard_error: if n > 1.0 { (variance / (n - 1.0)).sqrt() } else { 0.0 },
            max: at(1.0),
            p99_9: at(0.999),
            p99: at(0.99),
            p95: at(0.95),
            p90: at(0.9),
            median: at(0.5),
            p10: at(0.1),
            p5: at(0.05),
            p1: at(0.01),
            p0_1: at(0.001),
            min: at(0.0),
        }
    }
}

/// `lrc calibrate`.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Serialize, Deserialize)]
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

/// `lrc inspect`: the spectra of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InspectReport {
    pub schema_version: u32,
    pub lrc_version: String,
    pub model: String,
    pub parameters: u64,
    pub size_bytes: u64,
    pub linears: Vec<SpectrumRecord>,
    /// Tensors that were not taken for linears.
    pub other_tensors: Vec<String>,
}

/// Figures of the spectrum of one linear. Singular values are σ, descending.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SpectrumRecord {
    pub module: String,
    pub block: Option<usize>,
    /// (out, in).
    pub shape: [usize; 2],
    pub dtype: String,
    /// Rank of the stored factors; none for a dense weight.
    pub stored_rank: Option<usize>,
    /// Singular values above numpy's `matrix_rank` tolerance in f32, σ₁ · max(m, n) · 2⁻²³.
    pub rank: usize,
    /// σ₁.
    pub spectral_norm: f64,
    /// √Σσ².
    pub frobenius_norm: f64,
    /// Σσ² / σ₁².
    pub stable_rank: f64,
    /// exp of the entropy of p = σ² / Σσ².
    pub effective_rank: f64,
    /// exp of the entropy of p = σ / Σσ (Roy & Vetterli 2007).
    pub effective_rank_sigma: f64,
    /// Smallest ranks that hold the shares of Σσ² in `ENERGY_SHARES`.
    pub energy_ranks: Vec<EnergyRank>,
    /// Largest rank at which two factors have fewer parameters than the matrix.
    pub break_even_rank: usize,
    /// √(share of Σσ² behind the break-even rank): the error of plain SVD where it begins to save.
    pub break_even_error: f64,
    /// σ at evenly spaced positions, over σ₁: for a sparkline.
    pub sketch: Vec<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EnergyRank {
    pub share: f64,
    pub rank: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_interpolated() {
        let distribution = Distribution::of(vec![4.0, 0.0, 3.0, 1.0, 2.0]);
        assert_eq!((distribution.mean, distribution.median, distribution.min, distribution.max), (2.0, 2.0, 0.0, 4.0));
        assert!((distribution.p90 - 3.6).abs() < 1e-12 && (distribution.p5 - 0.2).abs() < 1e-12);
        // Variance 2 over n, standard error √(2 / 4).
        assert!((distribution.standard_error - 0.5f64.sqrt()).abs() < 1e-15);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn peak_memory_is_read() {
        assert!(peak_memory_bytes().unwrap() > 1 << 20);
    }
}
