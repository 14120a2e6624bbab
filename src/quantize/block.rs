//! llama.cpp's block types, through candle's implementation where it has one.

use anyhow::{Result, ensure};
use candle_core::Tensor;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};

use super::fields::Codec;
use super::grouped::{Grouped, Scheme};
use super::lattice::{BlockLattice, Lattice};
use super::levels::Levels;
use super::search;
use crate::device::{HOST, to_host};

/// A block type: its name, its implementation and the number by which GGUF files know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockType {
    /// The name in recipes and on the command line: `q4_k`.
    pub name: &'static str,
    codec: Codec,
    /// The `ggml_type` in GGUF files.
    pub id: u32,
    /// The type for rows that do not consist of whole blocks, as in llama.cpp.
    fallback: Option<&'static str>,
}

const fn row(name: &'static str, codec: Codec, id: u32, fallback: Option<&'static str>) -> BlockType {
    BlockType { name, codec, id, fallback }
}

const fn candle(name: &'static str, dtype: GgmlDType, id: u32, fallback: Option<&'static str>) -> BlockType {
    row(name, Codec::Candle(dtype), id, fallback)
}

/// The block types that quantize weights.
pub const BLOCK_TYPES: [BlockType; 17] = [
    candle("q4_0", GgmlDType::Q4_0, 2, None),
    candle("q4_1", GgmlDType::Q4_1, 3, None),
    candle("q5_0", GgmlDType::Q5_0, 6, None),
    candle("q5_1", GgmlDType::Q5_1, 7, None),
    candle("q8_0", GgmlDType::Q8_0, 8, None),
    candle("q2_k", GgmlDType::Q2K, 10, Some("q4_0")),
    candle("q3_k", GgmlDType::Q3K, 11, Some("q4_0")),
    candle("q4_k", GgmlDType::Q4K, 12, Some("q5_0")),
    candle("q5_k", GgmlDType::Q5K, 13, Some("q5_1")),
    candle("q6_k", GgmlDType::Q6K, 14, Some("q8_0")),
    row("iq2_xxs", Codec::Iq2Xxs, 16, Some("iq4_nl")),
    row("iq2_xs", Codec::Iq2Xs, 17, Some("iq4_nl")),
    row("iq2_s", Codec::Iq2S, 22, Some("iq4_nl")),
    row("iq3_xxs", Codec::Iq3Xxs, 18, Some("iq4_nl")),
    row("iq3_s", Codec::Iq3S, 21, Some("iq4_nl")),
    row("iq4_nl", Codec::Iq4Nl, 20, None),
    row("iq4_xs", Codec::Iq4Xs, 23, Some("iq4_nl")),
];

/// The block types that are read only.
pub const READ_TYPES: [BlockType; 1] = [candle("q8_k", GgmlDType::Q8K, 15, None)];

impl BlockType {
    /// By its name, `q4_k`, if weights can be quantized to it.
    pub fn named(name: &str) -> Option<Self> {
        BLOCK_TYPES.into_iter().find(|t| t.name == name)
    }

    /// By its number in GGUF files.
    pub fn of_id(id: u32) -> Option<Self> {
        BLOCK_TYPES.into_iter().chain(READ_TYPES).find(|t| t.id == id)
    }

    /// The scheme with the same levels; `None` for types that store more than codes and scales.
    pub fn as_scheme(self) -> Option<Scheme> {
        let bits = match self.codec {
            Codec::Candle(GgmlDType::Q4_0) => 4,
            Codec::Candle(GgmlDType::Q8_0) => 8,
            _ => return None,
        };
        Some(Scheme { levels: Levels::Int { bits, symmetric: true }, group: Some(32) })
    }

