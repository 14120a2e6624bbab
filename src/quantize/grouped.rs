//! Matrices of small codes in which runs of columns share a scale: the result of `rtn`, `gptq` and `nf4`.
//!
//! `W[i, j] = scale[i, j / group] · level(code[i, j])`, where a level is `code − zero` of an integer grid or an entry
//! of a table. Scales are kept as f16 values, which every format can hold.

use pulp::Arch;

use super::bits;
use super::lattice::{Lattice, Number, storable};
use super::levels::{E4M3_SCALE, Levels, NF4, e4m3, to_e4m3};

/// The layout of codes and scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// The values that codes represent.
    pub levels: Levels,
    /// Columns that share a scale, the last run may be shorter; `None`: a whole row.
    pub group: Option<usize>,
}

/// How the scale of a run of weights is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// The weight of the largest magnitude is the end of the grid.
    Absmax,
    /// The clipped grid with the least squared error.
    Mse,
}

/// A matrix (rows, cols).
#[derive(Debug, Clone, PartialEq)]
pub struct Grouped {
    /// Outputs of the linear.
    pub rows: usize,
    /// Inputs of the linear; the last group of a row may be shorter.
    pub cols: usize,
    /// The layout of codes and scales.
    pub scheme: Scheme,
    /// (rows, cols)
    pub codes: Vec<u8>,
    /// (rows, n_groups), each the value of an f16.
    pub scales: Vec<f32>,
    /// (rows, n_groups); empty if the levels have no zeros of their own.
    pub zeros: Vec<u8>,
}

impl Scheme {
    /// Columns of `cols` that share a scale.
    pub fn group_of(&self, cols: usize) -> usize {
        self.group.unwrap_or(cols).min(cols).max(1)
    }

    /// The same with the largest group that divides `cols`, found by halving its own; `None` if
    /// none of at least 16 does.
    pub fn dividing(&self, cols: usize) -> Option<Self> {
        const SMALLEST: usize = 16;
        let groups = std::iter::successors(Some(self.group_of(cols)), |group| Some(group / 2));
        let group = groups.take_while(|&group| group >= SMALLEST).find(|&group| cols.is_multiple_of(group))?;
        Some(if group == self.group_of(cols) { *self } else { Self { group: Some(group), ..*self } })
    }

    /// Scales per row of `cols` weights.
    pub fn n_groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group_of(cols))
    }

    /// Bytes of a matrix (rows, cols): packed codes, f16 scales and packed zeros.
    pub fn n_bytes(&self, rows: usize, cols: usize) -> u64 {
        let (bits, groups) = (self.levels.bits(), self.n_groups(cols));
        let scales = if self.levels.has_scales() { 2 * groups } else { 0 };
        let zeros = if self.levels.has_zeros() { bits::row_bytes(groups, bits, 1) } else { 0 };
        (rows * (self.code_bytes(cols) + scales + zeros)) as u64
    }

    /// Bytes of a row of packed codes.
    pub fn code_bytes(&self, cols: usize) -> usize {
        match self.levels {
            Levels::Sparse { bits } => bits::sparse_row_bytes(cols, bits),
            levels => bits::row_bytes(cols, levels.bits(), 1),
        }
    }

    /// Packs rows of `cols` codes, low bits first; of sparse ones those that are kept, then a bit for each column.
    pub fn pack(&self, codes: &[u8], cols: usize) -> Vec<u8> {
        match self.levels {
            Levels::Sparse { bits } => bits::pack_sparse(codes, cols, bits),
            levels => bits::pack(codes, cols, levels.bits(), 1),
        }
    }

    /// The inverse of [`Self::pack`]; `None` if the bytes are not `rows` rows of codes.
    pub fn unpack(&self, bytes: &[u8], rows: usize, cols: usize) -> Option<Vec<u8>> {
        match self.levels {
            Levels::Sparse { bits } => bits::unpack_sparse(bytes, rows, cols, bits),
            levels => bits::unpack(bytes, rows, cols, levels.bits(), 1),
        }
    }
}

/// Scale and zero of one group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    levels: Levels,
    pub scale: f32,
    pub zero: f32,
}

/// Adding this to a float below 2^22 and subtracting it again rounds to the nearest integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;

fn round(x: f32) -> f32 {
    (x + ROUNDER) - ROUNDER
}

