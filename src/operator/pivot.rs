//! `B·A` (m, n) of rank r, stored as r of its rows and the coefficients of the other rows in terms of them (PIFA, Zhao
//! et al. 2025): `lr_p` has the pivot rows `P` (r, n), `lr_t` the coefficients `T` (m − r, r), and `lr_order` (m) the
//! position of every row among pivots, then others; r (m + n − r) parameters, fewer than the matrix at every rank. The
//! bias stays with the module.
//!
//! Pivot rows are not ordered by significance as the columns of factors are. The factors can be recovered with the
//! pivot rows of `B` (r, r), which are stored on request.
//!
//! Rows of `T` have thousands of coefficients, and in 16 bits both their own errors and the errors of `P` are
//! multiplied by their norm. With `S = [I; T]`, so that the matrix is `S P`, and the metric `tr(G E C Eᵀ)`:
//!
//! - Pivots are swapped until no coefficient exceeds 1.2: rounding `P` with feedback costs the geometric mean of the
//!   spectrum of `Sᵀ G S`, which is least where the volume of the pivots is largest.
//! - `T` is rounded column by column in the metric `P C Pᵀ`.
//! - `P` is fitted to the rounded `T̂`: the error of a row with norm t falls by √(1 + t²).
//! - `P` is rounded row by row in the metric `Ŝᵀ G Ŝ`.

use anyhow::Result;
use candle_core::Tensor;
use faer::{Mat, MatRef};

use super::factors::{self, right_part};
use super::matrix::Matrix;
use super::products::{columns_of_both, product};
use super::rounding::{
    Grams, Rounded, Sides, columns_with_feedback, diagonal, refit_right, right_with_feedback, round_to_nearest,
    weighted_error,
};
use super::structure::{Element, Fit, Fitting, Kind, Shape, Size, Step, Structure};
use crate::approx::low_rank::{self, ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::codecs::cast::Dtype;
use crate::linalg::{self, LinalgError, RowSkeleton};
use crate::quantize::Scheme;

pub(super) struct Pivot;

/// Bound on the coefficients if they are rounded.
const TIGHT_BOUND: f64 = 1.2;

impl Structure for Pivot {
    fn name(&self) -> &'static str {
        "pivot"
    }

    fn suffixes(&self) -> &'static [(&'static str, Element)] {
        &[("lr_p", Element::Float), ("lr_t", Element::Float), ("lr_order", Element::Index)]
    }

    fn shapes(&self, size: Size, (m, n): Shape) -> Vec<[usize; 2]> {
        let rank = size.rank().unwrap_or(0);
        vec![[rank, n], [m.saturating_sub(rank), rank], [m, 1]]
    }

    fn measure(&self, stored: &[[usize; 2]]) -> Option<(Size, Shape)> {
        let &[[rank, n], [others, columns], [m, 1]] = stored else { return None };
        (rank == columns && rank.checked_add(others) == Some(m)).then_some((Size::Rank(rank), (m, n)))
    }

    fn apply(&self, parts: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let [pivots, coefficients, permutation] = parts else { unreachable!("invariant: pivots have three parts") };
        let p = product(x, pivots)?; // (rows, r)
        if coefficients.dim(0)? == 0 {
            return Ok(p.index_select(permutation, 1)?);
        }
        let others = product(&p, coefficients)?; // (rows, out - r)
        columns_of_both(&p, &others, permutation)
    }

    fn product(&self, parts: &[Matrix], size: Size, (m, n): Shape) -> Vec<f32> {
        let (rank, pivots) = (size.rank().unwrap_or(0), parts[0].values());
        let others = linalg::product_row_major(&parts[1].values(), &pivots, m - rank, rank, n);
        let row = |&place: &i32| {
            let place = place as usize;
            match place.checked_sub(rank) {
                None => &pivots[place * n..][..n],
                Some(other) => &others[other * n..][..n],
            }
        };
        parts[2].indices().iter().flat_map(row).copied().collect()
    }

    fn steps(&self, _: Size) -> Vec<Step> {
        vec![Step::Multiply(0), Step::Append(1), Step::Order(2)]
    }

    fn fitting(&self) -> Option<&dyn Fitting> {
        Some(self)
    }
}

impl Fitting for Pivot {
    fn size(&self, rank: usize, _: Shape) -> Size {
        Size::Rank(rank)
    }

