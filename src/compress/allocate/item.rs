//! The view that allocators have of a linear, costs, errors and scores, and the rules that they keep.

use crate::approx::low_rank::ErrorCurve;

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
    /// The smallest and the largest that an item can become.
    pub ends: Ends,
}

/// The smallest and the largest that an item with ranks can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ends {
    /// A weight: at least rank 1, and as it is where low rank does not save anything.
    #[default]
    Weight,
    /// The difference of two weights: left out at rank 0, and never stored except as factors, at most of full rank.
    Residual,
}

impl Rules {
    /// A budget of `keep` of the parameters of all items: ⌊keep · Σ m n⌋.
    pub fn of_keep(items: &[Item<'_>], keep: f64) -> Self {
        let total: u64 = items.iter().map(|item| item.dense_cost).sum();
        // Slightly above, so that 0.7 of 10 is 7 and not 6.
        let budget = (keep * total as f64 + 1e-6).floor() as u64;
        Self { budget, keep, floor: 0.0, multiple: 1, fill: false, ends: Ends::default() }
    }

    pub(super) fn round_down(&self, rank: usize) -> usize {
        rank / self.multiple * self.multiple
    }
}

/// The choice for an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// The item stays as it is.
    Dense,
    /// The candidate with this index, which is the rank if candidates are ranks.
    Candidate(usize),
}

/// A possible replacement of an item.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// In the unit of the budget.
    pub cost: u64,
    /// Squared error, weighted by its cost to the model, so that items compare.
    pub error: f64,
}

/// Something that a budget is spent on. It may stay as it is, without an error.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    /// The cost if it stays as it is, in the unit of the budget.
    pub dense_cost: u64,
    /// The possible replacements.
    pub candidates: Candidates<'a>,
}

/// The possible replacements of an item.
#[derive(Debug, Clone, Copy)]
pub enum Candidates<'a> {
    /// One that is always taken: rank 0 of a matrix of zeros.
    Free(Candidate),
    /// One for every rank.
    Ranks(Ladder<'a>),
    /// Any others, in no order; only the knapsack takes them.
    Menu(&'a [Candidate]),
}

/// The candidates of every rank from 0 to the largest.
#[derive(Debug, Clone, Copy)]
pub struct Ladder<'a> {
    /// By rank.
    pub candidates: &'a [Candidate],
    /// Cost in parameters by rank. Published methods divide parameters, even if the budget is in bytes.
    pub parameters: &'a [u64],
    /// Cost in parameters of the item as it is.
    pub n_weights: u64,
    /// What a published rule goes by, from `Allocator::scores`; empty for other allocators.
    pub scores: &'a [f64],
}

/// The candidates of ranks with these costs, from rank 0 up. Errors come from the curve, times
/// `weight`; without a curve they fall so that ranks grow evenly.
pub fn candidates_by_rank(costs: &[u64], curve: Option<&ErrorCurve>, weight: f64) -> Vec<Candidate> {
    let errors: Vec<f64> = match curve {
        None => (1..=costs.len()).map(|n| 1.0 / n as f64).collect(),
        Some(curve) => {
            let energies = curve.energies();
            // tail[r] = Σ_{i ≥ r} σ_i²
            let mut tail = vec![0.0; energies.len() + 1];
            for (i, energy) in energies.iter().enumerate().rev() {
                tail[i] = tail[i + 1] + energy;
            }
            (0..costs.len()).map(|rank| weight * tail[rank.min(energies.len())]).collect()
        }
    };
    costs.iter().zip(errors).map(|(&cost, error)| Candidate { cost, error }).collect()
}

impl<'a> Item<'a> {
    /// The cost of a pick.
    ///
    /// # Panics
    /// If it is not possible for the item.
    pub fn cost(&self, pick: Pick) -> u64 {
        self.priced(pick).cost
    }

    /// Weighted squared error of a pick.
    pub(super) fn error(&self, pick: Pick) -> f64 {
        self.priced(pick).error
    }

    fn priced(&self, pick: Pick) -> Candidate {
        match (pick, self.candidates) {
            (Pick::Dense, _) => Candidate { cost: self.dense_cost, error: 0.0 },
            (Pick::Candidate(_), Candidates::Free(candidate)) => candidate,
            (Pick::Candidate(at), Candidates::Ranks(Ladder { candidates, .. }) | Candidates::Menu(candidates)) => {
                candidates[at]
            }
        }
    }

    pub(super) fn ladder(&self) -> &Ladder<'a> {
        match &self.candidates {
            Candidates::Ranks(ladder) => ladder,
            Candidates::Free(_) | Candidates::Menu(_) => {
                unreachable!("invariant: only the knapsack gets other candidates than ranks")
            }
        }
    }
}

impl Ladder<'_> {
    /// Largest possible rank.
    pub(super) fn largest_rank(&self) -> usize {
        self.parameters.len().saturating_sub(1)
    }

    /// Largest rank with fewer parameters than the item as it is.
    pub(super) fn saving_rank(&self) -> usize {
        self.parameters.partition_point(|&parameters| parameters < self.n_weights).saturating_sub(1)
    }

    /// Largest rank with at most `keep` of the parameters of the matrix.
    pub(super) fn uniform_rank(&self, keep: f64) -> usize {
        let largest = self.largest_rank();
        if keep >= 1.0 {
            return largest;
        }
        let budget = (keep * self.n_weights as f64 + 1e-6).floor() as u64;
        self.parameters.partition_point(|&parameters| parameters <= budget).saturating_sub(1).min(largest)
    }

    /// `rank`, rounded down to the rules' multiple; dense if low rank would not save anything.
    pub(super) fn pick(&self, rank: usize, rules: &Rules) -> Pick {
        if rules.ends == Ends::Residual {
            let rank = rules.round_down(rank.min(self.largest_rank())).max(self.smallest_rank(rules));
            return Pick::Candidate(rank.min(self.largest_rank()));
        }
        let saving_rank = self.saving_rank();
        if rank > saving_rank {
            return Pick::Dense;
        }
        let rank = rules.round_down(rank).max(self.smallest_rank(rules));
        if rank > saving_rank { Pick::Dense } else { Pick::Candidate(rank) }
    }

    /// The floor: a share of the uniform rank, and at least the multiple for weights.
    pub(super) fn smallest_rank(&self, rules: &Rules) -> usize {
        let uniform = self.uniform_rank(rules.keep);
        let floor = rules.round_down((rules.floor * uniform as f64) as usize);
        if rules.ends == Ends::Residual { floor } else { floor.max(rules.multiple) }
    }
}
