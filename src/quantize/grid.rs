//! Weights that are coded together: four or eight magnitudes are one point of a grid, and each has a sign of its own, as
//! in llama.cpp's types `iq2_*` and `iq3_*`. Where eight signs take 7 bits, the number of minus signs is even.
//!
//! The code of a weight is the place of its value among all signed levels, so that scales, refits and values need to
//! know nothing of points.

use super::grids;

/// Weights whose signs, and one or two points, are chosen together.
pub(super) const RUN: usize = 8;
/// Signed levels at most.
pub(super) const LEVELS: usize = 16;

/// The first bit of one of many fields in a block, by its index.
type Bit = fn(usize) -> usize;

/// The points of a type, and where its blocks have them.
#[derive(Debug)]
pub(super) struct Grid {
    /// Packed magnitudes, in rising order.
    pub points: &'static [u16],
    /// Weights of a point.
    pub width: usize,
    /// Magnitudes that there are.
    pub n_magnitudes: u8,
    /// Signed levels in rising order, and infinities after them.
    pub levels: &'static [f32; LEVELS],
    /// Bits and places of the low and the high field of the index of a point.
    pub index: [(usize, Bit); 2],
    /// Bits and places of the signs of eight weights, the first one lowest.
    signs: (usize, Bit),
}

/// 8, 25 and 43, in quarters.
const OF_2_BITS: [f32; LEVELS] = {
    let mut levels = [f32::INFINITY; LEVELS];
    (levels[0], levels[1], levels[2]) = (-10.75, -6.25, -2.0);
    (levels[3], levels[4], levels[5]) = (2.0, 6.25, 10.75);
    levels
};
/// 4 to 62, in halves.
const OF_IQ3_XXS: [f32; LEVELS] =
    [-31.0, -26.0, -22.0, -18.0, -14.0, -10.0, -6.0, -2.0, 2.0, 6.0, 10.0, 14.0, 18.0, 22.0, 26.0, 31.0];
/// 1 to 15, twice.
const OF_IQ3_S: [f32; LEVELS] =
    [-30.0, -26.0, -22.0, -18.0, -14.0, -10.0, -6.0, -2.0, 2.0, 6.0, 10.0, 14.0, 18.0, 22.0, 26.0, 30.0];

const fn of_8(points: &'static [u16], index: [(usize, Bit); 2], signs: (usize, Bit)) -> Grid {
    Grid { points, width: 8, n_magnitudes: 3, levels: &OF_2_BITS, index, signs }
}

const fn of_4(
    points: &'static [u16],
    levels: &'static [f32; LEVELS],
    index: [(usize, Bit); 2],
    signs: (usize, Bit),
) -> Grid {
    Grid { points, width: 4, n_magnitudes: 8, levels, index, signs }
}

const NO_BITS: (usize, Bit) = (0, |_| 0);

/// Of `iq2_xxs`.
pub(super) static IQ2_XXS: Grid = of_8(
    &grids::IQ2_XXS,
    [(8, |p| 8 * (2 + 8 * (p / 4) + p % 4)), NO_BITS],
    (7, |run| 8 * (6 + 8 * (run / 4)) + 7 * (run % 4)),
);
/// Of `iq2_xs`.
pub(super) static IQ2_XS: Grid = of_8(&grids::IQ2_XS, [(9, |p| 16 + 16 * p), NO_BITS], (7, |run| 16 + 16 * run + 9));
/// Of `iq2_s`.
pub(super) static IQ2_S: Grid =
    of_8(&grids::IQ2_S, [(8, |p| 8 * (2 + p)), (2, |p| 8 * (66 + p / 4) + 2 * (p % 4))], (8, |run| 8 * (34 + run)));
