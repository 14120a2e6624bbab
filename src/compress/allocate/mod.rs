//! Chooses a rank for each linear, under a budget of parameters or bytes. Each allocator is one file and one line in
//! [`Ranks::allocator`].

mod effective_rank;
mod energy;
mod fixed;
mod knapsack;
mod uniform;
mod welore;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::approx::low_rank::ErrorCurve;

/// The choice for an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// The item stays as it is.
    Dense,
    /// All weights of the item are zero: rank 0.
    Zeros,
    /// A low rank.
    Rank(usize),
    /// The candidate with this index.
    Candidate(usize),
}

/// Something that a budget is spent on, described by costs and errors alone.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    /// Number of weights as it is.
    pub n_weights: u64,
    /// Number of parameters at every rank from 0 to the largest possible.
    pub parameters: &'a [u64],
    /// Largest rank with fewer parameters.
    pub saving_rank: usize,
    /// Weight of a rank relative to those of other items: rows plus columns.
    pub rank_weight: f64,
    /// Bytes as it is, and at every rank from 0, if the budget is in bytes.
    pub bytes: Option<(u64, &'a [u64])>,
    /// The spectrum that the allocator needs.
    pub curve: Option<&'a ErrorCurve>,
    /// Cost to the model of a unit of squared error; it makes errors of items comparable.
    pub sensitivity: f64,
    /// The alternatives to ranks; if there are any, the item gets no rank.
    pub candidates: &'a [Candidate],
    /// Whether all weights are zero: the item then gets rank 0, and needs no spectrum.
    pub is_zero: bool,
}

/// An alternative that an item may be replaced by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// In the unit of the budget.
    pub cost: u64,
    /// Squared error, in the metric of the curves.
    pub error: f64,
}

impl Item<'_> {
    /// The cost of the item as it is.
    pub fn dense_cost(&self) -> u64 {
        self.bytes.map_or(self.n_weights, |(dense, _)| dense)
    }

    /// The cost of a pick.
    ///
    /// # Panics
    /// If it is not possible for the item.
    pub fn cost(&self, pick: Pick) -> u64 {
        let ranks = self.bytes.map_or(self.parameters, |(_, ranks)| ranks);
        match pick {
            Pick::Dense => self.dense_cost(),
            Pick::Zeros => ranks.first().copied().unwrap_or(0),
            Pick::Rank(rank) => ranks[rank],
            Pick::Candidate(at) => self.candidates[at].cost,
        }
    }

    /// Largest possible rank.
    fn largest_rank(&self) -> usize {
        self.parameters.len().saturating_sub(1)
    }

    /// `rank`, rounded down to the rules' multiple; dense if low rank would not save anything.
    fn pick(&self, rank: usize, rules: &Rules) -> Pick {
        if rank > self.saving_rank {
            return Pick::Dense;
        }
        let rank = rules.round_down(rank).max(self.smallest_rank(rules));
        if rank > self.saving_rank { Pick::Dense } else { Pick::Rank(rank) }
    }

    /// The floor: a share of the uniform rank, and at least the multiple.
    fn smallest_rank(&self, rules: &Rules) -> usize {
        let uniform = uniform::rank(self, rules.keep);
        rules.round_down((rules.floor * uniform as f64) as usize).max(rules.multiple)
    }

    fn curve(&self) -> &ErrorCurve {
        self.curve.expect("invariant: an allocator gets the spectra that it asks for")
    }

    /// Weighted squared error of a pick.
    fn error(&self, pick: Pick) -> f64 {
        match pick {
            Pick::Dense | Pick::Zeros => 0.0,
            Pick::Rank(rank) => self.sensitivity * self.curve().squared_error(rank),
            Pick::Candidate(at) => self.sensitivity * self.candidates[at].error,
        }
    }
}

/// The rules for every allocator.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// In the unit of the items' costs.
    pub budget: u64,
    /// The budget as a share of the cost of all items when dense.
    pub keep: f64,
    /// Share of the uniform rank that every low-rank linear keeps.
    pub floor: f64,
    /// Ranks are multiples of this.
    pub multiple: usize,
    /// Whether the remaining budget is spent rank by rank.
    pub fill: bool,
}

