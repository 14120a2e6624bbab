//! The same share of parameters for every linear, as in all published tools: the largest rank that costs at most `keep`
//! of the matrix, `⌊keep · m n / (m + n)⌋` for factors.

use super::{Allocator, Item, Pick, Rules, Spectra, largest_affordable};

pub(super) struct Uniform;

impl Allocator for Uniform {
    fn spectra(&self) -> Spectra {
        Spectra::None
    }

    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Pick> {
        let at =
            |keep: f64| -> Vec<Pick> { items.iter().map(|item| item.pick(rank(item, keep).max(1), rules)).collect() };
        let choices = at(rules.keep);
        // A budget in bytes also includes headers.
        if super::cost(items, &choices) <= rules.budget { choices } else { largest_affordable(items, rules, at) }
    }
}

/// Largest rank with at most `keep` of the parameters of the matrix.
pub(super) fn rank(item: &Item<'_>, keep: f64) -> usize {
    let largest = item.largest_rank();
    if keep >= 1.0 {
        return largest;
    }
    let budget = (keep * item.n_weights as f64 + 1e-6).floor() as u64;
    item.parameters.partition_point(|&parameters| parameters <= budget).saturating_sub(1).min(largest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::Kind;

    #[test]
    fn ranks_follow_the_formula() {
        for (shape, keep, factors, pivot) in [
            ((64, 64), 0.8, Pick::Rank(25), Pick::Rank(35)),
            ((172, 64), 0.8, Pick::Rank(37), Pick::Rank(46)),
            ((2048, 5632), 0.8, Pick::Rank(1201), Pick::Rank(1490)),
            ((64, 64), 0.999, Pick::Rank(31), Pick::Rank(61)),
            ((1000, 2), 0.5, Pick::Rank(1), Pick::Rank(1)),
        ] {
            for (kind, expected) in [(Kind::FACTORS, factors), (Kind::default(), pivot)] {
                let largest = kind.fitting().largest_rank(shape);
                let parameters: Vec<u64> = (0..=largest).map(|rank| kind.n_parameters(rank, shape)).collect();
                let item = Item {
                    n_weights: (shape.0 * shape.1) as u64,
                    parameters: &parameters,
                    saving_rank: kind.fitting().largest_saving_rank(shape),
                    rank_weight: (shape.0 + shape.1) as f64,
                    bytes: None,
                    curve: None,
                    sensitivity: 1.0,
                    candidates: &[],
                    is_zero: false,
                };
                let picks =
                    super::super::allocate(super::super::Ranks::Uniform, &[item], &Rules::of_keep(&[item], keep));
                assert_eq!(picks, [expected], "{shape:?} at {keep} {kind:?}");
            }
        }
    }
}