    fn largest_saving_rank(&self, (m, n): Shape) -> usize {
        m.min(n).saturating_sub(1)
    }

    fn largest_rank(&self, (m, n): Shape) -> usize {
        m.min(n)
    }

    fn fit(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>, largest_rank: usize) -> Result<Fit, LinalgError> {
        factors::fit(target, metric, largest_rank)
    }

    fn curve(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>) -> Result<ErrorCurve, LinalgError> {
        low_rank::error_curve(target, metric)
    }

    fn prefix(&self, pair: &LowRank, rank: usize, _: Shape) -> LowRank {
        pair.prefix(rank)
    }

    /// Pivots are the rows of `B` with the largest volume, so that no coefficient exceeds 2.
    fn lay_out(&self, LowRank { rank, b, a }: LowRank, (m, n): Shape) -> Vec<Matrix> {
        let b_t = linalg::transposed_from_row_major(&b, m, rank); // (r, m)
        let rows = linalg::row_skeleton(b_t.transpose(), linalg::COEFFICIENT_BOUND);
        let pivot_rows: Vec<f32> = rows.pivots.iter().flat_map(|&row| &b[row * rank..][..rank]).copied().collect();
        let pivots = linalg::product_row_major(&pivot_rows, &a, rank, rank, n);
        parts(pivots, linalg::to_row_major(rows.coefficients.as_ref()), &rows)
    }

    fn round(&self, pair: &LowRank, shape: Shape, sides: &Sides<'_>, dtype: Dtype) -> Rounded {
        let skeleton = Skeleton::new(pair, shape, sides);
        skeleton.fed_back(dtype, &[Feedback::Outputs]).unwrap_or_else(|| skeleton.plain(dtype))
    }

    fn round_parts(&self, parts: &[Matrix], size: Size, shape: Shape, sides: &Sides<'_>, dtype: Dtype) -> Rounded {
        let skeleton = Skeleton::stored(parts, size.rank().unwrap_or(0), shape, sides);
        skeleton.fed_back(dtype, &[Feedback::Outputs, Feedback::Inputs]).unwrap_or_else(|| skeleton.plain(dtype))
    }

    fn alternative(&self) -> Option<Kind> {
        Some(Kind::FACTORS)
    }

    fn quantize(
        &self,
        parts: &[Matrix],
        size: Size,
        target: MatRef<'_, f64>,
        output: &Metric,
        scheme: Scheme,
    ) -> Result<Vec<Matrix>> {
        let ((m, n), rank) = (target.shape(), size.rank().unwrap_or(0));
        let coefficients = Matrix::quantized(&parts[1].values(), m - rank, rank, scheme);
        let b = expanded(parts[2].indices(), &coefficients.values(), rank);
        let pivots = Matrix::quantized(&right_part(&b, rank, target, output)?, rank, n, scheme);
        Ok(vec![pivots, coefficients, parts[2].clone()])
    }

    fn pair(&self, parts: &[Matrix], size: Size, _: Shape) -> LowRank {
        let rank = size.rank().unwrap_or(0);
        let b = expanded(parts[2].indices(), &parts[1].values(), rank);
        LowRank { rank, b, a: parts[0].values().into_owned() }
    }

    fn is_nested(&self) -> bool {
        false
    }

    /// The rows of `B` (m, r) that became pivots, in the order of the pivots: (r, r).
    fn rank_factor(&self, parts: &[Matrix], b: &[f32]) -> Option<Vec<f32>> {
        let permutation = parts[2].indices();
        let rank = b.len() / permutation.len().max(1);
        let mut rows = vec![0.0; rank * rank];
        for (row, &place) in b.chunks_exact(rank.max(1)).zip(permutation) {
            if let Some(to) = rows.chunks_exact_mut(rank.max(1)).nth(place as usize) {
                to.copy_from_slice(row);
            }
        }
        Some(rows)
    }

    fn restored(&self, LowRank { rank, b, a }: LowRank, rank_factor: &[f32], (m, n): Shape) -> Option<LowRank> {
        let factor_t = linalg::transposed_from_row_major(rank_factor, rank, rank);
        let a_t = linalg::transposed_from_row_major(&a, rank, n); // (n, r)
        // B = [I; T] B_pivot, A = B_pivot⁻¹ P
        let solved = linalg::solve(factor_t.transpose(), a_t.transpose())?;
        let b = linalg::product_row_major(&b, rank_factor, m, rank, rank);
        Some(LowRank { rank, b, a: linalg::to_row_major(solved.as_ref()) })
    }
}

