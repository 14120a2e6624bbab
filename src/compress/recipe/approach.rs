//! The structure that replaces the targeted linears. Each setting exists only in the variants where it has an effect.

use super::{CompensateRank, DepthWeight, FactorBits, Sensitivity};
use crate::compress::allocate::Ranks;
use crate::compress::compensate::Compensate;
use crate::operator::Kind;
use crate::quantize::Quant;

/// The structure that replaces a weight `W` (out, in).
#[derive(Debug, Clone, PartialEq)]
pub enum Approach {
    /// `W ≈ B·A`.
    LowRank(LowRankApproach),
    /// `W ≈ Q`, or `W ≈ Q + B·A`.
    Quantized(QuantizedApproach),
}

/// Low rank without a base.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRankApproach {
    /// How ranks are chosen.
    pub allocation: Allocation,
    /// How factors are stored.
    pub storage: FactorStorage,
    /// μ in [0, 1] of the sequential mode; `None` decomposes all linears on the inputs of the source.
    pub anchor: Option<f64>,
    /// Whether right factors are shared.
    pub sharing: Sharing,
}

/// Whether linears that read the same input may share their right factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Each linear has its own.
    None,
    /// Right factors are shared if the knapsack finds that better.
    Allowed,
}

/// How ranks are allocated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Allocation {
    /// The same rank for every linear, at most its full rank.
    Fixed(usize),
    /// A rank per linear.
    PerLinear {
        /// The allocator, with its limit.
        rule: Rule,
        /// Share of the uniform rank that every low-rank linear keeps, in [0, 1].
        floor: f64,
        /// Ranks are multiples of this, at least 1.
        multiple: usize,
    },
}

/// An allocator with its limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// The rank that keeps the same share of the parameters of every linear.
    Uniform(Limit),
    /// The singular values of plain spectra above one threshold (WeLore, Jaiswal et al. 2024).
    Welore(Limit),
    /// Smallest ranks that keep the largest affordable share of the energy.
    Energy(Limit),
    /// Smallest ranks that keep this share of the energy, or less if the limit requires it.
    EnergyShare(f64, Option<Limit>),
    /// Ranks in proportion to `√(effective rank / (m + n))` (D-Rank, Mi et al. 2025).
    EffectiveRank(Limit),
    /// The least sum of errors, each times its sensitivity.
    Knapsack {
        /// The most that the chosen candidates may cost together.
        limit: Limit,
        /// How errors of different linears compare.
        sensitivity: Sensitivity,
        /// Additional weight of errors in early blocks.
        depth_weight: DepthWeight,
    },
}

/// How factors are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactorStorage {
    /// Stored in the dtype of the weight.
    Plain(Kind),
    /// With the order of ranks stored as well, so that truncation is exact (`--elastic`). Never the layout `factors`,
    /// which is ordered itself.
    Elastic(Kind),
    /// Stored as integers.
    Quantized(Kind, FactorBits),
}

/// A quantized base per linear, with or without factors for its error.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedApproach {
    /// The quantizers, and the factors.
    pub bases: Bases,
    /// Never `Measured`, whose trials truncate weights to a low rank.
    pub sensitivity: Sensitivity,
    /// γ of the depth weight.
    pub gamma: f64,
}

/// The quantizers, and the factors.
#[derive(Debug, Clone, PartialEq)]
pub enum Bases {
    /// The same for every linear; no budget.
    Fixed {
        /// The quantizer.
        quant: Quant,
        /// Factors of this rank for every linear.
        factors: Option<Factors<usize>>,
    },
    /// The limit chooses a quantizer per linear and, with [`CompensateRank::Auto`], the rank of its factors.
    Chosen {
        /// The quantizers to choose from.
        menu: Vec<Quant>,
        /// Factors of a given rank, or of a rank that the limit chooses.
        factors: Option<Factors<CompensateRank>>,
        /// The budget.
        limit: Limit,
    },
}

/// Factors that compensate the error of a base.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors<R> {
    /// The method, which decides the error that the factors minimize.
    pub method: Compensate,
    /// r of `B` (out, r) and `A` (r, in).
    pub rank: R,
    /// Integers instead of the dtype of the weight.
    pub bits: Option<FactorBits>,
}

/// A limit on the size of the output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// Share of the parameters of the targeted linears, or of their bytes if bases are quantized. In (0, 1].
    Keep(f64),
    /// Bytes of the weight files.
    Bytes(u64),
    /// Mean bits per weight of the targeted linears, in (0, 32].
    Bits(f64),
}

/// The budget of allocators: a [`Limit`], or none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// As [`Limit::Keep`].
    Keep(f64),
    /// As [`Limit::Bytes`].
    Bytes(u64),
    /// As [`Limit::Bits`].
    Bits(f64),
    /// The recipe gives ranks or quantizers itself.
    None,
}

impl From<Option<Limit>> for Budget {
    fn from(limit: Option<Limit>) -> Self {
        match limit {
            Some(Limit::Keep(share)) => Self::Keep(share),
            Some(Limit::Bytes(bytes)) => Self::Bytes(bytes),
            Some(Limit::Bits(bits)) => Self::Bits(bits),
            None => Self::None,
        }
    }
}

impl Rule {
    fn ranks(self) -> Ranks {
        match self {
            Self::Uniform(_) => Ranks::Uniform,
            Self::Welore(_) => Ranks::Welore,
            Self::Energy(_) => Ranks::Energy(None),
            Self::EnergyShare(share, _) => Ranks::Energy(Some(share)),
            Self::EffectiveRank(_) => Ranks::EffectiveRank,
            Self::Knapsack { .. } => Ranks::Knapsack,
        }
    }

