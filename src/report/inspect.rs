//! What `lrc inspect` found.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `lrc inspect`: the spectra of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct InspectReport {
    pub schema_version: u32,
    pub lrc_version: String,
    pub model: String,
    pub parameters: u64,
    pub size_bytes: u64,
    /// The calibration metric of `linears[].weighted`, where a text or statistics were given.
    pub metric: Option<String>,
    pub linears: Vec<SpectrumRecord>,
    /// Tensors that were not taken for matrices.
    pub other_tensors: Vec<String>,
}

/// Figures of one matrix.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct SpectrumRecord {
    pub module: String,
    /// `linear`, or what is fused or stacked: `fused q, k, v`, `expert 3 of 8`.
    pub kind: String,
    pub block: Option<usize>,
    /// (out, in).
    pub shape: [usize; 2],
    pub dtype: String,
    /// Rank of the stored factors; none for a dense weight.
    pub stored_rank: Option<usize>,
    /// Largest rank at which two factors have fewer parameters than the matrix: r (m + n) < m n.
    pub break_even_rank: usize,
    #[serde(flatten)]
    pub figures: Figures,
    /// Marchenko–Pastur: the largest σ² of a random matrix of this size and energy, Σσ²/(m n) · (√m + √n)².
    pub mp_edge: f64,
    /// σ² above `mp_edge`: directions that no random matrix has.
    pub mp_spikes: usize,
    /// FARMS: Hill's α of pooled square windows of at most 128, which the shape does not bias (Hu et al. 2025).
    pub alpha_farms: Option<f64>,
    /// The same figures in the calibration metric.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub weighted: Option<Figures>,
    /// Sides on which that metric is plain, because calibration measured only zeros there.
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
    /// −Σ p ln p of p = σ² / Σσ², in nats.
    pub entropy: f64,
    /// exp of the entropy of p = σ² / Σσ².
    pub effective_rank: f64,
    /// exp of the entropy of p = σ / Σσ (Roy & Vetterli 2007).
    pub effective_rank_sigma: f64,
    /// Smallest ranks that hold shares of Σσ².
    pub energy_ranks: Vec<EnergyRank>,
    /// WeLore: values of (σ − σ_min) / (σ_max − σ_min) below thresholds.
    pub welore: Vec<BelowThreshold>,
    /// Rank where the min–max-normalised spectrum is farthest below the chord between its ends.
    pub knee: usize,
    /// The tail of σ² as a power law; none where σ² do not differ.
    pub power_law: Option<PowerLaw>,
    /// Hill's α of the larger half of σ².
    pub alpha_hill: Option<f64>,
    /// √(share of Σσ² behind the break-even rank): the error of plain SVD where it begins to save.
    pub break_even_error: f64,
    /// σ at evenly spaced positions, over σ₁: for a sparkline.
    pub sketch: Vec<f64>,
}

/// `p(λ) ∝ λ^−α` from `xmin` on, fitted to λ = σ² as WeightWatcher does; it calls α < 2 over- and α > 6 under-trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PowerLaw {
    /// Exponent, by maximum likelihood.
    pub alpha: f64,
    /// Where the tail begins.
    pub xmin: f64,
    /// Kolmogorov–Smirnov distance of the fit.
    pub distance: f64,
    /// σ² above `xmin`.
    pub n_spikes: usize,
}

/// Values below a threshold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BelowThreshold {
    pub threshold: f64,
    pub count: usize,
}

/// A share of Σσ², and the smallest rank that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EnergyRank {
    pub share: f64,
    pub rank: usize,
}

/// The singular values of a matrix, descending.
#[derive(Debug, Clone)]
pub struct Spectrum {
    pub module: String,
    pub raw: Vec<f64>,
    /// In the calibration metric.
    pub weighted: Option<Vec<f64>>,
}