impl Rules {
    /// A budget of `keep` of the parameters of all items: ⌊keep · Σ m n⌋.
    pub fn of_keep(items: &[Item<'_>], keep: f64) -> Self {
        let total: u64 = items.iter().map(Item::dense_cost).sum();
        // Slightly above, so that 0.7 of 10 is 7 and not 6.
        let budget = (keep * total as f64 + 1e-6).floor() as u64;
        Self { budget, keep, floor: 0.0, multiple: 1, fill: false }
    }

    fn round_down(&self, rank: usize) -> usize {
        rank / self.multiple * self.multiple
    }
}

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

/// A way to allocate ranks.
pub trait Allocator {
    /// The spectra that the choices depend on.
    fn spectra(&self) -> Spectra;

    /// The choices, one per item.
    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Pick>;
}

/// The choices of `ranks` under the budget, or the smallest ranks if even they exceed it. Items of zeros get rank 0,
/// which leaves their share of the budget to the others.
pub fn allocate(ranks: Ranks, items: &[Item<'_>], rules: &Rules) -> Vec<Pick> {
    if rules.keep >= 1.0 && ranks.is_budgeted() {
        return vec![Pick::Dense; items.len()];
    }
    let others: Vec<Item<'_>> = items.iter().filter(|item| !item.is_zero).copied().collect();
    let mut found = ranks.allocator().choices(&others, rules);
    if rules.fill && ranks.is_budgeted() {
        fill(&others, rules, &mut found);
    }
    let mut found = found.into_iter();
    let mut next = || found.next().expect("invariant: an allocator makes a choice an item");
    items.iter().map(|item| if item.is_zero { Pick::Zeros } else { next() }).collect()
}

/// Total cost of choices.
pub fn cost(items: &[Item<'_>], choices: &[Pick]) -> u64 {
    items.iter().zip(choices).map(|(item, &choice)| item.cost(choice)).sum()
}

/// Spends the remaining budget step by step, each time on the rank that gains most for its cost.
fn fill(items: &[Item<'_>], rules: &Rules, choices: &mut [Pick]) {
    let mut left = rules.budget.saturating_sub(cost(items, choices));
    loop {
        let step = |(i, item): (usize, &Item<'_>)| {
            let Pick::Rank(rank) = choices[i] else { return None };
            let next = item.pick(rank + rules.multiple, rules);
            let extra = item.cost(next).checked_sub(item.cost(choices[i]))?;
            let error = |pick: Pick| match (item.curve, pick) {
                // Without a spectrum, ranks grow evenly.
                (None, Pick::Rank(r)) => 1.0 / (r + 1) as f64,
                (_, pick) => item.error(pick),
            };
            let gain = (error(choices[i]) - error(next)) / extra.max(1) as f64;
            (extra <= left && next != choices[i]).then_some((gain, i, next, extra))
        };
        let best =
            items.iter().enumerate().filter_map(step).reduce(|best, new| if new.0 > best.0 { new } else { best });
        let Some((_, i, next, extra)) = best else { return };
        choices[i] = next;
        left -= extra;
    }
}

/// The choices `at(t)` for the largest affordable t in [0, 1], where cost grows with t; those at 0 if none is
/// affordable.
fn largest_affordable(items: &[Item<'_>], rules: &Rules, at: impl Fn(f64) -> Vec<Pick>) -> Vec<Pick> {
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

/// The allocators, by their names on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
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
const FULL: usize = usize::MAX;

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
        ranks.ok_or_else(|| {
            format!("`{text}` is not one of uniform, welore, energy, energy:SHARE, effective-rank, knapsack, full, fixed:RANK")
        })
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

    /// Shape, curve and sensitivity of a linear.
    type Linear = (Shape, ErrorCurve, f64);

    prop_compose! {
        fn linear()(m in 2usize..80, n in 2usize..80)
            (values in proptest::collection::vec(0.0f64..1e6, m.min(n)), m in Just(m), n in Just(n), s in 0.1f64..10.0)
            -> Linear {
            let mut values = values;
            values.sort_by(|x, y| y.total_cmp(x));
            ((m, n), ErrorCurve::new(values), s)
        }
    }

    /// The costs of the ranks of linears, in parameters and in bytes.
    struct Costs {
        parameters: Vec<Vec<u64>>,
        bytes: Vec<(u64, Vec<u64>)>,
    }

    impl Costs {
        /// Two bytes per parameter, and a constant as for a header or a permutation.
        fn of(linears: &[Linear], kind: Kind) -> Self {
            let ranks = |shape: Shape| 0..=kind.fitting().largest_rank(shape);
            let parameters = |(shape, ..): &Linear| ranks(*shape).map(|r| kind.n_parameters(r, *shape)).collect();
            let bytes = |(shape, ..): &Linear| {
                let cost = |r: usize| 2 * kind.n_parameters(r, *shape) + 200;
                (2 * (shape.0 * shape.1) as u64 + 90, ranks(*shape).map(cost).collect())
            };
            Self { parameters: linears.iter().map(parameters).collect(), bytes: linears.iter().map(bytes).collect() }
        }

        fn items<'a>(&'a self, linears: &'a [Linear], kind: Kind, in_bytes: bool) -> Vec<Item<'a>> {
            let item = |(i, (shape, curve, sensitivity)): (usize, &'a Linear)| Item {
                n_weights: (shape.0 * shape.1) as u64,
                parameters: &self.parameters[i],
                saving_rank: kind.fitting().largest_saving_rank(*shape),
                rank_weight: (shape.0 + shape.1) as f64,
                bytes: in_bytes.then(|| (self.bytes[i].0, &self.bytes[i].1[..])),
                curve: Some(curve),
                sensitivity: *sensitivity,
                candidates: &[],
                is_zero: false,
            };
            linears.iter().enumerate().map(item).collect()
        }
    }

    proptest! {
        #[test]
        fn budgets_are_kept_and_ranks_are_possible(
            linears in proptest::collection::vec(linear(), 1..12), keep in 0.05f64..1.2,
            multiple in 1usize..5, floor in 0.0f64..0.6, in_bytes: bool,
        ) {
            for kind in Kind::layouts() {
                let costs = Costs::of(&linears, kind);
                let items = costs.items(&linears, kind, in_bytes);
                for ranks in BUDGETED {
                    let rules = Rules { floor, multiple, fill: in_bytes, ..Rules::of_keep(&items, keep) };
                    let picks = allocate(ranks, &items, &rules);
                    prop_assert_eq!(picks.len(), items.len());
                    // Every linear keeps its smallest rank, even if a very small budget cannot pay for it.
                    let floor: u64 = items.iter().map(|i| i.cost(i.pick(i.smallest_rank(&rules), &rules))).sum();
                    let spent = cost(&items, &picks);
                    prop_assert!(spent <= rules.budget.max(floor), "{} spends {} of {}", ranks, spent, rules.budget);
                    for (pick, item) in picks.iter().zip(&items) {
                        if let Pick::Rank(r) = pick {
                            prop_assert!(*r >= item.smallest_rank(&rules) && *r <= item.saving_rank);
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
                            if let Pick::Rank(r) = pick {
                                let next = item.pick(r + multiple, &rules);
                                prop_assert!(item.cost(next) <= item.cost(pick) || item.cost(next) - item.cost(pick) > left);
                            }
                        }
                    }
                }
            }
        }

        #[test]
        fn no_allocator_beats_the_knapsack(linears in proptest::collection::vec(linear(), 1..12), keep in 0.3f64..1.0) {
            for kind in Kind::layouts() {
                let costs = Costs::of(&linears, kind);
                let items = costs.items(&linears, kind, false);
                let rules = Rules::of_keep(&items, keep);
                let spend = |ranks| {
                    let picks = allocate(ranks, &items, &rules);
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
