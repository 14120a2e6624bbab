//! The structure that replaces the targeted linears. A setting belongs to the variants where it can have an effect;
//! [`Recipe::new`](super::Recipe::new) refuses values that have none, such as a floor of ranks that are all equal.

use crate::compress::allocate::Ranks;
use crate::compress::compensate::{Compensate, CompensateRank};
use crate::compress::options::FactorBits;
use crate::compress::scale::{DepthWeight, Sensitivity};
use crate::operator::Kind;
use crate::quantize::Quant;

/// How the targeted linears are replaced.
#[derive(Debug, Clone, PartialEq)]
pub enum Approach {
    /// Every linear stays as it is: the budget is the whole model, and nothing is measured or decomposed.
    Dense,
    /// `W ≈ B·A`.
    LowRank(LowRankApproach),
    /// `W ≈ Q`, or `W ≈ Q + B·A`.
    Quantized(Bases),
}

/// Low rank without a base.
#[derive(Debug, Clone, PartialEq)]
pub enum LowRankApproach {
    /// Each linear has factors of its own.
    Separate {
        /// How ranks are allocated.
        allocation: RankAllocation,
        /// How factors are stored.
        storage: FactorStorage,
        /// μ in [0, 1] of the sequential mode; `None` decomposes all linears on the inputs of the source.
        anchor: Option<f64>,
    },
    /// Linears that read the same input share their right factor where the knapsack finds that better. All are
    /// decomposed on the inputs of the source.
    Shared {
        /// The allocator.
        knapsack: KnapsackSettings,
        /// The ranks that it may choose.
        steps: RankSteps,
        /// How factors are stored.
        storage: FloatStorage,
    },
}

/// How ranks are allocated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RankAllocation {
    /// The same rank for every linear, at most its full rank.
    Fixed(usize),
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
    /// Ranks are multiples of this, at least 1.
    pub multiple: usize,
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
    Knapsack(KnapsackSettings),
}

/// The allocator that minimizes the sum of errors, each times its sensitivity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KnapsackSettings {
    /// The most that the chosen candidates may cost together.
    pub limit: Limit,
    /// How errors of different linears compare.
    pub sensitivity: Sensitivity,
    /// Additional weight of errors in early blocks.
    pub depth_weight: DepthWeight,
}

/// How factors are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactorStorage {
    /// In the dtype of the weight.
    Float(FloatStorage),
    /// As integers, which cannot be truncated by rank.
    Quantized(Kind, FactorBits),
}

/// How factors in the dtype of the weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatStorage {
    /// In this layout.
    Plain(Kind),
    /// With the order of ranks beside it, so that truncation is exact (`--elastic`).
    Elastic(Unordered),
}

/// A layout that does not store its ranks in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unordered(Kind);

impl Unordered {
    /// The layout, unless its ranks are in order, as in `factors`.
    pub fn new(layout: Kind) -> Option<Self> {
        (!layout.fitting().is_nested()).then_some(Self(layout))
    }

    /// The layout.
    pub fn layout(self) -> Kind {
        self.0
    }
}

/// How errors of quantized linears compare. [`Sensitivity::Measured`] is not among them, because its trials
/// truncate weights to a low rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BaseSensitivity {
    /// As [`Sensitivity::SecondOrder`].
    SecondOrder,
    /// As [`Sensitivity::Energy`].
    Energy,
}

impl From<BaseSensitivity> for Sensitivity {
    fn from(sensitivity: BaseSensitivity) -> Self {
        match sensitivity {
            BaseSensitivity::SecondOrder => Self::SecondOrder,
            BaseSensitivity::Energy => Self::Energy,
        }
    }
}

