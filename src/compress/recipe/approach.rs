//! What happens to the targeted linears. A setting belongs to the variants where it can have an effect, so that a linear
//! that stays as it is has no method, and a uniform rank no floor.
//!
//! Whether there is a text for the settings that need one is checked by [`Recipe::new`](super::Recipe::new): one text
//! serves statistics, trials and the sequential mode, so that it belongs to none of them.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::allocation::{KnapsackSettings, RankAllocation, RankSteps, Rule};
use super::bases::{Bases, Factors};
use super::limit::{Budget, Reduction};
use super::storage::{FactorStorage, FloatStorage};
use crate::calibrate::WindowSettings;
use crate::compress::allocate::Ranks;
use crate::compress::compensate::CompensateRank;
use crate::compress::options::{ChannelSelection, Embeddings, FactorBits};
use crate::compress::presets::Method;
use crate::compress::scale::{DepthWeight, Sensitivity};
use crate::formats::Format;
use crate::operator::Kind;
use crate::quantize::Quant;

/// What happens to the targeted linears.
#[derive(Debug, Clone, PartialEq)]
pub enum Approach {
    /// Every linear stays as it is, in an output of this format: the budget is the whole model, and nothing is measured
    /// or decomposed.
    Dense(Format),
    /// They are replaced.
    Replace(Box<Replacement>),
}

/// How linears are replaced.
#[derive(Debug, Clone, PartialEq)]
pub struct Replacement {
    /// What replaces them.
    pub linears: Linears,
    /// How the embedding table and the head are stored.
    pub embeddings: Embeddings,
    /// Whether codes with factors are compared with codes alone of as many bytes.
    pub compares_at_equal_bytes: bool,
    /// How errors count.
    pub metric: MetricSettings,
}

/// What replaces a linear.
#[derive(Debug, Clone, PartialEq)]
pub enum Linears {
    /// `W ≈ B·A`.
    LowRank(LowRankApproach),
    /// `W ≈ Q`, or `W ≈ Q + B·A`.
    Quantized {
        /// The codes, and the factors over them.
        bases: Bases,
        /// The format of the output.
        format: Format,
        /// μ in [0, 1] of the sequential mode, for codes without factors; `None` rounds on the inputs of the source.
        anchor: Option<f64>,
    },
    /// Narrower matrices.
    Narrow(NarrowApproach),
}

/// How linears become narrower.
#[derive(Debug, Clone, PartialEq)]
pub struct NarrowApproach {
    /// The most that is kept: a share of the parameters, or bytes of the weight files.
    pub limit: Reduction,
    /// How channels and groups of heads are chosen.
    pub selection: ChannelSelection,
    /// Numbers of channels are multiples of this.
    pub multiple: NonZeroUsize,
    /// Which blocks have the same widths.
    pub widths: WidthRule,
    /// Whether blocks may be left out.
    pub drops_blocks: bool,
    /// Whether channels and groups are stored in order of importance, so that a prefix is the next narrower model.
    pub is_elastic: bool,
    /// What becomes of the linears of the narrower model: they stay as they are, or are quantized.
    pub then: Box<Approach>,
}

impl NarrowApproach {
    /// Whether linears of the narrower model become matrices of low rank.
    pub fn then_low_rank(&self) -> bool {
        self.then.low_rank().is_some()
    }
}

/// Which blocks have the same numbers of channels and of groups of heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WidthRule {
    /// All blocks, so that every runtime loads the output.
    Uniform,
    /// None has to.
    ByBlock,
    /// All keep the widths that they have.
    Whole,
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

/// The metric of the approximation, or of the reported errors if bases are quantized, and what it is measured from.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricSettings {
    /// The method that defines the metric.
    pub method: Method,
    /// Damping of input Grams, as a share of their mean eigenvalue, in [0, 1].
    pub damping_input: f64,
    /// The same for Grams of output gradients.
    pub damping_output: f64,
    /// Whether per-token gradients are clipped to 0.1 to 10 times their mean norm.
    pub clip_gradients: bool,
    /// Whether biases take up the mean of the inputs.
    pub center: bool,
    /// The text that is run through the model; `None` if the weights alone, or `statistics`, suffice.
    pub calibration: Option<WindowSettings>,
    /// A file of `lrc calibrate` in place of a forward and a backward pass.
    pub statistics: Option<PathBuf>,
}

impl LowRankApproach {
    fn allocation(&self) -> RankAllocation {
        match *self {
            Self::Separate { allocation, .. } => allocation,
            Self::Shared { knapsack, steps, .. } => RankAllocation::PerLinear { rule: Rule::Knapsack(knapsack), steps },
        }
    }

    fn storage(&self) -> FactorStorage {
        match *self {
            Self::Separate { storage, .. } => storage,
            Self::Shared { storage, .. } => FactorStorage::Float(storage),
        }
    }
}

/// The settings, with neutral values where an approach lacks them.
impl Approach {
    /// How linears are replaced, if they are.
    pub fn replacement(&self) -> Option<&Replacement> {
        match self {
            Self::Dense(_) => None,
            Self::Replace(replacement) => Some(replacement),
        }
    }

