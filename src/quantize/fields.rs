//! Where llama.cpp's block types have the code of each weight, and the scale of each run of weights: the layouts of
//! its `ggml-common.h`.
//!
//! A weight is `scale · (code − zero) − minimum`, or `scale · LEVELS[code]` in the types whose levels are not
//! evenly spaced. Its code is one field of bits, or a low one and a high one; or several weights have one.

use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use half::f16;

use super::grid::{self, Grid};
use super::lattice::{BlockLattice, Spacing};
use super::points::Points;

/// The implementation of a block type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    /// By candle.
    Candle(GgmlDType),
    /// 32 codes for [`LEVELS`] with one f16 scale.
    Iq4Nl,
    /// 256 codes for [`LEVELS`], an integer scale of 6 bits for each 32, and an f16 scale of these.
    Iq4Xs,
    /// 256 weights in points of eight, 8 bits each, with 7 bits of signs, and a scale of 4 bits for each 32.
    Iq2Xxs,
    /// Points of 9 bits, and a scale for each 16.
    Iq2Xs,
    /// Points of 10 bits with 8 bits of signs, and a scale for each 16.
    Iq2S,
    /// Points of four weights, 8 bits each, with 7 bits of signs for two, and a scale for each 32.
    Iq3Xxs,
    /// Points of four weights, 9 bits each, with 8 bits of signs for two, and a scale for each 32.
    Iq3S,
}

/// The levels of `iq4_nl` and `iq4_xs`.
pub(super) const LEVELS: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// Where one of many small integers has a field of its bits, by its index: the byte, and the lowest bit there.
type Place = fn(usize) -> (usize, usize);

/// Small integers of a block: codes, or the scales of runs.
#[derive(Clone, Copy)]
struct Integers {
    /// Bits and place of the low field.
    low: (usize, Place),
    /// Bits and place of the high field.
    high: Option<(usize, Place)>,
    /// Whether they are stored as two's complement; they are read with 128 added.
    is_signed: bool,
}

/// The layout of a block type.
pub(super) struct Fields {
    /// Weights of a block.
    block: usize,
    /// Bytes of a block.
    bytes: usize,
    /// Weights that share a scale.
    run: usize,
    spacing: Spacing,
    codes: Codes,
    /// The bytes of the f16 scale and the f16 minimum of a block.
    common: [Option<usize>; 2],
    /// The scale of every run, with what is subtracted from it, and the minimum of every run, both in units of those of
    /// the block.
    runs: [Option<(Integers, f32)>; 2],
}

