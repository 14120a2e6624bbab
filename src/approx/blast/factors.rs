//! The values of a matrix of blocks that share their factors, and products with parts of them.

use std::ops::Range;

use faer::{Mat, MatRef};

use crate::linalg;

/// The values of a matrix of blocks.
#[derive(Debug, Clone)]
pub struct BlockFactors {
    /// Slices of rows and of columns.
    pub count: usize,
    /// `U` (m, r).
    pub u: Mat<f32>,
    /// `V` (n, r).
    pub v: Mat<f32>,
    /// `s` (b², r), row-major, with rows in the order (i, j).
    pub s: Vec<f32>,
}

/// Slice `at` of `count` slices of a length.
pub(super) fn slice(len: usize, count: usize, at: usize) -> Range<usize> {
    at * len / count..(at + 1) * len / count
}

/// The rows `range` of a matrix.
pub(super) fn rows(x: &Mat<f32>, range: Range<usize>) -> MatRef<'_, f32> {
    x.as_ref().subrows(range.start, range.len())
}

/// A block of a matrix.
pub(super) fn block(x: &Mat<f32>, rows: Range<usize>, columns: Range<usize>) -> MatRef<'_, f32> {
    x.as_ref().submatrix(rows.start, columns.start, rows.len(), columns.len())
}

/// `x diag(scales)`.
pub(super) fn times_diagonal(x: MatRef<'_, f32>, scales: &[f32]) -> Mat<f32> {
    let mut scaled = x.to_owned();
    for (column, &scale) in scaled.col_iter_mut().zip(scales) {
        column.iter_mut().for_each(|value| *value *= scale);
    }
    scaled
}

/// Adds `x diag(scales)` to a sum of the same shape.
pub(super) fn add_times_diagonal(sum: &mut Mat<f32>, x: MatRef<'_, f32>, scales: &[f32]) {
    for ((sum, column), &scale) in sum.col_iter_mut().zip(x.col_iter()).zip(scales) {
        sum.iter_mut().zip(column.iter()).for_each(|(sum, value)| *sum += value * scale);
    }
}

/// `Σ_i x_ik y_ik` for every column k.
pub(super) fn column_products(x: MatRef<'_, f32>, y: MatRef<'_, f32>) -> Vec<f64> {
    let one = |(x, y): (&f32, &f32)| f64::from(*x) * f64::from(*y);
    x.col_iter().zip(y.col_iter()).map(|(x, y)| x.iter().zip(y.iter()).map(one).sum()).collect()
}

impl BlockFactors {
    /// r.
    pub fn rank(&self) -> usize {
        self.u.ncols()
    }

    /// `s_ij` (r).
    pub(super) fn scales(&self, i: usize, j: usize) -> &[f32] {
        &self.s[(i * self.count + j) * self.rank()..][..self.rank()]
    }

    pub(super) fn row_slice(&self, i: usize) -> Range<usize> {
        slice(self.u.nrows(), self.count, i)
    }

    pub(super) fn column_slice(&self, j: usize) -> Range<usize> {
        slice(self.v.nrows(), self.count, j)
    }

    /// The slices of `U` times `diag(s_ij)`, one below another (m, r): the left part of the columns of slice j.
    pub fn left(&self, j: usize) -> Mat<f32> {
        let mut left = self.u.clone();
        for i in 0..self.count {
            let own = self.row_slice(i);
            for (column, &scale) in left.col_iter_mut().zip(self.scales(i, j)) {
                column.subrows_mut(own.start, own.len()).iter_mut().for_each(|value| *value *= scale);
            }
        }
        left
    }

    /// The matrix (m, n).
    pub fn product(&self) -> Mat<f32> {
        let mut product = Mat::zeros(self.u.nrows(), self.v.nrows());
        for j in 0..self.count {
            let own = self.column_slice(j);
            let columns = product.as_mut().subcols_mut(own.start, own.len());
            linalg::add_product_f32(columns, 1.0, self.left(j).as_ref(), rows(&self.v, own).transpose());
        }
        product
    }

    /// The same matrix, with columns of `U` and `V` of norm 1.
    pub(super) fn normalized(mut self) -> Self {
        let sizes = [&self.u, &self.v].map(|part| column_products(part.as_ref(), part.as_ref()));
        let root = |square: &f64| if *square > 0.0 { square.sqrt() as f32 } else { 1.0 };
        let [of_u, of_v] = sizes.map(|squares| squares.iter().map(root).collect::<Vec<f32>>());
        let inverse = |sizes: &[f32]| sizes.iter().map(|size| 1.0 / size).collect::<Vec<f32>>();
        self.u = times_diagonal(self.u.as_ref(), &inverse(&of_u));
        self.v = times_diagonal(self.v.as_ref(), &inverse(&of_v));
        for scales in self.s.chunks_exact_mut(of_u.len().max(1)) {
            scales.iter_mut().zip(of_u.iter().zip(&of_v)).for_each(|(s, (u, v))| *s *= u * v);
        }
        self
    }

    /// The same matrix, with columns of `s` of mean square 1 and what is left shared by `U` and `V`: steps of training are
    /// of one size for all values.
    pub(super) fn balanced(mut self) -> Self {
        let (rank, n_blocks) = (self.rank(), (self.count * self.count) as f32);
        let square = |k: usize| self.s.iter().skip(k).step_by(rank).map(|s| s * s).sum::<f32>() / n_blocks;
        let root = |k: usize| Some(square(k).sqrt().sqrt()).filter(|root| *root > 0.0).unwrap_or(1.0);
        let roots: Vec<f32> = (0..rank).map(root).collect();
        self.u = times_diagonal(self.u.as_ref(), &roots);
        self.v = times_diagonal(self.v.as_ref(), &roots);
        for scales in self.s.chunks_exact_mut(rank.max(1)) {
            scales.iter_mut().zip(&roots).for_each(|(s, root)| *s /= root * root);
        }
        self
    }

    /// `self + share (self − before)`, part by part.
    pub(super) fn extrapolated(&self, before: &Self, share: f32) -> Self {
        let moved = |now: &Mat<f32>, before: &Mat<f32>| now + (now - before) * faer::Scale(share);
        let s = self.s.iter().zip(&before.s).map(|(now, before)| now + share * (now - before)).collect();
        Self { count: self.count, u: moved(&self.u, &before.u), v: moved(&self.v, &before.v), s }
    }
}
