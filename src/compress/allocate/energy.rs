//! The smallest ranks that keep the same share τ of the energy `Σ σ²` in every linear (LiteASR, Kamahori et al. 2025,
//! keeps 0.99 in attention and 0.999 in feed-forward layers). With a budget, τ is the largest share that it allows.

use super::allocator::{Allocator, Spectra, cost, largest_affordable};
use super::item::{Item, Pick, Rules};
use crate::approx::low_rank::ErrorCurve;

pub(super) struct Energy {
    pub share: Option<f64>,
}

impl Allocator for Energy {
    fn spectra(&self) -> Spectra {
        Spectra::Metric
    }

    /// The energy that is lost without this rank and those above it: `Σ_{j ≥ i} σ_j²`.
    fn scores(&self, spectrum: &ErrorCurve, _: (usize, usize)) -> Vec<f64> {
        let mut lost = spectrum.energies().to_vec();
        for i in (1..lost.len()).rev() {
            lost[i - 1] += lost[i];
        }
        lost
    }

    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Pick> {
        let at = |share: f64| -> Vec<Pick> {
            items
                .iter()
                .map(Item::ladder)
                .map(|ladder| ladder.pick(smallest_rank(ladder.scores, share), rules))
                .collect()
        };
        let asked = at(self.share.unwrap_or(1.0));
        if cost(items, &asked) <= rules.budget { asked } else { largest_affordable(items, rules, at) }
    }
}

/// Smallest rank whose energies sum to `share` of the total.
fn smallest_rank(lost: &[f64], share: f64) -> usize {
    let allowed = (1.0 - share) * lost.first().copied().unwrap_or(0.0);
    lost.partition_point(|&lost| lost > allowed).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rank_is_the_first_that_keeps_the_share() {
        let lost = |energies: Vec<f64>| Energy { share: None }.scores(&ErrorCurve::new(energies), (4, 4));
        let four = lost(vec![8.0, 1.0, 0.75, 0.25]);
        assert_eq!(four, [10.0, 2.0, 1.0, 0.25]);
        for (share, expected) in [(0.5, 1), (0.79, 1), (0.85, 2), (0.89, 2), (0.97, 3), (1.0, 4)] {
            assert_eq!(smallest_rank(&four, share), expected, "{share}");
        }
        assert_eq!(smallest_rank(&lost(vec![0.0; 3]), 0.9), 1);
    }
}
