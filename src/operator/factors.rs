//! Factors `B·A` (m, n) of rank r: `lr_a` is `A` (r, n), `lr_b` is `B` (m, r); r (m + n) parameters. `lr_b` has the
//! bias.
//!
//! When factors are rounded to 16 bits, `B` is rounded to nearest (both Grams are diagonal in their gauge, so feedback
//! gains nothing); `A` is fitted to the rounded `B`, and then rounded.

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use faer::{Mat, MatRef};

use super::matrix::Matrix;
use super::products::product;
use super::rounding::{
    Grams, Rounded, Sides, columns_with_feedback, diagonal, refit_right, right_with_feedback, round_to_nearest,
    weighted_error,
};
use super::structure::{Element, Fit, FitValues, Fitting, Shape, Size, Step, Structure};
use crate::approx::low_rank::{self, Decomposition, ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::codecs::cast::Dtype;
use crate::linalg::{self, LinalgError};
use crate::quantize::{E4M3_LARGEST, Levels, Scheme};

/// The part that is `A`.
const A: &str = "lr_a";
/// The part that is `B`.
const B: &str = "lr_b";

pub(super) struct Factors;

impl Structure for Factors {
    fn name(&self) -> &'static str {
        "factors"
    }

    fn suffixes(&self) -> &'static [(&'static str, Element)] {
        &[(A, Element::Float), (B, Element::Float)]
    }

    fn shapes(&self, size: Size, (m, n): Shape) -> Vec<[usize; 2]> {
        let rank = size.rank().unwrap_or(0);
        vec![[rank, n], [m, rank]]
    }

    fn measure(&self, stored: &[[usize; 2]]) -> Option<(Size, Shape)> {
        let &[[rank, n], [m, columns]] = stored else { return None };
        (rank == columns).then_some((Size::Rank(rank), (m, n)))
    }

    fn apply(&self, parts: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let [a, b] = parts else { unreachable!("invariant: factors are two matrices") };
        if a.dim(0)? == 0 {
            return Ok(Tensor::zeros((x.dim(0)?, b.dim(0)?), x.dtype(), x.device())?);
        }
        product(&product(x, a)?, b)
    }

    fn product(&self, parts: &[Matrix], size: Size, (m, n): Shape) -> Vec<f32> {
        linalg::product_row_major(&parts[1].values(), &parts[0].values(), m, size.rank().unwrap_or(0), n)
    }

    fn steps(&self, _: Size) -> Vec<Step> {
        vec![Step::Multiply(0), Step::Multiply(1)]
    }

    fn bias_part(&self) -> Option<&'static str> {
        Some(B)
    }

    fn takes_base(&self) -> bool {
        true
    }

    fn adapter<'p>(&self, parts: &'p [Matrix]) -> Option<[&'p Matrix; 2]> {
        Some([&parts[0], &parts[1]])
    }

    fn fitting(&self) -> Option<&dyn Fitting> {
        Some(self)
    }
}

/// The best factors in a metric, and the error at every rank.
pub(super) fn fit(target: MatRef<'_, f64>, metric: MetricPair<'_>, largest_rank: usize) -> Result<Fit, LinalgError> {
    let Decomposition { curve, dual } = low_rank::decompose(target, metric, largest_rank)?;
    Ok(Fit { curve, values: FitValues::Dual(dual) })
}

/// The best right part `(Bᵀ G B)⁻¹ Bᵀ G T`, (r, n) row-major, for a left part `b` (m, r). It is the same for any input
/// metric.
///
/// # Errors
/// The left part has dependent columns.
pub(super) fn right_part(b: &[f32], rank: usize, target: MatRef<'_, f64>, output: &Metric) -> Result<Vec<f32>> {
    let b_t = linalg::transposed_from_row_major(b, target.nrows(), rank); // (r, m)
    let weighted = output.times(b_t.as_ref()); // Bᵀ G
    let normal: Mat<f64> = linalg::product(weighted.as_ref(), b_t.transpose());
    let right = linalg::product(weighted.as_ref(), target);
    // A column that was rounded to zeros takes no part: with any positive diagonal its row on the right is zero.
    let least = 1e-9 * (0..rank).map(|i| normal[(i, i)]).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let normal = Mat::from_fn(rank, rank, |i, j| normal[(i, j)] + if i == j { least } else { 0.0 });
    let solved =
        linalg::solve(normal.as_ref(), right.as_ref()).context("the quantized factor has dependent columns")?;
    Ok(linalg::to_row_major(solved.as_ref()))
}

impl Fitting for Factors {
    fn size(&self, rank: usize, _: Shape) -> Size {
        Size::Rank(rank)
    }

    /// r (m + n) < m n.
    fn largest_saving_rank(&self, (m, n): Shape) -> usize {
        (m * n).saturating_sub(1) / (m + n).max(1)
    }

