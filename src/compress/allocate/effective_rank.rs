//! Ranks proportional to `√(erank / (m + n))`, where the effective rank is exp of the entropy of `σ² / Σ σ²`, and m + n
//! is the number of parameters per rank (D-Rank, Mi et al. 2025). All linears share one factor, the largest that the
//! budget allows.

use super::allocator::{Allocator, Spectra, largest_affordable};
use super::item::{Item, Ladder, Pick, Rules};
use crate::approx::low_rank::ErrorCurve;

pub(super) struct EffectiveRank;

impl Allocator for EffectiveRank {
    fn spectra(&self) -> Spectra {
        Spectra::Metric
    }

    /// One number: `√(erank / (m + n))`. The paper's price of a rank is m + n in any layout.
    fn scores(&self, spectrum: &ErrorCurve, (m, n): (usize, usize)) -> Vec<f64> {
        vec![(effective_rank(spectrum) / (m + n) as f64).sqrt()]
    }

    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Pick> {
        let ladders: Vec<&Ladder<'_>> = items.iter().map(Item::ladder).collect();
        let weights: Vec<f64> = ladders.iter().map(|ladder| ladder.scores[0]).collect();
        // At t = 1 no rank is below the full rank of its matrix.
        let full = ladders.iter().zip(&weights).map(|(ladder, weight)| ladder.largest_rank() as f64 / weight);
        let largest = full.fold(0.0, f64::max);
        largest_affordable(items, rules, |t| {
            let rank = |weight: f64| ((t * largest * weight) as usize).max(1);
            ladders.iter().zip(&weights).map(|(ladder, &weight)| ladder.pick(rank(weight), rules)).collect()
        })
    }
}

/// exp of the entropy of `σ² / Σ σ²`; 1 for a weight of zeros.
fn effective_rank(spectrum: &ErrorCurve) -> f64 {
    let total = spectrum.squared_error(0);
    let shares = spectrum.energies().iter().map(|energy| energy / total).filter(|&p| p > 0.0);
    if total > 0.0 { (-shares.map(|p| p * p.ln()).sum::<f64>()).exp() } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::super::Ranks;
    use super::super::tests::{Linear, picks};
    use super::*;
    use crate::operator::Kind;

    #[test]
    fn ranks_are_in_proportion_to_the_root_of_effective_ranks() {
        // 16 and 4 equal energies: effective ranks 16 and 4, so ranks 2 : 1.
        let curve = |k: usize| ErrorCurve::new((0..64).map(|i| f64::from(u8::from(i < k))).collect());
        let linears = [curve(16), curve(4)].map(|curve| Linear::new(Kind::FACTORS, (64, 64), curve, 1.0));
        let items = [linears[0].item(), linears[1].item()];
        let choices = picks(Ranks::EffectiveRank, &linears, &Rules::of_keep(&items, 0.5));
        let [Pick::Candidate(first), Pick::Candidate(second)] = choices[..] else { panic!("{choices:?}") };
        assert!(first.abs_diff(2 * second) <= 1 && first + second >= 30, "{first} {second}");
    }
}
