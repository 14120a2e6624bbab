//! Which rank each linear gets, under a budget of parameters or bytes. One allocator a file, one line in
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

use super::low_rank::ErrorCurve;
use crate::model::Layout;

/// What becomes of one linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// Left as it is.
    Dense,
    /// Low rank, in the layout of the recipe.
    Rank(usize),
    /// A quantised base, and factors of some rank (or none, for 0) on top: of its variants the one with this number.
    Coded { variant: usize, rank: usize },
}

/// (out, in).
pub type Shape = (usize, usize);

impl Choice {
    /// Its rank, if it is of low rank or has factors.
    pub fn rank(self) -> Option<usize> {
        match self {
            Self::Dense | Self::Coded { rank: 0, .. } => None,
            Self::Rank(rank) | Self::Coded { rank, .. } => Some(rank),
        }
    }

    /// Parameters of the linear after the choice.
    pub fn n_parameters(self, layout: Layout, shape: Shape) -> u64 {
        match self {
            Self::Dense => (shape.0 * shape.1) as u64,
            Self::Rank(r) => layout.n_parameters(r, shape),
            Self::Coded { rank, .. } => (shape.0 * shape.1 + rank * (shape.0 + shape.1)) as u64,
        }
    }
}

/// One linear, as allocators see it.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    pub shape: Shape,
    pub layout: Layout,
    /// The spectrum that the allocator asked for.
    pub curve: Option<&'a ErrorCurve>,
    /// What a unit of squared error costs the model: the scale between matrices.
    pub sensitivity: f64,
    pub price: Price<'a>,
    /// What it may become with a quantised base; where there is any, it may not become low rank alone.
    pub coded: &'a [Coded],
    /// Whether all of its weights are zero: it then gets rank 0, and needs no spectrum.
    pub is_zero: bool,
}

/// A linear with a quantised base, as allocators see it.
#[derive(Debug, Clone, Copy)]
pub struct Coded {
    pub choice: Choice,
    /// In the unit of the budget.
    pub cost: u64,
    /// Squared error, in the metric of the curves.
    pub error: f64,
}

/// What choices cost, in the unit of the budget.
#[derive(Debug, Clone, Copy)]
pub enum Price<'a> {
    /// The budget counts parameters.
    Parameters,
    /// It counts bytes: of the dense linear, and of every rank from 0 on.
    Bytes { dense: u64, ranks: &'a [u64] },
}

impl Item<'_> {
    /// What a choice costs.
    ///
    /// # Panics
    /// When it may not be chosen.
    pub fn cost(&self, choice: Choice) -> u64 {
        match (choice, self.price) {
            (Choice::Coded { .. }, _) => {
                self.coded.iter().find(|coded| coded.choice == choice).expect("invariant: the choice is offered").cost
            }
            (choice, Price::Parameters) => choice.n_parameters(self.layout, self.shape),
            (Choice::Dense, Price::Bytes { dense, .. }) => dense,
            (Choice::Rank(rank), Price::Bytes { ranks, .. }) => ranks[rank],
        }
    }

    /// `rank`, rounded down to the rules' multiple; dense where low rank would save nothing.
    fn choice(&self, rank: usize, rules: &Rules) -> Choice {
        if rank > self.layout.largest_saving_rank(self.shape) {
            return Choice::Dense;
        }
        let rank = rules.round_down(rank).max(self.smallest_rank(rules));
        if rank > self.layout.largest_saving_rank(self.shape) { Choice::Dense } else { Choice::Rank(rank) }
    }

    /// The floor: a share of the uniform rank, at least 1 and at least the multiple.
    fn smallest_rank(&self, rules: &Rules) -> usize {
        let uniform = uniform::rank(self, rules.keep);
        rules.round_down((rules.floor * uniform as f64) as usize).max(rules.multiple)
    }

    fn curve(&self) -> &ErrorCurve {
        self.curve.expect("invariant: an allocator gets the spectra that it asks for")
    }
}

/// What every allocator obeys.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// In the unit of the items' prices.
    pub budget: u64,
    /// The budget as a share of what all items cost dense.
    pub keep: f64,
    /// Share of the uniform rank that every linear of low rank keeps.
    pub floor: f64,
    /// Ranks are multiples of this.
    pub multiple: usize,
    /// Whether what is left of the budget is spent rank by rank.
    pub fill: bool,
}

