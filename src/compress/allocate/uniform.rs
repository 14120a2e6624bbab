//! The same share of parameters everywhere: the largest rank that costs no more than `keep` of the matrix,
//! `⌊keep · m n / (m + n)⌋` for factors, what every published tool ships.

use super::{Allocator, Choice, Item, Rules, Spectra, largest_affordable};

pub(super) struct Uniform;

impl Allocator for Uniform {
    fn spectra(&self) -> Spectra {
        Spectra::None
    }

    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Choice> {
        let at = |keep: f64| -> Vec<Choice> {
            items.iter().map(|item| item.choice(rank(item, keep).max(1), rules)).collect()
        };
        let choices = at(rules.keep);
        // A budget in bytes also pays for headers.
        if super::cost(items, &choices) <= rules.budget { choices } else { largest_affordable(items, rules, at) }
    }
}

/// Largest rank with at most `keep` of the parameters of the matrix.
pub(super) fn rank(item: &Item<'_>, keep: f64) -> usize {
    let (m, n) = item.shape;
    if keep >= 1.0 {
        return m.min(n);
    }
    let budget = (keep * (m * n) as f64 + 1e-6).floor() as u64;
    let (mut low, mut high) = (0, m.min(n));
    while low < high {
        let middle = (low + high).div_ceil(2);
        if item.layout.n_parameters(middle, item.shape) <= budget { low = middle } else { high = middle - 1 }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::super::Price;
    use super::*;
    use crate::model::Layout;

    #[test]
    fn ranks_follow_the_formula() {
        for (shape, keep, factors, pivot) in [
            ((64, 64), 0.8, Choice::Rank(25), Choice::Rank(35)),
            ((172, 64), 0.8, Choice::Rank(37), Choice::Rank(46)),
            ((2048, 5632), 0.8, Choice::Rank(1201), Choice::Rank(1490)),
            ((64, 64), 0.999, Choice::Rank(31), Choice::Rank(61)),
            ((1000, 2), 0.5, Choice::Rank(1), Choice::Rank(1)),
        ] {
            for (layout, expected) in [(Layout::Factors, factors), (Layout::Pivot, pivot)] {
                let item = Item {
                    shape,
                    layout,
                    curve: None,
                    sensitivity: 1.0,
                    price: Price::Parameters,
                    coded: &[],
                    is_zero: false,
                };
                let choices =
                    super::super::allocate(super::super::Ranks::Uniform, &[item], &Rules::of_keep(&[item], keep));
                assert_eq!(choices, [expected], "{shape:?} at {keep} {layout:?}");
            }
        }
    }
}