/// The codes of a block.
#[derive(Clone, Copy)]
enum Codes {
    /// A field of bits for each.
    Each(Integers),
    /// Fields for several.
    Together(&'static Grid),
}

impl Codec {
    /// Weights and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Candle(dtype) => (dtype.block_size(), dtype.type_size()),
            Self::Iq4Nl => (32, 18),
            Self::Iq4Xs => (256, 136),
            Self::Iq2Xxs => (256, 66),
            Self::Iq2Xs => (256, 74),
            Self::Iq2S => (256, 82),
            Self::Iq3Xxs => (256, 98),
            Self::Iq3S => (256, 110),
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
            Self::Candle(GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0) => &[0],
            Self::Candle(_) => &[],
            _ => &[0],
        }
    }

    /// The layout.
    ///
    /// # Panics
    /// For `q8_k`, which has no codes to choose, and what is no block type.
    pub fn fields(self) -> Fields {
        let (block, bytes) = self.block();
        // One f16 scale, and a minimum if it has a place; its sign is that of the value added.
        let one = |spacing, codes, minimum| Fields {
            block,
            bytes,
            run: block,
            spacing,
            codes: Codes::Each(codes),
            common: [Some(0), minimum],
            runs: [None, None],
        };
        let nested = |run, spacing, codes, common: [Option<usize>; 2], runs| Fields {
            block,
            bytes,
            run,
            spacing,
            codes: Codes::Each(codes),
            common,
            runs,
        };
        let dtype = match self {
            Self::Candle(dtype) => dtype,
            Self::Iq2Xxs => return self.points(&grid::IQ2_XXS, 32, |r| (9 + 8 * r, 4)),
            Self::Iq2Xs => return self.points(&grid::IQ2_XS, 16, |r| (66 + r / 2, 4 * (r % 2))),
            Self::Iq2S => return self.points(&grid::IQ2_S, 16, |r| (74 + r / 2, 4 * (r % 2))),
            Self::Iq3Xxs => return self.points(&grid::IQ3_XXS, 32, |r| (69 + 4 * r, 4)),
            Self::Iq3S => return self.points(&grid::IQ3_S, 32, |r| (106 + r / 2, 4 * (r % 2))),
            Self::Iq4Nl => return one(Spacing::Table(&LEVELS), low(4, |k| halves(2, k)), None),
            Self::Iq4Xs => {
                let codes = low(4, |k| halves(8 + 16 * (k / 32), k % 32));
                // The upper 2 bits of 8 in a word, then the low 4 bits.
                let scales = low(4, |r| (4 + r / 2, 4 * (r % 2))).with(2, |r| (2 + r / 4, 2 * (r % 4)));
                return nested(32, Spacing::Table(&LEVELS), codes, [Some(0), None], [Some((scales, 32.0)), None]);
            }
        };
        match dtype {
            GgmlDType::Q4_0 => one(steps(4, 8), low(4, |k| halves(2, k)), None),
            GgmlDType::Q4_1 => one(steps(4, 0), low(4, |k| halves(4, k)), Some(2)),
            GgmlDType::Q5_0 => one(steps(5, 16), low(4, |k| halves(6, k)).with(1, |k| (2 + k / 8, k % 8)), None),
            GgmlDType::Q5_1 => one(steps(5, 0), low(4, |k| halves(8, k)).with(1, |k| (4 + k / 8, k % 8)), Some(2)),
            GgmlDType::Q8_0 => one(steps(8, 128), low(8, |k| (2 + k, 0)).signed(), None),
            GgmlDType::Q2K => {
                // Four bits of the scale and four of the minimum in a byte; the scales of both at the end.
                let runs = [Some((low(4, |r| (r, 0)), 0.0)), Some((low(4, |r| (r, 4)), 0.0))];
                nested(16, steps(2, 0), low(2, |k| quarters(16, k)), [Some(80), Some(82)], runs)
            }
            GgmlDType::Q3K => {
                let codes = low(2, |k| quarters(32, k)).with(1, |k| (k % 32, k / 32));
                // The low 4 bits of 16 in 8 bytes, then the upper 2 in 4.
                let scales = low(4, |r| (96 + r % 8, 4 * (r / 8))).with(2, |r| (104 + r % 4, 2 * (r / 4)));
                nested(16, steps(3, 4), codes, [Some(108), None], [Some((scales, 32.0)), None])
            }
            GgmlDType::Q4K => nested(32, steps(4, 0), low(4, |k| pairs(16, k)), [Some(0), Some(2)], sixes()),
            GgmlDType::Q5K => {
                let codes = low(4, |k| pairs(48, k)).with(1, |k| (16 + k % 32, k / 32));
                nested(32, steps(5, 0), codes, [Some(0), Some(2)], sixes())
            }
            GgmlDType::Q6K => {
                let codes = low(4, |k| (64 * (k / 128) + k % 64, 4 * (k % 128 / 64))).with(2, |k| quarters(128, k));
                let scales = low(8, |r| (192 + r, 0)).signed();
                nested(16, steps(6, 32), codes, [Some(208), None], [Some((scales, 128.0)), None])
            }
            other => unreachable!("invariant: {other:?} has no codes to choose"),
        }
    }
}

impl Codec {
    /// Points of a grid, with scales of `run` weights that are odd numbers of halves.
    fn points(self, grid: &'static Grid, run: usize, scales: Place) -> Fields {
        let (block, bytes) = self.block();
        Fields {
            block,
            bytes,
            run,
            spacing: Spacing::Table(grid.levels),
            codes: Codes::Together(grid),
            common: [Some(0), None],
            runs: [Some((low(4, scales), -0.5)), None],
        }
    }
}

impl Integers {
    fn with(self, bits: usize, high: Place) -> Self {
        Self { high: Some((bits, high)), ..self }
    }

    fn signed(self) -> Self {
        Self { is_signed: true, ..self }
    }

    /// The largest.
    fn top(&self) -> u8 {
        mask(self.low.0 + self.high.map_or(0, |(bits, _)| bits))
    }

    fn get(&self, block: &[u8], at: usize) -> u8 {
        let field = |(bits, place): (usize, Place)| {
            let (byte, shift) = place(at);
            (block[byte] >> shift) & mask(bits)
        };
        let value = field(self.low) | self.high.map_or(0, |high| field(high) << self.low.0);
        if self.is_signed { value ^ 128 } else { value }
    }

    fn put(&self, block: &mut [u8], at: usize, value: u8) {
        let value = if self.is_signed { value ^ 128 } else { value };
        let fields = [Some((self.low, value)), self.high.map(|high| (high, value >> self.low.0))];
        for ((bits, place), value) in fields.into_iter().flatten() {
            let (byte, shift) = place(at);
            block[byte] = block[byte] & !(mask(bits) << shift) | (value & mask(bits)) << shift;
        }
    }
}

