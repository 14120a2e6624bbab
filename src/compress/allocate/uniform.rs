//! The same share of parameters for every linear, as in all published tools: the largest rank that costs at most `keep`
//! of the matrix, `⌊keep · m n / (m + n)⌋` for factors.

use super::allocator::{Allocator, Spectra, cost, largest_affordable};
use super::item::{Item, Pick, Rules};

pub(super) struct Uniform;

impl Allocator for Uniform {
    fn spectra(&self) -> Spectra {
        Spectra::None
    }

    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Pick> {
        let at = |keep: f64| -> Vec<Pick> {
            let ladders = items.iter().map(Item::ladder);
            ladders.map(|ladder| ladder.pick(ladder.uniform_rank(keep).max(1), rules)).collect()
        };
        let choices = at(rules.keep);
        // A budget in bytes also includes headers.
        if cost(items, &choices) <= rules.budget { choices } else { largest_affordable(items, rules, at) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Linear;
    use super::super::{Ranks, allocate};
    use super::*;
    use crate::approx::low_rank::ErrorCurve;
    use crate::operator::Kind;

    #[test]
    fn ranks_follow_the_formula() {
        for (shape, keep, factors, pivot) in [
            ((64, 64), 0.8, Pick::Candidate(25), Pick::Candidate(35)),
            ((172, 64), 0.8, Pick::Candidate(37), Pick::Candidate(46)),
            ((2048, 5632), 0.8, Pick::Candidate(1201), Pick::Candidate(1490)),
            ((64, 64), 0.999, Pick::Candidate(31), Pick::Candidate(61)),
            ((1000, 2), 0.5, Pick::Candidate(1), Pick::Candidate(1)),
        ] {
            for (kind, expected) in [(Kind::FACTORS, factors), (Kind::default(), pivot)] {
                let linear = Linear::new(kind, shape, ErrorCurve::new(Vec::new()), 1.0);
                let items = [linear.item()];
                let picks = allocate(Ranks::Uniform, &items, &Rules::of_keep(&items, keep));
                assert_eq!(picks, [expected], "{shape:?} at {keep} {kind:?}");
            }
        }
    }
}
