//! The kernel: the best `B·A` in a metric, for every rank at once.
//!
//! Minimises `tr((T − B·A) C (T − B·A)ᵀ)` over `B` (m, r) and `A` (r, n). The columns of the best `B` are the top
//! eigenvectors of the output Gram `T C Tᵀ` (m, m), `A = Bᵀ T`, and the eigenvalues are the error curve: dropping
//! the ranks behind r costs `Σ_{i ≥ r} λ_i`. No inverse and no Cholesky factor, so a singular `C` is no special case.
//! When m > n, the twin problem of size n is solved: with `C = H Hᵀ`, `V` the top eigenvectors of `Hᵀ Tᵀ T H`,
//! `B = orth(T H V)`; in the plain metric `A = Vᵀ` and `B = T V` are the same pair without the orthogonalisation.
//!
//! With `C = I` this is the truncated SVD; with the Gram of calibration inputs it has the optimum of SVD-LLM (Wang et
//! al. 2024) and of the output PCA of LoRD (Kaushal et al. 2023), without a whitening matrix to invert.

use faer::{Mat, MatRef};

use super::metric::Metric;
use crate::linalg::{self, LinalgError};

/// Energies `λ_i = σ_i²` of a weight in a metric, largest first: the error of every rank.
#[derive(Debug, Clone, PartialEq)]
pub struct ErrorCurve {
    energies: Vec<f64>,
}

impl ErrorCurve {
    /// Of eigenvalues in descending order; rounding errors below zero are clamped.
    pub fn new(eigenvalues: Vec<f64>) -> Self {
        Self { energies: eigenvalues.into_iter().map(|v| v.max(0.0)).collect() }
    }

    /// `σ_i²`, (min(m, n)), descending.
    pub fn energies(&self) -> &[f64] {
        &self.energies
    }

    /// `σ_i`, descending.
    pub fn singular_values(&self) -> impl Iterator<Item = f64> + '_ {
        self.energies.iter().map(|e| e.sqrt())
    }

    /// Squared error of the best approximation of `rank`: `Σ_{i ≥ rank} σ_i²`.
    pub fn squared_error(&self, rank: usize) -> f64 {
        // From the smallest up: the small ones are not lost beside a large sum.
        self.energies.iter().skip(rank).rev().sum()
    }

    /// Error relative to the norm of the weight, `√(Σ_{i ≥ rank} σ_i² / Σ σ_i²)`; 0 for a weight of zeros.
    pub fn relative_error(&self, rank: usize) -> f64 {
        let total = self.squared_error(0);
        if total > 0.0 { (self.squared_error(rank) / total).sqrt() } else { 0.0 }
    }
}

/// A pair `B` (m, r), `A` (r, n) in row-major order, columns in order of significance, norms balanced.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    pub rank: usize,
    pub b: Vec<f32>,
    pub a: Vec<f32>,
}

/// Orthonormal bases of the best subspaces of a target, and the error of each.
#[derive(Debug, Clone)]
pub struct Decomposition {
    pub curve: ErrorCurve,
    basis: Basis,
}

/// Orthonormal columns, of which the first r span the best subspace of dimension r.
#[derive(Debug, Clone)]
enum Basis {
    /// `B` (m, max_rank) of the outputs; `A = Bᵀ T`.
    Output(Mat<f64>),
    /// `Aᵀ` (n, max_rank) of the inputs; `B = T Aᵀ`.
    Input(Mat<f64>),
}

/// The error curve of `target` (m, n) alone, without bases.
///
/// # Errors
/// See [`LinalgError`].
pub fn error_curve(target: MatRef<'_, f64>, metric: &Metric) -> Result<ErrorCurve, LinalgError> {
    let gram = if target.nrows() <= target.ncols() {
        metric.output_gram(target)
    } else {
        let whitened = metric.whiten(target)?;
        linalg::product_symmetric(whitened.transpose(), whitened.as_ref())
    };
    Ok(ErrorCurve::new(linalg::eigenvalues(gram.as_ref())?))
}

/// Decomposes `target` (m, n); the basis keeps the first `max_rank` columns (at most min(m, n)).
///
/// # Errors
/// See [`LinalgError`].
pub fn decompose(target: MatRef<'_, f64>, metric: &Metric, max_rank: usize) -> Result<Decomposition, LinalgError> {
    let (m, n) = (target.nrows(), target.ncols());
    let max_rank = max_rank.min(m).min(n);
    if m <= n {
        let linalg::Eigh { values, vectors } = linalg::eigh(metric.output_gram(target).as_ref())?;
        let basis = Basis::Output(vectors.subcols(0, max_rank).to_owned());
        return Ok(Decomposition { curve: ErrorCurve::new(values), basis });
    }
    let whitened = metric.whiten(target)?; // T H (m, n)
    let gram = linalg::product_symmetric(whitened.transpose(), whitened.as_ref()); // (n, n)
    let linalg::Eigh { values, vectors } = linalg::eigh(gram.as_ref())?;
    let vectors = vectors.subcols(0, max_rank);
    let basis = match metric {
        Metric::Identity => Basis::Input(vectors.to_owned()),
        Metric::Full(_) => {
            let images = linalg::product(whitened.as_ref(), vectors); // T H V (m, max_rank)
            let smallest = max_rank.checked_sub(1).map_or(0.0, |last| values[last]);
            let is_well_spread = smallest > ORTHOGONAL_SHARE * values[0];
            let basis = if is_well_spread { normalised_columns(images) } else { linalg::orthonormal_columns(images) };
            Basis::Output(basis)
        }
    };
    Ok(Decomposition { curve: ErrorCurve::new(values), basis })
}

