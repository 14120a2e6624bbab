//! Where llama.cpp's block types have the code of each weight, and the scale of each run of weights: the layouts of
//! its `ggml-common.h`.
//!
//! A weight is `scale · (code − zero) − minimum`, or `scale · LEVELS[code]` in the two types whose levels are not
//! evenly spaced. Its code is one field of bits, or a low one and a high one.

use candle_core::quantized::GgmlDType;
use half::f16;

use super::lattice::{BlockLattice, Spacing};

/// The implementation of a block type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    /// By candle.
    Candle(GgmlDType),
    /// 32 codes for [`LEVELS`] with one f16 scale.
    Iq4Nl,
    /// 256 codes for [`LEVELS`], an integer scale of 6 bits for each 32, and an f16 scale of these.
    Iq4Xs,
}

/// The levels of `iq4_nl` and `iq4_xs`.
pub(super) const LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// A field of bits of the code of the weight with an index: the byte that has it, and its lowest bit there.
type Place = fn(usize) -> (usize, usize);

/// The layout of a block type.
pub(super) struct Fields {
    /// Weights of a block.
    block: usize,
    /// Bytes of a block.
    bytes: usize,
    /// Weights that share a scale.
    run: usize,
    spacing: Spacing,
    /// Bits and place of the low field.
    low: (usize, Place),
    /// Bits and place of the high field.
    high: Option<(usize, Place)>,
    /// Whether codes are stored as two's complement.
    is_signed: bool,
    /// Scale and minimum of a run.
    scale: fn(&[u8], usize) -> (f32, f32),
}

impl Codec {
    /// Weights and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Candle(dtype) => (dtype.block_size(), dtype.type_size()),
            Self::Iq4Nl => (32, 18),
            Self::Iq4Xs => (256, 136),
        }
    }

    /// The first bytes of the f16 numbers of a block: its scale, and its minimum if it has one. Its values are linear
    /// in them.
    pub fn floats(self) -> &'static [usize] {
        match self {
            Self::Candle(GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K) => &[0, 2],
            Self::Candle(GgmlDType::Q2K) => &[80, 82],
            Self::Candle(GgmlDType::Q3K) => &[108],
            Self::Candle(GgmlDType::Q6K) => &[208],
            Self::Candle(GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0) | Self::Iq4Nl | Self::Iq4Xs => &[0],
            Self::Candle(_) => &[],
        }
    }

    /// The layout.
    ///
    /// # Panics
    /// For `q8_k`, which has no codes to choose, and what is no block type.
    pub fn fields(self) -> Fields {
        let (block, bytes) = self.block();
        let fields = |run, spacing, low, high, scale| {
            let is_signed = self == Self::Candle(GgmlDType::Q8_0);
            Fields { block, bytes, run, spacing, low, high, is_signed, scale }
        };
        let dtype = match self {
            Self::Candle(dtype) => dtype,
            Self::Iq4Nl => return fields(32, Spacing::Table(&LEVELS), (4, |k| halves(2, k)), None, one),
            Self::Iq4Xs => {
                let low: Place = |k| halves(8 + 16 * (k / 32), k % 32);
                return fields(32, Spacing::Table(&LEVELS), (4, low), None, iq4_xs_scale);
            }
        };
        match dtype {
            GgmlDType::Q4_0 => fields(32, steps(4, 8), (4, |k| halves(2, k)), None, one),
            GgmlDType::Q4_1 => fields(32, steps(4, 0), (4, |k| halves(4, k)), None, one_with_minimum),
            GgmlDType::Q5_0 => fields(32, steps(5, 16), (4, |k| halves(6, k)), Some((1, |k| (2 + k / 8, k % 8))), one),
            GgmlDType::Q5_1 => {
                fields(32, steps(5, 0), (4, |k| halves(8, k)), Some((1, |k| (4 + k / 8, k % 8))), one_with_minimum)
            }
            GgmlDType::Q8_0 => fields(32, steps(8, 128), (8, |k| (2 + k, 0)), None, one),
            GgmlDType::Q2K => fields(16, steps(2, 0), (2, |k| quarters(16, k)), None, q2_k_scale),
            GgmlDType::Q3K => {
                fields(16, steps(3, 4), (2, |k| quarters(32, k)), Some((1, |k| (k % 32, k / 32))), q3_k_scale)
            }
            GgmlDType::Q4K => fields(32, steps(4, 0), (4, |k| pairs(16, k)), None, q4_k_scale),
            GgmlDType::Q5K => {
                fields(32, steps(5, 0), (4, |k| pairs(48, k)), Some((1, |k| (16 + k % 32, k / 32))), q4_k_scale)
            }
            GgmlDType::Q6K => {
                let low: Place = |k| (64 * (k / 128) + k % 64, 4 * (k % 128 / 64));
                fields(16, steps(6, 32), (4, low), Some((2, |k| quarters(128, k))), q6_k_scale)
            }
            other => unreachable!("invariant: {other:?} has no codes to choose"),
        }
    }
}

