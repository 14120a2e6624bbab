//! Blocks that share their factors (BLAST, Lee et al. 2024): block (i, j) of b² is `U_i diag(s_ij) V_jᵀ`.
//!
//! `y_i = U_i Σ_j s_ij ∘ (V_jᵀ x_j)` for slices of the input and of the output. Stored are `lr_v` (b r, n / b), rows in
//! the order (input slice, rank); `lr_s` (b², r), rows in the order (output slice, input slice); and `lr_u` (m, r): r
//! (m + n + b²) parameters. With all `s` 1 these are factors, of which [`Fitting::fit`] makes one of every rank. What
//! is gained over pivots comes from a descent at one rank ([`crate::approx::blast`]), of which a smaller rank is no
//! part: so ranks are planned for pivots, and a linear is stored in whichever has the smaller error.

use anyhow::Result;
use candle_core::Tensor;
use faer::MatRef;

use super::factors::right_part;
use super::matrix::Matrix;
use super::monarch::{blocks, n_slices};
use super::products::mixed_slices;
use super::rounding::{Rounded, Sides, round_to_nearest};
use super::structure::{Element, Fit, FitValues, Fitting, FittingAlone, Kind, Shape, Size, Step, Structure};
use crate::approx::blast;
use crate::approx::low_rank::{self, ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::codecs::cast::Dtype;
use crate::linalg::{self, LinalgError};
use crate::quantize::Scheme;

pub(super) struct Blast;

impl Structure for Blast {
    fn name(&self) -> &'static str {
        "blast"
    }

    fn suffixes(&self) -> &'static [(&'static str, Element)] {
        &[("lr_v", Element::Float), ("lr_s", Element::Float), ("lr_u", Element::Float)]
    }

    fn shapes(&self, size: Size, (m, n): Shape) -> Vec<[usize; 2]> {
        let (count, rank) = blocks(size);
        vec![[count * rank, n / count], [count * count, rank], [m, rank]]
    }

    fn measure(&self, stored: &[[usize; 2]]) -> Option<(Size, Shape)> {
        let &[[rows, width], [pairs, rank], [m, columns]] = stored else { return None };
        let count = pairs.isqrt();
        let is_whole = count > 0 && rank > 0 && count * count == pairs && rank == columns && m % count == 0;
        let n = count.checked_mul(width)?;
        (is_whole && count.checked_mul(rank) == Some(rows)).then_some((Size::Blocks { count, rank }, (m, n)))
    }

    fn apply(&self, parts: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let [right, scales, left] = parts else {
            unreachable!("invariant: blocks with shared factors have three parts")
        };
        let ((rows, n), (m, rank)) = (x.dims2()?, left.dims2()?);
        let count = right.dim(0)? / rank;
        let slices = |part: &Tensor, width: usize| -> Result<Tensor> {
            Ok(part.reshape((count, width, ()))?.transpose(1, 2)?.contiguous()?)
        };
        let x = x.reshape((rows, count, n / count))?.transpose(0, 1)?.contiguous()?; // (j, rows, n / b)
        let inner = x.matmul(&slices(right, rank)?)?; // (j, rows, r)
        let mixed = mixed_slices(&inner, scales)?; // (i, rows, r)
        let y = mixed.matmul(&slices(left, m / count)?)?; // (i, rows, m / b)
        Ok(y.transpose(0, 1)?.contiguous()?.reshape((rows, m))?)
    }

    fn product(&self, parts: &[Matrix], size: Size, (m, n): Shape) -> Vec<f32> {
        let ((count, rank), right) = (blocks(size), parts[0].values());
        let width = n / count;
        let mut product = vec![0.0; m * n];
        for (j, left) in lefts(&parts[2].values(), &parts[1].values(), count, rank).enumerate() {
            let columns = linalg::product_row_major(&left, &right[j * rank * width..][..rank * width], m, rank, width);
            put_columns(&mut product, &columns, (n, width), j);
        }
        product
    }

    fn steps(&self, size: Size) -> Vec<Step> {
        vec![Step::Slice(blocks(size).0), Step::Multiply(0), Step::Mix(1), Step::Multiply(2), Step::Join]
    }

    fn fitting(&self) -> Option<&dyn Fitting> {
        Some(self)
    }
}

