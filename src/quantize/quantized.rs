//! Quantized matrices, and how they are stored.

use super::block::{BlockType, Blocks};
use super::grouped::{Grouped, Scheme};

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