impl Grid {
    /// The grid of a run of weights; with shares of each in the error, [`Scale::Mse`] minimizes their sum.
    pub fn of(values: &[f32], levels: Levels, scale: Scale, shares: Option<&[f32]>) -> Self {
        if !levels.has_scales() {
            return Self { levels, scale: E4M3_SCALE, zero: 0.0 };
        }
        let extreme = values.iter().fold(0.0f32, |e, &v| if v.abs() > e.abs() { v } else { e });
        if extreme == 0.0 {
            return Self { levels, scale: 0.0, zero: levels.middle() };
        }
        let whole = match levels {
            // The extreme gets the lowest code, because there is one more code on that side.
            Levels::Int { symmetric: true, .. } | Levels::Sparse { .. } => {
                Self { levels, scale: -extreme / levels.middle(), zero: levels.middle() }
            }
            Levels::Int { bits, symmetric: false } => {
                let (low, high) = values.iter().fold((0.0f32, 0.0f32), |(l, h), &v| (l.min(v), h.max(v)));
                Self { levels, scale: (high - low) / ((1 << bits) - 1) as f32, zero: -low }
            }
            Levels::Nf4 | Levels::E4m3 => Self { levels, scale: extreme.abs(), zero: 0.0 },
        };
        let first = whole.clipped(1.0);
        if scale == Scale::Absmax {
            return first;
        }
        // With fewer levels, more clipping pays.
        let least = match levels.bits() {
            ..=2 => 0.3,
            3 => 0.45,
            4 => 0.65,
            _ => 0.95,
        };
        let mut best = (first.error(values, shares), first);
        for step in 0..=CLIPS {
            let share = 1.0 - (1.0 - least) * step as f32 / CLIPS as f32;
            for sign in whole.signs() {
                let grid = whole.clipped(sign * share);
                let error = grid.error(values, shares);
                if error < best.0 {
                    best = (error, grid);
                }
            }
        }
        best.1
    }

    fn signs(&self) -> &'static [f32] {
        match self.levels {
            Levels::Int { symmetric: true, .. } | Levels::Sparse { .. } => &[1.0, -1.0],
            _ => &[1.0],
        }
    }

    /// The grid over a share of the range, with a scale that can be stored.
    fn clipped(&self, share: f32) -> Self {
        let scale = storable(self.scale * share);
        let zero = match self.levels {
            Levels::Int { bits, symmetric: false } => {
                round(self.zero * share / scale).clamp(0.0, ((1 << bits) - 1) as f32)
            }
            _ => self.zero,
        };
        Self { levels: self.levels, scale, zero }
    }

    /// The code of a weight.
    #[inline(always)]
    pub fn code(&self, value: f32) -> u8 {
        if self.scale == 0.0 {
            return match self.levels {
                Levels::Int { .. } | Levels::Sparse { .. } => self.zero as u8,
                Levels::Nf4 => 7,
                Levels::E4m3 => 0,
            };
        }
        match self.levels {
            Levels::Int { bits, .. } | Levels::Sparse { bits } => {
                let top = ((1u32 << bits) - 1) as f32;
                round((value / self.scale).clamp(-1024.0, 1024.0) + self.zero).clamp(0.0, top) as u8
            }
            Levels::Nf4 => {
                let x = value / self.scale;
                NF4.windows(2).filter(|pair| x > 0.5 * (pair[0] + pair[1])).count() as u8
            }
            Levels::E4m3 => to_e4m3(value / self.scale),
        }
    }

    /// The value of a code.
    #[inline(always)]
    pub fn value(&self, code: u8) -> f32 {
        self.level(code) * self.scale
    }

    /// The value of a code before its scale.
    #[inline(always)]
    fn level(&self, code: u8) -> f32 {
        match self.levels {
            Levels::Int { .. } | Levels::Sparse { .. } => f32::from(code) - self.zero,
            Levels::Nf4 => NF4[usize::from(code & 15)],
            Levels::E4m3 => e4m3(code),
        }
    }

    fn error(&self, values: &[f32], shares: Option<&[f32]>) -> f32 {
        let Some(shares) = shares else { return self.squared_error(values) };
        values.iter().zip(shares).map(|(&v, share)| share * (self.value(self.code(v)) - v).powi(2)).sum()
    }

    fn squared_error(&self, values: &[f32]) -> f32 {
        let (Levels::Int { bits, .. } | Levels::Sparse { bits }) = self.levels else {
            return values.iter().map(|&v| (self.value(self.code(v)) - v).powi(2)).sum();
        };
        let (scale, inverse, zero, top) = (self.scale, 1.0 / self.scale, self.zero, ((1u32 << bits) - 1) as f32);
        // Eight sums in parallel, because the compiler does not reorder additions of floats.
        let mut sums = [0.0f32; 8];
        let mut add = |sum: usize, v: f32| {
            let code = round((v * inverse).clamp(-1024.0, 1024.0) + zero).clamp(0.0, top);
            let error = (code - zero) * scale - v;
            sums[sum] += error * error;
        };
        let (chunks, rest) = values.as_chunks::<8>();
        for chunk in chunks {
            for (sum, &v) in chunk.iter().enumerate() {
                add(sum, v);
            }
        }
        rest.iter().for_each(|&v| add(0, v));
        sums.iter().sum()
    }
}

