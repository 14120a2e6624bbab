//! Symmetric matrices, held as one triangle.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::reborrow::{IntoConst, ReborrowMut};
use faer::{Accum, Mat, MatMut, MatRef};

use super::gram::{threads_for, unpack_lower};

/// `scale · T + shift · I` (n, n), with the lower triangle of `T` row by row in f32: a quarter of the bytes of all its
/// entries in f64.
#[derive(Debug, Clone)]
pub struct Packed {
    n: usize,
    triangle: Vec<f32>,
    scale: f64,
    shift: f64,
}

/// Rows that are unpacked at once.
const PANEL: usize = 256;

impl Packed {
    /// `scale · T`; `None` if the length does not match a triangle of size `n`.
    pub fn new(triangle: Vec<f32>, n: usize, scale: f64) -> Option<Self> {
        (triangle.len() == n * (n + 1) / 2).then_some(Self { n, triangle, scale, shift: 0.0 })
    }

    /// Draws the eigenvalues towards their mean: `(1 − damping) M + damping · mean(diag M) · I`.
    #[must_use]
    pub fn damped(mut self, damping: f64) -> Self {
        let mean = self.diagonal().iter().sum::<f64>() / self.n.max(1) as f64;
        self.scale *= 1.0 - damping;
        self.shift = (1.0 - damping) * self.shift + damping * mean;
        self
    }

    /// If it is a mean of outer products `x xᵀ`, the same of vectors without their mean: `M − scale · s sᵀ / count`,
    /// for the sum `s` (n) of the `count` vectors. Rounding errors below zero on the diagonal of this covariance are
    /// clamped.
    #[must_use]
    pub fn centered(mut self, sum: &[f64], count: f64) -> Self {
        let mut rows = self.triangle.as_mut_slice();
        for (i, &a) in sum.iter().enumerate() {
            let (row, rest) = std::mem::take(&mut rows).split_at_mut(i + 1);
            row.iter_mut().zip(sum).for_each(|(v, b)| *v = (f64::from(*v) - a * b / count) as f32);
            row[i] = row[i].max(0.0);
            rows = rest;
        }
        self
    }

    /// Rows and columns.
    pub fn n(&self) -> usize {
        self.n
    }

    fn row(&self, i: usize) -> &[f32] {
        let first = i * (i + 1) / 2;
        &self.triangle[first..=first + i]
    }

