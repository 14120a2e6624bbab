//! Low-rank compensation of a quantized base, `W ≈ Q + B·A`: published methods as rows of a table.
//!
//! All minimize `tr(G E C Eᵀ)` of the error `E = W − Q − B·A` with the same kernel. They differ in the metric, and in
//! whether they alternate between base and factors.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::presets::{MetricForm, Preset};

/// A published method of compensation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Compensate {
    /// No factors
    #[default]
    None,
    /// Plain SVD of the error (LoRC of ZeroQuant-V2, Yao et al. 2023)
    Lorc,
    /// Weights inputs by their mean magnitude (L²QER, Zhang et al. 2024)
    Lqer,
    /// Weights inputs by their root mean square (QERA-approx, Zhang et al. 2024)
    QeraApprox,
    /// Minimizes the output error on calibration inputs (EoRA, Liu et al. 2024; same optimum as QERA-exact)
    Eora,
    /// Minimizes the loss to second order, as `--method kfac` does
    Kfac,
    /// Plain SVD, alternating between base and factors (LoftQ, Li et al. 2023)
    Loftq,
    /// Weights by Fisher information, alternating between base and factors (LQ-LoRA, Guo et al. 2023)
    LqLora,
}

/// Most iterations of the alternating methods; LoftQ uses 1 to 5.
const TURNS: usize = 5;

/// Damping of Grams on both sides, as a share of their mean eigenvalue; the default of `--method kfac`.
const KFAC_DAMPING: f64 = 0.01;

impl Compensate {
    /// The name in flags and recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lorc => "lorc",
            Self::Lqer => "lqer",
            Self::QeraApprox => "qera-approx",
            Self::Eora => "eora",
            Self::Kfac => "kfac",
            Self::Loftq => "loftq",
            Self::LqLora => "lq-lora",
        }
    }

    /// Its metric.
    pub fn preset(self) -> Preset {
        let preset = |output, input| Preset { output, input, damping: 0.0 };
        match self {
            Self::None | Self::Lorc | Self::Loftq => preset(MetricForm::Identity, MetricForm::Identity),
            // Columns are scaled by mean |x|; the normalization in the paper is a common factor.
            Self::Lqer => preset(MetricForm::Identity, MetricForm::Magnitude { alpha: 1.0 }),
            Self::QeraApprox => preset(MetricForm::Identity, MetricForm::GramDiagonal),
            Self::Eora => preset(MetricForm::Identity, MetricForm::Gram),
            Self::Kfac => Preset { damping: KFAC_DAMPING, ..preset(MetricForm::Gram, MetricForm::Gram) },
            Self::LqLora => preset(MetricForm::SquaredGradient, MetricForm::SquaredGradient),
        }
    }

    /// Iterations over base and factors, each fitted to the residual of the other; the best is kept.
    pub fn turns(self) -> usize {
        if matches!(self, Self::Loftq | Self::LqLora) { TURNS } else { 1 }
    }
}

/// The rank of the factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompensateRank {
    /// Allocated by the budget: a rank per linear, which may be 0.
    Auto,
    /// The same rank for every linear, at most its full rank.
    Fixed(NonZeroUsize),
}

impl fmt::Display for CompensateRank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(rank) => write!(f, "{rank}"),
        }
    }
}

impl FromStr for CompensateRank {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rank = || text.parse().ok().map(Self::Fixed);
        let parsed = if text == "auto" { Some(Self::Auto) } else { rank() };
        parsed.ok_or_else(|| format!("`{text}` is neither `auto` nor a positive rank"))
    }
}

impl Serialize for CompensateRank {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CompensateRank {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
