//! Scales that make errors of different linears comparable: the scale of the knapsack, by its name on the command line,
//! and weights by depth.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The source of the scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Sensitivity {
    /// Unscaled error curves; with kfac they estimate the loss to second order
    SecondOrder,
    /// Divergence of the output when only this matrix is truncated to a low rank, over its error
    Measured,
    /// One over the energy of the matrix, so that relative errors count equally
    Energy,
}

/// The additional weight of errors in early blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DepthWeight {
    /// γ.
    Fixed(f64),
    /// Tries a few γ, and takes the one whose ranks diverge least on the calibration text.
    Auto,
}

/// Values that `auto` tries.
pub(super) const GAMMAS: [f64; 5] = [0.0, 0.25, 0.5, 1.0, 2.0];

impl fmt::Display for DepthWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(gamma) => write!(f, "{gamma}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

impl FromStr for DepthWeight {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let gamma = || text.parse().ok().filter(|gamma: &f64| *gamma >= 0.0 && gamma.is_finite()).map(Self::Fixed);
        let parsed = if text == "auto" { Some(Self::Auto) } else { gamma() };
        parsed.ok_or_else(|| format!("`{text}` is neither `auto` nor a non-negative number"))
    }
}

impl Serialize for DepthWeight {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DepthWeight {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
