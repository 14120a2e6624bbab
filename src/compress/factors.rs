//! Quantised factors: the left part is quantised first, the right part refitted to it, and quantised last.
//!
//! For any metric of the inputs the best right part of a given `B` is `A = (Bᵀ G B)⁻¹ Bᵀ G T`: that of the inputs cancels.

use anyhow::{Context, Result};
use faer::{Mat, MatRef};

use super::metric::Metric;
use crate::formats::{Matrix, Parts};
use crate::linalg;
use crate::model::layout::expand_pivots;
use crate::quantize::{Grouped, Quantized, Scale, Scheme};

fn quantised(values: &[f32], rows: usize, cols: usize, scheme: Scheme) -> Matrix {
    Matrix::Quantized(Quantized::Grouped(Grouped::round(values, rows, cols, scheme, Scale::Mse)))
}

/// Quantises the parts of a matrix that stand for `target` (m, n), in the metric of its outputs.
///
/// # Errors
/// The quantised left part has dependent columns.
pub(super) fn quantise(parts: &Parts, target: MatRef<'_, f64>, output: &Metric, scheme: Scheme) -> Result<Parts> {
    let (m, n) = (target.nrows(), target.ncols());
    match parts {
        Parts::Factors { rank, b, .. } => {
            let b = quantised(&b.values(), m, *rank, scheme);
            let a = refit(&b.values(), *rank, target, output)?;
            Ok(Parts::Factors { rank: *rank, b, a: quantised(&a, *rank, n, scheme) })
        }
        Parts::Pivot { rank, coefficients, order, .. } => {
            let coefficients = quantised(&coefficients.values(), m - rank, *rank, scheme);
            let places: Vec<usize> = order.iter().map(|&place| place as usize).collect();
            let b = expand_pivots(&places, &coefficients.values(), *rank);
            let pivots = quantised(&refit(&b, *rank, target, output)?, *rank, n, scheme);
            Ok(Parts::Pivot { rank: *rank, pivots, coefficients, order: order.clone() })
        }
    }
}

/// `(Bᵀ G B)⁻¹ Bᵀ G T`, (r, n) row-major, of `b` (m, r).
fn refit(b: &[f32], rank: usize, target: MatRef<'_, f64>, output: &Metric) -> Result<Vec<f32>> {
    let b_t = linalg::transposed_from_row_major(b, target.nrows(), rank); // (r, m)
    let weighted = output.times(b_t.as_ref()); // Bᵀ G
    let normal: Mat<f64> = linalg::product(weighted.as_ref(), b_t.transpose());
    let right = linalg::product(weighted.as_ref(), target);
    // A column that was rounded to zeros takes no part: any positive diagonal gives it zeros on the right.
    let least = 1e-9 * (0..rank).map(|i| normal[(i, i)]).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let normal = Mat::from_fn(rank, rank, |i, j| normal[(i, j)] + if i == j { least } else { 0.0 });
    let solved =
        linalg::solve(normal.as_ref(), right.as_ref()).context("the quantised factor has dependent columns")?;
    Ok(linalg::to_row_major(solved.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::low_rank;
    use crate::compress::metric::MetricPair;
    use crate::compress::pivot;
    use crate::model::Layout;
    use crate::quantize::Levels;

    #[test]
    fn refitting_is_better_than_rounding_both() {
        let (m, n, rank) = (40, 60, 10);
        let weight = Mat::from_fn(m, n, |i, j| ((i * 31 + j * 17 + i * j) % 23) as f64 - 11.0);
        let gradients = Mat::from_fn(200, m, |i, j| ((i * 7 + j * j + i * j * 3) % 13) as f64 - 6.0);
        let output = Metric::damped(gradients.transpose() * &gradients, 0.01);
        for (metric, layout) in
            [(&output, Layout::Factors), (&Metric::Identity, Layout::Factors), (&Metric::Identity, Layout::Pivot)]
        {
            let pair = MetricPair { output: metric, input: &Metric::Identity };
            let decomposition = low_rank::decompose(weight.as_ref(), pair, rank).unwrap();
            let parts = pivot::lay_out(layout, decomposition.truncate(weight.as_ref(), rank), (m, n));
            for bits in [4, 8] {
                let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group: Some(128) };
                let error = |parts: &Parts| {
                    let product = linalg::transposed_from_row_major(&parts.product(m, n), m, n);
                    pair.squared_norm((&weight - product.transpose()).as_ref())
                };
                let refitted = error(&quantise(&parts, weight.as_ref(), metric, scheme).unwrap());
                let round = |values: &Matrix, rows, cols| quantised(&values.values(), rows, cols, scheme);
                let rounded = match &parts {
                    Parts::Factors { b, a, .. } => Parts::Factors { rank, b: round(b, m, rank), a: round(a, rank, n) },
                    Parts::Pivot { pivots, coefficients, order, .. } => Parts::Pivot {
                        rank,
                        pivots: round(pivots, rank, n),
                        coefficients: round(coefficients, m - rank, rank),
                        order: order.clone(),
                    },
                };
                let rounded = error(&rounded);
                let floor = decomposition.curve.squared_error(rank);
                assert!(floor < refitted && refitted < rounded, "{bits} {layout:?}: {floor} {refitted} {rounded}");
            }
        }
    }
}