    /// The diagonal, (n).
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.n).map(|i| self.scale * f64::from(self.row(i)[i]) + self.shift).collect()
    }

    /// Whether all entries are zero.
    pub fn is_zero(&self) -> bool {
        self.shift == 0.0 && (self.scale == 0.0 || self.triangle.iter().all(|&v| v == 0.0))
    }

    /// A run of its rows, and the same columns.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let triangle = range.clone().flat_map(|i| &self.row(i)[range.start..]).copied().collect();
        Self { n: range.len(), triangle, ..*self }
    }

    /// All entries.
    pub fn to_dense(&self) -> Mat<f64> {
        let mut matrix = unpack_lower(&self.triangle, self.n, self.scale);
        (0..self.n).for_each(|i| matrix[(i, i)] += self.shift);
        matrix
    }

    /// `X M` for `x` (rows, n); one panel of `M` is unpacked at a time.
    pub fn left_times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut result = x * faer::Scale(self.shift);
        let mut panel = Mat::zeros(self.n, PANEL.min(self.n));
        for first in (0..self.n).step_by(PANEL) {
            let rows = first..self.n.min(first + PANEL);
            let panel = panel.as_mut().submatrix_mut(0, 0, rows.end, rows.len());
            let panel = self.unpack(rows.clone(), panel);
            let add = |to: MatMut<'_, f64>, x: MatRef<'_, f64>, panel: MatRef<'_, f64>| {
                let threads = threads_for(x.nrows() * x.ncols() * panel.ncols());
                matmul(to, Accum::Add, x, panel, self.scale, threads);
            };
            // The rows of the panel up to the end of its diagonal block, then its columns below that block.
            add(result.as_mut().subcols_mut(0, rows.end), x.subcols(first, rows.len()), panel.transpose());
            add(result.as_mut().subcols_mut(first, rows.len()), x.subcols(0, first), panel.subrows(0, first));
        }
        result
    }

    /// `X M Xᵀ` (rows, rows) for `x` (rows, n). With `M = L + Lᵀ` it is `X L Xᵀ` plus its transpose, one panel of `L`
    /// at a time: half the products of `X M`, which is not kept.
    pub fn quadratic(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        let mut half = Mat::zeros(x.nrows(), x.nrows());
        let mut panel = Mat::zeros(self.n, PANEL.min(self.n));
        let mut image = Mat::zeros(x.nrows(), PANEL.min(self.n));
        for first in (0..self.n).step_by(PANEL) {
            let rows = first..self.n.min(first + PANEL);
            let mut panel = panel.as_mut().submatrix_mut(0, 0, rows.end, rows.len());
            self.unpack_rows(rows.clone(), panel.rb_mut(), self.scale);
            for i in 0..rows.len() {
                let row = first + i;
                panel[(row, i)] = 0.5 * (panel[(row, i)] + self.shift);
                panel.rb_mut().col_mut(i).subrows_mut(row + 1, rows.end - row - 1).fill(0.0);
            }
            let mut image = image.as_mut().subcols_mut(0, rows.len()); // X Lᵀ, its columns of the panel
            let threads = threads_for(x.nrows() * rows.end * rows.len());
            matmul(image.rb_mut(), Accum::Replace, x.subcols(0, rows.end), panel.as_ref(), 1.0, threads);
            let threads = threads_for(x.nrows() * x.nrows() * rows.len());
            matmul(half.as_mut(), Accum::Add, x.subcols(first, rows.len()), image.transpose(), 1.0, threads);
        }
        &half + half.transpose()
    }

    /// Entries `0..rows.end` of `rows` of `T`, as columns.
    fn unpack<'p>(&self, rows: Range<usize>, mut panel: MatMut<'p, f64>) -> MatRef<'p, f64> {
        self.unpack_rows(rows.clone(), panel.rb_mut(), 1.0);
        for i in 0..rows.len() {
            for j in i + 1..rows.len() {
                panel[(rows.start + j, i)] = panel[(rows.start + i, j)];
            }
        }
        panel.into_const()
    }

    /// The triangle's entries of `rows` times `scale`, as columns; entries above the diagonal are not changed.
    fn unpack_rows(&self, rows: Range<usize>, panel: MatMut<'_, f64>, scale: f64) {
        for (i, column) in rows.zip(panel.col_iter_mut()) {
            column.iter_mut().zip(self.row(i)).for_each(|(to, &from)| *to = scale * f64::from(from));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_centered_gram_is_the_gram_of_vectors_without_their_mean() {
        // Small integers with a mean of whole numbers: every product is exact.
        let vectors =
            Mat::from_fn(4, 3, |i, j| [[1.0, 2.0, 5.0], [3.0, -2.0, 5.0], [5.0, 4.0, 5.0], [3.0, 0.0, 5.0]][i][j]);
        let gram = vectors.transpose() * &vectors;
        let triangle: Vec<f32> = (0..3).flat_map(|i| (0..=i).map(move |j| (i, j))).map(|at| gram[at] as f32).collect();
        let centered = Packed::new(triangle, 3, 0.25).unwrap().centered(&[12.0, 4.0, 20.0], 4.0).to_dense();
        let apart = Mat::from_fn(4, 3, |i, j| vectors[(i, j)] - [3.0, 1.0, 5.0][j]);
        assert_eq!(centered, 0.25 * (apart.transpose() * &apart));
        // Two constants of equal sums: what rounding leaves is no negative variance.
        let constant = Packed::new(vec![0.1f32 * 0.1 * 7.0], 1, 1.0).unwrap().centered(&[0.7000001], 7.0);
        assert_eq!(constant.diagonal(), [0.0]);
    }

    #[test]
    fn it_is_the_matrix_that_its_triangle_is_of() {
        // Several panels, the last narrower; small integers are exact in f32.
        for n in [1, 7, PANEL, 2 * PANEL + 3] {
            let value = |i: usize, j: usize| ((i * 31 + j * 31 + i * j * 7) % 23) as f64 - 11.0;
            let triangle: Vec<f32> = (0..n).flat_map(|i| (0..=i).map(move |j| value(i, j) as f32)).collect();
            let packed = Packed::new(triangle, n, 0.5).unwrap();
            let expected = Mat::from_fn(n, n, |i, j| 0.5 * value(i, j));
            assert_eq!(packed.to_dense(), expected);
            let x = Mat::from_fn(5, n, |i, j| ((i * 5 + j * 3) % 7) as f64 - 3.0);
            assert_eq!(packed.left_times(x.as_ref()), &x * &expected);
            assert_eq!(packed.quadratic(x.as_ref()), &x * &expected * x.transpose());
            let part = n / 3..n.div_ceil(2);
            let block = expected.submatrix(part.start, part.start, part.len(), part.len()).to_owned();
            assert_eq!(packed.slice(part).to_dense(), block);

            let damped = packed.damped(0.25);
            let mean = (0..n).map(|i| expected[(i, i)]).sum::<f64>() / n as f64;
            let expected = Mat::from_fn(n, n, |i, j| 0.75 * expected[(i, j)] + if i == j { 0.25 * mean } else { 0.0 });
            assert!((damped.to_dense() - &expected).norm_max() < 1e-12);
            assert!((damped.left_times(x.as_ref()) - &x * &expected).norm_max() < 1e-9);
            assert!((damped.quadratic(x.as_ref()) - &x * &expected * x.transpose()).norm_max() < 1e-8);
            assert_eq!(damped.diagonal(), (0..n).map(|i| damped.to_dense()[(i, i)]).collect::<Vec<_>>());
        }
        assert!(Packed::new(vec![0.0; 5], 3, 1.0).is_none());
        assert!(Packed::new(vec![0.0; 6], 3, 1.0).unwrap().is_zero());
    }
}