    /// The smallest factor of an f16 scale at either end of a block's range. In blocks with a minimum, the negative end
    /// is the code of that minimum.
    pub fn n_levels(self) -> f32 {
        let dtype = match self.codec {
            Codec::Candle(dtype) => dtype,
            Codec::Iq4Nl => return 113.0,
            Codec::Iq4Xs => return 113.0 * 31.0,
            // Of the points with eight equal magnitudes, the largest.
            Codec::Iq2Xxs | Codec::Iq3S => return 2.0 * 15.5,
            Codec::Iq2Xs | Codec::Iq2S => return 10.75 * 15.5,
            Codec::Iq3Xxs => return 14.0 * 15.5,
        };
        match dtype {
            GgmlDType::Q4_0 => 8.0,
            GgmlDType::Q5_0 => 16.0,
            // The minimum of a block is an f16 of its own.
            GgmlDType::Q4_1 | GgmlDType::Q5_1 => 1.0,
            GgmlDType::Q8_0 => 127.0,
            GgmlDType::Q2K => 15.0,
            GgmlDType::Q3K => 31.0 * 4.0,
            GgmlDType::Q4K | GgmlDType::Q5K => 63.0,
            _ => 127.0 * 31.0,
        }
    }

    /// This type, or the one that llama.cpp takes instead for rows of `cols` that do not consist of its blocks; `None`
    /// if no type has blocks that divide them.
    pub fn for_rows(self, cols: usize) -> Option<Self> {
        if self.divides(cols) { Some(self) } else { Self::named(self.fallback?)?.for_rows(cols) }
    }

    /// Whether rows of `cols` consist of whole blocks.
    pub fn divides(self, cols: usize) -> bool {
        cols > 0 && cols.is_multiple_of(self.codec.block().0)
    }

    /// Weights of a block.
    pub(super) fn n_weights(self) -> usize {
        self.codec.block().0
    }

    /// Bytes of a block.
    pub(super) fn n_block_bytes(self) -> usize {
        self.codec.block().1
    }

    /// The first bytes of the f16 numbers of a block.
    pub(super) fn floats(self) -> &'static [usize] {
        self.codec.floats()
    }

    /// Bytes of a matrix (rows, cols).
    pub fn n_bytes(self, rows: usize, cols: usize) -> u64 {
        let (size, bytes) = self.codec.block();
        (rows * (cols / size) * bytes) as u64
    }
}

/// A matrix (rows, cols) in blocks along its rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Blocks {
    /// Outputs of the linear.
    pub rows: usize,
    /// Inputs of the linear, a multiple of the block size.
    pub cols: usize,
    /// The type of all blocks.
    pub block_type: BlockType,
    /// The blocks row by row, as GGUF files store them.
    pub bytes: Vec<u8>,
}

impl Blocks {
    /// Rounded to nearest.
    ///
    /// # Errors
    /// Rows do not consist of whole blocks.
    pub fn quantize(values: &[f32], rows: usize, cols: usize, block_type: BlockType) -> Result<Self> {
        Self::weighted(values, rows, cols, block_type, None)
    }

    /// Rounded to nearest, with scales for the least squared error where the columns have these weights. Types without
    /// a search for scales have the same as without weights.
    pub(super) fn weighted(
        values: &[f32],
        rows: usize,
        cols: usize,
        block_type: BlockType,
        weights: Option<&[f32]>,
    ) -> Result<Self> {
        ensure!(block_type.divides(cols), "rows of {cols} are not made of whole blocks of `{}`", block_type.name);
        let bytes = match block_type.codec {
            Codec::Candle(dtype) => {
                let tensor = Tensor::from_slice(values, (rows, cols), &HOST)?;
                let quantized = match weights.filter(|_| block_type.fallback.is_some()) {
                    Some(weights) => QTensor::quantize_imatrix(&tensor, weights, dtype)?,
                    None => QTensor::quantize(&tensor, dtype)?,
                };
                quantized.data()?.into_owned()
            }
            codec => search::quantize(codec, values, cols, weights),
        };
        Ok(Self { rows, cols, block_type, bytes })
    }

