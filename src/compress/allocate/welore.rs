//! WeLore's rank selection (Jaiswal et al. 2024, "From GaLore to WeLore", section 3): one threshold k for all linears
//! on their normalized singular values `(s − s_min) / (s_max − s_min)`; a linear keeps those that are at least k.
//!
//! The paper fixes k by hand for each model and counts ranks. Here k is the smallest threshold that meets the
//! **parameter** budget, and a linear is factored only if that saves parameters. Factored linears are the paper's LRCs
//! (low-rank components), dense ones its N-LRCs. As in the paper the singular values belong to the plain weight,
//! whatever the metric of the truncation: no text affects the ranks.

use super::allocator::{Allocator, Spectra, cost};
use super::item::{Item, Pick, Rules};
use crate::approx::low_rank::ErrorCurve;

pub(super) struct Welore;

impl Allocator for Welore {
    fn spectra(&self) -> Spectra {
        Spectra::Plain
    }

    /// Singular values mapped to [0, 1], descending; all 1 if they are equal.
    fn scores(&self, spectrum: &ErrorCurve, _: (usize, usize)) -> Vec<f64> {
        let values: Vec<f64> = spectrum.singular_values().collect();
        let (max, min) = (values.first().copied().unwrap_or(0.0), values.last().copied().unwrap_or(0.0));
        let span = max - min;
        values.into_iter().map(|s| if span > 0.0 { (s - min) / span } else { 1.0 }).collect()
    }

    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Pick> {
        let at = |k: f64| -> Vec<Pick> {
            let ladders = items.iter().map(Item::ladder);
            ladders.map(|ladder| ladder.pick(ladder.scores.partition_point(|&s| s >= k).max(1), rules)).collect()
        };
        // Ranks change only where k passes a singular value, so bisect over those.
        let mut thresholds: Vec<f64> = items.iter().flat_map(|item| item.ladder().scores).copied().collect();
        thresholds.sort_by(f64::total_cmp);
        thresholds.dedup();
        let first = thresholds.partition_point(|&k| cost(items, &at(k)) > rules.budget);
        at(thresholds.get(first).copied().unwrap_or(f64::INFINITY))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Ranks;
    use super::super::tests::{Linear, picks};
    use super::*;
    use crate::operator::{Kind, Shape};

    fn linear(shape: Shape, spectrum: ErrorCurve) -> Linear {
        Linear::new(Kind::FACTORS, shape, spectrum, 1.0)
    }

    #[test]
    fn steep_spectra_give_their_ranks_to_flat_ones() {
        let steep = ErrorCurve::new((0..40).map(|i| 0.5f64.powi(i)).collect());
        let flat = ErrorCurve::new((0..40).map(|i| 1.0 - 0.01 * f64::from(i)).collect());
        let linears = [linear((40, 40), steep), linear((40, 40), flat)];
        let items: Vec<Item<'_>> = linears.iter().map(Linear::item).collect();
        let choices = picks(Ranks::Welore, &linears, &Rules::of_keep(&items, 0.7));
        let Pick::Candidate(rank) = choices[0] else { panic!("the steep one is factored") };
        assert!(rank < 10, "{rank}");
        assert_eq!(choices[1], Pick::Dense);
    }

    #[test]
    fn a_looser_budget_never_takes_a_rank_away() {
        let curve = |decay: f64| ErrorCurve::new((0..30).map(|i| decay.powi(i)).collect());
        let linears =
            [((30, 60), 0.9), ((60, 30), 0.8), ((30, 30), 0.95)].map(|(shape, decay)| linear(shape, curve(decay)));
        let items: Vec<Item<'_>> = linears.iter().map(Linear::item).collect();
        let mut last = vec![0; 3];
        for keep in [0.1, 0.3, 0.5, 0.7, 0.9, 1.0] {
            let choices = picks(Ranks::Welore, &linears, &Rules::of_keep(&items, keep));
            let costs: Vec<u64> = choices.iter().zip(&items).map(|(&c, item)| item.cost(c)).collect();
            assert!(costs.iter().zip(&last).all(|(now, before)| now >= before), "{keep}: {costs:?}");
            last = costs;
        }
    }
}