/// Columns of `T H V` with energies `λ_i`, `λ_j` are orthogonal up to `ε λ_1 / √(λ_i λ_j)`: under this share of the largest
/// energy that is no longer below the rounding of f32, and the columns are orthogonalised.
const ORTHOGONAL_SHARE: f64 = 1e-8;

fn normalised_columns(mut matrix: Mat<f64>) -> Mat<f64> {
    for column in matrix.col_iter_mut() {
        let norm = column.norm_l2();
        column.iter_mut().for_each(|v| *v /= norm);
    }
    matrix
}

impl Decomposition {
    /// The best pair of `rank`, at most `max_rank`, for the target it was made from, with the norm of each rank-one
    /// term shared evenly between its column and its row.
    ///
    /// # Panics
    /// When `rank` exceeds the kept basis.
    pub fn truncate(&self, target: MatRef<'_, f64>, rank: usize) -> LowRank {
        let (mut b, mut a_t) = match &self.basis {
            Basis::Output(basis) => {
                let b = basis.subcols(0, rank).to_owned(); // (m, r)
                let a_t = linalg::product(target.transpose(), b.as_ref()); // (n, r)
                (b, a_t)
            }
            Basis::Input(basis) => {
                let a_t = basis.subcols(0, rank).to_owned(); // (n, r)
                let b = linalg::product(target, a_t.as_ref()); // (m, r)
                (b, a_t)
            }
        };
        for (column, row) in b.col_iter_mut().zip(a_t.col_iter_mut()) {
            let (column_norm, row_norm) = (column.norm_l2(), row.norm_l2());
            if column_norm > 0.0 && row_norm > 0.0 {
                let scale = (row_norm / column_norm).sqrt();
                column.iter_mut().for_each(|v| *v *= scale);
                row.iter_mut().for_each(|v| *v /= scale);
            }
        }
        LowRank { rank, b: linalg::to_row_major(b.as_ref()), a: linalg::to_row_major(a_t.transpose()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    fn matrix(values: &[f64], m: usize, n: usize) -> Mat<f64> {
        Mat::from_fn(m, n, |i, j| values[i * n + j])
    }

    fn gram(inputs: &Mat<f64>) -> Mat<f64> {
        inputs.transpose() * inputs * faer::Scale(1.0 / inputs.nrows() as f64)
    }

    fn product(pair: &LowRank, m: usize, n: usize) -> Mat<f64> {
        let wide = |values: &[f32], m, n| matrix(&values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), m, n);
        wide(&pair.b, m, pair.rank) * wide(&pair.a, pair.rank, n)
    }

    #[derive(Deserialize)]
    struct Case {
        m: usize,
        n: usize,
        weight: Vec<f64>,
        inputs: Vec<f64>,
        metrics: std::collections::BTreeMap<String, Expected>,
    }

    #[derive(Deserialize)]
    struct Expected {
        singular_values: Vec<f64>,
        products: Vec<Vec<f64>>,
    }

    #[test]
    fn agrees_with_cholesky_whitening_in_numpy() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/oracles/low_rank.json")).unwrap();
        assert_eq!(cases.len(), 3);
        for case in cases {
            let (m, n) = (case.m, case.n);
            let weight = matrix(&case.weight, m, n);
            let inputs = matrix(&case.inputs, case.inputs.len() / n, n);
            for (name, expected) in &case.metrics {
                let metric = if name == "gram" { Metric::full(gram(&inputs)) } else { Metric::Identity };
                let decomposition = decompose(weight.as_ref(), &metric, usize::MAX).unwrap();
                let first = expected.singular_values[0];
                for (found, expected) in decomposition.curve.singular_values().zip(&expected.singular_values) {
                    // Squares of singular values are exact to 1e-16 of the largest.
                    assert!((found - expected).abs() < 1e-7 * first, "{name}: {found} {expected}");
                }
                let alone = error_curve(weight.as_ref(), &metric).unwrap();
                for rank in 1..=m.min(n) {
                    let best = matrix(&expected.products[rank - 1], m, n);
                    let found = product(&decomposition.truncate(weight.as_ref(), rank), m, n);
                    assert!((&found - &best).norm_max() < 2e-5 * weight.norm_max(), "{name} {m} {n} rank {rank}");
                    assert!((alone.relative_error(rank) - decomposition.curve.relative_error(rank)).abs() < 1e-7);
                }
            }
        }
    }

    /// A weight, inputs of any rank, and a rank to cut at.
    fn problem() -> impl Strategy<Value = (Mat<f64>, Mat<f64>, usize)> {
        (1usize..14, 1usize..14, 1usize..20).prop_flat_map(|(m, n, n_tokens)| {
            let values = |len| proptest::collection::vec(-3.0f64..3.0, len);
            (values(m * n), values(n_tokens * n), 0..=m.min(n))
                .prop_map(move |(w, x, rank)| (matrix(&w, m, n), matrix(&x, n_tokens, n), rank))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn the_curve_is_the_measured_error((weight, inputs, rank) in problem()) {
            let (m, n) = (weight.nrows(), weight.ncols());
            for metric in [Metric::Identity, Metric::full(gram(&inputs))] {
                let decomposition = decompose(weight.as_ref(), &metric, usize::MAX).unwrap();
                let error = &weight - product(&decomposition.truncate(weight.as_ref(), rank), m, n);
                let measured = metric.squared_norm(error.as_ref());
                let total = decomposition.curve.squared_error(0);
                prop_assert!((total - metric.squared_norm(weight.as_ref())).abs() <= 1e-9 * total + 1e-12);
                prop_assert!((measured - decomposition.curve.squared_error(rank)).abs() <= 1e-6 * total + 1e-9,
                    "measured {measured}, curve {}, total {total}", decomposition.curve.squared_error(rank));
            }
        }

        #[test]
        fn full_rank_reproduces_the_weight_even_in_a_singular_metric((weight, inputs, _) in problem()) {
            let (m, n) = (weight.nrows(), weight.ncols());
            for metric in [Metric::Identity, Metric::full(gram(&inputs))] {
                let decomposition = decompose(weight.as_ref(), &metric, usize::MAX).unwrap();
                let rebuilt = product(&decomposition.truncate(weight.as_ref(), m.min(n)), m, n);
                prop_assert!((&rebuilt - &weight).norm_max() <= 1e-5 * weight.norm_max().max(1.0));
            }
        }

        #[test]
        fn no_method_beats_another_in_the_others_metric((weight, inputs, rank) in problem()) {
            let (m, n) = (weight.nrows(), weight.ncols());
            let metrics = [Metric::Identity, Metric::full(gram(&inputs))];
            let cut = |metric: &Metric| {
                let pair = decompose(weight.as_ref(), metric, rank).unwrap().truncate(weight.as_ref(), rank);
                &weight - product(&pair, m, n)
            };
            let errors = [cut(&metrics[0]), cut(&metrics[1])];
            for (i, metric) in metrics.iter().enumerate() {
                let (own, other) = (metric.squared_norm(errors[i].as_ref()), metric.squared_norm(errors[1 - i].as_ref()));
                prop_assert!(own <= other + 1e-6 * metric.squared_norm(weight.as_ref()) + 1e-9);
            }
        }

        #[test]
        fn error_falls_with_rank_and_norms_are_balanced((weight, inputs, rank) in problem()) {
            let decomposition = decompose(weight.as_ref(), &Metric::full(gram(&inputs)), usize::MAX).unwrap();
            let errors: Vec<f64> = (0..=weight.nrows().min(weight.ncols())).map(|r| decomposition.curve.squared_error(r)).collect();
            prop_assert!(errors.windows(2).all(|e| e[0] >= e[1]));
            let pair = decomposition.truncate(weight.as_ref(), rank);
            for i in 0..rank {
                let column: f32 = pair.b.iter().skip(i).step_by(rank).map(|v| v * v).sum();
                let row: f32 = pair.a[i * weight.ncols()..][..weight.ncols()].iter().map(|v| v * v).sum();
                prop_assert!(row < 1e-6 || (column / row - 1.0).abs() < 1e-3, "{column} {row}");
            }
        }

        #[test]
        fn shorter_truncations_are_prefixes_of_longer_ones((weight, inputs, rank) in problem()) {
            let n = weight.ncols();
            let decomposition = decompose(weight.as_ref(), &Metric::full(gram(&inputs)), usize::MAX).unwrap();
            let (short, long) = (decomposition.truncate(weight.as_ref(), rank), decomposition.truncate(weight.as_ref(), weight.nrows().min(n)));
            prop_assert!(short.a.iter().zip(&long.a).all(|(s, l)| (s - l).abs() <= 1e-6 * l.abs().max(1.0)));
        }
    }

    #[test]
    fn a_weight_of_zeros_stays_zero() {
        let weight = Mat::zeros(4, 6);
        let decomposition = decompose(weight.as_ref(), &Metric::Identity, 3).unwrap();
        let pair = decomposition.truncate(weight.as_ref(), 3);
        assert!(product(&pair, 4, 6).norm_max() == 0.0 && pair.b.iter().all(|v| v.is_finite()));
        assert_eq!(decomposition.curve.relative_error(1), 0.0);
    }
}
