//! Rounds parts to 16-bit floats with about as little error as a dense weight has; shared by all structures.
//!
//! A left part is rounded first. The right part is then fitted to it, `A − X A` with `X = (Ŝᵀ G Ŝ)⁻¹ Ŝᵀ G (Ŝ − S)`, and
//! rounded last; the input metric cancels in the fit. Matrices whose columns can compensate for each other are rounded
//! column by column with feedback ([`feed_back`]), then value by value ([`Descent`]). Errors are second moments, and
//! values that are rounded separately are assumed to be independent.

use faer::{Mat, MatMut, MatRef};
use rayon::prelude::*;

use super::matrix::Matrix;
use crate::approx::gram::{mean_diagonal, shifted};
use crate::approx::metric::Metric;
use crate::codecs::cast::{self, Dtype};
use crate::linalg;
use crate::quantize::{Descent, feed_back};

/// Fraction of the mean eigenvalue that is added to a metric for feedback: it costs a hundredth of what rounding to
/// nearest does, and keeps compensating values from growing.
const RIDGE: f64 = 1e-4;

/// The most sweeps of coordinate descent after feedback. The last one is the first whose relative gain is below
/// `SMALL_GAIN`.
const N_SWEEPS: usize = 3;
const SMALL_GAIN: f64 = 0.05;

/// Rows that are rounded at a time: a block of their columns stays in the cache of a core. Rows are independent, so that
/// no value depends on this or on the number of threads.
const ROWS: usize = 256;

/// One side of the metric in which rounding is measured.
pub enum Side<'a> {
    /// The metric in which the factors were fitted.
    Whole(&'a Metric),
    /// The diagonal of a Gram that is too large to be worth reading. The Gram of the factors is known all the same: see
    /// `Sides::grams`.
    Diagonal(Metric),
}

impl Side<'_> {
    pub(super) fn metric(&self) -> &Metric {
        match self {
            Self::Whole(metric) => metric,
            Self::Diagonal(metric) => metric,
        }
    }
}

/// Both sides of the metric in which factors were fitted.
pub struct Sides<'a> {
    /// `G` (m, m).
    pub output: &'a Metric,
    /// `C` (n, n), or its diagonal.
    pub input: Side<'a>,
    /// The energies `λ_k`: `Bᵀ G B` and `A C Aᵀ` are diagonal, and this is their product. Not read if both sides are
    /// whole and the output side is not a Gram.
    pub energies: &'a [f64],
}

/// Parts whose values all have the dtype, and the squared error of rounding in the metric.
#[derive(Debug, Clone)]
pub struct Rounded {
    /// In the order of [`Structure::suffixes`](super::structure::Structure::suffixes).
    pub parts: Vec<Matrix>,
    /// `tr(G E C Eᵀ)`, where `E` is the change of the matrix by rounding.
    pub squared_error: f64,
}

/// `Bᵀ G B` and `A C Aᵀ`, (r, r).
pub(super) struct Grams {
    pub left: Mat<f64>,
    pub right: Mat<f64>,
}

impl Sides<'_> {
    /// The Grams of factors `b_t` (r, m), `a` (r, n). If a side is large, or only its diagonal is known, its Gram
    /// follows from the other.
    pub(super) fn grams(&self, b_t: MatRef<'_, f64>, a: MatRef<'_, f64>) -> Grams {
        let dual = |gram: &Mat<f64>| {
            Mat::from_fn(gram.nrows(), gram.nrows(), |i, j| match gram[(i, i)] {
                size if i == j && size > 0.0 => self.energies[i] / size,
                _ => 0.0,
            })
        };
        match (&self.input, self.output) {
            (Side::Whole(input), Metric::Full(_)) => {
                let right = input.quadratic(a);
                Grams { left: dual(&right), right }
            }
            (Side::Whole(input), output) => Grams { left: output.quadratic(b_t), right: input.quadratic(a) },
            (Side::Diagonal(_), output) => {
                let left = output.quadratic(b_t);
                Grams { right: dual(&left), left }
            }
        }
    }
}