    fn limit(self) -> Option<Limit> {
        match self {
            Self::Uniform(limit)
            | Self::Welore(limit)
            | Self::Energy(limit)
            | Self::EffectiveRank(limit)
            | Self::Knapsack { limit, .. } => Some(limit),
            Self::EnergyShare(_, limit) => limit,
        }
    }
}

impl Bases {
    fn menu(&self) -> &[Quant] {
        match self {
            Self::Fixed { quant, .. } => std::slice::from_ref(quant),
            Self::Chosen { menu, .. } => menu,
        }
    }

    fn factors(&self) -> Option<Factors<CompensateRank>> {
        match self {
            Self::Fixed { factors, .. } => factors.map(|Factors { method, rank, bits }| Factors {
                method,
                rank: CompensateRank::Fixed(rank),
                bits,
            }),
            Self::Chosen { factors, .. } => *factors,
        }
    }
}

impl Approach {
    /// The menu of quantizers; empty for low rank alone.
    pub fn quant(&self) -> &[Quant] {
        match self {
            Self::LowRank(_) => &[],
            Self::Quantized(quantized) => quantized.bases.menu(),
        }
    }

    /// The factors that compensate a quantized base.
    pub fn factors(&self) -> Option<Factors<CompensateRank>> {
        match self {
            Self::LowRank(_) => None,
            Self::Quantized(quantized) => quantized.bases.factors(),
        }
    }

    /// The allocator; a knapsack over quantizers and ranks if bases are quantized.
    pub fn ranks(&self) -> Ranks {
        match self {
            Self::LowRank(LowRankApproach { allocation: Allocation::Fixed(rank), .. }) => Ranks::Fixed(*rank),
            Self::LowRank(LowRankApproach { allocation: Allocation::PerLinear { rule, .. }, .. }) => rule.ranks(),
            Self::Quantized(_) => Ranks::Knapsack,
        }
    }

    /// The budget.
    pub fn budget(&self) -> Budget {
        match self {
            Self::LowRank(LowRankApproach { allocation: Allocation::PerLinear { rule, .. }, .. }) => {
                rule.limit().into()
            }
            Self::Quantized(QuantizedApproach { bases: Bases::Chosen { limit, .. }, .. }) => Some(*limit).into(),
            Self::LowRank(_) | Self::Quantized(_) => Budget::None,
        }
    }

    /// The layout of factors.
    pub fn layout(&self) -> Kind {
        match self {
            Self::LowRank(LowRankApproach { storage, .. }) => match storage {
                FactorStorage::Plain(layout) | FactorStorage::Elastic(layout) | FactorStorage::Quantized(layout, _) => {
                    *layout
                }
            },
            Self::Quantized(_) => Kind::FACTORS,
        }
    }

    /// The integers that factors are stored as; `None` keeps the dtype of the weight.
    pub fn quant_factors(&self) -> Option<FactorBits> {
        match self {
            Self::LowRank(LowRankApproach { storage: FactorStorage::Quantized(_, bits), .. }) => Some(*bits),
            Self::LowRank(_) => None,
            Self::Quantized(_) => self.factors().and_then(|factors| factors.bits),
        }
    }

    /// The source of the knapsack's scale between linears; `None` for other allocators.
    pub fn sensitivity(&self) -> Option<Sensitivity> {
        self.knapsack().map(|(sensitivity, _)| sensitivity)
    }

    /// The depth weight of the knapsack; 0 for other allocators.
    pub fn depth_weight(&self) -> DepthWeight {
        self.knapsack().map_or(DepthWeight::Fixed(0.0), |(_, depth_weight)| depth_weight)
    }

    fn knapsack(&self) -> Option<(Sensitivity, DepthWeight)> {
        match self {
            Self::LowRank(LowRankApproach { allocation: Allocation::PerLinear { rule, .. }, .. }) => match rule {
                Rule::Knapsack { sensitivity, depth_weight, .. } => Some((*sensitivity, *depth_weight)),
                _ => None,
            },
            Self::LowRank(_) => None,
            Self::Quantized(QuantizedApproach { sensitivity, gamma, .. }) => {
                Some((*sensitivity, DepthWeight::Fixed(*gamma)))
            }
        }
    }

    /// Floor (a share of the uniform rank) and multiple, for ranks that are allocated per linear.
    pub fn rank_steps(&self) -> Option<(f64, usize)> {
        match self {
            Self::LowRank(LowRankApproach { allocation: Allocation::PerLinear { floor, multiple, .. }, .. }) => {
                Some((*floor, *multiple))
            }
            Self::LowRank(_) | Self::Quantized(_) => None,
        }
    }

    /// μ of the sequential mode.
    pub fn anchor(&self) -> Option<f64> {
        match self {
            Self::LowRank(low_rank) => low_rank.anchor,
            Self::Quantized(_) => None,
        }
    }

    /// Whether shared right factors are allowed.
    pub fn shares(&self) -> bool {
        matches!(self, Self::LowRank(LowRankApproach { sharing: Sharing::Allowed, .. }))
    }

    /// Whether the order of ranks is stored with the layout.
    pub fn is_elastic(&self) -> bool {
        matches!(self, Self::LowRank(LowRankApproach { storage: FactorStorage::Elastic(_), .. }))
    }
}
