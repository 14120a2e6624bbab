//! Quantized matrices and the quantizers that make them. No files, no tensor names.
//!
//! A quantizer has a name of words joined by dashes: `rtn-int4-g128`, `gptq-int3-channel-asym`, `nf4-g64`, `q4_k`.

pub mod bits;
mod block;
mod damped;
mod descent;
mod feedback;
mod fields;
mod gptq;
mod grid;
mod grids;
mod grouped;
mod joint;
mod lattice;
mod levels;
mod name;
mod points;
mod quantized;
mod refit;
mod scaled;
mod search;
mod sparse;

use anyhow::{Context, Result};

pub use block::{BLOCK_TYPES, BlockType, Blocks, READ_TYPES};
pub use descent::Sides;
pub use feedback::{Descent, feed_back};
pub use gptq::Fallback;
pub use grouped::{Grouped, Scale, Scheme};
pub use levels::{E4M3_LARGEST, E4M3_SCALE, Levels, to_e4m3};
pub use quantized::{Quantized, Storage};
pub use scaled::Scaled;

/// A quantizer with its settings.
///
/// ```
/// use lrc::quantize::Quant;
///
/// let quant: Quant = "rtn-int4".parse().unwrap();
/// assert_eq!(quant.to_string(), "rtn-int4-g128"); // with the default group
/// let values: Vec<f32> = (-8..8).map(|code| code as f32 / 2.0).collect(); // 16 levels of one scale
/// let (quantized, _) = quant.quantize(&values, (1, 16), None)?;
/// assert_eq!(quantized.dequantize(), values);
/// assert!("rtn-int5".parse::<Quant>().is_err());
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quant {
    /// No method is named: what [`Self::resolved`] makes of it. Where nothing has, it is rounding.
    Bare(Scheme, Scale),
    /// Round to nearest.
    Rtn(Scheme, Scale),
    /// GPTQ, in the metric of the inputs.
    Gptq(Scheme, Scale),
    /// One of llama.cpp's block types, rounded to nearest.
    Block(BlockType),
    /// A block type with the scales that have the least squared error where columns have the mean squares of their
    /// inputs as weights, and codes rounded to nearest: llama.cpp with an importance matrix.
    Imatrix(BlockType),
    /// Coordinate descent, in the metric of inputs and outputs.
    Cd(Scheme, Scale),
    /// A block type by coordinate descent.
    CdBlock(BlockType),
}

impl Quant {
    /// The storage of its results.
    pub fn storage(self) -> Storage {
        match self {
            Self::Bare(scheme, _) | Self::Rtn(scheme, _) | Self::Gptq(scheme, _) | Self::Cd(scheme, _) => {
                Storage::Grouped(scheme)
            }
            Self::Block(block_type) | Self::Imatrix(block_type) | Self::CdBlock(block_type) => {
                Storage::Block(block_type)
            }
        }
    }

    /// The largest magnitude of a weight that its f16 scales reach.
    pub fn largest(self) -> f32 {
        let levels = match self.storage() {
            Storage::Grouped(Scheme { levels: Levels::Nf4 | Levels::E4m3, .. }) => 1.0,
            Storage::Grouped(Scheme { levels: Levels::Int { bits, .. } | Levels::Sparse { bits }, .. }) => {
                (1u32 << (bits - 1)) as f32
            }
            Storage::Block(block_type) => block_type.n_levels(),
        };
        half::f16::MAX.to_f32() * levels
    }

    /// This quantizer, or the one that takes its place for rows of `cols` that its blocks do not divide; `None` if no
    /// block does.
    pub fn for_rows(self, cols: usize) -> Option<Self> {
        match self {
            Self::Block(block_type) => block_type.for_rows(cols).map(Self::Block),
            Self::Imatrix(block_type) => block_type.for_rows(cols).map(Self::Imatrix),
            Self::CdBlock(block_type) => block_type.for_rows(cols).map(Self::CdBlock),
            Self::Bare(..) | Self::Rtn(..) | Self::Gptq(..) | Self::Cd(..) => Some(self),
        }
    }