/// For every slice j of the inputs the left part of its columns, `diag(s_ij)` after `U_i`, (m, r) row-major.
fn lefts<'a>(u: &'a [f32], s: &'a [f32], count: usize, rank: usize) -> impl Iterator<Item = Vec<f32>> + 'a {
    let height = u.len() / (count * rank).max(1);
    (0..count).map(move |j| {
        let row = |(at, row): (usize, &'a [f32])| {
            let scales = &s[(at / height * count + j) * rank..][..rank];
            row.iter().zip(scales).map(|(u, s)| u * s)
        };
        u.chunks_exact(rank.max(1)).enumerate().flat_map(row).collect()
    })
}

/// Puts `columns` (m, width) in the place of slice j of a matrix (m, n), both row-major.
fn put_columns(matrix: &mut [f32], columns: &[f32], (n, width): (usize, usize), j: usize) {
    for (to, from) in matrix.chunks_exact_mut(n.max(1)).zip(columns.chunks_exact(width.max(1))) {
        to[j * width..][..width].copy_from_slice(from);
    }
}

/// `U`, and `V` with `s` behind it, in the form of a pair: `b` is `U` (m, r), `a` (r, n + b²) has `Vᵀ` and then `sᵀ`.
fn packed(
    rank: usize,
    u: Vec<f32>,
    v_t: impl Fn(usize, usize) -> f32,
    s: impl Fn(usize, usize) -> f32,
    (n, pairs): (usize, usize),
) -> LowRank {
    let row = |k: usize| {
        let (v_t, s) = (&v_t, &s);
        (0..n).map(move |j| v_t(k, j)).chain((0..pairs).map(move |at| s(at, k)))
    };
    LowRank { rank, b: u, a: (0..rank).flat_map(row).collect() }
}

impl Fitting for Blast {
    fn size(&self, rank: usize, shape: Shape) -> Size {
        Size::Blocks { count: n_slices(shape), rank }
    }

    /// r (m + n + b²) < m n.
    fn largest_saving_rank(&self, (m, n): Shape) -> usize {
        let rank = (m * n).saturating_sub(1) / (m + n + n_slices((m, n)).pow(2));
        rank.min(self.largest_rank((m, n)))
    }

    fn largest_rank(&self, (m, n): Shape) -> usize {
        m.min(n)
    }

    /// Factors, whose `s` is 1.
    fn fit(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>, largest_rank: usize) -> Result<Fit, LinalgError> {
        let (n, pairs) = (target.ncols(), n_slices(target.shape()).pow(2));
        let decomposition = low_rank::decompose(target, metric, largest_rank)?;
        let LowRank { rank, b, a } = decomposition.truncate(target, largest_rank);
        let pair = packed(rank, b, |k, j| a[k * n + j], |_, _| 1.0, (n, pairs));
        Ok(Fit { curve: decomposition.curve, values: FitValues::Pair(pair) })
    }

    fn n_values(&self, rank: usize, (m, n): Shape) -> u64 {
        (rank * (m + n + n_slices((m, n)).pow(2))) as u64
    }

    fn curve(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>) -> Result<ErrorCurve, LinalgError> {
        low_rank::error_curve(target, metric)
    }

    fn alone(&self) -> Option<&dyn FittingAlone> {
        Some(self)
    }

    fn prefix(&self, pair: &LowRank, rank: usize, _: Shape) -> LowRank {
        pair.prefix(rank)
    }

    fn lay_out(&self, LowRank { rank, b, a }: LowRank, shape: Shape) -> Vec<Matrix> {
        let (n, count) = (shape.1, n_slices(shape));
        let (row, width) = (n + count * count, n / count);
        let right = (0..count).flat_map(|j| a.chunks_exact(row).flat_map(move |row| &row[j * width..][..width]));
        let right: Vec<f32> = right.copied().collect();
        let scales: Vec<f32> = (0..count * count)
            .flat_map(|at| (0..rank).map(move |k| (at, k)))
            .map(|(at, k)| a[k * row + n + at])
            .collect();
        vec![right.into(), scales.into(), b.into()]
    }

