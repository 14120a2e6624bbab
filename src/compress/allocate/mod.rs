//! Chooses a rank for each linear, under a budget of parameters or bytes, by costs, errors and scores. Each allocator is one
//! file and one line in [`Ranks::allocator`].

mod allocator;
mod effective_rank;
mod energy;
mod fixed;
mod frontier;
mod item;
mod knapsack;
mod uniform;
mod welore;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use allocator::{Allocator, Spectra, cost};
pub(super) use frontier::{Point, frontier};
pub use item::{Candidate, Candidates, Ends, Item, Ladder, Pick, Rules, candidates_by_rank};

/// The choices of `ranks` under the budget, or the smallest ranks if even they exceed it. Free candidates are taken,
/// which leaves their share of the budget to the other items.
pub fn allocate(ranks: Ranks, items: &[Item<'_>], rules: &Rules) -> Vec<Pick> {
    if rules.keep >= 1.0 && ranks.is_budgeted() && rules.ends == Ends::Weight {
        return vec![Pick::Dense; items.len()];
    }
    let is_free = |item: &Item<'_>| matches!(item.candidates, Candidates::Free(_));
    let others: Vec<Item<'_>> = items.iter().filter(|item| !is_free(item)).copied().collect();
    let mut found = ranks.allocator().choices(&others, rules);
    if rules.fill && ranks.is_budgeted() {
        fill(&others, rules, &mut found);
    }
    let mut found = found.into_iter();
    let mut next = || found.next().expect("invariant: an allocator makes a choice an item");
    items.iter().map(|item| if is_free(item) { Pick::Candidate(0) } else { next() }).collect()
}

/// Spends the remaining budget step by step, each time on the rank that gains most for its cost.
fn fill(items: &[Item<'_>], rules: &Rules, choices: &mut [Pick]) {
    let mut left = rules.budget.saturating_sub(cost(items, choices));
    loop {
        let step = |(i, item): (usize, &Item<'_>)| {
            let (Pick::Candidate(rank), Candidates::Ranks(ladder)) = (choices[i], item.candidates) else { return None };
            let next = ladder.pick(rank + rules.multiple, rules);
            let extra = item.cost(next).checked_sub(item.cost(choices[i]))?;
            let gain = (item.error(choices[i]) - item.error(next)) / extra.max(1) as f64;
            (extra <= left && next != choices[i]).then_some((gain, i, next, extra))
        };
        let best =
            items.iter().enumerate().filter_map(step).reduce(|best, new| if new.0 > best.0 { new } else { best });
        let Some((_, i, next, extra)) = best else { return };
        choices[i] = next;
        left -= extra;
    }
}

/// The allocators, by their names on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[allow(missing_docs, reason = "the file of each allocator documents it")]
pub enum Ranks {
    #[default]
    Uniform,
    Welore,
    /// Smallest ranks that keep this share of the energy; `None` means the largest share that the budget allows.
    Energy(Option<f64>),
    EffectiveRank,
    Knapsack,
    Fixed(usize),
}

impl Ranks {
    /// The allocator with this name.
    pub fn allocator(self) -> Box<dyn Allocator> {
        match self {
            Self::Uniform => Box::new(uniform::Uniform),
            Self::Welore => Box::new(welore::Welore),
            Self::Energy(share) => Box::new(energy::Energy { share }),
            Self::EffectiveRank => Box::new(effective_rank::EffectiveRank),
            Self::Knapsack => Box::new(knapsack::Knapsack),
            Self::Fixed(rank) => Box::new(fixed::Fixed { rank }),
        }
    }

    /// Whether the allocator spends a budget.
    pub fn is_budgeted(self) -> bool {
        !matches!(self, Self::Fixed(_) | Self::Energy(Some(_)))
    }

    /// Whether a budget may limit the allocator.
    pub fn takes_budget(self) -> bool {
        !matches!(self, Self::Fixed(_))
    }
}

/// The rank that means full rank.
pub const FULL: usize = usize::MAX;

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Welore => f.write_str("welore"),
            Self::Energy(None) => f.write_str("energy"),
            Self::Energy(Some(share)) => write!(f, "energy:{share}"),
            Self::EffectiveRank => f.write_str("effective-rank"),
            Self::Knapsack => f.write_str("knapsack"),
            Self::Fixed(FULL) => f.write_str("full"),
            Self::Fixed(rank) => write!(f, "fixed:{rank}"),
        }
    }
}

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once(':').map_or((text, None), |(name, value)| (name, Some(value)));
        let share = |value: &str| value.parse().ok().filter(|&share| 0.0 < share && share <= 1.0);
        let rank = |value: &str| value.parse().ok().filter(|&rank| rank > 0);
        let ranks = match (name, value) {
            ("uniform", None) => Some(Self::Uniform),
            ("welore", None) => Some(Self::Welore),
            ("energy", None) => Some(Self::Energy(None)),
            ("energy", Some(value)) => share(value).map(|share| Self::Energy(Some(share))),
            ("effective-rank", None) => Some(Self::EffectiveRank),
            ("knapsack", None) => Some(Self::Knapsack),
            ("full", None) => Some(Self::Fixed(FULL)),
            ("fixed", Some(value)) => rank(value).map(Self::Fixed),
            _ => None,
        };
        const NAMES: &str = "uniform, welore, energy, energy:SHARE, effective-rank, knapsack, full, fixed:RANK";
        ranks.ok_or_else(|| format!("`{text}` is not one of {NAMES}, with RANK at least 1 and SHARE in (0, 1]"))
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::approx::low_rank::ErrorCurve;
    use crate::operator::{Kind, Shape};

    const BUDGETED: [Ranks; 5] =
        [Ranks::Uniform, Ranks::Welore, Ranks::Energy(None), Ranks::EffectiveRank, Ranks::Knapsack];

    #[test]
    fn names_are_read_as_they_are_written() {
        let others = [Ranks::Energy(Some(0.95)), Ranks::Fixed(FULL), Ranks::Fixed(8)];
        for ranks in BUDGETED.into_iter().chain(others) {
            assert_eq!(ranks.to_string().parse(), Ok(ranks));
        }
        for wrong in ["fixed:0", "best", "energy:1.5", "energy:", "uniform:3"] {
            assert!(wrong.parse::<Ranks>().is_err(), "{wrong}");
        }
    }

    /// Owns what an item borrows.
    pub(super) struct Linear {
        shape: Shape,
        spectrum: ErrorCurve,
        parameters: Vec<u64>,
        dense_cost: u64,
        candidates: Vec<Candidate>,
    }

    impl Linear {
        /// Priced in parameters.
        pub fn new(kind: Kind, shape: Shape, spectrum: ErrorCurve, sensitivity: f64) -> Self {
            let ranks = 0..=kind.fitting().largest_rank(shape);
            let parameters: Vec<u64> = ranks.map(|rank| kind.n_parameters(rank, shape)).collect();
            let candidates = candidates_by_rank(&parameters, Some(&spectrum), sensitivity);
            Self { shape, spectrum, parameters, dense_cost: (shape.0 * shape.1) as u64, candidates }
        }

        /// Two bytes per parameter, and a constant as for a header or a permutation.
        fn in_bytes(mut self) -> Self {
            self.dense_cost = 2 * self.dense_cost + 90;
            self.candidates.iter_mut().for_each(|candidate| candidate.cost = 2 * candidate.cost + 200);
            self
        }

        /// Without scores.
        pub fn item(&self) -> Item<'_> {
            self.scored(&[])
        }

        fn scored<'a>(&'a self, scores: &'a [f64]) -> Item<'a> {
            let n_weights = (self.shape.0 * self.shape.1) as u64;
            let ladder = Ladder { candidates: &self.candidates, parameters: &self.parameters, n_weights, scores };
            Item { dense_cost: self.dense_cost, candidates: Candidates::Ranks(ladder) }
        }
    }

    /// The picks of an allocator that has its scores.
    pub(super) fn picks(ranks: Ranks, linears: &[Linear], rules: &Rules) -> Vec<Pick> {
        let scores = |linear: &Linear| ranks.allocator().scores(&linear.spectrum, linear.shape);
        let scores: Vec<Vec<f64>> = linears.iter().map(scores).collect();
        let items: Vec<Item<'_>> = linears.iter().zip(&scores).map(|(linear, scores)| linear.scored(scores)).collect();
        allocate(ranks, &items, rules)
    }

    /// Shape, spectrum and sensitivity of a linear.
    type Given = (Shape, ErrorCurve, f64);

    prop_compose! {
        fn linear()(m in 2usize..80, n in 2usize..80)
            (values in proptest::collection::vec(0.0f64..1e6, m.min(n)), m in Just(m), n in Just(n), s in 0.1f64..10.0)
            -> Given {
            let mut values = values;
            values.sort_by(|x, y| y.total_cmp(x));
            ((m, n), ErrorCurve::new(values), s)
        }
    }

    /// Linears in a layout, priced in parameters.
    fn priced(given: &[Given], kind: Kind) -> Vec<Linear> {
        given.iter().map(|(shape, curve, sensitivity)| Linear::new(kind, *shape, curve.clone(), *sensitivity)).collect()
    }

    #[test]
    fn ranks_that_save_are_those_of_the_layout() {
        for kind in Kind::layouts() {
            for (m, n) in [(2, 3), (12, 12), (8, 64), (48, 20), (64, 64)] {
                let linear = Linear::new(kind, (m, n), ErrorCurve::new(vec![1.0; m.min(n)]), 1.0);
                let saving_rank = kind.fitting().largest_saving_rank((m, n));
                assert_eq!(linear.item().ladder().saving_rank(), saving_rank, "{kind:?} {m} {n}");
            }
        }
    }

    #[test]
    fn candidates_have_the_errors_of_the_curve() {
        let curve = ErrorCurve::new(vec![0.7, 0.1, 0.1, 1e-17, 0.0]);
        let candidates = candidates_by_rank(&[0, 3, 6, 9, 12, 15], Some(&curve), 0.3);
        for (rank, candidate) in candidates.into_iter().enumerate() {
            assert_eq!((candidate.cost, candidate.error), (3 * rank as u64, 0.3 * curve.squared_error(rank)));
        }
    }

    #[test]
    fn free_offers_leave_their_share_to_others() {
        let linear = Linear::new(Kind::FACTORS, (40, 40), ErrorCurve::new(vec![1.0; 40]), 1.0);
        let zeros = Item { dense_cost: 1600, candidates: Candidates::Free(Candidate { cost: 0, error: 0.0 }) };
        let items = [zeros, linear.item()];
        let picks = |keep| allocate(Ranks::Knapsack, &items, &Rules::of_keep(&items, keep));
        assert_eq!(picks(0.6), [Pick::Candidate(0), Pick::Dense]);
        assert_eq!(picks(0.25), [Pick::Candidate(0), Pick::Candidate(10)]);
        assert_eq!(picks(1.0), [Pick::Dense, Pick::Dense]);
    }

    #[test]
    fn residuals_may_be_left_out_and_are_never_dense() {
        let linear = |energy: f64| Linear::new(Kind::FACTORS, (40, 40), ErrorCurve::new(vec![energy; 40]), 1.0);
        let linears = [linear(1.0), linear(1e-9)];
        let items: Vec<Item<'_>> = linears.iter().map(Linear::item).collect();
        let rules = |budget| Rules { budget, ends: Ends::Residual, ..Rules::of_keep(&items, 0.5) };
        let knapsack = |n_ranks: u64| allocate(Ranks::Knapsack, &items, &rules(80 * n_ranks));
        assert_eq!(knapsack(5), [Pick::Candidate(5), Pick::Candidate(0)]);
        assert_eq!(knapsack(80), [Pick::Candidate(40), Pick::Candidate(40)]);
        for ranks in BUDGETED {
            let picks = picks(ranks, &linears, &rules(80 * 60));
            assert!(picks.iter().all(|pick| matches!(pick, Pick::Candidate(_))), "{ranks}: {picks:?}");
        }
    }

    proptest! {
        #[test]
        fn budgets_are_kept_and_ranks_are_possible(
            given in proptest::collection::vec(linear(), 1..12), keep in 0.05f64..1.2,
            multiple in 1usize..5, floor in 0.0f64..0.6, in_bytes: bool,
        ) {
            for kind in Kind::layouts() {
                let linears = priced(&given, kind).into_iter();
                let linears: Vec<Linear> = linears.map(|linear| if in_bytes { linear.in_bytes() } else { linear }).collect();
                let items: Vec<Item<'_>> = linears.iter().map(Linear::item).collect();
                for ranks in BUDGETED {
                    let rules = Rules { floor, multiple, fill: in_bytes, ..Rules::of_keep(&items, keep) };
                    let picks = picks(ranks, &linears, &rules);
                    prop_assert_eq!(picks.len(), items.len());
                    // Every linear keeps its smallest rank, even if a very small budget cannot pay for it.
                    let smallest = |ladder: &Ladder<'_>| ladder.pick(ladder.smallest_rank(&rules), &rules);
                    let floor: u64 = items.iter().map(|item| item.cost(smallest(item.ladder()))).sum();
                    let spent = cost(&items, &picks);
                    prop_assert!(spent <= rules.budget.max(floor), "{} spends {} of {}", ranks, spent, rules.budget);
                    for (pick, item) in picks.iter().zip(&items) {
                        if let Pick::Candidate(r) = pick {
                            let ladder = item.ladder();
                            prop_assert!(*r >= ladder.smallest_rank(&rules) && *r <= ladder.saving_rank());
                            prop_assert_eq!(r % multiple, 0);
                        }
                        if keep >= 1.0 {
                            prop_assert_eq!(*pick, Pick::Dense);
                        }
                    }
                    if rules.fill && spent <= rules.budget {
                        // No further step of rank is affordable.
                        let left = rules.budget - spent;
                        for (&pick, item) in picks.iter().zip(&items) {
                            if let Pick::Candidate(r) = pick {
                                let next = item.ladder().pick(r + multiple, &rules);
                                prop_assert!(item.cost(next) <= item.cost(pick) || item.cost(next) - item.cost(pick) > left);
                            }
                        }
                    }
                }
            }
        }

        #[test]
        fn no_allocator_beats_the_knapsack(given in proptest::collection::vec(linear(), 1..12), keep in 0.3f64..1.0) {
            for kind in Kind::layouts() {
                let linears = priced(&given, kind);
                let items: Vec<Item<'_>> = linears.iter().map(Linear::item).collect();
                let rules = Rules::of_keep(&items, keep);
                let spend = |ranks| {
                    let picks = picks(ranks, &linears, &rules);
                    let error: f64 = items.iter().zip(&picks).map(|(item, &pick)| item.error(pick)).sum();
                    (cost(&items, &picks), error)
                };
                let (spent, least) = spend(Ranks::Knapsack);
                prop_assume!(spent <= rules.budget);
                // It is optimal up to the one hull step that did not fit.
                let step = knapsack::widest_step(&items, &rules);
                for other in [Ranks::Uniform, Ranks::Welore, Ranks::Energy(None), Ranks::EffectiveRank] {
                    let (cost, error) = spend(other);
                    prop_assert!(cost > rules.budget || least <= error + step, "{}: {} {} {}", other, least, error, step);
                }
            }
        }
    }
}
