//! GPTQ (Frantar et al. 2022): columns are quantized one after another, and the columns that follow compensate the
//! error of each ([`feed_back`]), in the metric of the inputs' Gram `H`. Columns go in the order of falling
//! `H_jj`, with scales of groups that are fixed before ("act-order with static groups"), so that no index of
//! groups needs to be stored.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use serde::{Deserialize, Serialize};

use super::damped::{damped, falling_runs, single};
use super::feedback::feed_back;
use super::grouped::{Grouped, Scale, Scheme};
use super::lattice::Lattice;
use super::sparse::{Sparse, pruned};
use crate::linalg;

/// The reason why a quantizer returned the result of rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fallback {
    /// The damped Gram is not positive definite.
    NotDefinite,
    /// Rounding has the smaller error in the metric.
    NoGain,
}

impl Fallback {
    /// A clause for reports and logs.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotDefinite => "the Gram of its inputs has no Cholesky factor",
            Self::NoGain => "rounding to nearest has the smaller error",
        }
    }
}

/// Quantizes `values` (rows, cols), row-major, with the Gram `H` (cols, cols) of their inputs. Rounds to nearest if
/// `H` cannot be factored or if that has the smaller error, and returns the reason.
///
/// # Panics
/// If the shapes do not match.
pub fn gptq(
    values: &[f32],
    rows: usize,
    cols: usize,
    gram: MatRef<'_, f64>,
    scheme: Scheme,
    scale: Scale,
) -> (Grouped, Option<Fallback>) {
    let kept = scheme.kept(values, (rows, cols), Some(gram));
    let start = pruned(values, kept.as_deref());
    let rounded = || Grouped::round(&start, rows, cols, scheme, scale);
    let lattice = scheme.lattice(&start, cols, scale, None);
    let fed = match kept {
        Some(kept) => feed(values, (rows, cols), gram, &Sparse::new(lattice.clone(), scheme, cols, kept)),
        None => feed(values, (rows, cols), gram, &lattice),
    };
    let Some(fed) = fed else {
        return (rounded(), Some(Fallback::NotDefinite));
    };
    let rounded = rounded();
    if squared_error(values, &rounded, &fed.factor, &fed.permutation) <= fed.loss {
        return (rounded, Some(Fallback::NoGain));
    }
    (Grouped::of_codes(fed.codes, rows, cols, scheme, &lattice.grids), None)
}

/// Codes chosen with feedback.
pub(super) struct Fed {
    /// (rows, cols), row-major.
    pub codes: Vec<u8>,
    /// Their squared error in the damped metric.
    loss: f64,
    /// The metric is `F Fᵀ`, in the order of `permutation`.
    factor: Mat<f32>,
    permutation: Vec<usize>,
}

/// Chooses the codes of a lattice with feedback; `None` if `H` cannot be factored.
///
/// # Panics
/// If the shapes do not match.
pub(super) fn feed(
    values: &[f32],
    (rows, cols): (usize, usize),
    gram: MatRef<'_, f64>,
    lattice: &impl Lattice,
) -> Option<Fed> {
    assert_eq!((values.len(), gram.nrows()), (rows * cols, cols), "invariant: the Gram belongs to the inputs");
    let permutation = falling_runs(gram, 1);
    let (upper, factor) = linalg::inverse_cholesky(damped(gram, &permutation).as_ref())?;
    let mut weights = Mat::from_fn(rows, cols, |i, j| values[i * cols + permutation[j]]);
    let upper = single(&upper);
    let mut codes = vec![0u8; rows * cols];
    let mut loss = 0.0f64;
    let round = |j: usize, weight: &mut [f32]| {
        let column = permutation[j];
        for (i, weight) in weight.iter_mut().enumerate() {
            let code = lattice.code(i, column, *weight);
            codes[i * cols + column] = code;
            *weight = lattice.value(i, column, code);
        }
    };
    feed_back(weights.as_mut(), upper.as_ref(), round, |error: &[f32]| {
        loss += error.iter().map(|&e| f64::from(e) * f64::from(e)).sum::<f64>();
    });
    Some(Fed { codes, loss, factor: single(&factor), permutation })
}