impl Fields {
    /// The values that the codes of whole blocks may take, with rows of `cols`.
    pub fn lattice(&self, bytes: &[u8], cols: usize) -> BlockLattice {
        let mut scales = Vec::with_capacity(bytes.len() / self.bytes * (self.block / self.run));
        for block in bytes.chunks_exact(self.bytes) {
            scales.extend((0..self.block / self.run).map(|run| (self.scale)(block, run)));
        }
        BlockLattice { run: self.run, n_runs: cols / self.run, spacing: self.spacing, scales }
    }

    /// The codes of whole blocks, in the order of the weights.
    pub fn codes(&self, bytes: &[u8]) -> Vec<u8> {
        let mut codes = Vec::with_capacity(bytes.len() / self.bytes * self.block);
        for block in bytes.chunks_exact(self.bytes) {
            codes.extend((0..self.block).map(|k| {
                let field = |(bits, place): (usize, Place)| {
                    let (byte, shift) = place(k);
                    (block[byte] >> shift) & mask(bits)
                };
                let code = field(self.low) | self.high.map_or(0, |high| field(high) << self.low.0);
                if self.is_signed { code ^ 128 } else { code }
            }));
        }
        codes
    }

    /// Puts codes, in the order of the weights, in the place of those of whole blocks, which keep their scales.
    pub fn put(&self, codes: &[u8], bytes: &mut [u8]) {
        for (block, codes) in bytes.chunks_exact_mut(self.bytes).zip(codes.chunks_exact(self.block)) {
            for (k, &code) in codes.iter().enumerate() {
                let code = if self.is_signed { code ^ 128 } else { code };
                let fields = [Some((self.low, code)), self.high.map(|high| (high, code >> self.low.0))];
                for ((bits, place), value) in fields.into_iter().flatten() {
                    let (byte, shift) = place(k);
                    block[byte] = block[byte] & !(mask(bits) << shift) | (value & mask(bits)) << shift;
                }
            }
        }
    }
}

fn mask(bits: usize) -> u8 {
    0xFF >> (8 - bits)
}

fn steps(bits: u32, zero: u8) -> Spacing {
    Spacing::Even { zero: f32::from(zero), top: ((1u32 << bits) - 1) as f32 }
}

/// Codes of 32 weights in 16 bytes from `begin`: the first 16 in the low halves.
fn halves(begin: usize, k: usize) -> (usize, usize) {
    (begin + k % 16, 4 * (k / 16))
}

/// Codes in runs of 64 weights to 32 bytes: the first 32 in the low halves.
fn pairs(begin: usize, k: usize) -> (usize, usize) {
    (begin + 32 * (k / 64) + k % 32, 4 * (k % 64 / 32))
}

/// Two bits of codes in runs of 128 weights to 32 bytes: the first 32 in the lowest bits.
fn quarters(begin: usize, k: usize) -> (usize, usize) {
    (begin + 32 * (k / 128) + k % 32, 2 * (k % 128 / 32))
}

fn float(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn one(block: &[u8], _: usize) -> (f32, f32) {
    (float(block, 0), 0.0)
}

fn one_with_minimum(block: &[u8], _: usize) -> (f32, f32) {
    (float(block, 0), -float(block, 2))
}

/// Four bits of the scale and four of the minimum in a byte; the scales of both at the end.
fn q2_k_scale(block: &[u8], run: usize) -> (f32, f32) {
    let both = block[run];
    (float(block, 80) * f32::from(both & 15), float(block, 82) * f32::from(both >> 4))
}

/// Integers of 6 bits from which 32 is taken: the low 4 bits of 16 in 8 bytes, then the upper 2 in 4.
fn q3_k_scale(block: &[u8], run: usize) -> (f32, f32) {
    let scales = &block[96..108];
    let low = (scales[run % 8] >> (4 * (run / 8))) & 15;
    let high = (scales[8 + run % 4] >> (2 * (run / 4))) & 3;
    (float(block, 108) * (f32::from(low | high << 4) - 32.0), 0.0)
}

/// Integers of 6 bits for 8 scales and 8 minima: the first four of each in a byte, whose upper 2 bits belong to the
/// last four, which have their low 4 bits in the last four bytes.
fn q4_k_scale(block: &[u8], run: usize) -> (f32, f32) {
    let scales = &block[4..16];
    let (scale, minimum) = match run.checked_sub(4) {
        None => (scales[run] & 63, scales[run + 4] & 63),
        Some(at) => (scales[8 + at] & 15 | scales[at] >> 6 << 4, scales[8 + at] >> 4 | scales[4 + at] >> 6 << 4),
    };
    (float(block, 0) * f32::from(scale), float(block, 2) * f32::from(minimum))
}

fn q6_k_scale(block: &[u8], run: usize) -> (f32, f32) {
    (float(block, 208) * f32::from(block[192 + run] as i8), 0.0)
}

/// Integers of 6 bits from which 32 is taken: the upper 2 bits of 8 in a word, then the low 4 bits.
fn iq4_xs_scale(block: &[u8], run: usize) -> (f32, f32) {
    let high = (u16::from_le_bytes([block[2], block[3]]) >> (2 * run)) & 3;
    let low = (block[4 + run / 2] >> (4 * (run % 2))) & 15;
    (float(block, 0) * (f32::from(u16::from(low) | high << 4) - 32.0), 0.0)
}
