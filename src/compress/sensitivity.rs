//! Cost to the model of a unit of squared error of each linear: the scale on which the knapsack compares matrices.

use anyhow::Result;

use super::allocate::Ranks;
use super::allocation::{self, Allocation};
use super::plan::Choice;
use super::recipe::Budget;
use super::refine;
use super::scale::{DepthWeight, GAMMAS, Sensitivity};
use super::solution::Solution;
use super::study::Study;
use super::trials::mean_kl;

/// A trial keeps this share of the parameters of its matrix: a tenth of what keeping 80 % everywhere would.
const TRIAL_KEEP: f64 = 0.08;

/// Number of tokens in trials. The divergence of such a deep cut is visible on few tokens.
const TRIAL_TOKENS: usize = 8192;

/// Cost to the model of a unit of squared error of each linear, before depth weights.
///
/// # Errors
/// A trial fails.
pub(super) fn of(study: &Study<'_>) -> Result<Vec<f64>> {
    let n = study.plan.linears.len();
    if study.recipe.ranks() != Ranks::Knapsack {
        return Ok(vec![1.0; n]);
    }
    let energy = |i: usize| match study.fits.low_rank(i).and_then(|fit| fit.curve()) {
        Some(curve) => curve.squared_error(0),
        None if study.plan.linears[i].vocabulary.is_some() => study.fits.norm(i),
        None => 1.0,
    };
    Ok(match study.recipe.sensitivity() {
        None | Some(Sensitivity::SecondOrder) => vec![1.0; n],
        Some(Sensitivity::Energy) => (0..n).map(|i| reciprocal(energy(i))).collect(),
        Some(Sensitivity::Measured) => measured(study)?,
    })
}

/// The allocation under a budget; if the depth weight is `auto`, the one with the lowest divergence.
///
/// # Errors
/// A size in bytes cannot be reached, or a trial fails.
pub(super) fn allocate(study: &Study<'_>, sensitivities: &[f64], budget: Budget) -> Result<Allocation> {
    let gammas = match study.recipe.depth_weight() {
        DepthWeight::Fixed(gamma) => vec![gamma],
        DepthWeight::Auto => GAMMAS.to_vec(),
    };
    let at = |&gamma: &f64| -> Result<Allocation> {
        let weights = depth_weights(study, gamma);
        let sensitivities: Vec<f64> = sensitivities.iter().zip(weights).map(|(s, w)| s * w).collect();
        Ok(Allocation { choices: allocation::choose(study, budget, &sensitivities)?, sensitivities })
    };
    let mut allocations = gammas.iter().map(at).collect::<Result<Vec<_>>>()?;
    if allocations.len() == 1 {
        return Ok(allocations.remove(0));
    }
    let refinements = refine::of(study.recipe);
    let trials: Vec<Solution<'_>> =
        allocations.iter().map(|a| Solution::new(study, a.choices.clone(), &refinements)).collect();
    let kl = mean_kl(study, trial_windows(study), &trials.iter().collect::<Vec<_>>(), "depth weight")?;
    drop(trials);
    let best = (0..kl.len()).reduce(|best, i| if kl[i] < kl[best] { i } else { best }).unwrap_or(0);
    tracing::info!("depth weight {} has the lowest divergence: {:.6}", gammas[best], kl[best]);
    Ok(allocations.swap_remove(best))
}

/// The windows for trials.
pub(super) fn trial_windows<'a>(study: &'a Study<'_>) -> &'a [Vec<u32>] {
    let windows = &study.inputs.windows.as_ref().expect("invariant: a recipe with trials has a text").windows;
    &windows[..(TRIAL_TOKENS / windows[0].len().max(1)).clamp(1, windows.len())]
}

/// Divergence of the trial of each linear, divided by its error.
fn measured(study: &Study<'_>) -> Result<Vec<f64>> {
    let linears = study.plan.linears.iter().zip(&study.plan.are_zero);
    let ranks: Vec<usize> = linears
        .map(|(linear, is_zero)| {
            let (m, n) = linear.shape();
            let rank = (TRIAL_KEEP * (m * n) as f64 / (m + n) as f64) as usize;
            let most = study.recipe.layout().fitting().largest_saving_rank((m, n));
            if *is_zero { 0 } else { rank.max(1).min(most) }
        })
        .collect();
    let (n, refinements) = (ranks.len(), refine::of(study.recipe));
    let trial = |i: usize| {
        let choice = |j| if i == j && ranks[i] > 0 { Choice::Fitted { fit: 0, rank: ranks[i] } } else { Choice::Dense };
        Solution::new(study, (0..n).map(choice).collect(), &refinements)
    };
    let trials: Vec<Solution<'_>> = (0..n).map(trial).collect();
    let kl = mean_kl(study, trial_windows(study), &trials.iter().collect::<Vec<_>>(), "try")?;
    let scales = kl.into_iter().enumerate().map(|(i, kl)| {
        let curve = study.fits.low_rank(i).and_then(|fit| fit.curve());
        kl * reciprocal(curve.map_or(0.0, |curve| curve.squared_error(ranks[i])))
    });
    Ok(scales.collect())
}

fn reciprocal(value: f64) -> f64 {
    if value > 0.0 { 1.0 / value } else { 0.0 }
}

/// The depth weight of every linear of the plan.
fn depth_weights(study: &Study<'_>, gamma: f64) -> Vec<f64> {
    let linears = &study.plan.linears;
    let n_blocks = linears.iter().filter_map(|l| l.block).max().map_or(0, |last| last + 1);
    linears.iter().map(|linear| depth_weight(gamma, linear.block, n_blocks)).collect()
}

/// `1 + γ Σ_{k ≥ block} 1 / (k + 1)`: errors of early blocks pass through more of the model.
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