    /// `U` and `s` to nearest; `V` is fitted to them, and then rounded to nearest.
    fn round(&self, pair: &LowRank, shape: Shape, sides: &Sides<'_>, dtype: Dtype) -> Rounded {
        let (size, exact) = (self.size(pair.rank, shape), self.lay_out(pair.clone(), shape));
        let nearest = |part: &Matrix| -> Matrix { round_to_nearest(dtype, &part.values()).into() };
        let target = linalg::transposed_from_row_major(&self.product(&exact, size, shape), shape.0, shape.1);
        let (scales, left) = (nearest(&exact[1]), nearest(&exact[2]));
        // Where the rounded left part has dependent columns, the right part stays.
        let right = refitted(&left, &scales, size, target.transpose(), sides.output)
            .map_or_else(|_| nearest(&exact[0]), |right| nearest(&right.into()));
        let parts = vec![right, scales, left];
        let rounded = linalg::transposed_from_row_major(&self.product(&parts, size, shape), shape.0, shape.1);
        let metric = MetricPair { output: sides.output, input: sides.input.metric() };
        Rounded { squared_error: metric.squared_norm((target - rounded).transpose()), parts }
    }

    fn quantize(
        &self,
        parts: &[Matrix],
        size: Size,
        target: MatRef<'_, f64>,
        output: &Metric,
        scheme: Scheme,
    ) -> Result<Vec<Matrix>> {
        let ((count, rank), (m, n)) = (blocks(size), target.shape());
        // Slices of the inputs are correlated: what each would best be by itself is not what all were fitted to be.
        let fitted = linalg::transposed_from_row_major(&self.product(parts, size, (m, n)), m, n);
        let left = Matrix::quantized(&parts[2].values(), m, rank, scheme);
        let scales = Matrix::quantized(&parts[1].values(), count * count, rank, scheme);
        let right = refitted(&left, &scales, size, fitted.transpose(), output)?;
        Ok(vec![Matrix::quantized(&right, count * rank, n / count, scheme), scales, left])
    }

    fn pair(&self, parts: &[Matrix], size: Size, (_, n): Shape) -> LowRank {
        let ((count, rank), right, scales) = (blocks(size), parts[0].values(), parts[1].values());
        let width = n / count;
        let v_t = |k: usize, j: usize| right[(j / width * rank + k) * width + j % width];
        packed(rank, parts[2].values().into_owned(), v_t, |at, k| scales[at * rank + k], (n, count * count))
    }
}

impl FittingAlone for Blast {
    fn planned(&self) -> Kind {
        Kind::default()
    }

    fn fit(
        &self,
        target: MatRef<'_, f64>,
        metric: MetricPair<'_>,
        rank: usize,
        limit: f64,
    ) -> Result<Option<Vec<Matrix>>, LinalgError> {
        let (shape, count) = (target.shape(), n_slices(target.shape()));
        let Some((blast, _)) = blast::fit(target, metric, (count, rank), limit)? else { return Ok(None) };
        let u = (0..shape.0).flat_map(|i| blast.u.row(i).iter().copied().collect::<Vec<_>>()).collect();
        let pair = packed(rank, u, |k, j| blast.v[(j, k)], |at, k| blast.s[at * rank + k], (shape.1, count * count));
        Ok(Some(self.lay_out(pair, shape)))
    }

    fn n_multiplications(&self, rank: usize, shape: Shape) -> f64 {
        blast::n_multiplications(shape, n_slices(shape), rank)
    }
}

/// The best right part (b r, n / b) in the output metric for the other parts: that of every slice of the inputs by itself.
///
/// # Errors
/// The left part of a slice has dependent columns.
fn refitted(left: &Matrix, scales: &Matrix, size: Size, target: MatRef<'_, f64>, output: &Metric) -> Result<Vec<f32>> {
    let ((count, rank), width) = (blocks(size), target.ncols() / blocks(size).0);
    let (u, s) = (left.values(), scales.values());
    let mut right = Vec::with_capacity(rank * target.ncols());
    for (j, left) in lefts(&u, &s, count, rank).enumerate() {
        right.extend(right_part(&left, rank, target.subcols(j * width, width), output)?);
    }
    Ok(right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_no_fit_has_are_not_measured() {
        let size = Size::Blocks { count: 4, rank: 3 };
        let shapes = Blast.shapes(size, (24, 32));
        assert_eq!(Blast.measure(&shapes), Some((size, (24, 32))));
        // Without ranks, of a count that is no square, of slices that the outputs do not have, and of two ranks.
        assert_eq!(Blast.measure(&[[0, 8], [16, 0], [24, 0]]), None);
        assert_eq!(Blast.measure(&[[12, 8], [15, 3], [24, 3]]), None);
        assert_eq!(Blast.measure(&[[12, 8], [16, 3], [26, 3]]), None);
        assert_eq!(Blast.measure(&[[12, 8], [16, 3], [24, 2]]), None);
    }
}
