//! Block-diagonal pairs (Monarch, Dao et al. 2022): a matrix (m, n) of b² blocks (m / b, n / b), each of rank r.
//!
//! `y = L · P · R · x`: `R` multiplies each of b slices of the input by (b r, n / b), `P` gathers for every slice of
//! the output its share of all input slices, and `L` multiplies that by (m / b, b r). Block (j, i) of the matrix is
//! `L_ji R_ij`, so in the plain metric the best approximation is the truncated SVD of each block; Monarch matrices
//! proper have r = 1 and permuted rows. The stored parts are `lr_r` (b² r, n / b), with rows in the order (i, j, rank),
//! and `lr_l` (m, b r), with columns in the order (i, rank); together b r (m + n) parameters, as many as factors of
//! rank b r.
//!
//! In a metric with Grams each block is fitted in its own part of both. The joint error of all blocks is measured at a
//! few ranks, and the curve is scaled to it in between.

use anyhow::Result;
use candle_core::Tensor;
use faer::MatRef;

use super::factors::right_part;
use super::matrix::Matrix;
use super::rounding::{Rounded, Sides, round_to_nearest};
use super::structure::{Element, Fit, FitValues, Fitting, Shape, Size, Step, Structure};
use crate::approx::low_rank::{self, ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::codecs::cast::Dtype;
use crate::linalg::{self, LinalgError};
use crate::quantize::Scheme;

pub(super) struct Monarch;

/// Most slices of inputs and of outputs.
const MOST_SLICES: usize = 4;

/// The largest power of two up to [`MOST_SLICES`] that divides both sides.
pub(super) fn n_slices((m, n): Shape) -> usize {
    let mut count = 1;
    while count < MOST_SLICES && m.is_multiple_of(2 * count) && n.is_multiple_of(2 * count) {
        count *= 2;
    }
    count
}

/// The number of slices, and the rank of a block.
pub(super) fn blocks(size: Size) -> (usize, usize) {
    match size {
        Size::Blocks { count, rank } => (count, rank),
        Size::Rank(rank) => (1, rank),
        Size::Whole => unreachable!("invariant: blocks have a rank"),
    }
}

impl Structure for Monarch {
    fn name(&self) -> &'static str {
        "monarch"
    }

    fn suffixes(&self) -> &'static [(&'static str, Element)] {
        &[("lr_r", Element::Float), ("lr_l", Element::Float)]
    }

    fn shapes(&self, size: Size, (m, n): Shape) -> Vec<[usize; 2]> {
        let (count, rank) = blocks(size);
        vec![[count * count * rank, n / count], [m, count * rank]]
    }

    fn measure(&self, stored: &[[usize; 2]]) -> Option<(Size, Shape)> {
        let &[[rows, width], [m, columns]] = stored else { return None };
        let count = rows.checked_div(columns)?;
        let is_whole = count > 0 && columns % count == 0 && m % count == 0 && count.checked_mul(columns) == Some(rows);
        let n = count.checked_mul(width)?;
        is_whole.then(|| (Size::Blocks { count, rank: columns / count }, (m, n)))
    }

    fn apply(&self, parts: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let [right, left] = parts else { unreachable!("invariant: a block-diagonal pair is two matrices") };
        let ((rows, n), (m, columns)) = (x.dims2()?, left.dims2()?);
        let count = right.dim(0)? / columns;
        let x = x.reshape((rows, count, n / count))?.transpose(0, 1)?.contiguous()?; // (i, rows, n / b)
        let right = right.reshape((count, columns, n / count))?.transpose(1, 2)?.contiguous()?; // (i, n / b, j r)
        let inner = x.matmul(&right)?.reshape((count, rows, count, columns / count))?; // (i, rows, j, r)
        let inner = inner.permute((2, 1, 0, 3))?.contiguous()?.reshape((count, rows, columns))?; // (j, rows, i r)
        let left = left.reshape((count, m / count, columns))?.transpose(1, 2)?.contiguous()?; // (j, i r, m / b)
        Ok(inner.matmul(&left)?.transpose(0, 1)?.contiguous()?.reshape((rows, m))?)
    }

    fn product(&self, parts: &[Matrix], size: Size, (m, n): Shape) -> Vec<f32> {
        let (count, rank) = blocks(size);
        let (right, left) = (parts[0].values(), parts[1].values());
        let (height, width) = (m / count, n / count);
        let mut product = vec![0.0; m * n];
        for (j, i) in pairs(count) {
            let l = left_block(&left, count, rank, height, (j, i));
            let r = &right[(i * count + j) * rank * width..][..rank * width];
            let block = linalg::product_row_major(&l, r, height, rank, width);
            for (row, values) in block.chunks_exact(width.max(1)).enumerate() {
                product[(j * height + row) * n + i * width..][..width].copy_from_slice(values);
            }
        }
        product
    }

    fn steps(&self, size: Size) -> Vec<Step> {
        vec![Step::Slice(blocks(size).0), Step::Multiply(0), Step::Exchange, Step::Multiply(1), Step::Join]
    }

    fn fitting(&self) -> Option<&dyn Fitting> {
        Some(self)
    }
}