/// `tr(E H Eᵀ) = ‖E F‖²` for the error of a quantized matrix, with `H = F Fᵀ` in the order of the columns.
fn squared_error(values: &[f32], quantized: &Grouped, factor: &Mat<f32>, permutation: &[usize]) -> f64 {
    let (rows, cols) = (quantized.rows, quantized.cols);
    let back = quantized.dequantize();
    let errors = Mat::from_fn(rows, cols, |i, j| {
        let at = i * cols + permutation[j];
        values[at] - back[at]
    });
    let mut image = Mat::<f32>::zeros(rows, cols);
    matmul(&mut image, Accum::Replace, errors.as_ref(), factor.as_ref(), 1.0, Par::Seq);
    image.col_iter().map(|column| column.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()).sum()
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::super::levels::Levels;
    use super::*;

    fn matrix(rows: usize, cols: usize, seed: u32) -> Vec<f32> {
        let value = |i: usize| ((i as u32 ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
        (0..rows * cols).map(value).collect()
    }

    fn gram(cols: usize, n_tokens: usize) -> Mat<f64> {
        // Correlated inputs, as activations are.
        let x = matrix(n_tokens, cols, 77);
        let x = Mat::from_fn(n_tokens, cols, |i, j| {
            let at = |j: usize| f64::from(x[i * cols + j]);
            at(j) + 0.9 * at(j / 3) + if j % 5 == 0 { at(0) } else { 0.0 }
        });
        x.transpose() * &x * faer::Scale(1.0 / n_tokens as f64)
    }

    fn error(values: &[f32], quantized: &Grouped, gram: &Mat<f64>) -> f64 {
        let back = quantized.dequantize();
        let e = Mat::from_fn(quantized.rows, quantized.cols, |i, j| {
            f64::from(values[i * quantized.cols + j] - back[i * quantized.cols + j])
        });
        (&e * gram * e.transpose()).diagonal().column_vector().iter().sum()
    }

    #[test]
    fn it_beats_rounding_in_its_metric() {
        let (rows, cols) = (24, 300);
        let (values, gram) = (matrix(rows, cols, 5), gram(cols, 500));
        for bits in [2, 3, 4, 8] {
            for symmetric in [true, false] {
                for group in [None, Some(32)] {
                    let scheme = Scheme { levels: Levels::Int { bits, symmetric }, group };
                    let (found, fallback) = gptq(&values, rows, cols, gram.as_ref(), scheme, Scale::Mse);
                    let rounded = Grouped::round(&values, rows, cols, scheme, Scale::Mse);
                    let (found, rounded) = (error(&values, &found, &gram), error(&values, &rounded, &gram));
                    assert_eq!(fallback, None);
                    assert!(found < 0.8 * rounded, "{scheme:?}: {found} {rounded}");
                }
            }
        }
    }

    #[test]
    fn without_correlation_it_is_rounding() {
        let (values, scheme) =
            (matrix(7, 40, 9), Scheme { levels: Levels::Int { bits: 3, symmetric: true }, group: Some(8) });
        let (found, _) = gptq(&values, 7, 40, Mat::<f64>::identity(40, 40).as_ref(), scheme, Scale::Absmax);
        assert_eq!(found, Grouped::round(&values, 7, 40, scheme, Scale::Absmax));
    }

    #[test]
    fn dead_inputs_and_broken_grams_are_no_panic() {
        let (values, scheme) =
            (matrix(5, 30, 3), Scheme { levels: Levels::Int { bits: 4, symmetric: true }, group: None });
        let mut dead = gram(30, 60);
        for i in 0..30 {
            (dead[(i, 4)], dead[(4, i)]) = (0.0, 0.0);
        }
        let (found, fallback) = gptq(&values, 5, 30, dead.as_ref(), scheme, Scale::Mse);
        assert!(fallback.is_none() && found.dequantize().iter().all(|v| v.is_finite()));
        // Without any measurement the result is rounding to nearest, and the note says so.
        let zeros = Mat::zeros(30, 30);
        let (found, fallback) = gptq(&values, 5, 30, zeros.as_ref(), scheme, Scale::Mse);
        assert_eq!(found, Grouped::round(&values, 5, 30, scheme, Scale::Mse));
        assert_eq!(fallback, Some(Fallback::NoGain));
        let broken = Mat::from_fn(30, 30, |i, j| if i == j { 1.0 } else { -5.0 });
        assert_eq!(gptq(&values, 5, 30, broken.as_ref(), scheme, Scale::Mse).1, Some(Fallback::NotDefinite));
    }

    #[test]
    fn the_scale_of_a_gram_changes_no_code() {
        let (rows, cols) = (6, 40);
        let (values, gram) = (matrix(rows, cols, 5), gram(cols, 90));
        let scheme = Scheme { levels: Levels::Int { bits: 3, symmetric: true }, group: Some(8) };
        let (expected, fallback) = gptq(&values, rows, cols, gram.as_ref(), scheme, Scale::Mse);
        assert_eq!(fallback, None);
        for exponent in [-900, -200, -90, 90, 900] {
            let scaled = &gram * faer::Scale(2f64.powi(exponent));
            assert_eq!(gptq(&values, rows, cols, scaled.as_ref(), scheme, Scale::Mse), (expected.clone(), None));
        }
    }

    #[derive(Deserialize)]
    struct Case {
        rows: usize,
        cols: usize,
        bits: u32,
        group: usize,
        weight: Vec<f32>,
        gram: Vec<f64>,
        scales: Vec<f32>,
        codes: Vec<u8>,
    }

    #[test]
    fn it_agrees_with_the_column_by_column_algorithm_in_numpy() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/oracles/gptq.json")).unwrap();
        assert_eq!(cases.len(), 4);
        for case in cases {
            let gram = Mat::from_fn(case.cols, case.cols, |i, j| case.gram[i * case.cols + j]);
            let scheme = Scheme { levels: Levels::Int { bits: case.bits, symmetric: true }, group: Some(case.group) };
            let (found, _) = gptq(&case.weight, case.rows, case.cols, gram.as_ref(), scheme, Scale::Absmax);
            assert_eq!(found.scales, case.scales);
            let different = found.codes.iter().zip(&case.codes).filter(|(x, y)| x != y).count();
            // The oracle runs in f64: a weight halfway between two levels may be rounded to the other one.
            assert!(different * 200 <= case.codes.len(), "{different} of {} codes differ", case.codes.len());
        }
    }
}