/// Number of clipped grids that are tried.
const CLIPS: usize = 20;

/// The grid of every group of a matrix (rows, cols), row-major: (rows, n_groups). The columns may have shares in the
/// error.
fn grids(values: &[f32], cols: usize, scheme: Scheme, scale: Scale, shares: Option<&[f32]>) -> Vec<Grid> {
    let group = scheme.group_of(cols);
    Arch::new().dispatch(|| {
        let rows = values.chunks_exact(cols.max(1));
        let runs = rows.flat_map(|row| row.chunks(group).enumerate());
        let shares = |at: usize, run: &[f32]| shares.map(|shares| &shares[at * group..][..run.len()]);
        runs.map(|(at, run)| Grid::of(run, scheme.levels, scale, shares(at, run))).collect()
    })
}

/// The grids of the groups of a matrix.
#[derive(Clone)]
pub(super) struct GroupLattice {
    levels: Levels,
    /// (rows, n_groups)
    pub grids: Vec<Grid>,
    group: usize,
    n_groups: usize,
}

impl GroupLattice {
    #[inline(always)]
    fn grid(&self, row: usize, col: usize) -> &Grid {
        &self.grids[row * self.n_groups + col / self.group]
    }
}

impl Lattice for GroupLattice {
    #[inline(always)]
    fn code(&self, row: usize, col: usize, value: f32) -> u8 {
        self.grid(row, col).code(value)
    }

    #[inline(always)]
    fn value(&self, row: usize, col: usize, code: u8) -> f32 {
        self.grid(row, col).value(code)
    }

    fn numbers(&self) -> Vec<(Number, usize)> {
        let all = [(self.levels.has_scales(), Number::Scale), (self.levels.has_zeros(), Number::Offset)];
        all.into_iter().filter(|(is_stored, _)| *is_stored).map(|(_, number)| (number, self.group)).collect()
    }

    fn number(&self, number: Number, row: usize, col: usize) -> f32 {
        let grid = self.grid(row, col);
        if number == Number::Scale { grid.scale } else { grid.zero }
    }

    fn slope(&self, number: Number, row: usize, col: usize, code: u8) -> f32 {
        let grid = self.grid(row, col);
        if number == Number::Scale { grid.level(code) } else { -grid.scale }
    }

    fn put_number(&mut self, number: Number, row: usize, col: usize, wish: f32) -> f32 {
        let grid = &mut self.grids[row * self.n_groups + col / self.group];
        if number == Number::Scale {
            grid.scale = storable(wish);
            return grid.scale;
        }
        grid.zero = round(wish.clamp(-1024.0, 1024.0)).clamp(0.0, ((1u32 << self.levels.bits()) - 1) as f32);
        grid.zero
    }
}

impl Scheme {
    /// The values that codes may take for a matrix with rows of `cols`, row-major, whose columns may have shares in the
    /// error.
    pub(super) fn lattice(self, values: &[f32], cols: usize, scale: Scale, shares: Option<&[f32]>) -> GroupLattice {
        let (group, n_groups) = (self.group_of(cols), self.n_groups(cols));
        GroupLattice { levels: self.levels, grids: grids(values, cols, self, scale, shares), group, n_groups }
    }
}

impl Grouped {
    /// Rounds every weight of a matrix (rows, cols), row-major, to the nearest level of its group.
    ///
    /// # Panics
    /// If `values` does not consist of rows of `cols`.
    pub fn round(values: &[f32], rows: usize, cols: usize, scheme: Scheme, scale: Scale) -> Self {
        assert_eq!(values.len(), rows * cols, "invariant: a matrix has rows x columns values");
        let grids = grids(values, cols, scheme, scale, None);
        let (group, n_groups) = (scheme.group_of(cols), scheme.n_groups(cols));
        let codes = Arch::new().dispatch(|| {
            let runs = values.chunks_exact(cols.max(1)).zip(grids.chunks_exact(n_groups.max(1)));
            runs.flat_map(|(row, grids)| row.chunks(group).zip(grids))
                .flat_map(|(run, grid)| run.iter().map(|&v| grid.code(v)))
                .collect()
        });
        Self::of_codes(codes, rows, cols, scheme, &grids)
    }

    pub(super) fn of_codes(codes: Vec<u8>, rows: usize, cols: usize, scheme: Scheme, grids: &[Grid]) -> Self {
        let scales = grids.iter().map(|g| g.scale).collect();
        let has_zeros = scheme.levels.has_zeros();
        let zeros = if has_zeros { grids.iter().map(|g| g.zero as u8).collect() } else { Vec::new() };
        Self { rows, cols, scheme, codes, scales, zeros }
    }

