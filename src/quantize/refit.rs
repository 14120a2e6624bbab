//! Scales, zeros and minima for fixed codes, in the metric of both sides.
//!
//! The values `Q` are linear in each of these numbers: if one of row `i` grows by `t`, the values of its run of columns
//! `R` grow by `t x`, with `x` the slopes of their codes. The error `f = tr(G E C Eᵀ)`, `E = W − Q`, is a parabola in
//! `t`, with its least at `(G E C)_iR x / (G_ii xᵀ C_RR x)`: the storable number nearest to that is the best while all
//! others stay. So no step increases `f`.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use super::lattice::{Lattice, Number};

/// Rows whose couplings with later rows are computed at a time.
const TILE: usize = 64;

/// The metric in which numbers are refitted.
pub(super) struct Refit<'a> {
    /// `C` (cols, cols).
    pub inputs: MatRef<'a, f32>,
    /// `G` (rows, rows); `None`: the identity.
    pub outputs: Option<MatRef<'a, f32>>,
}

impl Refit<'_> {
    /// Refits every number of a lattice once, with `pull = G E C` (rows, cols).
    pub fn all(&self, lattice: &mut impl Lattice, codes: &[u8], mut pull: Mat<f32>) {
        let (rows, cols) = pull.shape();
        let numbers = lattice.numbers();
        let width = numbers.iter().map(|(_, width)| *width).max().unwrap_or(cols).max(1);
        for first in (0..cols).step_by(width) {
            let block = first..cols.min(first + width);
            let mut moved = Mat::<f32>::zeros(rows, block.len());
            for &(number, width) in &numbers {
                for begin in block.clone().step_by(width) {
                    let run = begin..block.end.min(begin + width);
                    let change = self.run(lattice, codes, number, run.clone(), pull.as_ref());
                    let change =
                        self.outputs.map_or_else(|| change.clone(), |outputs| product(outputs, change.as_ref()));
                    self.follow(&mut pull, change.as_ref(), run.start, block.clone());
                    let mut moved = moved.as_mut().subcols_mut(begin - first, run.len());
                    moved += &change;
                }
            }
            self.follow(&mut pull, moved.as_ref(), first, block.end..cols);
        }
    }

    /// `pull[:, cols] −= change · C[first.., cols]`, with `change = G ΔQ` of the columns from `first`.
    fn follow(&self, pull: &mut Mat<f32>, change: MatRef<'_, f32>, first: usize, cols: Range<usize>) {
        let couplings = self.inputs.submatrix(first, cols.start, change.ncols(), cols.len());
        let pull = pull.as_mut().subcols_mut(cols.start, cols.len());
        matmul(pull, Accum::Add, change, couplings, -1.0f32, Par::Seq);
    }

    /// Refits one number of every row, that of a run of columns; returns how the values there moved, (rows, run).
    fn run(
        &self,
        lattice: &mut impl Lattice,
        codes: &[u8],
        number: Number,
        run: Range<usize>,
        pull: MatRef<'_, f32>,
    ) -> Mat<f32> {
        let (rows, cols) = pull.shape();
        let slope = |i: usize, j: usize| lattice.slope(number, i, run.start + j, codes[i * cols + run.start + j]);
        let mut slopes = Mat::from_fn(rows, run.len(), slope);
        let inputs = self.inputs.submatrix(run.start, run.start, run.len(), run.len());
        let images = product(slopes.as_ref(), inputs);
        let mut along = row_dots(pull.subcols(run.start, run.len()), slopes.as_ref());
        let squares = row_dots(images.as_ref(), slopes.as_ref());
        let mut steps = vec![0.0f32; rows];
        for first in (0..rows).step_by(TILE) {
            let tile = first..rows.min(first + TILE);
            // `x_iᵀ C_RR x_k` of later rows i and the rows k of the tile.
            let later = images.as_ref().subrows(first, rows - first);
            let couplings =
                self.outputs.map(|_| product(later, slopes.as_ref().subrows(first, tile.len()).transpose()));
            for i in tile {
                let weight = self.outputs.map_or(1.0, |outputs| outputs[(i, i)]) * squares[i];
                if weight <= 0.0 {
                    continue;
                }
                let before = lattice.number(number, i, run.start);
                steps[i] = lattice.put_number(number, i, run.start, before + along[i] / weight) - before;
                if let Some((outputs, couplings)) = self.outputs.zip(couplings.as_ref()).filter(|_| steps[i] != 0.0) {
                    for k in i + 1..rows {
                        along[k] -= steps[i] * outputs[(k, i)] * couplings[(k - first, i - first)];
                    }
                }
            }
        }
        for column in slopes.col_iter_mut() {
            column.iter_mut().zip(&steps).for_each(|(slope, step)| *slope *= step);
        }
        slopes
    }
}

