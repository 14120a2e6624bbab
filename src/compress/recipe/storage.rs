//! How factors without a base are stored.

use crate::compress::options::FactorBits;
use crate::formats::Format;
use crate::operator::Kind;

/// How factors are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactorStorage {
    /// In the dtype of the weight.
    Float(FloatStorage),
    /// As integers, which cannot be truncated by rank: layout, integers, and format of the output.
    Quantized(Kind, FactorBits, Format),
}

/// How factors in the dtype of the weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatStorage {
    /// In this layout, in an output of this format.
    Plain(Kind, Format),
    /// In [`Format::Factored`], with the order of ranks beside it, so that truncation is exact (`--elastic`). No other
    /// format stores ranks.
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

impl FactorStorage {
    pub(super) fn layout(self) -> Kind {
        match self {
            Self::Float(FloatStorage::Plain(layout, _)) | Self::Quantized(layout, ..) => layout,
            Self::Float(FloatStorage::Elastic(unordered)) => unordered.layout(),
        }
    }

    pub(super) fn format(self) -> Format {
        match self {
            Self::Float(FloatStorage::Plain(_, format)) | Self::Quantized(_, _, format) => format,
            Self::Float(FloatStorage::Elastic(_)) => Format::Factored,
        }
    }

    pub(super) fn bits(self) -> Option<FactorBits> {
        match self {
            Self::Float(_) => None,
            Self::Quantized(_, bits, _) => Some(bits),
        }
    }

    pub(super) fn is_elastic(self) -> bool {
        matches!(self, Self::Float(FloatStorage::Elastic(_)))
    }
}