    /// The codes, in the order of the weights, and the values that they may take.
    pub(super) fn codes(&self) -> (Vec<u8>, BlockLattice) {
        let fields = self.block_type.codec.fields();
        (fields.codes(&self.bytes), fields.lattice(&self.bytes, self.cols))
    }

    /// Replaces the codes, in the order of the weights; scales stay.
    pub(super) fn put(&mut self, codes: &[u8]) {
        self.block_type.codec.fields().put(codes, &mut self.bytes);
    }

    /// Replaces the scales and minima; codes stay.
    pub(super) fn put_scales(&mut self, lattice: &BlockLattice) {
        self.block_type.codec.fields().put_scales(lattice, &mut self.bytes);
    }

    /// Symmetric codes as blocks, exactly: up to 4 bits as Q4_0, up to 8 as Q8_0; `None` if their groups are
    /// not made of whole blocks.
    pub fn of_grouped(matrix: &Grouped) -> Option<Self> {
        const BLOCK: usize = 32;
        let Levels::Int { bits, symmetric: true } = matrix.scheme.levels else { return None };
        let (rows, cols) = (matrix.rows, matrix.cols);
        let (group, n_groups) = (matrix.scheme.group_of(cols), matrix.scheme.n_groups(cols));
        if !cols.is_multiple_of(BLOCK) || !group.is_multiple_of(BLOCK) {
            return None;
        }
        let block_type = BlockType::named(if bits <= 4 { "q4_0" } else { "q8_0" })?;
        let mut bytes = Vec::with_capacity(block_type.n_bytes(rows, cols) as usize);
        for (row, codes) in matrix.codes.chunks_exact(cols.max(1)).enumerate() {
            for (at, codes) in codes.chunks_exact(BLOCK).enumerate() {
                let scale = matrix.scales[row * n_groups + at * BLOCK / group];
                bytes.extend(half::f16::from_f32(scale).to_le_bytes());
                if bits > 4 {
                    // Shifts the middle of `bits` to 0.
                    let middle = 1u8 << (bits - 1);
                    bytes.extend(codes.iter().map(|code| code.wrapping_sub(middle)));
                    continue;
                }
                // Shifts the middle of fewer bits to the middle of four. The low nibbles are the
                // first half of the block.
                let shift = 8 - (1u8 << (bits - 1));
                let (first, second) = codes.split_at(BLOCK / 2);
                bytes.extend(first.iter().zip(second).map(|(low, high)| (low + shift) | ((high + shift) << 4)));
            }
        }
        Some(Self { rows, cols, block_type, bytes })
    }

    /// The same matrix as codes in groups of 32; `None` for types that store more than codes and scales.
    pub fn to_grouped(&self) -> Option<Grouped> {
        let scheme = self.block_type.as_scheme()?;
        let size = self.block_type.codec.block().1;
        let (mut codes, mut scales) = (Vec::with_capacity(self.rows * self.cols), Vec::new());
        for block in self.bytes.chunks_exact(size) {
            let (scale, values) = block.split_first_chunk::<2>()?;
            scales.push(half::f16::from_le_bytes(*scale).to_f32());
            match scheme.levels.bits() {
                8 => codes.extend(values.iter().map(|&q| q.wrapping_add(128))),
                _ => {
                    codes.extend(values.iter().map(|q| q & 15));
                    codes.extend(values.iter().map(|q| q >> 4));
                }
            }
        }
        Some(Grouped { rows: self.rows, cols: self.cols, scheme, codes, scales, zeros: Vec::new() })
    }

    /// The matrix, row-major.
    ///
    /// # Panics
    /// If the number of bytes does not match the matrix.
    pub fn dequantize(&self) -> Vec<f32> {
        assert_eq!(
            self.bytes.len() as u64,
            self.block_type.n_bytes(self.rows, self.cols),
            "invariant: blocks are whole"
        );
        let dtype = match self.block_type.codec {
            Codec::Candle(dtype) => dtype,
            _ => return self.values(),
        };
        if self.bytes.is_empty() {
            // candle requires an alignment that an empty buffer does not have.
            return Vec::new();
        }
        let values = || -> candle_core::Result<Vec<f32>> {
            let storage = QStorage::from_data(self.bytes.as_slice().into(), &HOST, dtype)?;
            QTensor::new(storage, (self.rows, self.cols))?.dequantize(&HOST).and_then(|values| to_host(&values))
        };
        values().expect("invariant: whole blocks are dequantized")
    }