impl Rules {
    /// A budget of `keep` of the parameters of all items: ⌊keep · Σ m n⌋.
    pub fn of_keep(items: &[Item<'_>], keep: f64) -> Self {
        let total: u64 = items.iter().map(|item| item.cost(Choice::Dense)).sum();
        // A hair above, so that 0.7 of 10 is 7 and not 6.
        let budget = (keep * total as f64 + 1e-6).floor() as u64;
        Self { budget, keep, floor: 0.0, multiple: 1, fill: false }
    }

    fn round_down(&self, rank: usize) -> usize {
        rank / self.multiple * self.multiple
    }
}

/// The spectra that an allocator looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spectra {
    /// None: shapes decide.
    None,
    /// Of the plain weights.
    Plain,
    /// Of the weights in the metric of the method.
    Metric,
}

/// A way to share out ranks.
pub trait Allocator {
    fn spectra(&self) -> Spectra;

    /// The choices, one an item.
    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Choice>;
}

/// The choices of `ranks` under the budget. Where even the smallest ranks cost more, those. What is all zeros gets rank 0, and
/// leaves its share of the budget to the others.
pub fn allocate(ranks: Ranks, items: &[Item<'_>], rules: &Rules) -> Vec<Choice> {
    if rules.keep >= 1.0 && ranks.is_budgeted() {
        return vec![Choice::Dense; items.len()];
    }
    let others: Vec<Item<'_>> = items.iter().filter(|item| !item.is_zero).copied().collect();
    let mut found = ranks.allocator().choices(&others, rules);
    if rules.fill && ranks.is_budgeted() {
        fill(&others, rules, &mut found);
    }
    let mut found = found.into_iter();
    let mut next = || found.next().expect("invariant: an allocator makes a choice an item");
    items.iter().map(|item| if item.is_zero { Choice::Rank(0) } else { next() }).collect()
}

/// Total cost of choices.
pub fn cost(items: &[Item<'_>], choices: &[Choice]) -> u64 {
    items.iter().zip(choices).map(|(item, &choice)| item.cost(choice)).sum()
}

/// Spends what is left of the budget, a step of rank at a time, where it gains most for its cost.
fn fill(items: &[Item<'_>], rules: &Rules, choices: &mut [Choice]) {
    let mut left = rules.budget.saturating_sub(cost(items, choices));
    loop {
        let step = |(i, item): (usize, &Item<'_>)| {
            let Choice::Rank(rank) = choices[i] else { return None };
            let next = item.choice(rank + rules.multiple, rules);
            let extra = item.cost(next).checked_sub(item.cost(choices[i]))?;
            let error = |choice: Choice| match (item.curve, choice) {
                (_, Choice::Dense | Choice::Coded { .. }) => 0.0,
                (Some(curve), Choice::Rank(r)) => item.sensitivity * curve.squared_error(r),
                // Without a spectrum, ranks grow evenly.
                (None, Choice::Rank(r)) => 1.0 / (r + 1) as f64,
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

/// The choices `at(t)` of the largest t in [0, 1] that the budget pays for, where cost grows with t; else those of 0.
fn largest_affordable(items: &[Item<'_>], rules: &Rules, at: impl Fn(f64) -> Vec<Choice>) -> Vec<Choice> {
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

/// The allocators, as a user names them.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Ranks {
    #[default]
    Uniform,
    Welore,
    /// Smallest ranks that keep this share of the energy; none: the largest share that the budget pays for.
    Energy(Option<f64>),
    EffectiveRank,
    Knapsack,
    Fixed(usize),
}

impl Ranks {
    /// The allocator behind the name.
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

    /// Whether a budget may bound it.
    pub fn takes_budget(self) -> bool {
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

    prop_compose! {
        fn linear()(m in 2usize..80, n in 2usize..80)
            (values in proptest::collection::vec(0.0f64..1e6, m.min(n)), m in Just(m), n in Just(n), s in 0.1f64..10.0)
            -> (Shape, ErrorCurve, f64) {
            let mut values = values;
            values.sort_by(|x, y| y.total_cmp(x));
            ((m, n), ErrorCurve::new(values), s)
        }
    }

    /// Two bytes a parameter, with what a header or an order may add.
    fn bytes(linears: &[(Shape, ErrorCurve, f64)], layout: Layout) -> Vec<(u64, Vec<u64>)> {
        let of = |(shape, ..): &(Shape, ErrorCurve, f64)| {
            let ranks = 0..=shape.0.min(shape.1);
            let cost = |r: usize| 2 * layout.n_parameters(r, *shape) + 200;
            (2 * (shape.0 * shape.1) as u64 + 90, ranks.map(cost).collect())
        };
        linears.iter().map(of).collect()
    }

    fn items<'a>(
        linears: &'a [(Shape, ErrorCurve, f64)],
        layout: Layout,
        bytes: Option<&'a [(u64, Vec<u64>)]>,
    ) -> Vec<Item<'a>> {
        let price = |i: usize| match bytes {
            Some(bytes) => Price::Bytes { dense: bytes[i].0, ranks: &bytes[i].1 },
            None => Price::Parameters,
        };
        linears
            .iter()
            .enumerate()
            .map(|(i, (shape, curve, s))| Item {
                shape: *shape,
                layout,
                curve: Some(curve),
                sensitivity: *s,
                price: price(i),
                coded: &[],
                is_zero: false,
            })
            .collect()
    }

    proptest! {
        #[test]
        fn budgets_are_kept_and_ranks_are_possible(
            linears in proptest::collection::vec(linear(), 1..12), keep in 0.05f64..1.2,
            multiple in 1usize..5, floor in 0.0f64..0.6, in_bytes: bool,
        ) {
            for layout in [Layout::Factors, Layout::Pivot] {
                let prices = bytes(&linears, layout);
                let items = items(&linears, layout, in_bytes.then_some(&prices[..]));
                for ranks in BUDGETED {
                    let rules = Rules { floor, multiple, fill: in_bytes, ..Rules::of_keep(&items, keep) };
                    let choices = allocate(ranks, &items, &rules);
                    prop_assert_eq!(choices.len(), items.len());
                    // Every linear keeps its smallest rank, which very small budgets cannot pay for.
                    let floor: u64 = items.iter().map(|i| i.cost(i.choice(i.smallest_rank(&rules), &rules))).sum();
                    let spent = cost(&items, &choices);
                    prop_assert!(spent <= rules.budget.max(floor), "{} spends {} of {}", ranks, spent, rules.budget);
                    for (choice, item) in choices.iter().zip(&items) {
                        if let Choice::Rank(r) = choice {
                            prop_assert!(*r >= item.smallest_rank(&rules) && *r <= layout.largest_saving_rank(item.shape));
                            prop_assert_eq!(r % multiple, 0);
                        }
                        if keep >= 1.0 {
                            prop_assert_eq!(*choice, Choice::Dense);
                        }
                    }
                    if rules.fill && spent <= rules.budget {
                        // No step of rank is left that the budget would pay for.
                        let left = rules.budget - spent;
                        for (&choice, item) in choices.iter().zip(&items) {
                            if let Choice::Rank(r) = choice {
                                let next = item.choice(r + multiple, &rules);
                                prop_assert!(item.cost(next) <= item.cost(choice) || item.cost(next) - item.cost(choice) > left);
                            }
                        }
                    }
                }
            }
        }

        #[test]
        fn no_allocator_beats_the_knapsack(linears in proptest::collection::vec(linear(), 1..12), keep in 0.3f64..1.0) {
            for layout in [Layout::Factors, Layout::Pivot] {
                let items = items(&linears, layout, None);
                let rules = Rules::of_keep(&items, keep);
                let error = |ranks| -> f64 {
                    let choices = allocate(ranks, &items, &rules);
                    let error = |(item, choice): (&Item<'_>, &Choice)| {
                        choice.rank().map_or(0.0, |r| item.sensitivity * item.curve().squared_error(r))
                    };
                    items.iter().zip(&choices).map(error).sum()
                };
                let affordable = cost(&items, &allocate(Ranks::Knapsack, &items, &rules)) <= rules.budget;
                // The knapsack is optimal up to the one step that did not fit.
                let step = items.iter().map(|i| i.sensitivity * i.curve().squared_error(0)).fold(0.0, f64::max);
                for other in [Ranks::Uniform, Ranks::Welore, Ranks::Energy(None), Ranks::EffectiveRank] {
                    prop_assert!(!affordable || error(Ranks::Knapsack) <= error(other) + step, "{}", other);
                }
            }
        }
    }
}