    fn largest_rank(&self, (m, n): Shape) -> usize {
        m.min(n)
    }

    fn fit(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>, largest_rank: usize) -> Result<Fit, LinalgError> {
        fit(target, metric, largest_rank)
    }

    fn curve(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>) -> Result<ErrorCurve, LinalgError> {
        low_rank::error_curve(target, metric)
    }

    fn prefix(&self, pair: &LowRank, rank: usize, _: Shape) -> LowRank {
        pair.prefix(rank)
    }

    fn lay_out(&self, LowRank { b, a, .. }: LowRank, _: Shape) -> Vec<Matrix> {
        vec![a.into(), b.into()]
    }

    fn round(&self, pair: &LowRank, (m, n): Shape, sides: &Sides<'_>, dtype: Dtype) -> Rounded {
        let rank = pair.rank;
        let b_t = linalg::transposed_from_row_major(&pair.b, m, rank); // (r, m)
        let a_t = linalg::transposed_from_row_major(&pair.a, rank, n); // (n, r)
        let Grams { left, right } = sides.grams(b_t.as_ref(), a_t.transpose());
        let b = round_to_nearest(dtype, &pair.b);
        let moved_t = linalg::transposed_from_row_major(&b, m, rank) - &b_t;
        let fitted = refit_right(sides.output, b_t.as_ref(), moved_t.as_ref(), &left, &right);
        let (target, of_b) = match fitted {
            Some(fitted) => (linalg::to_row_major(fitted.of(a_t.transpose()).as_ref()), fitted.squared_error),
            None => {
                let outputs = sides.output.to_diagonal(m);
                (pair.a.clone(), weighted_error(&b, &pair.b, &outputs, &diagonal(&right)))
            }
        };
        let a = round_to_nearest(dtype, &target);
        let inputs = sides.input.metric().to_diagonal(n);
        let squared_error = of_b + weighted_error(&a, &target, &diagonal(&left), &inputs);
        Rounded { parts: vec![a.into(), b.into()], squared_error }
    }

    /// With feedback in both parts: they are in no gauge whose Grams are diagonal.
    fn round_parts(&self, parts: &[Matrix], size: Size, shape: Shape, sides: &Sides<'_>, dtype: Dtype) -> Rounded {
        let pair = self.pair(parts, size, shape);
        fed_back(&pair, shape, sides, dtype).unwrap_or_else(|| self.round(&pair, shape, sides, dtype))
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
        let b = match scheme.levels {
            // Without scales, columns have to be of the size of the grid.
            Levels::E4m3 => {
                let b = self.pair(parts, size, (m, n)).balanced().b;
                // The refitted rows of `A` are of this size too, but not exactly.
                let is_large = b.iter().any(|value| value.abs() > 0.75 * E4M3_LARGEST);
                ensure!(!is_large, "the factors have values too large for 8-bit floats: leave out `--quant-factors`");
                b.into()
            }
            _ => parts[1].values(),
        };
        let b = Matrix::quantized(&b, m, rank, scheme);
        let a = right_part(&b.values(), rank, target, output)?;
        Ok(vec![Matrix::quantized(&a, rank, n, scheme), b])
    }

    fn pair(&self, parts: &[Matrix], size: Size, _: Shape) -> LowRank {
        let values = |part: &Matrix| part.values().into_owned();
        LowRank { rank: size.rank().unwrap_or(0), b: values(&parts[1]), a: values(&parts[0]) }
    }
}

/// Both parts of a pair rounded with feedback in the input metric; `None` if that has no Cholesky factor.
fn fed_back(pair: &LowRank, (m, n): Shape, sides: &Sides<'_>, dtype: Dtype) -> Option<Rounded> {
    let rank = pair.rank;
    let b_t = linalg::transposed_from_row_major(&pair.b, m, rank); // (r, m)
    let a_t = linalg::transposed_from_row_major(&pair.a, rank, n); // (n, r)
    let (input, right) = (sides.input.metric(), sides.input.metric().quadratic(a_t.transpose()));
    let (b, _) = columns_with_feedback(&b_t.transpose().to_owned(), &right, dtype)?;
    let moved_t = Mat::from_fn(rank, m, |k, i| f64::from(b[(i, k)]) - b_t[(k, i)]);
    let fitted =
        refit_right(sides.output, b_t.as_ref(), moved_t.as_ref(), &sides.output.quadratic(b_t.as_ref()), &right)?;
    let target = linalg::to_row_major(fitted.of(a_t.transpose()).as_ref());
    let (a, of_a) = right_with_feedback(&target, (rank, n), &fitted.left, input, dtype)?;
    let b: Vec<f32> = b.row_iter().flat_map(|row| row.iter().copied()).collect();
    Some(Rounded { parts: vec![a.into(), b.into()], squared_error: fitted.squared_error + of_a })
}
