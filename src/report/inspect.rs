//! The report of `lrc inspect`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::adapter::AdapterRecord;
use super::importance::ImportanceRecord;

/// `lrc inspect`: the spectra of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct InspectReport {
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
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors as stored.
    pub size_bytes: u64,
    /// The calibration metric of `linears[].weighted`, if a text or statistics were given.
    pub metric: Option<String>,
    /// One entry per matrix, in the order of the model.
    pub linears: Vec<SpectrumRecord>,
    /// Tensors that are not matrices.
    pub other_tensors: Vec<String>,
    /// Errors of leaving out blocks, groups of heads and channels, with `--importance`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub importance: Option<ImportanceRecord>,
}

/// Figures of one matrix.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SpectrumRecord {
    /// Name of the module, such as `model.layers.0.mlp.up_proj`.
    pub module: String,
    /// `linear`, or the parts of a fused or stacked matrix: `fused q, k, v`, `expert 3 of 8`.
    pub kind: String,
    /// Index of the block, if the name has one.
    pub block: Option<usize>,
    /// (out, in).
    pub shape: [usize; 2],
    /// Dtype of the stored weight or factors.
    pub dtype: String,
    /// Rank of the stored factors; none for a dense weight.
    pub stored_rank: Option<usize>,
    /// Largest rank at which two factors have fewer parameters than the matrix: r (m + n) < m n.
    pub break_even_rank: usize,
    /// Figures of the plain spectrum.
    #[serde(flatten)]
    pub figures: Figures,
    /// Marchenko–Pastur: the largest σ² of a random matrix of this size and energy, Σσ²/(m n) · (√m + √n)².
    pub mp_edge: f64,
    /// Number of σ² above `mp_edge`: directions that a random matrix does not have.
    pub mp_spikes: usize,
    /// FARMS: Hill's α of pooled square windows of side at most 128, free of the bias of the shape (Hu et al. 2025).
    pub alpha_farms: Option<f64>,
    /// The same figures in the calibration metric.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub weighted: Option<Figures>,
    /// Sides on which the metric is the identity, because calibration measured only zeros.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
}

/// Figures of one spectrum. Singular values are σ, descending.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct Figures {
    /// Singular values above numpy's `matrix_rank` tolerance in f32, σ₁ · max(m, n) · 2⁻²³.
    pub rank: usize,
    /// σ₁.
    pub spectral_norm: f64,
    /// log₁₀ σ₁.
    pub log10_spectral_norm: Option<f64>,
    /// √Σσ².
    pub frobenius_norm: f64,
    /// log₁₀ √Σσ².
    pub log10_frobenius_norm: Option<f64>,
    /// Σσ² / σ₁².
    pub stable_rank: f64,
    /// −Σ p ln p with p = σ² / Σσ², in nats.
    pub entropy: f64,
    /// exp of the entropy of σ² / Σσ².
    pub effective_rank: f64,
    /// exp of the entropy of σ / Σσ (Roy & Vetterli 2007).
    pub effective_rank_sigma: f64,
    /// Smallest ranks with given shares of Σσ².
    pub energy_ranks: Vec<EnergyRank>,
    /// WeLore: numbers of values of (σ − σ_min) / (σ_max − σ_min) below thresholds.
    pub welore: Vec<BelowThreshold>,
    /// Rank where the min–max-normalized spectrum is farthest below the chord between its ends.
    pub knee: usize,
    /// Power-law fit of the tail of σ²; none if all σ² are equal.
    pub power_law: Option<PowerLaw>,
    /// Hill's α of the larger half of σ².
    pub alpha_hill: Option<f64>,
    /// √(share of Σσ² beyond the break-even rank): the relative error of plain SVD at that rank.
    pub break_even_error: f64,
    /// σ / σ₁ at evenly spaced positions, for a sparkline.
    pub sketch: Vec<f64>,
}

/// `p(λ) ∝ λ^−α` from `xmin` on, fitted to λ = σ² as WeightWatcher does; WeightWatcher calls α < 2 over-trained
/// and α > 6 under-trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PowerLaw {
    /// Exponent, estimated by maximum likelihood.
    pub alpha: f64,
    /// Start of the tail.
    pub xmin: f64,
    /// Kolmogorov–Smirnov distance of the fit.
    pub distance: f64,
    /// Number of σ² above `xmin`.
    pub n_spikes: usize,
}

/// Values below a threshold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BelowThreshold {
    /// The threshold, between 0 and 1.
    pub threshold: f64,
    /// Number of values below the threshold.
    pub count: usize,
}

/// A share of Σσ², and the smallest rank that has it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EnergyRank {
    /// The share, between 0 and 1.
    pub share: f64,
    /// The smallest rank with that share of Σσ².
    pub rank: usize,
}

/// The singular values of a matrix, descending.
#[derive(Debug, Clone)]
pub struct Spectrum {
    /// Name of the module.
    pub module: String,
    /// The singular values of the plain matrix.
    pub raw: Vec<f64>,
    /// The singular values in the calibration metric, if there is one.
    pub weighted: Option<Vec<f64>>,
}