/// `A B`.
pub(super) fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Mat<f32> {
    let mut product = Mat::<f32>::zeros(a.nrows(), b.ncols());
    matmul(&mut product, Accum::Replace, a, b, 1.0, Par::Seq);
    product
}

/// The inner product of every row of one matrix with that of another.
fn row_dots(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Vec<f32> {
    let mut dots = vec![0.0f32; a.nrows()];
    for (a, b) in a.col_iter().zip(b.col_iter()) {
        dots.iter_mut().zip(a.iter().zip(b.iter())).for_each(|(dot, (a, b))| *dot += a * b);
    }
    dots
}

#[cfg(test)]
mod tests {
    use super::super::{BLOCK_TYPES, Blocks, Levels, Scale, Scheme};
    use super::*;

    fn matrix(rows: usize, cols: usize, seed: u32) -> Vec<f32> {
        let value = |i: usize| ((i as u32 ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
        (0..rows * cols).map(value).collect()
    }

    /// The second moment of correlated vectors.
    fn gram(n: usize, seed: u32) -> Mat<f32> {
        let x = matrix(2 * n, n, seed);
        let x = Mat::from_fn(2 * n, n, |i, j| x[i * n + j] + 0.7 * x[i * n + j / 3]);
        x.transpose() * &x * faer::Scale(0.5 / n as f32)
    }

    struct Case {
        values: Vec<f32>,
        shape: (usize, usize),
        inputs: Mat<f32>,
        outputs: Option<Mat<f32>>,
    }

    impl Case {
        /// `G E C` and `tr(G E C Eᵀ)` in f64.
        fn pull(&self, lattice: &impl Lattice, codes: &[u8]) -> (Mat<f64>, f64) {
            let wide =
                |matrix: &Mat<f32>| Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| f64::from(matrix[(i, j)]));
            let (rows, cols) = self.shape;
            let errors = Mat::from_fn(rows, cols, |i, j| {
                f64::from(self.values[i * cols + j]) - f64::from(lattice.value(i, j, codes[i * cols + j]))
            });
            let pull = &errors * wide(&self.inputs);
            let pull = self.outputs.as_ref().map_or_else(|| pull.clone(), |outputs| wide(outputs) * &pull);
            let error = (0..rows).map(|i| (0..cols).map(|j| errors[(i, j)] * pull[(i, j)]).sum::<f64>()).sum();
            (pull, error)
        }

        fn refit(&self, lattice: &mut impl Lattice, codes: &[u8]) -> f64 {
            let (pull, _) = self.pull(lattice, codes);
            let pull = Mat::from_fn(pull.nrows(), pull.ncols(), |i, j| pull[(i, j)] as f32);
            let refit = Refit { inputs: self.inputs.as_ref(), outputs: self.outputs.as_ref().map(Mat::as_ref) };
            refit.all(lattice, codes, pull);
            self.pull(lattice, codes).1
        }

        /// Refits until nothing moves: the error never rises, and in the end no number can lower it by moving to a
        /// neighbour. Returns the share of the error that is left.
        fn check<L: Lattice + Clone>(&self, lattice: &mut L, codes: &[u8], name: &str) -> f64 {
            let (rows, cols) = self.shape;
            let first = self.pull(lattice, codes).1;
            let mut last = first;
            for _ in 0..1000 {
                let error = self.refit(lattice, codes);
                assert!(error <= last * 1.000_01, "{name}: {error} {last}");
                let is_done = error == last;
                last = error;
                if is_done {
                    break;
                }
            }
            for (number, width) in lattice.numbers() {
                for (i, j) in (0..rows).flat_map(|i| (0..cols).step_by(width).map(move |j| (i, j))) {
                    let now = lattice.number(number, i, j);
                    for step in [1.0f32, -1.0, 0.002 * now, -0.002 * now] {
                        let mut moved = lattice.clone();
                        moved.put_number(number, i, j, now + step);
                        let error = self.pull(&moved, codes).1;
                        assert!(error >= last * 0.999_5, "{name} {number:?} {i} {j}: {error} {last}");
                    }
                }
            }
            last / first
        }
    }

    #[test]
    fn no_number_can_lower_the_error_after_refits_none_of_which_raises_it() {
        let (rows, cols) = (3, 256);
        for outputs in [None, Some(gram(rows, 8))] {
            let case = Case { values: matrix(rows, cols, 3), shape: (rows, cols), inputs: gram(cols, 7), outputs };
            let int = |bits, symmetric| Levels::Int { bits, symmetric };
            for (levels, group) in
                [(int(2, true), Some(64)), (int(3, false), Some(96)), (int(4, true), None), (Levels::Nf4, Some(128))]
            {
                let scheme = Scheme { levels, group };
                let mut lattice = scheme.lattice(&case.values, cols, Scale::Absmax, None);
                let codes = lattice.round(&case.values, cols);
                let left = case.check(&mut lattice, &codes, &scheme.to_string());
                assert!(left < 0.999, "{scheme}: {left}");
            }
            for block_type in BLOCK_TYPES {
                let mut blocks = Blocks::quantize(&case.values, rows, cols, block_type).unwrap();
                let (codes, mut lattice) = blocks.codes();
                let left = case.check(&mut lattice, &codes, block_type.name);
                assert!(left < 0.999, "{}: {left}", block_type.name);
                // What is refitted is what is stored.
                blocks.put_scales(&lattice);
                let (stored, again) = blocks.codes();
                assert_eq!((stored, again.scales), (codes, lattice.scales), "{}", block_type.name);
            }
        }
    }

    #[test]
    fn one_group_alone_gets_the_scale_of_least_squares() {
        let (rows, cols) = (1, 48);
        let case = Case { values: matrix(rows, cols, 11), shape: (rows, cols), inputs: gram(cols, 7), outputs: None };
        let scheme = Scheme { levels: Levels::Int { bits: 3, symmetric: true }, group: None };
        let mut lattice = scheme.lattice(&case.values, cols, Scale::Absmax, None);
        let codes = lattice.round(&case.values, cols);
        let (mut along, mut square) = (0.0, 0.0);
        for (j, k) in (0..cols).flat_map(|j| (0..cols).map(move |k| (j, k))) {
            let level = |at: usize| f64::from(codes[at]) - 4.0;
            along += level(j) * f64::from(case.inputs[(j, k)]) * f64::from(case.values[k]);
            square += level(j) * f64::from(case.inputs[(j, k)]) * level(k);
        }
        case.refit(&mut lattice, &codes);
        assert!((f64::from(lattice.grids[0].scale) * square / along - 1.0).abs() < 1e-3);
    }

    #[test]
    fn floats_without_scales_and_runs_of_zeros_stay() {
        let (rows, cols) = (2, 256);
        let case = Case { values: vec![0.0; rows * cols], shape: (rows, cols), inputs: gram(cols, 7), outputs: None };
        for block_type in BLOCK_TYPES {
            let (codes, mut lattice) = Blocks::quantize(&case.values, rows, cols, block_type).unwrap().codes();
            assert_eq!(case.refit(&mut lattice, &codes), 0.0, "{}", block_type.name);
        }
        let scheme = Scheme { levels: Levels::E4m3, group: None };
        let values = matrix(rows, cols, 5);
        let mut lattice = scheme.lattice(&values, cols, Scale::Mse, None);
        let codes = lattice.round(&values, cols);
        let case = Case { values, ..case };
        let before = case.pull(&lattice, &codes).1;
        assert_eq!(case.refit(&mut lattice, &codes), before);
    }
}
