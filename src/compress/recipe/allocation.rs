//! How ranks are allocated, without a base.

use std::num::NonZeroUsize;

use super::limit::{Limit, Reduction};
use crate::compress::allocate::Ranks;
use crate::compress::scale::{DepthWeight, Sensitivity};

/// How ranks are allocated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RankAllocation {
    /// The same rank for every linear, at most its full rank.
    Fixed(usize),
    /// The rank that keeps the same share of the parameters of every linear. All ranks are equal in this sense, and no
    /// other could be their floor.
    Uniform {
        /// The most that all linears may cost together.
        limit: Reduction,
        /// Ranks are multiples of this.
        multiple: NonZeroUsize,
    },
    /// A rank per linear.
    PerLinear {
        /// The allocator, with its limit.
        rule: Rule,
        /// The ranks that may be chosen.
        steps: RankSteps,
    },
}

/// The ranks that an allocator may choose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankSteps {
    /// Share of the uniform rank that every low-rank linear keeps, in [0, 1].
    pub floor: f64,
    /// Ranks are multiples of this.
    pub multiple: NonZeroUsize,
}

/// An allocator of a rank per linear, with its limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// The singular values of plain spectra above one threshold (WeLore, Jaiswal et al. 2024).
    Welore(Reduction),
    /// Smallest ranks that keep the largest affordable share of the energy.
    Energy(Reduction),
    /// Smallest ranks that keep this share of the energy, or less if the limit requires it.
    EnergyShare(f64, Option<Limit>),
    /// Ranks in proportion to `√(effective rank / (m + n))` (D-Rank, Mi et al. 2025).
    EffectiveRank(Reduction),
    /// The least sum of errors, each times its sensitivity.
    Knapsack(KnapsackSettings),
}

/// The allocator that minimizes the sum of errors, each times its sensitivity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KnapsackSettings {
    /// The most that the chosen candidates may cost together.
    pub limit: Reduction,
    /// How errors of different linears compare.
    pub sensitivity: Sensitivity,
    /// Additional weight of errors in early blocks.
    pub depth_weight: DepthWeight,
}

impl RankAllocation {
    pub(super) fn ranks(self) -> Ranks {
        match self {
            Self::Fixed(rank) => Ranks::Fixed(rank),
            Self::Uniform { .. } => Ranks::Uniform,
            Self::PerLinear { rule: Rule::Welore(_), .. } => Ranks::Welore,
            Self::PerLinear { rule: Rule::Energy(_), .. } => Ranks::Energy(None),
            Self::PerLinear { rule: Rule::EnergyShare(share, _), .. } => Ranks::Energy(Some(share)),
            Self::PerLinear { rule: Rule::EffectiveRank(_), .. } => Ranks::EffectiveRank,
            Self::PerLinear { rule: Rule::Knapsack(_), .. } => Ranks::Knapsack,
        }
    }

    pub(super) fn limit(self) -> Option<Limit> {
        match self {
            Self::Fixed(_) => None,
            Self::Uniform { limit, .. } => Some(limit.limit()),
            Self::PerLinear { rule, .. } => match rule {
                Rule::Welore(limit) | Rule::Energy(limit) | Rule::EffectiveRank(limit) => Some(limit.limit()),
                Rule::Knapsack(KnapsackSettings { limit, .. }) => Some(limit.limit()),
                Rule::EnergyShare(_, limit) => limit,
            },
        }
    }

    pub(super) fn steps(self) -> Option<RankSteps> {
        match self {
            Self::Fixed(_) => None,
            Self::Uniform { multiple, .. } => Some(RankSteps { floor: 0.0, multiple }),
            Self::PerLinear { steps, .. } => Some(steps),
        }
    }

    pub(super) fn knapsack(self) -> Option<KnapsackSettings> {
        match self {
            Self::PerLinear { rule: Rule::Knapsack(knapsack), .. } => Some(knapsack),
            _ => None,
        }
    }
}