    /// The matrix from its codes.
    fn values(&self) -> Vec<f32> {
        let (codes, lattice) = self.codes();
        let value = |(at, &code): (usize, &u8)| lattice.value(at / self.cols, at % self.cols, code);
        codes.iter().enumerate().map(value).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::Scale;

    #[test]
    fn symmetric_codes_are_blocks_exactly() {
        let (rows, cols) = (3, 128);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
        for bits in 2..=8 {
            for group in [Some(32), Some(64), None] {
                let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group };
                let matrix = Grouped::round(&values, rows, cols, scheme, Scale::Mse);
                let blocks = Blocks::of_grouped(&matrix).unwrap();
                assert_eq!(blocks.dequantize(), matrix.dequantize(), "{scheme}");
                if group == Some(32) && [4, 8].contains(&bits) {
                    assert_eq!(blocks.to_grouped().unwrap(), matrix);
                }
            }
        }
        let other = |group, symmetric| Scheme { levels: Levels::Int { bits: 4, symmetric }, group };
        for scheme in [other(Some(24), true), other(None, false), Scheme { levels: Levels::Nf4, group: None }] {
            assert!(Blocks::of_grouped(&Grouped::round(&values, rows, cols, scheme, Scale::Mse)).is_none());
        }
    }

    #[test]
    fn blocks_come_back_close_and_in_their_bytes() {
        let (rows, cols) = (3, 512);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
        let limits =
            [0.09, 0.09, 0.05, 0.05, 0.006, 0.35, 0.18, 0.08, 0.04, 0.02, 0.41, 0.38, 0.35, 0.21, 0.19, 0.09, 0.09];
        for (block_type, limit) in BLOCK_TYPES.into_iter().zip(limits) {
            let blocks = Blocks::quantize(&values, rows, cols, block_type).unwrap();
            assert_eq!(blocks.bytes.len() as u64, block_type.n_bytes(rows, cols));
            let back = blocks.dequantize();
            assert_eq!(blocks.to_grouped().is_some(), ["q4_0", "q8_0"].contains(&block_type.name));
            assert!(blocks.to_grouped().is_none_or(|grouped| grouped.dequantize() == back));
            let square = |v: f32| f64::from(v) * f64::from(v);
            let error: f64 = back.iter().zip(&values).map(|(q, v)| square(q - v)).sum();
            let relative = (error / values.iter().map(|&v| square(v)).sum::<f64>()).sqrt();
            assert!(relative < limit, "{}: {relative}", block_type.name);
            assert_eq!(
                (BlockType::named(block_type.name), BlockType::of_id(block_type.id)),
                (Some(block_type), Some(block_type))
            );
        }
        assert!(Blocks::quantize(&values[..100], 1, 100, BLOCK_TYPES[1]).is_err());
    }

    #[test]
    fn codes_and_scales_are_where_candle_has_them() {
        let (rows, cols) = (3, 512);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
        for block_type in BLOCK_TYPES {
            let mut blocks = Blocks::quantize(&values, rows, cols, block_type).unwrap();
            for (found, expected) in blocks.values().into_iter().zip(blocks.dequantize()) {
                assert!((found - expected).abs() < 1e-6, "{}: {found} {expected}", block_type.name);
            }
            let (before, (codes, lattice)) = (blocks.clone(), blocks.codes());
            blocks.put(&codes);
            blocks.put_scales(&lattice);
            assert_eq!(blocks, before);
            // Others in their place, with the same scales; eight together may be the point of a grid.
            let others: Vec<u8> = codes.chunks_exact(8).rev().flatten().copied().collect();
            blocks.put(&others);
            assert_eq!((&blocks.codes().0, &blocks.codes().1.scales), (&others, &lattice.scales));
            let nearest = lattice.round(&values, cols);
            blocks.put(&nearest);
            let error = |blocks: &Blocks| -> f64 {
                let errors = blocks.dequantize().into_iter().zip(&values).map(|(q, v)| f64::from(q - v));
                errors.map(|error| error * error).sum()
            };
            assert!(error(&blocks) <= error(&before) * 1.000_001, "{}", block_type.name);
        }
    }

