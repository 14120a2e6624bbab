//! Low-rank compensation of a quantised base, `W ≈ Q + B·A`: published methods as rows of a table.
//!
//! All of them minimise `tr(G E C Eᵀ)` of what quantising left, `E = W − Q − B·A`, with the one kernel; only the metric differs,
//! and whether base and pair take turns.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::presets::{Form, Preset};

/// A published compensation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Compensate {
    /// No factors
    #[default]
    None,
    /// Plain SVD of the error (LoRC of ZeroQuant-V2, Yao et al. 2023)
    Lorc,
    /// Inputs weighted by their mean magnitude (L²QER, Zhang et al. 2024)
    Lqer,
    /// Inputs weighted by their root mean square (QERA-approx, Zhang et al. 2024)
    QeraApprox,
    /// The metric of calibration inputs (EoRA, Liu et al. 2024; QERA-exact has the same optimum)
    Eora,
    /// The metrics of calibration inputs and of loss gradients, as `--method kfac` has them
    Kfac,
    /// Plain, base and factors by turns (LoftQ, Li et al. 2023)
    Loftq,
    /// Weighted by Fisher information, base and factors by turns (LQ-LoRA, Guo et al. 2023)
    LqLora,
}

/// Turns that the alternating ones take at most; LoftQ uses 1 to 5.
const TURNS: usize = 5;

/// Share of its mean eigenvalue that Grams of both sides are damped with, as in `--method kfac`.
const KFAC_DAMPING: f64 = 0.01;

impl Compensate {
    /// Its metric.
    pub fn preset(self) -> Preset {
        let preset = |output, input| Preset { output, input, damping: 0.0 };
        match self {
            Self::None | Self::Lorc | Self::Loftq => preset(Form::Identity, Form::Identity),
            // Columns are scaled by mean |x|; the paper's normalisation is one factor for all of them.
            Self::Lqer => preset(Form::Identity, Form::Magnitude { alpha: 1.0 }),
            Self::QeraApprox => preset(Form::Identity, Form::GramDiagonal),
            Self::Eora => preset(Form::Identity, Form::Gram),
            Self::Kfac => Preset { damping: KFAC_DAMPING, ..preset(Form::Gram, Form::Gram) },
            Self::LqLora => preset(Form::SquaredGradient, Form::SquaredGradient),
        }
    }

    /// How often base and factors are made, each for what the other leaves; the best is kept.
    pub fn turns(self) -> usize {
        if matches!(self, Self::Loftq | Self::LqLora) { TURNS } else { 1 }
    }
}

/// The rank of the factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompensateRank {
    /// Each linear its own, 0 included, as the budget is best spent.
    Auto,
    Fixed(usize),
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
        let rank = || text.parse().ok().filter(|&rank| rank > 0).map(Self::Fixed);
        let parsed = if text == "auto" { Some(Self::Auto) } else { rank() };
        parsed.ok_or_else(|| format!("`{text}` is neither `auto` nor a rank from 1 on"))
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
