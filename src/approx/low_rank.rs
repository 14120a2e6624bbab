//! The kernel: the best `B·A` in a metric, for every rank at once.
//!
//! Minimizes `tr(G E C Eᵀ)`, `E = T − B·A`, over `B` (m, r) and `A` (r, n). With roots `G = K Kᵀ`, `C = H Hᵀ` this is the
//! truncated SVD of `S = Kᵀ T H`, un-whitened. The smaller of two eigenproblems is solved:
//!
//! - m ≤ n: `U` = top eigenvectors of `S Sᵀ = Kᵀ T C Tᵀ K`, and `B = K⁻ᵀ U`, `A = (K U)ᵀ T`. `C` is not rooted, let alone
//!   inverted, so a singular one is no special case.
//! - m > n: `V` = top eigenvectors of `Sᵀ S = Hᵀ Tᵀ G T H`, and `A = (H⁻ᵀ V)ᵀ`, `B = T H V`. `G`, the larger of the two, is not
//!   rooted. Where `C` is too close to singular for `H⁻ᵀ`, `U = orth(S V)` and the pair is as above.
//!
//! Eigenvalues are the error curve: dropping the ranks behind r costs `Σ_{i ≥ r} λ_i`. With `G = C = I` this is the truncated
//! SVD; with the Gram of calibration inputs it has the optimum of SVD-LLM (Wang et al. 2024) and of the output PCA of LoRD
//! (Kaushal et al. 2023); with both Grams that of the Kronecker-factored Fisher (GFWSVD, Chekalina et al. 2025).

use faer::{Mat, MatRef};

use super::metric::{Metric, MetricPair};
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

impl LowRank {
    /// The first `rank` terms: the best pair of that rank in the metric it was made in.
    ///
    /// # Panics
    /// When `rank` exceeds the pair's.
    #[must_use]
    pub fn prefix(&self, rank: usize) -> Self {
        assert!(rank <= self.rank, "invariant: a prefix is no longer than the whole");
        let b = if rank == 0 {
            Vec::new()
        } else {
            self.b.chunks_exact(self.rank).flat_map(|row| &row[..rank]).copied().collect()
        };
        let n = self.a.len() / self.rank.max(1);
        Self { rank, b, a: self.a[..rank * n].to_vec() }
    }
}

/// Bases of the best subspaces of a target, and the error of each.
#[derive(Debug, Clone)]
pub struct Decomposition {
    pub curve: ErrorCurve,
    basis: Basis,
}

/// Two bases, dual to each other, of which the first r columns belong to the best pair of rank r.
#[derive(Debug, Clone)]
enum Basis {
    /// Of the outputs, (m, max_rank): `B` = `basis`, `A` = `dualᵀ T`. No dual: the basis is orthonormal.
    Output { basis: Mat<f64>, dual: Option<Mat<f64>> },
    /// Of the inputs, (n, max_rank): `Aᵀ` = `basis`, `B` = `T dual`. No dual: the basis is orthonormal.
    Input { basis: Mat<f64>, dual: Option<Mat<f64>> },
}

/// The error curve of `target` (m, n) alone, without bases.
///
/// # Errors
/// See [`LinalgError`].
pub fn error_curve(target: MatRef<'_, f64>, metric: MetricPair<'_>) -> Result<ErrorCurve, LinalgError> {
    Ok(ErrorCurve::new(linalg::eigenvalues(Whitened::new(target, metric)?.gram.as_ref())?))
}

/// A target in its metric, ready for the smaller eigenproblem.
struct Whitened {
    /// `Kᵀ T` (m, n) for m ≤ n, else `T H`.
    image: Mat<f64>,
    /// `S Sᵀ` (m, m) for m ≤ n, else `Sᵀ S` (n, n).
    gram: Mat<f64>,
}

impl Whitened {
    fn new(target: MatRef<'_, f64>, metric: MetricPair<'_>) -> Result<Self, LinalgError> {
        // The smaller side is rooted, the larger only multiplied with.
        if target.nrows() <= target.ncols() {
            let image = whiten_rows(target, metric.output)?;
            let gram = match metric.input {
                Metric::Identity => linalg::product_symmetric(image.as_ref(), image.transpose()),
                input => linalg::product_symmetric(input.times(image.as_ref()).as_ref(), image.transpose()),
            };
            return Ok(Self { image, gram });
        }
        let image = match metric.input {
            Metric::Identity => target.to_owned(),
            input => input.times_root(target)?,
        };
        let gram = match metric.output {
            Metric::Identity => linalg::product_symmetric(image.transpose(), image.as_ref()),
            output => linalg::product_symmetric(output.times(image.transpose()).as_ref(), image.as_ref()),
        };
        Ok(Self { image, gram })
    }
}