    #[test]
    fn an_importance_matrix_lowers_the_error_where_columns_matter() {
        let (rows, cols) = (4, 512);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
        let weights: Vec<f32> = (0..cols).map(|j| if j % 7 == 0 { 20.0 } else { 0.2 + (j % 3) as f32 / 3.0 }).collect();
        let inputs = faer::Mat::from_fn(cols, cols, |i, j| if i == j { f64::from(weights[i]) } else { 0.0 });
        let sides = crate::quantize::Sides { inputs: inputs.as_ref(), outputs: None };
        for name in [
            "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs",
            "iq3_s",
        ] {
            let error = |quant: &str| -> f64 {
                let quant: crate::quantize::Quant = quant.parse().unwrap();
                let (found, fallback) = quant.quantize(&values, (rows, cols), Some(sides)).unwrap();
                assert_eq!((found.storage(), fallback), (quant.storage(), None));
                let squares = found.dequantize().into_iter().zip(&values).map(|(q, v)| f64::from(q - v).powi(2));
                squares.enumerate().map(|(at, square)| f64::from(weights[at % cols]) * square).sum()
            };
            let [plain, weighted, descended] = ["", "imatrix-", "cd-"].map(|prefix| error(&format!("{prefix}{name}")));
            assert!(descended < weighted && weighted < 0.99 * plain, "{name}: {descended} {weighted} {plain}");
        }
    }

    #[test]
    fn rows_that_no_block_divides_fall_back_to_a_type_that_does() {
        let fallback = |name: &str, cols| BlockType::named(name).unwrap().for_rows(cols).map(|found| found.name);
        for (name, expected) in [
            ("q2_k", "q4_0"),
            ("q3_k", "q4_0"),
            ("q4_k", "q5_0"),
            ("q5_k", "q5_1"),
            ("q6_k", "q8_0"),
            ("q8_0", "q8_0"),
            ("iq4_xs", "iq4_nl"),
            ("iq2_xs", "iq4_nl"),
        ] {
            assert_eq!((fallback(name, 576), fallback(name, 1536)), (Some(expected), Some(name)));
            assert_eq!(fallback(name, 40), None);
        }
    }

    #[test]
    fn zeros_stay_zeros_and_the_ends_of_the_range_are_reached() {
        for block_type in BLOCK_TYPES {
            // All zeros, and one row of zeros among others.
            for live in [0.0, 1.0] {
                let values: Vec<f32> =
                    (0..512).map(|i| if i < 256 { 0.0 } else { live * ((i % 13) as f32 - 6.0) }).collect();
                let back = Blocks::quantize(&values, 2, 256, block_type).unwrap().dequantize();
                assert!(back[..256].iter().all(|&v| v == 0.0), "{}", block_type.name);
                assert!(back.iter().all(|v| v.is_finite()), "{}", block_type.name);
            }
            let largest = 0.9 * 65504.0 * block_type.n_levels();
            let values: Vec<f32> = (0..256).map(|i| largest * (i as f32 / 127.5 - 1.0)).collect();
            let back = Blocks::quantize(&values, 1, 256, block_type).unwrap().dequantize();
            assert!(back.iter().zip(&values).all(|(q, v)| (q - v).abs() < 0.7 * largest), "{}", block_type.name);
        }
    }
}
