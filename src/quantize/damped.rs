//! The metric that quantizers work in: a Gram with a mean diagonal of about 1, damped, in f32.

use faer::{Mat, MatRef};

/// Share of the mean diagonal of `H` that is added to it (GPTQ's 1 %).
const DAMPING: f64 = 0.01;

/// `H` (cols, cols) in this order and with a mean diagonal of about 1, damped.
pub(super) fn damped(gram: MatRef<'_, f64>, permutation: &[usize]) -> Mat<f64> {
    let cols = gram.nrows();
    let unit = to_unit_mean((0..cols).map(|i| gram[(i, i)]).sum::<f64>() / cols.max(1) as f64);
    let mean = (0..cols).map(|i| gram[(i, i)] * unit).sum::<f64>() / cols.max(1) as f64;
    Mat::from_fn(cols, cols, |i, j| {
        let value = gram[(permutation[i], permutation[j])] * unit;
        // A dead input costs nothing; any positive diagonal keeps it from affecting the others.
        if i != j {
            value
        } else if value == 0.0 {
            1.0
        } else {
            value + DAMPING * mean
        }
    })
}

/// In f32.
pub(super) fn single(matrix: &Mat<f64>) -> Mat<f32> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[(i, j)] as f32)
}

/// A power of 4 that brings the mean diagonal of a Gram to about 1, so that its factors fit an f32. Roots of such
/// powers are exact, so no code changes.
fn to_unit_mean(mean: f64) -> f64 {
    if mean > 0.0 { 4f64.powi((-0.5 * mean.log2()).round().clamp(-500.0, 500.0) as i32) } else { 1.0 }
}

/// Columns in runs of `width`, in the order of their falling sums of `H_jj`; a shorter run comes last.
pub(super) fn falling_runs(gram: MatRef<'_, f64>, width: usize) -> Vec<usize> {
    let cols = gram.nrows();
    let (whole, rest) = (cols / width, cols / width * width..cols);
    let sum = |run: usize| (run * width..(run + 1) * width).map(|j| gram[(j, j)]).sum::<f64>();
    let mut runs: Vec<(usize, f64)> = (0..whole).map(|run| (run, sum(run))).collect();
    runs.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    runs.into_iter().flat_map(|(run, _)| run * width..(run + 1) * width).chain(rest).collect()
}
