//! Which rank each linear gets, under a budget of parameters. One allocator a file, one line in [`Ranks::allocator`].

mod fixed;
mod uniform;
mod welore;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::low_rank::ErrorCurve;
use crate::model::inventory::break_even_rank;

/// What becomes of one linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// Left as it is.
    Dense,
    /// Two factors of this rank.
    Rank(usize),
}

/// (out, in).
pub type Shape = (usize, usize);

impl Choice {
    /// `rank`, or dense where factors of that rank would save nothing.
    pub fn if_it_saves(rank: usize, (m, n): Shape) -> Self {
        if rank <= break_even_rank(m, n) { Self::Rank(rank) } else { Self::Dense }
    }

    /// Rank of the factors, if it is factored.
    pub fn rank(self) -> Option<usize> {
        match self {
            Self::Dense => None,
            Self::Rank(rank) => Some(rank),
        }
    }

    /// Parameters of the linear after the choice.
    pub fn n_parameters(self, (m, n): Shape) -> u64 {
        match self {
            Self::Dense => (m * n) as u64,
            Self::Rank(r) => (r * (m + n)) as u64,
        }
    }
}

/// A way to share out ranks.
pub trait Allocator {
    /// The choices, where shapes alone decide them: nothing need be decomposed to know the plan.
    fn by_shapes(&self, shapes: &[Shape], keep: f64) -> Option<Vec<Choice>>;

    /// The choices from the plain spectra of the weights; one a linear, in the order of `shapes`.
    fn by_spectra(&self, shapes: &[Shape], spectra: &[ErrorCurve], keep: f64) -> Vec<Choice>;
}

/// The allocators, as a user names them: `uniform`, `welore`, `full`, `fixed:64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ranks {
    #[default]
    Uniform,
    Welore,
    Fixed(usize),
}

impl Ranks {
    /// The allocator behind the name.
    pub fn allocator(self) -> Box<dyn Allocator> {
        match self {
            Self::Uniform => Box::new(uniform::Uniform),
            Self::Welore => Box::new(welore::Welore),
            Self::Fixed(rank) => Box::new(fixed::Fixed { rank }),
        }
    }

    /// Whether the allocator works towards `--keep`.
    pub fn needs_keep(self) -> bool {
        !matches!(self, Self::Fixed(_))
    }
}

/// The rank that stands for «all of them».
const FULL: usize = usize::MAX;

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Welore => f.write_str("welore"),
            Self::Fixed(FULL) => f.write_str("full"),
            Self::Fixed(rank) => write!(f, "fixed:{rank}"),
        }
    }
}

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "uniform" => Ok(Self::Uniform),
            "welore" => Ok(Self::Welore),
            "full" => Ok(Self::Fixed(FULL)),
            _ => match text.strip_prefix("fixed:").map(str::parse) {
                Some(Ok(rank)) if rank > 0 => Ok(Self::Fixed(rank)),
                _ => Err(format!("`{text}` is not one of uniform, welore, full, fixed:RANK")),
            },
        }
    }
}

impl Serialize for Ranks {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ranks {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Parameters that may be spent: ⌊keep · Σ m n⌋.
fn budget(shapes: &[Shape], keep: f64) -> u64 {
    let total: u64 = shapes.iter().map(|&shape| Choice::Dense.n_parameters(shape)).sum();
    // A hair above, so that 0.7 of 10 is 7 and not 6.
    (keep * total as f64 + 1e-6).floor() as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for ranks in [Ranks::Uniform, Ranks::Welore, Ranks::Fixed(FULL), Ranks::Fixed(8)] {
            assert_eq!(ranks.to_string().parse(), Ok(ranks));
        }
        assert!("fixed:0".parse::<Ranks>().is_err() && "best".parse::<Ranks>().is_err());
    }

    prop_compose! {
        fn linear()(m in 2usize..80, n in 2usize..80)
            (values in proptest::collection::vec(0.0f64..1e6, m.min(n)), m in Just(m), n in Just(n)) -> (Shape, ErrorCurve) {
            let mut values = values;
            values.sort_by(|x, y| y.total_cmp(x));
            ((m, n), ErrorCurve::new(values))
        }
    }

    proptest! {
        #[test]
        fn budgets_are_kept_and_ranks_are_possible(linears in proptest::collection::vec(linear(), 1..12), keep in 0.05f64..1.2) {
            let (shapes, spectra): (Vec<_>, Vec<_>) = linears.into_iter().unzip();
            for ranks in [Ranks::Uniform, Ranks::Welore] {
                let allocator = ranks.allocator();
                let choices = allocator.by_shapes(&shapes, keep).unwrap_or_else(|| allocator.by_spectra(&shapes, &spectra, keep));
                prop_assert_eq!(choices.len(), shapes.len());
                let spent: u64 = choices.iter().zip(&shapes).map(|(c, &s)| c.n_parameters(s)).sum();
                // Every linear keeps rank 1, which very small budgets cannot pay for; uniform has a budget a linear.
                let floor = |s: Shape| Choice::if_it_saves(1, s).n_parameters(s);
                let bound = if ranks == Ranks::Uniform {
                    shapes.iter().map(|&s| budget(&[s], keep).max(floor(s))).sum()
                } else {
                    budget(&shapes, keep).max(shapes.iter().map(|&s| floor(s)).sum())
                };
                prop_assert!(spent <= bound, "{} spends {}, may spend {}", ranks, spent, bound);
                for (choice, &shape) in choices.iter().zip(&shapes) {
                    if let Choice::Rank(r) = choice {
                        prop_assert!(*r >= 1 && *r <= break_even_rank(shape.0, shape.1));
                    }
                    if keep >= 1.0 {
                        prop_assert_eq!(*choice, Choice::Dense);
                    }
                }
            }
        }
    }
}
