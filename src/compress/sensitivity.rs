//! What a unit of squared error of a linear costs the model: the scale between matrices, on which the knapsack lives.

use std::fmt;
use std::str::FromStr;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::allocate::{Choice, Ranks};
use super::study::Study;
use crate::progress::Progress;

/// Where the scale comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Sensitivity {
    /// The curves as they are: with kfac they estimate the change of the loss to second order
    SecondOrder,
    /// Divergence of the model's output when one matrix alone is cut to a probe rank, over its error there
    Measured,
    /// One over the energy of the matrix: relative errors count alike
    Energy,
}

/// How much more errors of early blocks count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DepthWeight {
    /// γ.
    Fixed(f64),
    /// The γ of a few whose ranks diverge least on the calibration text.
    Auto,
}

/// What `auto` tries.
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
        parsed.ok_or_else(|| format!("`{text}` is neither `auto` nor a number from 0 on"))
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

/// A probe keeps this share of the parameters of its matrix: a tenth of what keeping 80 % everywhere would.
const PROBE_KEEP: f64 = 0.08;

/// Tokens that probes are run on; the divergence of a cut so deep shows on few.
const PROBE_TOKENS: usize = 8192;

/// One value a linear of the plan.
///
/// # Errors
/// A probe fails.
pub(super) fn of(study: &Study<'_>, progress: &dyn Progress) -> Result<Vec<f64>> {
    let n = study.plan.linears.len();
    if study.recipe.ranks() != Ranks::Knapsack {
        return Ok(vec![1.0; n]);
    }
    let energy = |i: usize| study.bases.get(i).map_or(1.0, |basis| basis.curve.squared_error(0));
    Ok(match study.recipe.sensitivity() {
        None | Some(Sensitivity::SecondOrder) => vec![1.0; n],
        Some(Sensitivity::Energy) => (0..n).map(|i| reciprocal(energy(i))).collect(),
        Some(Sensitivity::Measured) => measured(study, progress)?,
    })
}

/// The windows that probes are run on.
pub(super) fn probe_windows<'a>(study: &'a Study<'_>) -> &'a [Vec<u32>] {
    let windows = &study.inputs.windows.as_ref().expect("invariant: a recipe that probes has a text").windows;
    &windows[..(PROBE_TOKENS / windows[0].len().max(1)).clamp(1, windows.len())]
}

/// Divergence of the probe of each linear over its error.
fn measured(study: &Study<'_>, progress: &dyn Progress) -> Result<Vec<f64>> {
    let ranks: Vec<usize> = study
        .plan
        .linears
        .iter()
        .zip(&study.plan.are_zero)
        .map(|(linear, is_zero)| {
            let (m, n) = linear.shape();
            let rank = (PROBE_KEEP * (m * n) as f64 / (m + n) as f64) as usize;
            if *is_zero { 0 } else { rank.max(1).min(study.recipe.layout().largest_saving_rank((m, n))) }
        })
        .collect();
    let n = ranks.len();
    let probe = |i: usize| -> Vec<Choice> {
        (0..n).map(|j| if i == j && ranks[i] > 0 { Choice::Rank(ranks[i]) } else { Choice::Dense }).collect()
    };
    let probes: Vec<Vec<Choice>> = (0..n).map(probe).collect();
    let kl = study.mean_kl(probe_windows(study), &probes, "probe", progress)?;
    let scale = |(i, kl): (usize, f64)| {
        let error = study.bases.get(i).map_or(0.0, |basis| basis.curve.squared_error(ranks[i]));
        kl * reciprocal(error)
    };
    Ok(kl.into_iter().enumerate().map(scale).collect())
}

fn reciprocal(value: f64) -> f64 {
    if value > 0.0 { 1.0 / value } else { 0.0 }
}

/// The depth weight of every linear of the plan.
pub(super) fn depth_weights(study: &Study<'_>, gamma: f64) -> Vec<f64> {
    let linears = &study.plan.linears;
    let n_blocks = linears.iter().filter_map(|l| l.block).max().map_or(0, |last| last + 1);
    linears.iter().map(|linear| depth_weight(gamma, linear.block, n_blocks)).collect()
}

/// `1 + γ Σ_{k ≥ block} 1 / (k + 1)`: errors of early blocks travel through more of the model.
fn depth_weight(gamma: f64, block: Option<usize>, n_blocks: usize) -> f64 {
    block.map_or(1.0, |block| 1.0 + gamma * (block..n_blocks).map(|k| 1.0 / (k + 1) as f64).sum::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_weights_fall_with_depth() {
        assert_eq!(depth_weight(0.0, Some(0), 4), 1.0);
        assert!((depth_weight(2.0, Some(2), 4) - (1.0 + 2.0 * (1.0 / 3.0 + 0.25))).abs() < 1e-15);
        assert_eq!(depth_weight(2.0, None, 4), 1.0);
    }
}
