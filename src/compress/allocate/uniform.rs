//! The same share of parameters everywhere: `r = ⌊keep · m n / (m + n)⌋`, what every published tool ships.

use super::{Allocator, Choice, ErrorCurve, Shape};

pub(super) struct Uniform;

impl Allocator for Uniform {
    fn by_shapes(&self, shapes: &[Shape], keep: f64) -> Option<Vec<Choice>> {
        Some(shapes.iter().map(|&shape| choice(shape, keep)).collect())
    }

    fn by_spectra(&self, shapes: &[Shape], _: &[ErrorCurve], keep: f64) -> Vec<Choice> {
        shapes.iter().map(|&shape| choice(shape, keep)).collect()
    }
}

fn choice((m, n): Shape, keep: f64) -> Choice {
    if keep >= 1.0 {
        return Choice::Dense;
    }
    let rank = (super::budget(&[(m, n)], keep) / (m + n) as u64) as usize;
    Choice::if_it_saves(rank.max(1), (m, n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_follow_the_formula() {
        for (shape, keep, expected) in [
            ((64, 64), 0.8, Choice::Rank(25)),
            ((172, 64), 0.8, Choice::Rank(37)),
            ((2048, 5632), 0.8, Choice::Rank(1201)),
            ((64, 64), 1.0, Choice::Dense),
            ((1000, 2), 0.5, Choice::Rank(1)),
        ] {
            assert_eq!(choice(shape, keep), expected, "{shape:?} at {keep}");
        }
    }
}
