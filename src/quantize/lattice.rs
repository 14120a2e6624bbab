//! The values that the codes of a matrix may take: what rounding with feedback and coordinate descent choose from; and
//! the numbers that these values are linear in, which a refit chooses for fixed codes.

use std::sync::Arc;

use half::f16;

use super::grid::RUN;
use super::points::Points;

/// A number that the values of a run of columns are linear in, each other number fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Number {
    /// The scale of a run.
    Scale,
    /// The zero or the minimum of a run.
    Offset,
    /// The unit of the scales of a block of runs.
    CommonScale,
    /// The unit of the minima of a block of runs, or the minimum of a block that is one run.
    CommonOffset,
}

/// The values that a code may take in each place of a matrix.
pub(super) trait Lattice {
    /// The code with the value nearest to `value`.
    fn code(&self, row: usize, col: usize, value: f32) -> u8;

    /// The value of a code.
    fn value(&self, row: usize, col: usize, code: u8) -> f32;

    /// The codes of `values`, row-major with rows of `cols`, rounded to nearest.
    fn round(&self, values: &[f32], cols: usize) -> Vec<u8> {
        values.iter().enumerate().map(|(at, &value)| self.code(at / cols, at % cols, value)).collect()
    }

    /// The numbers that are stored, each with the columns that share one.
    fn numbers(&self) -> Vec<(Number, usize)>;

    /// The number at a place.
    fn number(&self, number: Number, row: usize, col: usize) -> f32;

    /// What the value of a code gains if the number grows by one.
    fn slope(&self, number: Number, row: usize, col: usize, code: u8) -> f32;

    /// Replaces a number by the storable one that is nearest to `wish`, and returns it.
    fn put_number(&mut self, number: Number, row: usize, col: usize, wish: f32) -> f32;

    /// The points from which the codes of eight columns are chosen together, if they are.
    fn points(&self) -> Option<&Points> {
        None
    }
}

/// The value of the nearest f16; 0 only if `scale` is 0.
pub(super) fn storable(scale: f32) -> f32 {
    let rounded = f16::from_f32(scale.clamp(-65504.0, 65504.0)).to_f32();
    if rounded == 0.0 && scale != 0.0 { f16::MIN_POSITIVE_SUBNORMAL.to_f32().copysign(scale) } else { rounded }
}

/// The levels of codes, before their scale.
#[derive(Debug, Clone, Copy)]
pub(super) enum Spacing {
    /// `code − zero`, with codes up to `top`.
    Even { zero: f32, top: f32 },
    /// In rising order.
    Table(&'static [f32; 16]),
}

/// Codes in blocks of llama.cpp: `d s level(code) − e t` with `d` and `e` of a block, `s` and `t` of a run.
#[derive(Clone)]
pub(super) struct BlockLattice {
    /// Columns of a run, and of a block.
    pub run: usize,
    pub block: usize,
    /// In a row.
    pub n_runs: usize,
    pub n_blocks: usize,
    pub spacing: Spacing,
    /// `d s` and `e t`, (rows, n_runs).
    pub scales: Vec<(f32, f32)>,
    /// `s` and `t`, (rows, n_runs).
    pub runs: Vec<[f32; 2]>,
    /// `d` and `e`, (rows, n_blocks), each the value of an f16.
    pub common: Vec<[f32; 2]>,
    /// The smallest and the largest `s` and `t`, if these are stored: there are those whose difference to it is whole.
    pub ends: [Option<(f32, f32)>; 2],
    /// Whether `e` is stored.
    pub has_minimum: bool,
    /// Of types whose weights are coded together.
    pub points: Option<Arc<Points>>,
}

impl BlockLattice {
    /// The codes of `values`, row-major with rows of `cols`, rounded to nearest where columns have these weights.
    pub fn nearest(&self, values: &[f32], cols: usize, weights: Option<&[f32]>) -> Vec<u8> {
        let Some(points) = &self.points else {
            return values.iter().enumerate().map(|(at, &value)| self.code(at / cols, at % cols, value)).collect();
        };
        let mut codes = vec![0u8; values.len()];
        let runs = codes.as_chunks_mut::<RUN>().0.iter_mut().zip(values.as_chunks::<RUN>().0);
        for (at, (codes, values)) in runs.enumerate() {
            let (row, col) = (at * RUN / cols, at * RUN % cols);
            let weights = std::array::from_fn(|k| weights.map_or(1.0, |weights| weights[col + k]));
            points.nearest(self.scales[row * self.n_runs + col / self.run].0, &weights, values, codes);
        }
        codes
    }
}

impl Spacing {
    /// The code of the level nearest to `level`.
    #[inline(always)]
    pub fn nearest(self, level: f32) -> u8 {
        match self {
            Self::Even { zero, top } => (level + zero).round_ties_even().clamp(0.0, top) as u8,
            Self::Table(levels) => {
                let middles = levels.array_windows().map(|[a, b]| 0.5 * (a + b));
                middles.filter(|&middle| level > middle).count() as u8
            }
        }
    }

