//! Ranks proportional to `√(erank / (m + n))`, where the effective rank is exp of the entropy of `σ² / Σ σ²`, and m + n
//! is the number of parameters per rank (D-Rank, Mi et al. 2025). All linears share one factor, the largest that the
//! budget allows.

use super::{Allocator, Item, Pick, Rules, Spectra, largest_affordable};
use crate::approx::low_rank::ErrorCurve;

pub(super) struct EffectiveRank;

impl Allocator for EffectiveRank {
    fn spectra(&self) -> Spectra {
        Spectra::Metric
    }

    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Pick> {
        let weight = |item: &Item<'_>| (effective_rank(item.curve()) / item.rank_weight).sqrt();
        let weights: Vec<f64> = items.iter().map(weight).collect();
        // At t = 1 no rank is below the full rank of its matrix.
        let full = items.iter().zip(&weights).map(|(item, weight)| item.largest_rank() as f64 / weight);
        let largest = full.fold(0.0, f64::max);
        largest_affordable(items, rules, |t| {
            let rank = |weight: f64| ((t * largest * weight) as usize).max(1);
            items.iter().zip(&weights).map(|(item, &weight)| item.pick(rank(weight), rules)).collect()
        })
    }
}

/// exp of the entropy of `σ² / Σ σ²`; 1 for a weight of zeros.
fn effective_rank(curve: &ErrorCurve) -> f64 {
    let total = curve.squared_error(0);
    let shares = curve.energies().iter().map(|energy| energy / total).filter(|&p| p > 0.0);
    if total > 0.0 { (-shares.map(|p| p * p.ln()).sum::<f64>()).exp() } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_in_proportion_to_the_root_of_effective_ranks() {
        // 16 and 4 equal energies: effective ranks 16 and 4, so ranks 2 : 1.
        let curve = |k: usize| ErrorCurve::new((0..64).map(|i| f64::from(u8::from(i < k))).collect());
        let curves = [curve(16), curve(4)];
        let parameters: Vec<u64> = (0..=64).map(|rank| 128 * rank).collect();
        let item = |curve| Item {
            n_weights: 4096,
            parameters: &parameters,
            saving_rank: 31,
            rank_weight: 128.0,
            bytes: None,
            curve: Some(curve),
            sensitivity: 1.0,
            candidates: &[],
            is_zero: false,
        };
        let items = [item(&curves[0]), item(&curves[1])];
        let choices = EffectiveRank.choices(&items, &Rules::of_keep(&items, 0.5));
        let [Pick::Rank(first), Pick::Rank(second)] = choices[..] else { panic!("{choices:?}") };
        assert!(first.abs_diff(2 * second) <= 1 && first + second >= 30, "{first} {second}");
    }
}