/// A quantized base per linear, with or without factors for its error.
#[derive(Debug, Clone, PartialEq)]
pub enum Bases {
    /// The same for every linear; no budget.
    Fixed {
        /// The quantizer.
        quant: Quant,
        /// The factors over it.
        factors: Option<Factors<usize>>,
    },
    /// The limit chooses a quantizer per linear and, with [`CompensateRank::Auto`], the rank of its factors.
    Chosen {
        /// The quantizers to choose from.
        menu: Quantizers,
        /// The factors over them.
        factors: Option<Factors<CompensateRank>>,
        /// The most that all linears may cost together.
        limit: Limit,
        /// How errors of different linears compare.
        sensitivity: BaseSensitivity,
        /// γ of the depth weight.
        gamma: f64,
    },
}

/// One or more quantizers.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantizers(Vec<Quant>);

impl Quantizers {
    /// The quantizers, unless there is none.
    pub fn new(quants: Vec<Quant>) -> Option<Self> {
        (!quants.is_empty()).then_some(Self(quants))
    }

    /// The quantizers.
    pub fn quants(&self) -> &[Quant] {
        &self.0
    }
}

/// Factors that compensate the error of a base.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors<R> {
    /// The method of compensation, which determines the error that the factors minimize.
    pub method: Compensator,
    /// r of `B` (out, r) and `A` (r, in).
    pub rank: R,
    /// Integers instead of the dtype of the weight.
    pub bits: Option<FactorBits>,
}

/// A method that fits factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compensator(Compensate);

impl Compensator {
    /// The method, unless it is [`Compensate::None`].
    pub fn new(method: Compensate) -> Option<Self> {
        (method != Compensate::None).then_some(Self(method))
    }

    /// The method.
    pub fn method(self) -> Compensate {
        self.0
    }
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
            Self::Knapsack(_) => Ranks::Knapsack,
        }
    }

    fn limit(self) -> Option<Limit> {
        match self {
            Self::Uniform(limit)
            | Self::Welore(limit)
            | Self::Energy(limit)
            | Self::EffectiveRank(limit)
            | Self::Knapsack(KnapsackSettings { limit, .. }) => Some(limit),
            Self::EnergyShare(_, limit) => limit,
        }
    }
}