/// `Kᵀ X` of `x` (m, n), where `output = K Kᵀ`.
fn whiten_rows(x: MatRef<'_, f64>, output: &Metric) -> Result<Mat<f64>, LinalgError> {
    Ok(match output {
        Metric::Identity => x.to_owned(),
        output => output.times_root(x.transpose())?.transpose().to_owned(),
    })
}

/// Decomposes `target` (m, n); the bases keep the first `max_rank` columns (at most min(m, n)).
///
/// # Errors
/// See [`LinalgError`].
pub fn decompose(
    target: MatRef<'_, f64>,
    metric: MetricPair<'_>,
    max_rank: usize,
) -> Result<Decomposition, LinalgError> {
    let (m, n) = (target.nrows(), target.ncols());
    let max_rank = max_rank.min(m).min(n);
    let Whitened { image, gram } = Whitened::new(target, metric)?;
    let linalg::Eigh { values, vectors } = linalg::eigh(gram.as_ref())?;
    drop(gram);
    let vectors = vectors.subcols(0, max_rank);
    let basis = if m <= n {
        output_basis(metric.output, vectors.to_owned())?
    } else if let Metric::Identity = metric.input {
        Basis::Input { basis: vectors.to_owned(), dual: None }
    } else if metric.input.is_well_conditioned()? {
        let dual = Some(metric.input.root_times(vectors)?);
        Basis::Input { basis: metric.input.dual_root_times(vectors)?, dual }
    } else {
        let images = linalg::product(image.as_ref(), vectors); // T H V (m, max_rank)
        let images = whiten_rows(images.as_ref(), metric.output)?; // S V
        let smallest = max_rank.checked_sub(1).map_or(0.0, |last| values[last]);
        let is_well_spread = smallest > ORTHOGONAL_SHARE * values[0];
        let basis = if is_well_spread { normalized_columns(images) } else { linalg::orthonormal_columns(images) };
        output_basis(metric.output, basis)?
    };
    Ok(Decomposition { curve: ErrorCurve::new(values), basis })
}

/// Un-whitens orthonormal columns `U` (m, r) of the output side.
fn output_basis(output: &Metric, u: Mat<f64>) -> Result<Basis, LinalgError> {
    Ok(match output {
        Metric::Identity => Basis::Output { basis: u, dual: None },
        output => {
            let dual = Some(output.root_times(u.as_ref())?);
            Basis::Output { basis: output.dual_root_times(u.as_ref())?, dual }
        }
    })
}

/// Columns of `S V` with energies `λ_i`, `λ_j` are orthogonal up to `ε λ_1 / √(λ_i λ_j)`: under this share of the largest
/// energy that is no longer below the rounding of f32, and the columns are orthogonalised.
const ORTHOGONAL_SHARE: f64 = 1e-8;