/// Rounds to nearest; values that overflow are kept, and refused when they are written.
fn round(dtype: Dtype, values: &mut [f32]) {
    for value in values {
        let nearest = cast::nearest(dtype, *value);
        if nearest.is_finite() {
            *value = nearest;
        }
    }
}

/// `values` rounded to nearest.
pub(super) fn round_to_nearest(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    let mut values = values.to_vec();
    round(dtype, &mut values);
    values
}

/// `Σ_ij rows_i columns_j (x_ij − y_ij)²` of row-major matrices.
pub(super) fn weighted_error(x: &[f32], y: &[f32], rows: &[f64], columns: &[f64]) -> f64 {
    let row = |(x, y): (&[f32], &[f32])| -> f64 {
        let squared = |((x, y), weight): ((&f32, &f32), &f64)| weight * (f64::from(*x) - f64::from(*y)).powi(2);
        x.iter().zip(y).zip(columns).map(squared).sum()
    };
    let width = columns.len().max(1);
    x.chunks_exact(width).zip(y.chunks_exact(width)).zip(rows).map(|(pair, weight)| weight * row(pair)).sum()
}

pub(super) fn diagonal(matrix: &Mat<f64>) -> Vec<f64> {
    (0..matrix.nrows()).map(|i| matrix[(i, i)]).collect()
}

/// `tr(X Y)` of symmetric matrices.
fn trace_of_product(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
    x.col_iter().zip(y.col_iter()).map(|(x, y)| x.iter().zip(y.iter()).map(|(x, y)| x * y).sum::<f64>()).sum()
}

/// The best right part for a rounded left part.
pub(super) struct Refit {
    /// The best right part is `A − X A`.
    x: Mat<f64>,
    /// `Ŝᵀ G Ŝ`.
    pub left: Mat<f64>,
    /// Squared error of the rounded left part with that right part.
    pub squared_error: f64,
}

/// Refits a right part to a left part `S`, transposed (r, m), that rounding moved by `moved_t`; the Grams `left` and
/// `right` belong to the exact parts. `None` if the rounded left part is singular.
pub(super) fn refit_right(
    output: &Metric,
    left_t: MatRef<'_, f64>,
    moved_t: MatRef<'_, f64>,
    left: &Mat<f64>,
    right: &Mat<f64>,
) -> Option<Refit> {
    let weighted = output.times(moved_t); // (Ŝ − S)ᵀ G
    let cross = linalg::product(weighted.as_ref(), left_t.transpose());
    let own = linalg::product_symmetric(weighted.as_ref(), moved_t.transpose());
    drop(weighted);
    let left = left + &cross + cross.transpose() + &own;
    let image = cross + &own; // (Ŝ − S)ᵀ G Ŝ
    let shift = RIDGE * RIDGE * mean_diagonal(&left);
    let x = linalg::solve(shifted(left.clone(), shift).as_ref(), image.transpose())?;
    let gained = linalg::product_symmetric(image.as_ref(), x.as_ref());
    let squared_error = (trace_of_product(&own, right) - trace_of_product(&gained, right)).max(0.0);
    Some(Refit { x, left, squared_error })
}

impl Refit {
    /// `A − X A`.
    pub fn of(&self, a: MatRef<'_, f64>) -> Mat<f64> {
        a - linalg::product(self.x.as_ref(), a)
    }
}

/// A weight (m, n), row-major, rounded with feedback in the metric of its inputs (n, n). `None` if that is not a Gram with
/// a Cholesky factor.
pub(crate) fn dense_with_feedback(
    weight: &[f32],
    shape: (usize, usize),
    input: &Metric,
    dtype: Dtype,
) -> Option<Vec<f32>> {
    let weight = linalg::transposed_from_row_major(weight, shape.0, shape.1).transpose().to_owned();
    let (rounded, _) = columns_with_feedback(&weight, &input.to_dense()?, dtype)?;
    Some(rounded.row_iter().flat_map(|row| row.iter().copied()).collect())
}