fn parts(pivots: Vec<f32>, coefficients: Vec<f32>, rows: &RowSkeleton) -> Vec<Matrix> {
    vec![pivots.into(), coefficients.into(), Matrix::Indices(permutation(&rows.pivots, &rows.others))]
}

/// The position of every row among pivots, then others.
fn permutation(pivots: &[usize], others: &[usize]) -> Vec<i32> {
    let mut places = vec![0; pivots.len() + others.len()];
    for (place, &row) in pivots.iter().chain(others).enumerate() {
        places[row] = i32::try_from(place).expect("invariant: a linear has fewer than 2^31 outputs");
    }
    places
}

/// The factor `B` (m, r) of pivot rows `A`, row-major: rows of a unit matrix at the pivots, coefficients elsewhere.
fn expanded(permutation: &[i32], coefficients: &[f32], rank: usize) -> Vec<f32> {
    let mut b = vec![0.0; permutation.len() * rank];
    for (row, &place) in b.chunks_exact_mut(rank.max(1)).zip(permutation) {
        let place = place as usize;
        match place.checked_sub(rank) {
            None => row[place] = 1.0,
            Some(other) => row.copy_from_slice(&coefficients[other * rank..][..rank]),
        }
    }
    b
}

/// The side on which errors of pivots make up for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Feedback {
    Outputs,
    Inputs,
}

/// Factors as rows and coefficients, before rounding.
struct Skeleton<'a> {
    rank: usize,
    shape: (usize, usize),
    sides: &'a Sides<'a>,
    rows: RowSkeleton,
    /// The pivot rows of `B`, (r, r).
    basis: Mat<f64>,
    /// `Aᵀ` (n, r).
    a_t: Mat<f64>,
    /// `Bᵀ G B`.
    of_basis: Mat<f64>,
    /// `P C Pᵀ`.
    right: Mat<f64>,
}

impl<'a> Skeleton<'a> {
    fn new(pair: &LowRank, (m, n): (usize, usize), sides: &'a Sides<'a>) -> Self {
        let rank = pair.rank;
        let b_t = linalg::transposed_from_row_major(&pair.b, m, rank); // (r, m)
        let a_t = linalg::transposed_from_row_major(&pair.a, rank, n); // (n, r)
        let rows = linalg::row_skeleton(b_t.transpose(), TIGHT_BOUND);
        let basis = Mat::from_fn(rank, rank, |i, k| b_t[(k, rows.pivots[i])]);
        let Grams { left, right } = sides.grams(b_t.as_ref(), a_t.transpose());
        let right = linalg::product(basis.as_ref(), right.as_ref());
        let right = linalg::product_symmetric(right.as_ref(), basis.transpose());
        Self { rank, shape: (m, n), sides, rows, basis, a_t, of_basis: left, right }
    }

    /// Of parts whose values are not those of a fit any more, with the pivots that they have.
    fn stored(parts: &[Matrix], rank: usize, (m, n): (usize, usize), sides: &'a Sides<'a>) -> Self {
        let (coefficients, mut order) = (parts[1].values(), vec![0; m]);
        for (row, &place) in parts[2].indices().iter().enumerate() {
            order[place as usize] = row;
        }
        let others = order.split_off(rank);
        let coefficients = Mat::from_fn(others.len(), rank, |i, j| f64::from(coefficients[i * rank + j]));
        let rows = RowSkeleton { pivots: order, others, coefficients };
        let a_t = linalg::transposed_from_row_major(&parts[0].values(), rank, n); // (n, r)
        let right = sides.input.metric().quadratic(a_t.transpose());
        let mut skeleton = Self {
            rank,
            shape: (m, n),
            sides,
            rows,
            basis: Mat::identity(rank, rank),
            a_t,
            of_basis: Mat::zeros(0, 0),
            right,
        };
        skeleton.of_basis = sides.output.quadratic(skeleton.left_t(&skeleton.rows.coefficients).as_ref());
        skeleton
    }

