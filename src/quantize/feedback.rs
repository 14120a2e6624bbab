//! Rounds columns one after another, in a metric `H` of the columns: the columns that follow compensate the error of
//! each.
//!
//! - With feedback (Frantar et al. 2022): with `H⁻¹ = Uᵀ U`, rounding column j by `e` shifts the later ones by
//!   `−(e / U_jj) U_j,j+1…`; the squares of `e / U_jj` add up to `tr(E H Eᵀ)`.
//! - By coordinate descent (Behdin et al. 2023, QuantEase): with all others fixed, the best value of column j is
//!   `x_j + R_j / H_jj`, rounded, with `R = (W − X) H`. No step increases the error.
//!
//! The caller decides which values a column may take. Rows do not depend on each other, so a caller may pass a few at a
//! time: the rows of a block of columns then stay in the cache.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par, RowRef};
use pulp::Arch;

/// Columns that are finished before those after them are updated, on two levels.
const BLOCK: usize = 128;
const PANEL: usize = 16;

/// Rounds the columns of `weights` (rows, cols) in their order. `upper` is the `U` of their metric. `round` rounds a
/// column in place, given its index; `spend` receives its errors over `U_jj`, whose squares are the cost of each row.
pub fn feed_back(
    weights: MatMut<'_, f32>,
    upper: MatRef<'_, f32>,
    mut round: impl FnMut(usize, &mut [f32]),
    mut spend: impl FnMut(&[f32]),
) {
    one_by_one(weights, upper, |j, weight, _, error| {
        let diagonal = upper[(j, j)];
        error.copy_from_slice(weight);
        round(j, weight);
        for (weight, error) in weight.iter().zip(error.iter_mut()) {
            *error = (*error - weight) / diagonal;
        }
        spend(error);
    });
}

/// Coordinate descent in a metric of the columns.
pub struct Descent {
    /// `H_jj`.
    sizes: Vec<f32>,
    /// `H_jk / H_kk` (cols, cols).
    relative: Mat<f32>,
}

impl Descent {
    /// Prepares for sweeps in `metric` (cols, cols).
    pub fn new(metric: MatRef<'_, f32>) -> Self {
        let cols = metric.ncols();
        Self {
            sizes: (0..cols).map(|j| metric[(j, j)]).collect(),
            relative: Mat::from_fn(cols, cols, |j, k| metric[(j, k)] / metric[(k, k)]),
        }
    }

    /// One sweep over `rounded` (rows, cols), columns in their order, towards `weights`; adds the change of the squared
    /// errors to `costs` (rows). `round` is as in [`feed_back`].
    pub fn sweep(
        &self,
        mut rounded: MatMut<'_, f32>,
        weights: MatRef<'_, f32>,
        costs: &mut [f64],
        mut round: impl FnMut(usize, &mut [f32]),
    ) {
        let errors = weights - rounded.as_ref();
        let mut wishes = rounded.to_owned();
        matmul(wishes.as_mut(), Accum::Add, errors.as_ref(), self.relative.as_ref(), 1.0f32, Par::Seq);
        one_by_one(wishes.as_mut(), self.relative.as_ref(), |j, wish, _, moved| {
            let size = f64::from(self.sizes[j]);
            let value = contiguous(rounded.as_mut(), j);
            moved.copy_from_slice(wish);
            round(j, wish);
            for (((value, new), moved), cost) in value.iter_mut().zip(wish.iter()).zip(moved).zip(costs.iter_mut()) {
                let (wished, step) = (f64::from(*moved - *value), f64::from(*new - *value));
                *cost += size * step * (step - 2.0 * wished);
                (*moved, *value) = (*new - *value, *new);
            }
        });
    }
}