    /// The same with the largest group that divides `cols`, found by halving its own; itself if
    /// none of at least 16 does.
    #[must_use]
    pub fn with_dividing_group(self, cols: usize) -> Self {
        match self {
            Self::Bare(scheme, scale) => Self::Bare(scheme.dividing(cols).unwrap_or(scheme), scale),
            Self::Rtn(scheme, scale) => Self::Rtn(scheme.dividing(cols).unwrap_or(scheme), scale),
            Self::Gptq(scheme, scale) => Self::Gptq(scheme.dividing(cols).unwrap_or(scheme), scale),
            Self::Cd(scheme, scale) => Self::Cd(scheme.dividing(cols).unwrap_or(scheme), scale),
            Self::Block(_) | Self::Imatrix(_) | Self::CdBlock(_) => self,
        }
    }

    /// The quantizer with a method, if none was named: coordinate descent where there is a metric, but for 8 bits of every
    /// value, where it gains nothing (docs/results.md, section 26); rounding to nearest elsewhere.
    #[must_use]
    pub fn resolved(self, has_metric: bool) -> Self {
        match self {
            Self::Bare(scheme, scale)
                if has_metric && (scheme.levels.bits() < 8 || matches!(scheme.levels, Levels::Sparse { .. })) =>
            {
                Self::Cd(scheme, scale)
            }
            Self::Bare(scheme, scale) => Self::Rtn(scheme, scale),
            named => named,
        }
    }

    /// Whether it minimizes the error in the metric of the inputs.
    pub fn needs_gram(self) -> bool {
        matches!(self, Self::Gptq(..) | Self::Imatrix(_)) || self.descends()
    }

    /// Whether it also uses the metric of the outputs, where there is one.
    pub fn descends(self) -> bool {
        matches!(self, Self::Cd(..) | Self::CdBlock(_))
    }

    /// Quantizes `values` (rows, cols), row-major, in a metric that may be missing if [`Self::needs_gram`] is false.
    /// Also returns why the result is that of rounding, if it is.
    ///
    /// # Errors
    /// Rows do not consist of whole blocks, or the metric is missing.
    pub fn quantize(
        self,
        values: &[f32],
        (rows, cols): (usize, usize),
        metric: Option<Sides<'_>>,
    ) -> Result<(Quantized, Option<Fallback>)> {
        let metric = || metric.context("invariant: a quantizer that needs a metric gets it");
        Ok(match self {
            Self::Bare(scheme, scale) | Self::Rtn(scheme, scale) => {
                let kept = scheme.kept(values, (rows, cols), None);
                let values = sparse::pruned(values, kept.as_deref());
                (Quantized::Grouped(Grouped::round(&values, rows, cols, scheme, scale)), None)
            }
            Self::Gptq(scheme, scale) => {
                let (matrix, fallback) = gptq::gptq(values, rows, cols, metric()?.inputs, scheme, scale);
                (Quantized::Grouped(matrix), fallback)
            }
            Self::Cd(scheme, scale) => {
                let (matrix, fallback) = descent::grouped(values, (rows, cols), scheme, scale, metric()?);
                (Quantized::Grouped(matrix), fallback)
            }
            Self::CdBlock(block_type) => {
                let (blocks, fallback) = descent::blocks(values, (rows, cols), block_type, metric()?)?;
                (Quantized::Block(blocks), fallback)
            }
            Self::Block(block_type) => (Quantized::Block(Blocks::quantize(values, rows, cols, block_type)?), None),
            Self::Imatrix(block_type) => {
                let weights = metric()?.diagonal();
                (Quantized::Block(Blocks::weighted(values, rows, cols, block_type, weights.as_deref())?), None)
            }
        })
    }

    /// The same quantizer at other bits and groups, dense if it is sparse; `None` if its type has a fixed number of
    /// bits.
    pub fn with(self, bits: u32, group: Option<usize>) -> Option<Self> {
        let scheme = |scheme: Scheme| match scheme.levels {
            Levels::Int { symmetric, .. } => Some(Scheme { levels: Levels::Int { bits, symmetric }, group }),
            Levels::Sparse { .. } => Some(Scheme { levels: Levels::Int { bits, symmetric: true }, group }),
            Levels::Nf4 => (bits == 4).then_some(Scheme { levels: Levels::Nf4, group }),
            Levels::E4m3 => None,
        };
        Some(match self {
            Self::Bare(old, scale) => Self::Bare(scheme(old)?, scale),
            Self::Rtn(old, scale) => Self::Rtn(scheme(old)?, scale),
            Self::Gptq(old, scale) => Self::Gptq(scheme(old)?, scale),
            Self::Cd(old, scale) => Self::Cd(scheme(old)?, scale),
            Self::Block(_) | Self::Imatrix(_) | Self::CdBlock(_) => return None,
        })
    }
}