impl Bases {
    fn menu(&self) -> &[Quant] {
        match self {
            Self::Fixed { quant, .. } => std::slice::from_ref(quant),
            Self::Chosen { menu, .. } => menu.quants(),
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

impl FloatStorage {
    fn layout(self) -> Kind {
        match self {
            Self::Plain(layout) => layout,
            Self::Elastic(unordered) => unordered.layout(),
        }
    }
}

impl LowRankApproach {
    /// The rule with the ranks that it may choose; `None` for fixed ranks.
    fn rule(&self) -> Option<(Rule, RankSteps)> {
        match *self {
            Self::Separate { allocation: RankAllocation::Fixed(_), .. } => None,
            Self::Separate { allocation: RankAllocation::PerLinear { rule, steps }, .. } => Some((rule, steps)),
            Self::Shared { knapsack, steps, .. } => Some((Rule::Knapsack(knapsack), steps)),
        }
    }

    fn ranks(&self) -> Ranks {
        match self {
            Self::Separate { allocation: RankAllocation::Fixed(rank), .. } => Ranks::Fixed(*rank),
            Self::Separate { allocation: RankAllocation::PerLinear { rule, .. }, .. } => rule.ranks(),
            Self::Shared { .. } => Ranks::Knapsack,
        }
    }

    fn storage(&self) -> FactorStorage {
        match *self {
            Self::Separate { storage, .. } => storage,
            Self::Shared { storage, .. } => FactorStorage::Float(storage),
        }
    }
}

impl Approach {
    /// The menu of quantizers; empty without quantized bases.
    pub fn quant(&self) -> &[Quant] {
        match self {
            Self::Dense | Self::LowRank(_) => &[],
            Self::Quantized(bases) => bases.menu(),
        }
    }

    /// The factors that compensate a quantized base.
    pub fn factors(&self) -> Option<Factors<CompensateRank>> {
        match self {
            Self::Dense | Self::LowRank(_) => None,
            Self::Quantized(bases) => bases.factors(),
        }
    }

    /// The allocator; a knapsack over quantizers and ranks if bases are quantized. Under the whole budget any leaves
    /// every linear dense: the one that needs no spectra is named.
    pub fn ranks(&self) -> Ranks {
        match self {
            Self::Dense => Ranks::Uniform,
            Self::LowRank(low_rank) => low_rank.ranks(),
            Self::Quantized(_) => Ranks::Knapsack,
        }
    }

    /// The budget.
    pub fn budget(&self) -> Budget {
        match self {
            Self::Dense => Budget::Keep(1.0),
            Self::LowRank(low_rank) => low_rank.rule().and_then(|(rule, _)| rule.limit()).into(),
            Self::Quantized(Bases::Chosen { limit, .. }) => Some(*limit).into(),
            Self::Quantized(Bases::Fixed { .. }) => Budget::None,
        }
    }

    /// The layout of factors.
    pub fn layout(&self) -> Kind {
        match self {
            Self::Dense => Kind::default(),
            Self::LowRank(low_rank) => match low_rank.storage() {
                FactorStorage::Float(storage) => storage.layout(),
                FactorStorage::Quantized(layout, _) => layout,
            },
            Self::Quantized(_) => Kind::FACTORS,
        }
    }

    /// The integers that factors are stored as; `None` keeps the dtype of the weight.
    pub fn quant_factors(&self) -> Option<FactorBits> {
        match self {
            Self::Dense => None,
            Self::LowRank(low_rank) => match low_rank.storage() {
                FactorStorage::Float(_) => None,
                FactorStorage::Quantized(_, bits) => Some(bits),
            },
            Self::Quantized(_) => self.factors().and_then(|factors| factors.bits),
        }
    }

    /// The source of the knapsack's scale between linears; `None` where it has nothing to choose.
    pub fn sensitivity(&self) -> Option<Sensitivity> {
        self.knapsack().map(|(sensitivity, _)| sensitivity)
    }

    /// The depth weight of the knapsack; 0 where it has nothing to choose.
    pub fn depth_weight(&self) -> DepthWeight {
        self.knapsack().map_or(DepthWeight::Fixed(0.0), |(_, depth_weight)| depth_weight)
    }

    fn knapsack(&self) -> Option<(Sensitivity, DepthWeight)> {
        match self {
            Self::Dense => None,
            Self::LowRank(low_rank) => match low_rank.rule()?.0 {
                Rule::Knapsack(KnapsackSettings { sensitivity, depth_weight, .. }) => Some((sensitivity, depth_weight)),
                _ => None,
            },
            Self::Quantized(Bases::Fixed { .. }) => None,
            Self::Quantized(Bases::Chosen { sensitivity, gamma, .. }) => {
                Some(((*sensitivity).into(), DepthWeight::Fixed(*gamma)))
            }
        }
    }

    /// The ranks that may be chosen, for ranks that are allocated per linear.
    pub fn rank_steps(&self) -> Option<RankSteps> {
        match self {
            Self::LowRank(low_rank) => low_rank.rule().map(|(_, steps)| steps),
            Self::Dense | Self::Quantized(_) => None,
        }
    }

    /// μ of the sequential mode.
    pub fn anchor(&self) -> Option<f64> {
        match self {
            Self::LowRank(LowRankApproach::Separate { anchor, .. }) => *anchor,
            _ => None,
        }
    }

    /// Whether shared right factors are allowed.
    pub fn shares(&self) -> bool {
        matches!(self, Self::LowRank(LowRankApproach::Shared { .. }))
    }

    /// Whether the order of ranks is stored with the layout.
    pub fn is_elastic(&self) -> bool {
        match self {
            Self::LowRank(low_rank) => {
                matches!(low_rank.storage(), FactorStorage::Float(FloatStorage::Elastic(_)))
            }
            Self::Dense | Self::Quantized(_) => false,
        }
    }
}