    /// The metric, if one is needed.
    pub fn metric(&self) -> Option<&MetricSettings> {
        self.replacement().map(|replacement| &replacement.metric)
    }

    /// The same approach under another limit, if it is one of low rank with a rank per linear.
    pub(super) fn with_limit(&self, limit: Reduction) -> Self {
        let mut own = self.clone();
        if let Self::Replace(replacement) = &mut own
            && let Linears::LowRank(LowRankApproach::Separate { allocation, .. }) = &mut replacement.linears
            && let RankAllocation::PerLinear { rule: Rule::Knapsack(knapsack), .. } = allocation
        {
            knapsack.limit = limit;
        }
        own
    }

    fn low_rank(&self) -> Option<&LowRankApproach> {
        match &self.replacement()?.linears {
            Linears::LowRank(low_rank) => Some(low_rank),
            Linears::Quantized { .. } | Linears::Narrow(_) => None,
        }
    }

    fn bases(&self) -> Option<&Bases> {
        match &self.replacement()?.linears {
            Linears::LowRank(_) | Linears::Narrow(_) => None,
            Linears::Quantized { bases, .. } => Some(bases),
        }
    }

    /// How linears become narrower, if they do.
    pub fn narrow(&self) -> Option<&NarrowApproach> {
        match &self.replacement()?.linears {
            Linears::Narrow(narrow) => Some(narrow),
            Linears::LowRank(_) | Linears::Quantized { .. } => None,
        }
    }

    /// The format of the output.
    pub fn format(&self) -> Format {
        match self {
            Self::Dense(format) => *format,
            Self::Replace(replacement) => match &replacement.linears {
                Linears::LowRank(low_rank) => low_rank.storage().format(),
                Linears::Quantized { format, .. } => *format,
                Linears::Narrow(narrow) => narrow.then.format(),
            },
        }
    }

    /// The menu of quantizers; empty without quantized bases.
    pub fn quant(&self) -> &[Quant] {
        self.bases().map_or(&[], Bases::menu)
    }

    /// Whether the budget chooses among quantizers, which it does not for one that every linear has.
    pub fn chooses(&self) -> bool {
        !matches!(self.bases(), Some(Bases::Fixed { .. }))
    }

    /// The factors that compensate a quantized base.
    pub fn factors(&self) -> Option<Factors<CompensateRank>> {
        self.bases().and_then(Bases::factors)
    }

    /// The allocator; a knapsack over quantizers and ranks if bases are quantized. Under the whole budget any leaves
    /// every linear dense: the one that needs no spectra is named.
    pub fn ranks(&self) -> Ranks {
        match (self.low_rank(), self.bases()) {
            (Some(low_rank), _) => low_rank.allocation().ranks(),
            (None, Some(_)) => Ranks::Knapsack,
            (None, None) => Ranks::Uniform,
        }
    }

    /// The budget.
    pub fn budget(&self) -> Budget {
        if let Some(narrow) = self.narrow() {
            return Some(narrow.limit.limit()).into();
        }
        match (self.low_rank(), self.bases()) {
            (Some(low_rank), _) => low_rank.allocation().limit().into(),
            (None, Some(bases)) => bases.limit().into(),
            (None, None) => Budget::Keep(1.0),
        }
    }

    /// The layout of factors.
    pub fn layout(&self) -> Kind {
        match (self.low_rank(), self.bases()) {
            (Some(low_rank), _) => low_rank.storage().layout(),
            (None, Some(_)) => Kind::FACTORS,
            (None, None) => Kind::default(),
        }
    }

    /// The integers that factors are stored as; `None` keeps the dtype of the weight.
    pub fn quant_factors(&self) -> Option<FactorBits> {
        match self.low_rank() {
            Some(low_rank) => low_rank.storage().bits(),
            None => self.factors().and_then(|factors| factors.bits),
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
        if let Some(Bases::Chosen { sensitivity, gamma, .. }) = self.bases() {
            return Some(((*sensitivity).into(), DepthWeight::Fixed(*gamma)));
        }
        let knapsack = self.low_rank()?.allocation().knapsack()?;
        Some((knapsack.sensitivity, knapsack.depth_weight))
    }

    /// The ranks that may be chosen, for ranks that are allocated per linear.
    pub fn rank_steps(&self) -> Option<RankSteps> {
        self.low_rank().and_then(|low_rank| low_rank.allocation().steps())
    }

    /// μ of the sequential mode.
    pub fn anchor(&self) -> Option<f64> {
        match &self.replacement()?.linears {
            Linears::LowRank(LowRankApproach::Separate { anchor, .. }) | Linears::Quantized { anchor, .. } => *anchor,
            Linears::LowRank(LowRankApproach::Shared { .. }) | Linears::Narrow(_) => None,
        }
    }

    /// Whether shared right factors are allowed.
    pub fn shares(&self) -> bool {
        matches!(self.low_rank(), Some(LowRankApproach::Shared { .. }))
    }

    /// Whether the order of ranks is stored beside factors, or channels and groups in order of importance.
    pub fn is_elastic(&self) -> bool {
        self.narrow().is_some_and(|narrow| narrow.is_elastic)
            || self.low_rank().is_some_and(|low_rank| low_rank.storage().is_elastic())
    }
}
