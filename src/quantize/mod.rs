//! Quantized matrices and the quantizers that make them. No files, no tensor names.
//!
//! A quantizer has a name of words joined by dashes: `rtn-int4-g128`, `gptq-int3-channel-asym`, `nf4-g64`, `q4_k`.

pub mod bits;
mod block;
mod feedback;
mod gptq;
mod grouped;

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use faer::Mat;
use serde::{Deserialize, Serialize};

pub use block::{BLOCK_TYPES, BlockType, Blocks, READ_TYPES};
pub use feedback::{Descent, feed_back};
pub use gptq::Fallback;
pub use grouped::{Grouped, Levels, Scale, Scheme};

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
    /// Round to nearest.
    Rtn(Scheme, Scale),
    /// GPTQ, in the metric of the inputs.
    Gptq(Scheme, Scale),
    /// One of llama.cpp's block types.
    Block(BlockType),
}

/// How a quantized matrix is stored.
///
/// ```
/// use lrc::quantize::Quant;
///
/// let storage = |name: &str| name.parse::<Quant>().unwrap().storage();
/// assert_eq!(storage("rtn-int4-g128").n_bytes(1, 128), 128 / 2 + 2); // codes and an f16 scale
/// assert_eq!(storage("q4_0").n_bytes(1, 128), 4 * 18); // blocks of 32 weights
/// assert!(storage("nf4").fits(100) && !storage("q4_0").fits(100)); // rows of whole blocks only
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Codes with a scale per group.
    Grouped(Scheme),
    /// Blocks of llama.cpp.
    Block(BlockType),
}

/// A quantized matrix.
#[derive(Debug, Clone, PartialEq)]
pub enum Quantized {
    /// Codes with a scale per group.
    Grouped(Grouped),
    /// Blocks of llama.cpp.
    Block(Blocks),
}

impl Storage {
    /// Bytes of a matrix (rows, cols) in the project's own packing.
    pub fn n_bytes(&self, rows: usize, cols: usize) -> u64 {
        match self {
            Self::Grouped(scheme) => scheme.n_bytes(rows, cols),
            Self::Block(block_type) => block_type.n_bytes(rows, cols),
        }
    }

    /// Whether a matrix with rows of `cols` can be stored.
    pub fn fits(&self, cols: usize) -> bool {
        match self {
            Self::Grouped(_) => true,
            Self::Block(block_type) => block_type.divides(cols),
        }
    }
}

impl Quantized {
    /// The matrix, row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        match self {
            Self::Grouped(matrix) => matrix.dequantize(),
            Self::Block(blocks) => blocks.dequantize(),
        }
    }

    /// The storage that holds this matrix exactly.
    pub fn storage(&self) -> Storage {
        match self {
            Self::Grouped(matrix) => Storage::Grouped(matrix.scheme),
            Self::Block(blocks) => Storage::Block(blocks.block_type),
        }
    }
}

impl Quant {
    /// The storage of its results.
    pub fn storage(self) -> Storage {
        match self {
            Self::Rtn(scheme, _) | Self::Gptq(scheme, _) => Storage::Grouped(scheme),
            Self::Block(block_type) => Storage::Block(block_type),
        }
    }

    /// The largest magnitude of a weight that its f16 scales reach.
    pub fn largest(self) -> f32 {
        let levels = match self.storage() {
            Storage::Grouped(Scheme { levels: Levels::Nf4, .. }) => 1.0,
            Storage::Grouped(Scheme { levels: Levels::Int { bits, .. }, .. }) => (1u32 << (bits - 1)) as f32,
            Storage::Block(block_type) => block_type.n_levels(),
        };
        half::f16::MAX.to_f32() * levels
    }

    /// This quantizer, or the one that takes its place for rows of `cols` that its blocks do not divide; `None` if no
    /// block does.
    pub fn for_rows(self, cols: usize) -> Option<Self> {
        match self {
            Self::Block(block_type) => block_type.for_rows(cols).map(Self::Block),
            Self::Rtn(..) | Self::Gptq(..) => Some(self),
        }
    }

    /// The same with the largest group that divides `cols`, found by halving its own; itself if
    /// none of at least 16 does.
    #[must_use]
    pub fn with_dividing_group(self, cols: usize) -> Self {
        match self {
            Self::Rtn(scheme, scale) => Self::Rtn(scheme.dividing(cols).unwrap_or(scheme), scale),
            Self::Gptq(scheme, scale) => Self::Gptq(scheme.dividing(cols).unwrap_or(scheme), scale),
            Self::Block(_) => self,
        }
    }

    /// Whether it minimizes the error in the metric of the inputs.
    pub fn needs_gram(self) -> bool {
        matches!(self, Self::Gptq(..))
    }

    /// Quantizes `values` (rows, cols), row-major, with the Gram of the inputs, `gram` (cols, cols). Also returns why
    /// GPTQ fell back to rounding, if it did.
    ///
    /// # Errors
    /// Rows do not consist of whole blocks, or the Gram is missing.
    pub fn quantize(
        self,
        values: &[f32],
        (rows, cols): (usize, usize),
        gram: Option<&Mat<f64>>,
    ) -> Result<(Quantized, Option<Fallback>)> {
        Ok(match self {
            Self::Rtn(scheme, scale) => (Quantized::Grouped(Grouped::round(values, rows, cols, scheme, scale)), None),
            Self::Gptq(scheme, scale) => {
                let gram = gram.context("invariant: a quantizer that needs a Gram gets it")?;
                let (matrix, fallback) = gptq::gptq(values, rows, cols, gram.as_ref(), scheme, scale);
                (Quantized::Grouped(matrix), fallback)
            }
            Self::Block(block_type) => (Quantized::Block(Blocks::quantize(values, rows, cols, block_type)?), None),
        })
    }