    /// The lowest and the highest level.
    pub fn ends(self) -> (f32, f32) {
        match self {
            Self::Even { zero, top } => (-zero, top - zero),
            Self::Table(levels) => {
                (levels[0], levels.iter().copied().filter(|level| level.is_finite()).fold(0.0, f32::max))
            }
        }
    }

    /// The level of a code.
    #[inline(always)]
    pub fn level(self, code: u8) -> f32 {
        match self {
            Self::Even { zero, .. } => f32::from(code) - zero,
            Self::Table(levels) => levels[usize::from(code & 15)],
        }
    }
}

impl Lattice for BlockLattice {
    #[inline(always)]
    fn code(&self, row: usize, col: usize, value: f32) -> u8 {
        let (scale, minimum) = self.scales[row * self.n_runs + col / self.run];
        // Without a scale all codes have one value.
        self.spacing.nearest(if scale == 0.0 { 0.0 } else { (value + minimum) / scale })
    }

    #[inline(always)]
    fn value(&self, row: usize, col: usize, code: u8) -> f32 {
        let (scale, minimum) = self.scales[row * self.n_runs + col / self.run];
        scale * self.spacing.level(code) - minimum
    }

    fn round(&self, values: &[f32], cols: usize) -> Vec<u8> {
        self.nearest(values, cols, None)
    }

    fn points(&self) -> Option<&Points> {
        self.points.as_deref()
    }

    fn numbers(&self) -> Vec<(Number, usize)> {
        let [scale, offset] = self.ends.map(|ends| ends.is_some());
        let all = [
            (scale, Number::Scale, self.run),
            (offset, Number::Offset, self.run),
            (true, Number::CommonScale, self.block),
            (self.has_minimum, Number::CommonOffset, self.block),
        ];
        all.into_iter().filter(|(is_stored, ..)| *is_stored).map(|(_, number, width)| (number, width)).collect()
    }

    fn number(&self, number: Number, row: usize, col: usize) -> f32 {
        let run = &self.runs[row * self.n_runs + col / self.run];
        let common = &self.common[row * self.n_blocks + col / self.block];
        match number {
            Number::Scale => run[0],
            Number::Offset => run[1],
            Number::CommonScale => common[0],
            Number::CommonOffset => common[1],
        }
    }

    fn slope(&self, number: Number, row: usize, col: usize, code: u8) -> f32 {
        let run = &self.runs[row * self.n_runs + col / self.run];
        let common = &self.common[row * self.n_blocks + col / self.block];
        match number {
            Number::Scale => common[0] * self.spacing.level(code),
            Number::Offset => -common[1],
            Number::CommonScale => run[0] * self.spacing.level(code),
            Number::CommonOffset => -run[1],
        }
    }

    fn put_number(&mut self, number: Number, row: usize, col: usize, wish: f32) -> f32 {
        let whole = |ends: Option<(f32, f32)>| {
            let (low, high) = ends.expect("invariant: only stored numbers are replaced");
            (low + (wish - low).round_ties_even()).clamp(low, high)
        };
        let block = row * self.n_blocks + col / self.block;
        let first = row * self.n_runs + col / self.run;
        let (found, place, n_runs) = match number {
            Number::Scale => (whole(self.ends[0]), &mut self.runs[first][0], 1),
            Number::Offset => (whole(self.ends[1]), &mut self.runs[first][1], 1),
            Number::CommonScale => (storable(wish), &mut self.common[block][0], self.block / self.run),
            Number::CommonOffset => (storable(wish), &mut self.common[block][1], self.block / self.run),
        };
        *place = found;
        let [d, e] = self.common[block];
        for run in first..first + n_runs {
            let [s, t] = self.runs[run];
            self.scales[run] = (d * s, e * t);
        }
        found
    }
}