    /// The matrix, row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let (group, n_groups) = (self.scheme.group_of(self.cols), self.scheme.n_groups(self.cols));
        let levels = self.scheme.levels;
        let mut values = Vec::with_capacity(self.codes.len());
        for (i, row) in self.codes.chunks_exact(self.cols.max(1)).enumerate() {
            for (j, run) in row.chunks(group).enumerate() {
                let at = i * n_groups + j;
                let zero = self.zeros.get(at).map_or(levels.middle(), |&z| f32::from(z));
                let grid = Grid { levels, scale: self.scales[at], zero };
                values.extend(run.iter().map(|&code| grid.value(code)));
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn schemes() -> Vec<Scheme> {
        let mut schemes =
            vec![Scheme { levels: Levels::Nf4, group: Some(16) }, Scheme { levels: Levels::Nf4, group: None }];
        schemes.push(Scheme { levels: Levels::E4m3, group: None });
        for bits in [2, 3, 4, 8] {
            for symmetric in [true, false] {
                for group in [None, Some(7), Some(32)] {
                    schemes.push(Scheme { levels: Levels::Int { bits, symmetric }, group });
                }
            }
        }
        schemes
    }

    fn error(matrix: &Grouped, values: &[f32]) -> f64 {
        matrix.dequantize().iter().zip(values).map(|(q, v)| f64::from(q - v).powi(2)).sum()
    }

    proptest! {
        #[test]
        fn no_weight_is_off_by_more_than_a_step(rows in 1usize..4, cols in 1usize..50, seed in any::<u32>()) {
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 8_388_608.0 - 1.0;
            let values: Vec<f32> = (0..rows * cols).map(value).collect();
            for scheme in schemes() {
                let matrix = Grouped::round(&values, rows, cols, scheme, Scale::Absmax);
                let step = match scheme.levels {
                    // The last level on the short side of a symmetric grid is one step away; f16 scales are accurate
                    // to 2^-11.
                    Levels::Int { bits, symmetric: true } | Levels::Sparse { bits } => 1.1 / f64::from(1 << (bits - 1)),
                    Levels::Int { bits, .. } => 2.1 / f64::from((1 << bits) - 1),
                    Levels::Nf4 => 0.16,
                    Levels::E4m3 => 1.0 / 16.0,
                };
                let back = matrix.dequantize();
                for (q, v) in back.iter().zip(&values) {
                    prop_assert!(f64::from((q - v).abs()) <= step, "{scheme:?} {q} {v}");
                }
                // Clipping is chosen if it lowers the mean error, and quantizing twice changes nothing.
                let clipped = Grouped::round(&values, rows, cols, scheme, Scale::Mse);
                prop_assert!(error(&clipped, &values) <= error(&matrix, &values) * (1.0 + 1e-5));
            }
        }
    }

    #[test]
    fn grids_hold_what_they_can() {
        // −8 … 7 times 0.5 are the levels of a symmetric int4 grid of scale 0.5 (or −0.5 with 8 … −7).
        let levels: Vec<f32> = (-8..8).map(|q| q as f32 * 0.5).collect();
        let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: true }, group: None };
        for scale in [Scale::Absmax, Scale::Mse] {
            let matrix = Grouped::round(&levels, 1, 16, scheme, scale);
            assert_eq!((matrix.dequantize(), matrix.scales[0]), (levels.clone(), 0.5));
        }
        // 0, 1 and 3 in two bits with a zero.
        let scheme = Scheme { levels: Levels::Int { bits: 2, symmetric: false }, group: None };
        let matrix = Grouped::round(&[-1.0, 0.0, 2.0], 1, 3, scheme, Scale::Absmax);
        assert_eq!((&matrix.codes[..], &matrix.zeros[..]), (&[0, 1, 3][..], &[1][..]));
        // All levels of NF4, and a run of zeros.
        let scheme = Scheme { levels: Levels::Nf4, group: Some(16) };
        let values = [&NF4[..], &[0.0; 16]].concat();
        let matrix = Grouped::round(&values, 1, 32, scheme, Scale::Absmax);
        assert_eq!(matrix.dequantize(), values);
        assert_eq!(matrix.codes[..16], (0..16).collect::<Vec<u8>>());
    }

    #[test]
    fn bytes_are_counted_as_they_are_packed() {
        let scheme = Scheme { levels: Levels::Int { bits: 3, symmetric: false }, group: Some(4) };
        // A row of 10: 4 bytes of codes, 3 scales, 3 zeros in 2 bytes.
        assert_eq!(scheme.n_bytes(5, 10), 5 * (4 + 6 + 2));
        assert_eq!(Scheme { levels: Levels::E4m3, group: None }.n_bytes(5, 10), 50);
    }
}