/// The same, with the squared error in that metric and in `output` (m, m).
pub(super) fn right_with_feedback(
    part: &[f32],
    (m, n): (usize, usize),
    output: &Mat<f64>,
    input: &Metric,
    dtype: Dtype,
) -> Option<(Vec<f32>, f64)> {
    let rounded = dense_with_feedback(part, (m, n), input, dtype)?;
    let error = Mat::from_fn(m, n, |i, j| f64::from(rounded[i * n + j]) - f64::from(part[i * n + j]));
    let squared_error = trace_of_product(output, &input.quadratic(error.as_ref()));
    Some((rounded, squared_error))
}

/// Rounds `weights` (rows, cols) in a `metric` (cols, cols) of the columns: with feedback, then by coordinate descent.
/// Also gives the cost of each row in the metric. `None` if the metric has no Cholesky factor.
pub(super) fn columns_with_feedback(
    weights: &Mat<f64>,
    metric: &Mat<f64>,
    dtype: Dtype,
) -> Option<(Mat<f32>, Vec<f64>)> {
    let (rows, cols) = (weights.nrows(), weights.ncols());
    let permutation = by_weight(weights, metric);
    let shift = RIDGE * mean_diagonal(metric);
    let metric =
        Mat::from_fn(cols, cols, |i, j| metric[(permutation[i], permutation[j])] + if i == j { shift } else { 0.0 });
    let (upper, _) = linalg::inverse_cholesky(metric.as_ref())?;
    let upper = Mat::from_fn(cols, cols, |i, j| upper[(i, j)] as f32);
    let weights = Mat::from_fn(rows, cols, |i, j| weights[(i, permutation[j])] as f32);
    let (mut found, mut costs) = (weights.clone(), vec![0.0; rows]);
    for_each_chunk(&mut found, &weights, &mut costs, |found, _, costs| {
        let spend = |errors: &[f32]| {
            costs.iter_mut().zip(errors).for_each(|(cost, &error)| *cost += f64::from(error) * f64::from(error));
        };
        feed_back(found, upper.as_ref(), |_, column| round(dtype, column), spend);
    });
    drop(upper);
    let descent = Descent::new(Mat::from_fn(cols, cols, |i, j| metric[(i, j)] as f32).as_ref());
    for _ in 0..N_SWEEPS {
        let before: f64 = costs.iter().sum();
        for_each_chunk(&mut found, &weights, &mut costs, |found, weights, costs| {
            descent.sweep(found, weights, costs, |_, column| round(dtype, column));
            costs.iter_mut().for_each(|cost| *cost = cost.max(0.0));
        });
        if costs.iter().sum::<f64>() > (1.0 - SMALL_GAIN) * before {
            break;
        }
    }
    let mut result = Mat::zeros(rows, cols);
    for (&at, column) in permutation.iter().zip(found.col_iter()) {
        result.col_mut(at).copy_from(column);
    }
    costs.iter().all(|cost| cost.is_finite()).then_some((result, costs))
}

/// Calls `f` with a few rows of `found` and `weights` (rows, cols) and their `costs` at a time, in parallel.
fn for_each_chunk(
    found: &mut Mat<f32>,
    weights: &Mat<f32>,
    costs: &mut [f64],
    f: impl Fn(MatMut<'_, f32>, MatRef<'_, f32>, &mut [f64]) + Sync,
) {
    let chunks = found.par_row_chunks_mut(ROWS).zip(weights.par_row_chunks(ROWS)).zip(costs.par_chunks_mut(ROWS));
    chunks.for_each(|((found, weights), costs)| f(found, weights, costs));
}

/// Columns in falling order of the cost of rounding to nearest: the costly ones are rounded while most others can still
/// compensate.
fn by_weight(weights: &Mat<f64>, metric: &Mat<f64>) -> Vec<usize> {
    let costs: Vec<f64> =
        weights.col_iter().enumerate().map(|(j, column)| metric[(j, j)] * column.squared_norm_l2()).collect();
    let mut permutation: Vec<usize> = (0..costs.len()).collect();
    permutation.sort_by(|&i, &j| costs[j].total_cmp(&costs[i]).then(i.cmp(&j)));
    permutation
}