/// Calls `step` with each column in turn, the later ones of its panel of 16, and a buffer for its error: later columns
/// are moved by the error times the column's row of `couplings`.
///
/// A column moves the rest of its panel, a panel the rest of its block, and a block all other columns: the first is
/// bound by memory, the others are matrix products.
pub(super) fn one_by_one(
    weights: MatMut<'_, f32>,
    couplings: MatRef<'_, f32>,
    mut step: impl FnMut(usize, &mut [f32], MatRef<'_, f32>, &mut [f32]),
) {
    run_by_run(weights, couplings, PANEL, |first, mut panel, mut errors| {
        let n = panel.ncols();
        for k in 0..n {
            let (mut left, later) = panel.as_mut().subcols_mut(k, n - k).split_at_col_mut(1);
            let error = contiguous(errors.as_mut(), k);
            step(first + k, contiguous(left.as_mut(), 0), later.as_ref(), error);
            spread(error, later, couplings.row(first + k).subcols(first + k + 1, n - k - 1));
        }
    });
}

/// Calls `step` with each run of `width` columns in turn, a divisor of 128, and a buffer for their errors: columns after
/// the run are moved by the errors times the run's rows of `couplings`.
pub(super) fn run_by_run(
    mut weights: MatMut<'_, f32>,
    couplings: MatRef<'_, f32>,
    width: usize,
    mut step: impl FnMut(usize, MatMut<'_, f32>, MatMut<'_, f32>),
) {
    let (rows, cols) = (weights.nrows(), weights.ncols());
    let mut errors = Mat::<f32>::zeros(rows, BLOCK);
    for first in (0..cols).step_by(BLOCK) {
        let end = cols.min(first + BLOCK);
        for run in (first..end).step_by(width) {
            let n = width.min(end - run);
            let mut moved = errors.as_mut().subcols_mut(run - first, n);
            step(run, weights.as_mut().subcols_mut(run, n), moved.as_mut());
            move_later(weights.as_mut(), couplings, moved.as_ref(), run, run + n..end);
        }
        move_later(weights.as_mut(), couplings, errors.as_ref().subcols(0, end - first), first, end..cols);
    }
}

/// `weights[:, later] −= errors · couplings[first.., later]`.
fn move_later(
    weights: MatMut<'_, f32>,
    couplings: MatRef<'_, f32>,
    errors: MatRef<'_, f32>,
    first: usize,
    later: Range<usize>,
) {
    let couplings = couplings.submatrix(first, later.start, errors.ncols(), later.len());
    let weights = weights.subcols_mut(later.start, later.len());
    matmul(weights, Accum::Add, errors, couplings, -1.0f32, Par::Seq);
}

pub(super) fn contiguous(matrix: MatMut<'_, f32>, column: usize) -> &mut [f32] {
    let column = matrix.col_mut(column).try_as_col_major_mut();
    column.expect("invariant: rows of an owned matrix are contiguous in a column").as_slice_mut()
}

/// `later[:, k] −= error · row[k]`.
fn spread(error: &[f32], mut later: MatMut<'_, f32>, row: RowRef<'_, f32>) {
    Arch::new().dispatch(|| {
        for k in 0..later.ncols() {
            let factor = row[k];
            for (weight, error) in contiguous(later.as_mut(), k).iter_mut().zip(error) {
                *weight -= error * factor;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `tr(E H Eᵀ)` row by row.
    fn errors(weights: &Mat<f32>, rounded: &Mat<f32>, metric: &Mat<f32>) -> Vec<f64> {
        let error = Mat::from_fn(weights.nrows(), weights.ncols(), |i, j| f64::from(weights[(i, j)] - rounded[(i, j)]));
        let image = &error * Mat::from_fn(metric.nrows(), metric.ncols(), |i, j| f64::from(metric[(i, j)]));
        (0..error.nrows()).map(|i| (0..error.ncols()).map(|j| error[(i, j)] * image[(i, j)]).sum()).collect()
    }

    #[test]
    fn descent_only_lowers_the_error_and_knows_by_how_much() {
        // More columns than a block, in a metric where neighbors are strongly correlated.
        let (rows, cols) = (5, BLOCK + 40);
        let weights = Mat::from_fn(rows, cols, |i, j| ((i * 37 + j * 11) % 101) as f32 / 10.0);
        let metric = Mat::from_fn(cols, cols, |i, j| 0.9f32.powi(i.abs_diff(j) as i32) * ((i + 1) * (j + 1)) as f32);
        let round = |_: usize, column: &mut [f32]| column.iter_mut().for_each(|v| *v = v.round());
        let mut rounded = weights.clone();
        (0..cols).for_each(|j| round(j, contiguous(rounded.as_mut(), j)));
        let mut costs = errors(&weights, &rounded, &metric);
        let (descent, mut last) = (Descent::new(metric.as_ref()), costs.clone());
        loop {
            let before = rounded.clone();
            descent.sweep(rounded.as_mut(), weights.as_ref(), &mut costs, round);
            for ((cost, exact), before) in costs.iter().zip(errors(&weights, &rounded, &metric)).zip(&last) {
                assert!((cost - exact).abs() < 1e-4 * before && exact <= before * 1.000_01, "{cost} {exact} {before}");
            }
            last = costs.clone();
            if rounded == before {
                break;
            }
        }
        // If a sweep changes nothing, no change of a single value improves the error.
        let found: f64 = errors(&weights, &rounded, &metric).iter().sum();
        for (i, j) in [(0, 3), (2, 90), (4, BLOCK + 7)] {
            for step in [-1.0, 1.0] {
                let mut moved = rounded.clone();
                moved[(i, j)] += step;
                assert!(errors(&weights, &moved, &metric).iter().sum::<f64>() >= found * 0.999_999, "{i} {j}");
            }
        }
    }
}