    /// The same quantizer at other bits and groups; `None` if its type has a fixed number of bits.
    pub fn with(self, bits: u32, group: Option<usize>) -> Option<Self> {
        let scheme = |scheme: Scheme| match scheme.levels {
            Levels::Int { symmetric, .. } => Some(Scheme { levels: Levels::Int { bits, symmetric }, group }),
            Levels::Nf4 => (bits == 4).then_some(Scheme { levels: Levels::Nf4, group }),
        };
        Some(match self {
            Self::Rtn(old, scale) => Self::Rtn(scheme(old)?, scale),
            Self::Gptq(old, scale) => Self::Gptq(scheme(old)?, scale),
            Self::Block(_) => return None,
        })
    }
}

/// The default number of columns that share a scale; for `nf4` as well.
const DEFAULT_GROUP: usize = 128;
const DEFAULT_NF4_GROUP: usize = 64;

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.levels {
            Levels::Int { bits, .. } => write!(f, "int{bits}")?,
            Levels::Nf4 => f.write_str("nf4")?,
        }
        match self.group {
            Some(group) => write!(f, "-g{group}")?,
            None => f.write_str("-channel")?,
        }
        if self.levels.has_zeros() { f.write_str("-asym") } else { Ok(()) }
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (method, scheme, scale) = match self {
            Self::Rtn(scheme, scale) if scheme.levels == Levels::Nf4 => ("", scheme, scale),
            Self::Rtn(scheme, scale) => ("rtn-", scheme, scale),
            Self::Gptq(scheme, scale) => ("gptq-", scheme, scale),
            Self::Block(block_type) => return f.write_str(block_type.name),
        };
        let clip = if *scale == Scale::Absmax && scheme.levels != Levels::Nf4 { "-absmax" } else { "" };
        write!(f, "{method}{scheme}{clip}")
    }
}

impl FromStr for Quant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(block_type) = BlockType::named(text) {
            return Ok(Self::Block(block_type));
        }
        let error = || {
            let blocks: Vec<&str> = BLOCK_TYPES.iter().map(|t| t.name).collect();
            format!(
                "`{text}` is not a quantizer: expected [rtn|gptq]-int8|int4|int3|int2 or nf4, then any of -g32, -g64, -g128, \
                 -channel, -sym, -asym, -absmax, -mse; or one of {}",
                blocks.join(", ")
            )
        };
        let (mut is_gptq, mut bits, mut is_nf4, mut group, mut symmetric, mut scale) =
            (false, None, false, None, true, None);
        for (at, word) in text.split('-').enumerate() {
            match word {
                "rtn" if at == 0 => {}
                "gptq" if at == 0 => is_gptq = true,
                "nf4" => is_nf4 = true,
                "int8" | "int4" | "int3" | "int2" => bits = word[3..].parse().ok(),
                "channel" => group = Some(None),
                "sym" => symmetric = true,
                "asym" => symmetric = false,
                "absmax" => scale = Some(Scale::Absmax),
                "mse" => scale = Some(Scale::Mse),
                _ => {
                    let size = word.strip_prefix('g').and_then(|n| n.parse::<usize>().ok());
                    group = Some(Some(size.filter(|&n| n >= 8 && n.is_power_of_two()).ok_or_else(error)?));
                }
            }
        }
        let levels = match (is_nf4, bits) {
            (true, None) if !is_gptq && symmetric => Levels::Nf4,
            (true, _) => return Err(error()),
            (false, bits) => Levels::Int { bits: bits.unwrap_or(4), symmetric },
        };
        if text.is_empty()
            || (bits.is_none() && !is_nf4 && text.split('-').next().is_none_or(|w| w != "rtn" && w != "gptq"))
        {
            return Err(error());
        }
        let default_group = if is_nf4 { DEFAULT_NF4_GROUP } else { DEFAULT_GROUP };
        let scheme = Scheme { levels, group: group.unwrap_or(Some(default_group)) };
        // NF4 is made for the whole range.
        let scale = scale.unwrap_or(if is_nf4 { Scale::Absmax } else { Scale::Mse });
        Ok(if is_gptq { Self::Gptq(scheme, scale) } else { Self::Rtn(scheme, scale) })
    }
}

impl Serialize for Quant {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Quant {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (text, name) in [
            ("rtn", "rtn-int4-g128"),
            ("int8-channel", "rtn-int8-channel"),
            ("gptq-int3-g32-asym-absmax", "gptq-int3-g32-asym-absmax"),
            ("gptq", "gptq-int4-g128"),
            ("nf4", "nf4-g64"),
            ("nf4-g32", "nf4-g32"),
            ("q4_k", "q4_k"),
            ("rtn-int2-sym-mse-g64", "rtn-int2-g64"),
        ] {
            let quant: Quant = text.parse().unwrap();
            assert_eq!(quant.to_string(), name);
            assert_eq!(name.parse(), Ok(quant));
        }
        for wrong in ["", "int5", "g32", "gptq-nf4", "rtn-g33", "q4_9", "nf4-asym", "rtn-", "int4-gptq"] {
            assert!(wrong.parse::<Quant>().is_err(), "{wrong}");
        }
    }
}