fn normalized_columns(mut matrix: Mat<f64>) -> Mat<f64> {
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
        let columns = |matrix: &Mat<f64>| matrix.subcols(0, rank).to_owned();
        let (mut b, mut a_t) = match &self.basis {
            Basis::Output { basis, dual } => {
                let dual = dual.as_ref().unwrap_or(basis).subcols(0, rank);
                (columns(basis), linalg::product(target.transpose(), dual)) // (m, r), (n, r)
            }
            Basis::Input { basis, dual } => {
                let dual = dual.as_ref().unwrap_or(basis).subcols(0, rank);
                (linalg::product(target, dual), columns(basis))
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

    /// A form of every kind from the rows of `samples`.
    fn form(kind: &str, samples: &Mat<f64>, damping: f64) -> Metric {
        match kind {
            "identity" => Metric::Identity,
            "diagonal" => Metric::diagonal((0..samples.ncols()).map(|i| gram(samples)[(i, i)]).collect()),
            _ => Metric::damped(gram(samples), damping),
        }
    }

    const KINDS: [&str; 3] = ["identity", "diagonal", "full"];

    #[derive(Deserialize)]
    struct Case {
        m: usize,
        n: usize,
        weight: Vec<f64>,
        inputs: Vec<f64>,
        gradients: Vec<f64>,
        metrics: Vec<Expected>,
    }

    #[derive(Deserialize)]
    struct Expected {
        output: String,
        input: String,
        singular_values: Vec<f64>,
        products: Vec<Vec<f64>>,
    }

    #[test]
    fn agrees_with_cholesky_whitening_in_numpy() {
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/oracles/low_rank.json")).unwrap();
        assert_eq!(cases.iter().map(|c| c.metrics.len()).sum::<usize>(), 3 * 9);
        for case in cases {
            let (m, n) = (case.m, case.n);
            let weight = matrix(&case.weight, m, n);
            let (inputs, gradients) = (matrix(&case.inputs, 40, n), matrix(&case.gradients, 40, m));
            for expected in &case.metrics {
                let (output, input) = (form(&expected.output, &gradients, 0.0), form(&expected.input, &inputs, 0.0));
                let metric = MetricPair { output: &output, input: &input };
                let name = format!("{} {} {m} x {n}", expected.output, expected.input);
                let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
                let first = expected.singular_values[0];
                for (found, expected) in decomposition.curve.singular_values().zip(&expected.singular_values) {
                    // Squares of singular values are exact to 1e-16 of the largest.
                    assert!((found - expected).abs() < 1e-7 * first, "{name}: {found} {expected}");
                }
                let alone = error_curve(weight.as_ref(), metric).unwrap();
                for rank in 1..=m.min(n) {
                    let best = matrix(&expected.products[rank - 1], m, n);
                    let found = product(&decomposition.truncate(weight.as_ref(), rank), m, n);
                    assert!((&found - &best).norm_max() < 2e-5 * weight.norm_max(), "{name} rank {rank}");
                    assert!((alone.relative_error(rank) - decomposition.curve.relative_error(rank)).abs() < 1e-7);
                }
            }
        }
    }

    /// A weight, inputs and gradients of any rank, and a rank to cut at.
    fn problem() -> impl Strategy<Value = (Mat<f64>, Mat<f64>, Mat<f64>, usize)> {
        (1usize..14, 1usize..14, 1usize..20).prop_flat_map(|(m, n, n_tokens)| {
            let values = |len| proptest::collection::vec(-3.0f64..3.0, len);
            (values(m * n), values(n_tokens * n), values(n_tokens * m), 0..=m.min(n)).prop_map(
                move |(w, x, g, rank)| (matrix(&w, m, n), matrix(&x, n_tokens, n), matrix(&g, n_tokens, m), rank),
            )
        })
    }

    /// Runs `check` in every one of the nine metrics. Input Grams may be singular, output Grams are damped.
    fn in_every_metric(
        inputs: &Mat<f64>,
        gradients: &Mat<f64>,
        mut check: impl FnMut(MetricPair<'_>, &str) -> Result<(), TestCaseError>,
    ) -> Result<(), TestCaseError> {
        for output_kind in KINDS {
            for input_kind in KINDS {
                let (output, input) = (form(output_kind, gradients, 0.01), form(input_kind, inputs, 0.0));
                check(MetricPair { output: &output, input: &input }, &format!("{output_kind} {input_kind}"))?;
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn the_curve_is_the_measured_error((weight, inputs, gradients, rank) in problem()) {
            let (m, n) = (weight.nrows(), weight.ncols());
            in_every_metric(&inputs, &gradients, |metric, name| {
                let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
                let error = &weight - product(&decomposition.truncate(weight.as_ref(), rank), m, n);
                let measured = metric.squared_norm(error.as_ref());
                let total = decomposition.curve.squared_error(0);
                prop_assert!((total - metric.squared_norm(weight.as_ref())).abs() <= 1e-8 * total + 1e-12, "{}", name);
                prop_assert!((measured - decomposition.curve.squared_error(rank)).abs() <= 1e-6 * total + 1e-9,
                    "{name}: measured {measured}, curve {}, total {total}", decomposition.curve.squared_error(rank));
                Ok(())
            })?;
        }

        #[test]
        fn full_rank_reproduces_the_weight_even_in_a_singular_metric((weight, inputs, gradients, _) in problem()) {
            let (m, n) = (weight.nrows(), weight.ncols());
            in_every_metric(&inputs, &gradients, |metric, name| {
                let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
                let rebuilt = product(&decomposition.truncate(weight.as_ref(), m.min(n)), m, n);
                prop_assert!((&rebuilt - &weight).norm_max() <= 1e-5 * weight.norm_max().max(1.0), "{}", name);
                Ok(())
            })?;
        }

        #[test]
        fn no_method_beats_another_in_the_others_metric((weight, inputs, gradients, rank) in problem()) {
            let (m, n) = (weight.nrows(), weight.ncols());
            let mut errors = Vec::new();
            in_every_metric(&inputs, &gradients, |metric, _| {
                let pair = decompose(weight.as_ref(), metric, rank).unwrap().truncate(weight.as_ref(), rank);
                errors.push(&weight - product(&pair, m, n));
                Ok(())
            })?;
            let mut own = 0;
            in_every_metric(&inputs, &gradients, |metric, name| {
                let slack = 1e-6 * metric.squared_norm(weight.as_ref()) + 1e-9;
                let best = metric.squared_norm(errors[own].as_ref());
                for other in &errors {
                    prop_assert!(best <= metric.squared_norm(other.as_ref()) + slack, "{}", name);
                }
                own += 1;
                Ok(())
            })?;
        }

        #[test]
        fn error_falls_with_rank_and_norms_are_balanced((weight, inputs, gradients, rank) in problem()) {
            in_every_metric(&inputs, &gradients, |metric, _| {
                let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
                let full = weight.nrows().min(weight.ncols());
                let errors: Vec<f64> = (0..=full).map(|r| decomposition.curve.squared_error(r)).collect();
                prop_assert!(errors.windows(2).all(|e| e[0] >= e[1]));
                let pair = decomposition.truncate(weight.as_ref(), rank);
                for i in 0..rank {
                    let column: f32 = pair.b.iter().skip(i).step_by(rank).map(|v| v * v).sum();
                    let row: f32 = pair.a[i * weight.ncols()..][..weight.ncols()].iter().map(|v| v * v).sum();
                    prop_assert!(row < 1e-6 || (column / row - 1.0).abs() < 1e-3, "{column} {row}");
                }
                Ok(())
            })?;
        }

        #[test]
        fn shorter_truncations_are_prefixes_of_longer_ones((weight, inputs, gradients, rank) in problem()) {
            in_every_metric(&inputs, &gradients, |metric, _| {
                let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
                let full = decomposition.truncate(weight.as_ref(), weight.nrows().min(weight.ncols()));
                let (short, prefix) = (decomposition.truncate(weight.as_ref(), rank), full.prefix(rank));
                let close = |x: &[f32], y: &[f32]| x.iter().zip(y).all(|(s, l)| (s - l).abs() <= 1e-6 * l.abs().max(1.0));
                prop_assert!(short.rank == prefix.rank && close(&short.a, &prefix.a) && close(&short.b, &prefix.b));
                Ok(())
            })?;
        }

        /// kfac with G = I is svd-llm, with both plain it is svd.
        #[test]
        fn the_general_metric_contains_the_simple_ones((weight, inputs, _, rank) in problem()) {
            let (m, n) = (weight.nrows(), weight.ncols());
            let eye = |n: usize| Metric::full(Mat::identity(n, n));
            let input = form("full", &inputs, 0.0);
            let cases = [
                (MetricPair { output: &eye(m), input: &input }, MetricPair { output: &Metric::Identity, input: &input }),
                (MetricPair { output: &eye(m), input: &eye(n) }, MetricPair::IDENTITY),
            ];
            for (general, simple) in cases {
                let curve = |metric| decompose(weight.as_ref(), metric, rank).unwrap();
                let (general, simple) = (curve(general), curve(simple));
                let total = simple.curve.squared_error(0);
                for (g, s) in general.curve.energies().iter().zip(simple.curve.energies()) {
                    prop_assert!((g - s).abs() <= 1e-9 * total);
                }
                // Equal energies on both sides of the cut leave the subspace free; the error is the same.
                let error = |d: &Decomposition| {
                    let error = &weight - product(&d.truncate(weight.as_ref(), rank), m, n);
                    MetricPair { output: &Metric::Identity, input: &input }.squared_norm(error.as_ref())
                };
                if rank == 0 || rank == m.min(n) || simple.curve.energies()[rank - 1] - simple.curve.energies()[rank] > 1e-3 * total {
                    prop_assert!((error(&general) - error(&simple)).abs() <= 1e-6 * (total + 1.0));
                }
            }
        }
    }

    #[test]
    fn a_weight_of_zeros_stays_zero() {
        let weight = Mat::zeros(4, 6);
        let decomposition = decompose(weight.as_ref(), MetricPair::IDENTITY, 3).unwrap();
        let pair = decomposition.truncate(weight.as_ref(), 3);
        assert!(product(&pair, 4, 6).norm_max() == 0.0 && pair.b.iter().all(|v| v.is_finite()));
        assert_eq!(decomposition.curve.relative_error(1), 0.0);
    }
}