    /// `Sᵀ` (r, m) from coefficients.
    fn left_t<T: Copy + Into<f64>>(&self, coefficients: &Mat<T>) -> Mat<f64> {
        let mut left_t = Mat::zeros(self.rank, self.shape.0);
        for (place, &row) in self.rows.pivots.iter().enumerate() {
            left_t[(place, row)] = 1.0;
        }
        for (i, &row) in self.rows.others.iter().enumerate() {
            left_t.col_mut(row).iter_mut().zip(coefficients.row(i).iter()).for_each(|(to, &from)| *to = from.into());
        }
        left_t
    }

    /// `Sᵀ G S = B_p⁻ᵀ (Bᵀ G B) B_p⁻¹`, or with the diagonal of `G` if the pivot rows are singular.
    fn left(&self) -> Mat<f64> {
        let of_basis = || {
            let half = linalg::solve(self.basis.transpose(), self.of_basis.as_ref())?;
            linalg::solve(self.basis.transpose(), half.transpose())
        };
        of_basis().unwrap_or_else(|| {
            let left_t = self.left_t(&self.rows.coefficients);
            self.sides.output.quadratic(left_t.as_ref())
        })
    }

    /// Weights of errors in the rows of `T` and in the columns of `P`.
    fn weights(&self) -> (Vec<f64>, Vec<f64>) {
        let (outputs, inputs) = (self.sides.output.to_diagonal(self.shape.0), self.sides.input.metric());
        (self.rows.others.iter().map(|&row| outputs[row]).collect(), inputs.to_diagonal(self.shape.1))
    }

    /// Both parts rounded to nearest.
    fn plain(&self, dtype: Dtype) -> Rounded {
        let coefficients = linalg::to_row_major(self.rows.coefficients.as_ref());
        let pivots = linalg::to_row_major(linalg::product(self.basis.as_ref(), self.a_t.transpose()).as_ref());
        let (t, p) = (round_to_nearest(dtype, &coefficients), round_to_nearest(dtype, &pivots));
        let (outputs, inputs) = self.weights();
        let squared_error = weighted_error(&t, &coefficients, &outputs, &diagonal(&self.right))
            + weighted_error(&p, &pivots, &diagonal(&self.left()), &inputs);
        Rounded { parts: parts(p, t, &self.rows), squared_error }
    }

    /// Both parts rounded with feedback, the pivots in the better of some ways; `None` if a metric has no Cholesky factor.
    fn fed_back(&self, dtype: Dtype, ways: &[Feedback]) -> Option<Rounded> {
        let (t, _) = columns_with_feedback(&self.rows.coefficients, &self.right, dtype)?;
        let mut moved_t = self.left_t(&t);
        let left_t = self.left_t(&self.rows.coefficients);
        moved_t -= &left_t;
        let fit = refit_right(self.sides.output, left_t.as_ref(), moved_t.as_ref(), &self.left(), &self.right)?;
        drop((left_t, moved_t));
        let targets = linalg::product(self.a_t.as_ref(), fit.of(self.basis.as_ref()).transpose()); // (n, r)
        let rounded = ways.iter().filter_map(|way| self.pivots(*way, &targets, &fit.left, dtype));
        let (pivots, of_pivots) = rounded.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let coefficients = t.row_iter().flat_map(|row| row.iter().copied()).collect();
        let squared_error = fit.squared_error + of_pivots;
        Some(Rounded { parts: parts(pivots, coefficients, &self.rows), squared_error })
    }

    /// The pivots next to `targets` (n, r), and their squared error, where `left` (r, r) is the Gram of the left part.
    fn pivots(&self, way: Feedback, targets: &Mat<f64>, left: &Mat<f64>, dtype: Dtype) -> Option<(Vec<f32>, f64)> {
        if way == Feedback::Inputs {
            let (shape, input) = ((self.rank, self.shape.1), self.sides.input.metric());
            return right_with_feedback(&linalg::to_row_major(targets.transpose()), shape, left, input, dtype);
        }
        let (_, inputs) = self.weights();
        let (p, costs) = columns_with_feedback(targets, left, dtype)?;
        let pivots = p.col_iter().flat_map(|column| column.iter().copied()).collect();
        Some((pivots, costs.iter().zip(&inputs).map(|(cost, weight)| cost * weight).sum()))
    }
}
