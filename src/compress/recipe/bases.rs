//! Quantized bases, with or without factors.

use std::num::NonZeroUsize;

use super::limit::Limit;
use crate::compress::compensate::{Compensate, CompensateRank};
use crate::compress::options::FactorBits;
use crate::compress::scale::Sensitivity;
use crate::quantize::Quant;

/// A quantized base per linear, with or without factors for its error.
#[derive(Debug, Clone, PartialEq)]
pub enum Bases {
    /// The same for every linear; no budget.
    Fixed {
        /// The quantizer.
        quant: Quant,
        /// The factors over it.
        factors: Option<Factors<NonZeroUsize>>,
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

impl Bases {
    pub(super) fn menu(&self) -> &[Quant] {
        match self {
            Self::Fixed { quant, .. } => std::slice::from_ref(quant),
            Self::Chosen { menu, .. } => menu.quants(),
        }
    }

    pub(super) fn factors(&self) -> Option<Factors<CompensateRank>> {
        match self {
            Self::Fixed { factors, .. } => factors.map(|Factors { method, rank, bits }| Factors {
                method,
                rank: CompensateRank::Fixed(rank),
                bits,
            }),
            Self::Chosen { factors, .. } => *factors,
        }
    }

    pub(super) fn limit(&self) -> Option<Limit> {
        match self {
            Self::Fixed { .. } => None,
            Self::Chosen { limit, .. } => Some(*limit),
        }
    }
}
