//! The interface of an allocator, and what several need.

use super::item::{Item, Pick, Rules};
use crate::approx::low_rank::ErrorCurve;

/// The spectra that an allocator needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spectra {
    /// No spectra: shapes decide.
    None,
    /// Spectra of the plain weights.
    Plain,
    /// Spectra of the weights in the metric of the method.
    Metric,
}

/// A way to allocate ranks. A rule that is defined by spectra makes scores of them, one linear at a time, before
/// anything is allocated.
pub trait Allocator {
    /// The spectra that the scores and the errors of the items are made of.
    fn spectra(&self) -> Spectra;

    /// The scores of a linear (out, in) with this spectrum, as [`Ladder::scores`] has them.
    ///
    /// [`Ladder::scores`]: super::item::Ladder::scores
    fn scores(&self, _spectrum: &ErrorCurve, _shape: (usize, usize)) -> Vec<f64> {
        Vec::new()
    }

    /// The choices, one per item.
    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Pick>;
}

/// Total cost of choices.
pub fn cost(items: &[Item<'_>], choices: &[Pick]) -> u64 {
    items.iter().zip(choices).map(|(item, &choice)| item.cost(choice)).sum()
}

/// The choices `at(t)` for the largest affordable t in [0, 1], where cost grows with t; those at 0 if none is
/// affordable.
pub(super) fn largest_affordable(items: &[Item<'_>], rules: &Rules, at: impl Fn(f64) -> Vec<Pick>) -> Vec<Pick> {
    let (mut low, mut high) = (0.0, 1.0);
    let mut best = at(low);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        let choices = at(middle);
        if cost(items, &choices) <= rules.budget {
            (low, best) = (middle, choices);
        } else {
            high = middle;
        }
    }
    best
}