/// Of `iq3_xxs`.
pub(super) static IQ3_XXS: Grid = of_4(
    &grids::IQ3_XXS,
    &OF_IQ3_XXS,
    [(8, |p| 8 * (2 + p)), NO_BITS],
    (7, |run| 8 * (66 + 4 * (run / 4)) + 7 * (run % 4)),
);
/// Of `iq3_s`.
pub(super) static IQ3_S: Grid =
    of_4(&grids::IQ3_S, &OF_IQ3_S, [(8, |p| 8 * (2 + p)), (1, |p| 8 * 66 + p)], (8, |run| 8 * (74 + run)));

impl Grid {
    /// The codes of a block of `n` weights.
    pub fn codes(&self, block: &[u8], n: usize) -> Vec<u8> {
        let mut codes = vec![0u8; n];
        for (at, codes) in codes.chunks_exact_mut(RUN).enumerate() {
            let signs = bits(block, self.signs, at);
            // The last sign of seven makes the number of minus signs even.
            let signs = signs | if self.has_parity() { (signs.count_ones() as usize & 1) << 7 } else { 0 };
            for (part, codes) in codes.chunks_exact_mut(self.width).enumerate() {
                let [low, high] = self.index.map(|field| bits(block, field, at * RUN / self.width + part));
                let point = self.points[low | high << self.index[0].0];
                for (k, code) in codes.iter_mut().enumerate() {
                    *code = self.code(self.magnitude(point, k), signs >> (part * self.width + k) & 1 == 1);
                }
            }
        }
        codes
    }

    /// Puts codes in the place of those of a block.
    ///
    /// # Panics
    /// If they are not points with signs that can be stored.
    pub fn put(&self, codes: &[u8], block: &mut [u8]) {
        for (at, codes) in codes.chunks_exact(RUN).enumerate() {
            let is_minus = |(k, &code): (usize, &u8)| usize::from(code < self.n_magnitudes) << k;
            let signs: usize = codes.iter().enumerate().map(is_minus).sum();
            assert!(!self.has_parity() || signs.count_ones() & 1 == 0, "invariant: signs can be stored");
            put_bits(block, self.signs, at, signs);
            for (part, codes) in codes.chunks_exact(self.width).enumerate() {
                let packed = |(k, &code): (usize, &u8)| u16::from(self.magnitude_of(code)) << (k * self.level_bits());
                let point: u16 = codes.iter().enumerate().map(packed).sum();
                let index = self.points.binary_search(&point).expect("invariant: codes are points of the grid");
                let place = at * RUN / self.width + part;
                put_bits(block, self.index[0], place, index);
                put_bits(block, self.index[1], place, index >> self.index[0].0);
            }
        }
    }

    /// Whether the number of minus signs is even.
    pub fn has_parity(&self) -> bool {
        self.signs.0 < RUN
    }

    fn level_bits(&self) -> usize {
        16 / self.width
    }

    /// The index of the magnitude of a weight of a point.
    pub fn magnitude(&self, point: u16, k: usize) -> u8 {
        (point >> (k * self.level_bits())) as u8 & (0xFF >> (8 - self.level_bits()))
    }

    /// The code of a magnitude with a sign.
    pub fn code(&self, magnitude: u8, is_negative: bool) -> u8 {
        if is_negative { self.n_magnitudes - 1 - magnitude } else { self.n_magnitudes + magnitude }
    }

    fn magnitude_of(&self, code: u8) -> u8 {
        if code < self.n_magnitudes { self.n_magnitudes - 1 - code } else { code - self.n_magnitudes }
    }
}

/// A field of at most 10 bits.
fn bits(block: &[u8], (n, place): (usize, Bit), at: usize) -> usize {
    let first = place(at);
    (0..n).map(|k| usize::from(block[(first + k) / 8] >> ((first + k) % 8) & 1) << k).sum()
}

fn put_bits(block: &mut [u8], (n, place): (usize, Bit), at: usize, value: usize) {
    for k in 0..n {
        let bit = place(at) + k;
        block[bit / 8] = block[bit / 8] & !(1 << (bit % 8)) | ((value >> k & 1) as u8) << (bit % 8);
    }
}