/// All blocks (j, i): slice of the output, slice of the input.
fn pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count * count).map(move |at| (at / count, at % count))
}

/// `L_ji` (m / b, r), row-major.
fn left_block(left: &[f32], count: usize, rank: usize, height: usize, (j, i): (usize, usize)) -> Vec<f32> {
    let rows = left[j * height * count * rank..].chunks_exact((count * rank).max(1)).take(height);
    rows.flat_map(|row| &row[i * rank..][..rank]).copied().collect()
}

/// A target in blocks, each with its part of the metric.
struct Blocks<'a> {
    target: MatRef<'a, f64>,
    count: usize,
    outputs: Vec<Metric>,
    inputs: Vec<Metric>,
}

impl<'a> Blocks<'a> {
    fn new(target: MatRef<'a, f64>, metric: MetricPair<'_>) -> Self {
        let (m, n) = target.shape();
        let count = n_slices((m, n));
        let slices = |metric: &Metric, len: usize| -> Vec<Metric> {
            (0..count).map(|at| metric.slice(at * len / count..(at + 1) * len / count)).collect()
        };
        Self { target, count, outputs: slices(metric.output, m), inputs: slices(metric.input, n) }
    }

    fn block(&self, (j, i): (usize, usize)) -> (MatRef<'a, f64>, MetricPair<'_>) {
        let (height, width) = (self.target.nrows() / self.count, self.target.ncols() / self.count);
        let target = self.target.submatrix(j * height, i * width, height, width);
        (target, MetricPair { output: &self.outputs[j], input: &self.inputs[i] })
    }

    /// Energies at every rank, summed over the blocks.
    fn sum(&self, curves: &[ErrorCurve]) -> ErrorCurve {
        let n_ranks = curves.iter().map(|curve| curve.energies().len()).max().unwrap_or(0);
        let energy = |at: usize| curves.iter().filter_map(|curve| curve.energies().get(at)).sum();
        ErrorCurve::new((0..n_ranks).map(energy).collect())
    }
}

impl Fitting for Monarch {
    fn size(&self, rank: usize, shape: Shape) -> Size {
        Size::Blocks { count: n_slices(shape), rank }
    }

    /// b r (m + n) < m n.
    fn largest_saving_rank(&self, (m, n): Shape) -> usize {
        let rank = (m * n).saturating_sub(1) / (n_slices((m, n)) * (m + n)).max(1);
        rank.min(self.largest_rank((m, n)))
    }

    fn largest_rank(&self, (m, n): Shape) -> usize {
        m.min(n) / n_slices((m, n))
    }

    fn fit(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>, largest_rank: usize) -> Result<Fit, LinalgError> {
        let blocks = Blocks::new(target, metric);
        let ((m, n), count) = (target.shape(), blocks.count);
        let (rank, height, width) = (largest_rank.min(self.largest_rank((m, n))), m / count, n / count);
        let (mut left, mut right) = (vec![0.0; m * count * rank], vec![0.0; count * count * rank * width]);
        let mut curves = Vec::new();
        for (j, i) in pairs(count) {
            let (target, metric) = blocks.block((j, i));
            let decomposition = low_rank::decompose(target, metric, rank)?;
            let LowRank { b, a, .. } = decomposition.truncate(target, rank);
            for (row, values) in b.chunks_exact(rank.max(1)).enumerate() {
                left[((j * height + row) * count + i) * rank..][..rank].copy_from_slice(values);
            }
            right[(i * count + j) * rank * width..][..rank * width].copy_from_slice(&a);
            curves.push(decomposition.curve);
        }
        let pair = LowRank { rank, b: left, a: right };
        let curve = self.measured(blocks.sum(&curves), &pair, target, metric);
        Ok(Fit { curve, values: FitValues::Pair(pair) })
    }

    fn n_values(&self, rank: usize, (m, n): Shape) -> u64 {
        (n_slices((m, n)) * rank * (m + n)) as u64
    }

    fn curve(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>) -> Result<ErrorCurve, LinalgError> {
        Ok(self.fit(target, metric, self.largest_rank(target.shape()))?.curve)
    }