impl Fields {
    /// The values that the codes of whole blocks may take, with rows of `cols`.
    pub fn lattice(&self, bytes: &[u8], cols: usize) -> BlockLattice {
        let per_block = self.block / self.run;
        let mut lattice = BlockLattice {
            run: self.run,
            block: self.block,
            n_runs: cols / self.run,
            n_blocks: cols / self.block,
            spacing: self.spacing,
            scales: Vec::with_capacity(bytes.len() / self.bytes * per_block),
            runs: Vec::with_capacity(bytes.len() / self.bytes * per_block),
            common: Vec::with_capacity(bytes.len() / self.bytes),
            ends: self.runs.map(|runs| runs.map(|(integers, zero)| (-zero, f32::from(integers.top()) - zero))),
            has_minimum: self.common[1].is_some(),
            points: match self.codes {
                Codes::Each(_) => None,
                Codes::Together(grid) => Some(Arc::new(Points::new(grid))),
            },
        };
        for block in bytes.chunks_exact(self.bytes) {
            let common = self.common.map(|at| at.map_or(0.0, |at| float(block, at)));
            for run in 0..per_block {
                let whole = |i: usize, constant: f32| {
                    self.runs[i].map_or(constant, |(integers, zero)| f32::from(integers.get(block, run)) - zero)
                };
                // A minimum of a block alone is added.
                let runs = [whole(0, 1.0), whole(1, -1.0)];
                lattice.scales.push((common[0] * runs[0], common[1] * runs[1]));
                lattice.runs.push(runs);
            }
            lattice.common.push(common);
        }
        lattice
    }

    /// One run, with a scale of 1.
    pub fn unit(&self) -> BlockLattice {
        BlockLattice {
            block: self.run,
            n_runs: 1,
            n_blocks: 1,
            scales: vec![(1.0, 0.0)],
            runs: vec![[1.0, 0.0]],
            common: vec![[1.0, 0.0]],
            ..self.lattice(&[], self.block)
        }
    }

    /// Puts the scales and minima of a lattice in the place of those of whole blocks, which keep their codes.
    pub fn put_scales(&self, lattice: &BlockLattice, bytes: &mut [u8]) {
        let per_block = self.block / self.run;
        let scales = lattice.common.iter().zip(lattice.runs.chunks_exact(per_block));
        for (block, (common, runs)) in bytes.chunks_exact_mut(self.bytes).zip(scales) {
            for (at, value) in self.common.iter().zip(common) {
                if let Some(at) = *at {
                    block[at..at + 2].copy_from_slice(&f16::from_f32(*value).to_le_bytes());
                }
            }
            for (run, values) in runs.iter().enumerate() {
                for (integers, value) in self.runs.iter().zip(values) {
                    if let Some((integers, zero)) = integers {
                        integers.put(block, run, (value + zero) as u8);
                    }
                }
            }
        }
    }

    /// The codes of whole blocks, in the order of the weights.
    pub fn codes(&self, bytes: &[u8]) -> Vec<u8> {
        let blocks = bytes.chunks_exact(self.bytes);
        blocks.flat_map(|block| self.codes.of(block, self.block)).collect()
    }

    /// Puts codes, in the order of the weights, in the place of those of whole blocks, which keep their scales.
    pub fn put(&self, codes: &[u8], bytes: &mut [u8]) {
        for (block, codes) in bytes.chunks_exact_mut(self.bytes).zip(codes.chunks_exact(self.block)) {
            match self.codes {
                Codes::Each(integers) => codes.iter().enumerate().for_each(|(k, &code)| integers.put(block, k, code)),
                Codes::Together(grid) => grid.put(codes, block),
            }
        }
    }
}

impl Codes {
    /// The codes of a block of `n` weights.
    fn of(self, block: &[u8], n: usize) -> Vec<u8> {
        match self {
            Self::Each(integers) => (0..n).map(|k| integers.get(block, k)).collect(),
            Self::Together(grid) => grid.codes(block, n),
        }
    }
}

fn low(bits: usize, place: Place) -> Integers {
    Integers { low: (bits, place), high: None, is_signed: false }
}

/// Integers of 6 bits for 8 scales and 8 minima, in 12 bytes: the first four of each in a byte, whose upper 2 bits
/// belong to the last four, which have their low 4 bits in the last four bytes.
fn sixes() -> [Option<(Integers, f32)>; 2] {
    let scales =
        low(4, |r| if r < 4 { (4 + r, 0) } else { (8 + r, 0) }).with(2, |r| if r < 4 { (4 + r, 4) } else { (r, 6) });
    let minima = low(4, |r| if r < 4 { (8 + r, 0) } else { (8 + r, 4) })
        .with(2, |r| if r < 4 { (8 + r, 4) } else { (4 + r, 6) });
    [Some((scales, 0.0)), Some((minima, 0.0))]
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
