//! What a unit of squared error of a linear costs the model: the scale between matrices, on which the knapsack lives.

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::allocate::{Choice, Ranks};
use super::study::Study;
use crate::progress::Progress;

/// Where the scale comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sensitivity {
    /// The curves as they are: with kfac they estimate the change of the loss to second order
    SecondOrder,
    /// Divergence of the model's output when one matrix alone is cut to a probe rank, over its error there
    Measured,
    /// One over the energy of the matrix: relative errors count alike
    Energy,
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
    if study.recipe.ranks != Ranks::Knapsack {
        return Ok(vec![1.0; n]);
    }
    let energy = |i: usize| study.bases.get(i).map_or(1.0, |basis| basis.curve.squared_error(0));
    let mut scales = match study.recipe.sensitivity {
        None | Some(Sensitivity::SecondOrder) => vec![1.0; n],
        Some(Sensitivity::Energy) => (0..n).map(|i| reciprocal(energy(i))).collect(),
        Some(Sensitivity::Measured) => measured(study, progress)?,
    };
    for (scale, linear) in scales.iter_mut().zip(&study.plan.linears) {
        *scale *= depth_weight(study.recipe.depth_weight, linear.block, n_blocks(study));
    }
    Ok(scales)
}

/// Divergence of the probe of each linear over its error.
fn measured(study: &Study<'_>, progress: &dyn Progress) -> Result<Vec<f64>> {
    let windows = &study.inputs.windows.as_ref().expect("invariant: measured sensitivities have a text").windows;
    let n_windows = (PROBE_TOKENS / windows[0].len().max(1)).clamp(1, windows.len());
    let ranks: Vec<usize> = study
        .plan
        .linears
        .iter()
        .map(|linear| {
            let (m, n) = linear.shape();
            let rank = (PROBE_KEEP * (m * n) as f64 / (m + n) as f64) as usize;
            rank.max(1).min(study.recipe.layout.largest_saving_rank((m, n)))
        })
        .collect();
    let n = ranks.len();
    let probe = |i: usize| -> Vec<Choice> {
        (0..n).map(|j| if i == j && ranks[i] > 0 { Choice::Rank(ranks[i]) } else { Choice::Dense }).collect()
    };
    let probes: Vec<Vec<Choice>> = (0..n).map(probe).collect();
    let divergences = study.diverge(&windows[..n_windows], &|len| 1..len, &probes, "probe", progress)?;
    let scale = |(i, kl): (usize, f64)| {
        let error = study.bases.get(i).map_or(0.0, |basis| basis.curve.squared_error(ranks[i]));
        kl * reciprocal(error)
    };
    Ok(divergences.iter().map(|d| d.mean_kl()).enumerate().map(scale).collect())
}

fn reciprocal(value: f64) -> f64 {
    if value > 0.0 { 1.0 / value } else { 0.0 }
}

fn n_blocks(study: &Study<'_>) -> usize {
    study.plan.linears.iter().filter_map(|l| l.block).max().map_or(0, |last| last + 1)
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