    fn prefix(&self, pair: &LowRank, rank: usize, shape: Shape) -> LowRank {
        assert!(rank <= pair.rank, "invariant: a prefix is no longer than the whole");
        if rank == pair.rank {
            return pair.clone();
        }
        let width = shape.1 / n_slices(shape);
        let first = |values: &[f32], length: usize| -> Vec<f32> {
            values.chunks_exact((pair.rank * length).max(1)).flat_map(|run| &run[..rank * length]).copied().collect()
        };
        LowRank { rank, b: first(&pair.b, 1), a: first(&pair.a, width) }
    }

    fn lay_out(&self, LowRank { b, a, .. }: LowRank, _: Shape) -> Vec<Matrix> {
        vec![a.into(), b.into()]
    }

    /// Rounds to nearest: blocks are small, so errors do not accumulate over long rows.
    fn round(&self, pair: &LowRank, shape: Shape, sides: &Sides<'_>, dtype: Dtype) -> Rounded {
        let parts: Vec<Matrix> =
            [&pair.a, &pair.b].map(|values| round_to_nearest(dtype, values).into()).into_iter().collect();
        let exact = self.lay_out(pair.clone(), shape);
        let metric = MetricPair { output: sides.output, input: sides.input.metric() };
        let matrix = |parts: &[Matrix]| {
            let values = self.product(parts, self.size(pair.rank, shape), shape);
            linalg::transposed_from_row_major(&values, shape.0, shape.1)
        };
        let error = matrix(&parts) - matrix(&exact);
        Rounded { squared_error: metric.squared_norm(error.transpose()), parts }
    }

    fn quantize(
        &self,
        parts: &[Matrix],
        size: Size,
        target: MatRef<'_, f64>,
        output: &Metric,
        scheme: Scheme,
    ) -> Result<Vec<Matrix>> {
        let (count, rank) = blocks(size);
        let (m, width) = (target.nrows(), target.ncols() / count);
        let left = Matrix::quantized(&parts[1].values(), m, count * rank, scheme);
        let blocks = Blocks::new(target, MetricPair { output, input: &Metric::Identity });
        let values = left.values();
        let mut right = Vec::new();
        for i in 0..count {
            for j in 0..count {
                let (target, metric) = blocks.block((j, i));
                let b = left_block(&values, count, rank, m / count, (j, i));
                right.extend(right_part(&b, rank, target, metric.output)?);
            }
        }
        let right = Matrix::quantized(&right, count * count * rank, width, scheme);
        drop(values);
        Ok(vec![right, left])
    }

    fn pair(&self, parts: &[Matrix], size: Size, _: Shape) -> LowRank {
        let values = |part: &Matrix| part.values().into_owned();
        LowRank { rank: blocks(size).1, b: values(&parts[1]), a: values(&parts[0]) }
    }
}

/// Fractions of the largest rank at which the joint error of all blocks is measured.
const MEASURED: [f64; 3] = [0.25, 0.5, 1.0];

impl Monarch {
    /// The curve of blocks that were fitted separately, scaled between the ranks at which their joint error is
    /// measured.
    fn measured(
        &self,
        apart: ErrorCurve,
        pair: &LowRank,
        target: MatRef<'_, f64>,
        metric: MetricPair<'_>,
    ) -> ErrorCurve {
        // Without Grams the blocks are independent.
        if !metric.has_gram() || pair.rank == 0 {
            return apart;
        }
        let shape = target.shape();
        let at = |rank: usize| -> (f64, f64) {
            let smaller = self.prefix(pair, rank, shape);
            let product = self.product(&self.lay_out(smaller, shape), self.size(rank, shape), shape);
            let error = target - linalg::transposed_from_row_major(&product, shape.0, shape.1).transpose();
            let expected = apart.squared_error(rank);
            let ratio = if expected > 0.0 { metric.squared_norm(error.as_ref()) / expected } else { 1.0 };
            (rank as f64, ratio)
        };
        let none =
            if apart.squared_error(0) > 0.0 { metric.squared_norm(target) / apart.squared_error(0) } else { 1.0 };
        let mut ratios = vec![(0.0, none)];
        ratios.extend(MEASURED.map(|share| at(((share * pair.rank as f64) as usize).max(1))));
        let errors: Vec<f64> = (0..=apart.energies().len())
            .map(|rank| interpolated(&ratios, rank as f64) * apart.squared_error(rank))
            .collect();
        ErrorCurve::new(errors.windows(2).map(|pair| pair[0] - pair[1]).collect())
    }
}

/// Interpolates linearly between points at `x`; beyond the last point it has the value there.
fn interpolated(points: &[(f64, f64)], x: f64) -> f64 {
    let after = points.iter().position(|&(at, _)| at >= x).unwrap_or(points.len() - 1).max(1);
    let ((x0, y0), (x1, y1)) = (points[after - 1], points[after]);
    if x >= x1 || x1 <= x0 { y1 } else { y0 + (y1 - y0) * (x - x0) / (x1 - x0) }
}
