//! The kernel: the best `B·A` in a metric, for every rank at once.
//!
//! Minimizes `tr(G E C Eᵀ)`, `E = T − B·A`, over `B` (m, r) and `A` (r, n). With roots `G = K Kᵀ`, `C = H Hᵀ` this is
//! the truncated SVD of `S = Kᵀ T H`, un-whitened. The smaller of two eigenproblems is solved:
//!
//! - m ≤ n: `U` = top eigenvectors of `S Sᵀ = Kᵀ T C Tᵀ K`, and `B = K⁻ᵀ U`, `A = (K U)ᵀ T`. `C` is not rooted, let
//!   alone inverted, so a singular one is not a special case.
//! - m > n: `V` = top eigenvectors of `Sᵀ S = Hᵀ Tᵀ G T H`, and `A = (H⁻ᵀ V)ᵀ`, `B = T H V`. `G`, the larger of the
//!   two, is not rooted. If `C` is too close to singular for `H⁻ᵀ`, `U = orth(S V)` and the pair is as above.
//!
//! Eigenvalues are the error curve: dropping the ranks behind r costs `Σ_{i ≥ r} λ_i`. With `G = C = I` this is
//! the truncated SVD; with the Gram of calibration inputs it has the optimum of SVD-LLM (Wang et al. 2024) and of
//! the output PCA of LoRD (Kaushal et al. 2023); with both Grams the optimum of the Kronecker-factored Fisher
//! (GFWSVD, Chekalina et al. 2025).

use faer::{Mat, MatRef};
use serde::{Deserialize, Serialize};

use super::metric::{Metric, MetricPair};
use crate::linalg::{self, LinalgError};

/// Energies `λ_i = σ_i²` of a weight in a metric, largest first: the error of every rank.
///
/// ```
/// use lrc::approx::low_rank::ErrorCurve;
///
/// let curve = ErrorCurve::new(vec![9.0, 4.0, 3.0]); // σ = 3, 2, √3
/// assert_eq!(curve.squared_error(1), 7.0);
/// assert_eq!(curve.relative_error(1), (7.0f64 / 16.0).sqrt());
/// assert_eq!(curve.squared_error(3), 0.0);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ErrorCurve {
    energies: Vec<f64>,
}

impl ErrorCurve {
    /// The curve of eigenvalues in descending order; rounding errors below zero are clamped.
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
///
/// ```
/// use lrc::approx::low_rank::LowRank;
///
/// let pair = LowRank { rank: 2, b: vec![1.0, 2.0, 3.0, 4.0], a: vec![5.0, 6.0, 7.0, 8.0] };
/// assert_eq!(pair.prefix(1), LowRank { rank: 1, b: vec![1.0, 3.0], a: vec![5.0, 6.0] });
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// r; 0 gives empty matrices.
    pub rank: usize,
    /// `B` (m, r): one row per output.
    pub b: Vec<f32>,
    /// `A` (r, n): one column per input.
    pub a: Vec<f32>,
}

impl LowRank {
    /// The first `rank` terms: the best pair of that rank in the metric of the fit.
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

    /// The same product, with the largest magnitude of every column of `B` that of its row of `A`.
    #[must_use]
    pub fn balanced(mut self) -> Self {
        let (rank, n) = (self.rank, self.a.len() / self.rank.max(1));
        for term in 0..rank {
            let row = &mut self.a[term * n..(term + 1) * n];
            let of_row = row.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            let column = || self.b.iter().skip(term).step_by(rank);
            let of_column = column().fold(0.0f32, |most, v| most.max(v.abs()));
            let factor = (of_row / of_column).sqrt();
            if factor.is_normal() {
                row.iter_mut().for_each(|v| *v /= factor);
                self.b.iter_mut().skip(term).step_by(rank).for_each(|v| *v *= factor);
            }
        }
        self
    }
}

/// Dual vectors of the best subspaces of a target, and the error of each.
#[derive(Debug, Clone)]
pub struct Decomposition {
    /// The error at every rank, beyond the kept vectors too.
    pub curve: ErrorCurve,
    /// Dual vectors of the smaller side, from which the pair of any rank follows.
    pub dual: DualVectors,
}

/// The side of a matrix that dual vectors belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Space {
    /// Outputs, m of them: `B` = `basis`, `A` = `dualᵀ T`.
    Outputs,
    /// Inputs, n of them: `Aᵀ` = `basis`, `B` = `T dual`.
    Inputs,
}

/// A basis of a subspace and its dual. Their first r columns and the target give the best pair of rank r, so they
/// are kept in place of a pair: they have `2 min(m, n)` numbers per rank, a pair has `m + n`.
#[derive(Debug, Clone)]
pub struct DualVectors {
    space: Space,
    /// (m or n, max_rank).
    basis: Mat<f64>,
    /// The same shape; `None` if the basis is orthonormal, and so its own dual.
    dual: Option<Mat<f64>>,
}

/// The error curve of `target` (m, n) alone, without vectors.
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
            let gram = metric.input.quadratic(image.as_ref());
            return Ok(Self { image, gram });
        }
        let image = match metric.input {
            Metric::Identity => target.to_owned(),
            input => input.times_root(target)?,
        };
        let gram = metric.output.quadratic(image.transpose());
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

/// Decomposes `target` (m, n); the dual vectors keep the first `max_rank` columns (at most min(m, n)).
///
/// ```
/// use faer::Mat;
/// use lrc::approx::low_rank::decompose;
/// use lrc::approx::metric::MetricPair;
///
/// let target = Mat::from_fn(3, 4, |i, j| ((i + 1) * (j + 1)) as f64); // rank one
/// let found = decompose(target.as_ref(), MetricPair::IDENTITY, 2)?;
/// assert!(found.curve.relative_error(0) == 1.0 && found.curve.relative_error(1) < 1e-7);
/// let pair = found.truncate(target.as_ref(), 1); // b (3, 1), a (1, 4)
/// assert!((pair.b[2] * pair.a[3] - 12.0).abs() < 1e-5);
/// # Ok::<(), lrc::linalg::LinalgError>(())
/// ```
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
    // Only a fallback reads the image of a tall target again.
    let image = if m > n && !metric.input.is_well_conditioned()? { Some(image) } else { None };
    let linalg::Eigh { values, vectors } = linalg::eigh(gram.as_ref())?;
    drop(gram);
    let vectors = vectors.subcols(0, max_rank);
    let dual = if m <= n {
        output_vectors(metric.output, vectors.to_owned())?
    } else if let Metric::Identity = metric.input {
        DualVectors { space: Space::Inputs, basis: vectors.to_owned(), dual: None }
    } else if let Some(image) = image {
        let images = linalg::product(image.as_ref(), vectors); // T H V (m, max_rank)
        let images = whiten_rows(images.as_ref(), metric.output)?; // S V
        let smallest = max_rank.checked_sub(1).map_or(0.0, |last| values[last]);
        let is_well_spread = smallest > ORTHOGONAL_SHARE * values[0];
        let basis = if is_well_spread { normalized_columns(images) } else { linalg::orthonormal_columns(images) };
        output_vectors(metric.output, basis)?
    } else {
        let dual = Some(metric.input.root_times(vectors)?);
        DualVectors { space: Space::Inputs, basis: metric.input.dual_root_times(vectors)?, dual }
    };
    Ok(Decomposition { curve: ErrorCurve::new(values), dual })
}

/// Un-whitens orthonormal columns `U` (m, r) of the output side.
fn output_vectors(output: &Metric, u: Mat<f64>) -> Result<DualVectors, LinalgError> {
    let space = Space::Outputs;
    Ok(match output {
        Metric::Identity => DualVectors { space, basis: u, dual: None },
        output => {
            let dual = Some(output.root_times(u.as_ref())?);
            DualVectors { space, basis: output.dual_root_times(u.as_ref())?, dual }
        }
    })
}

/// Columns of `S V` with energies `λ_i`, `λ_j` are orthogonal up to `ε λ_1 / √(λ_i λ_j)`. Below this share of the
/// largest energy the deviation exceeds the rounding of f32, and the columns are orthogonalized.
const ORTHOGONAL_SHARE: f64 = 1e-8;

fn normalized_columns(mut matrix: Mat<f64>) -> Mat<f64> {
    for column in matrix.col_iter_mut() {
        let norm = column.norm_l2();
        column.iter_mut().for_each(|v| *v /= norm);
    }
    matrix
}

impl Decomposition {
    /// See [`DualVectors::truncate`].
    ///
    /// # Panics
    /// When `rank` exceeds the kept vectors.
    pub fn truncate(&self, target: MatRef<'_, f64>, rank: usize) -> LowRank {
        self.dual.truncate(target, rank)
    }
}

impl DualVectors {
    /// The largest rank that they give.
    pub fn max_rank(&self) -> usize {
        self.basis.ncols()
    }

    /// The space, the basis and its dual in f32, column by column; no dual if the basis is orthonormal.
    pub fn to_arrays(&self) -> (Space, Vec<f32>, Vec<f32>) {
        let dual = self.dual.as_ref().map_or_else(Vec::new, |dual| linalg::to_row_major(dual.transpose()));
        (self.space, linalg::to_row_major(self.basis.transpose()), dual)
    }

    /// The first `rank` columns of what [`Self::to_arrays`] gave for a target (m, n).
    ///
    /// # Panics
    /// When the arrays have fewer columns.
    pub fn from_arrays(space: Space, (m, n): (usize, usize), rank: usize, basis: &[f32], dual: &[f32]) -> Self {
        let height = match space {
            Space::Outputs => m,
            Space::Inputs => n,
        };
        let columns = |values: &[f32]| linalg::transposed_from_row_major(&values[..rank * height], rank, height);
        Self { space, basis: columns(basis), dual: (!dual.is_empty()).then(|| columns(dual)) }
    }

    /// The best pair of `rank`, at most `max_rank`, for the target that they were made from, with the norm of each
    /// rank-one term shared evenly between its column and its row.
    ///
    /// # Panics
    /// When `rank` exceeds [`Self::max_rank`].
    pub fn truncate(&self, target: MatRef<'_, f64>, rank: usize) -> LowRank {
        let basis = self.basis.subcols(0, rank).to_owned();
        let dual = self.dual.as_ref().unwrap_or(&self.basis).subcols(0, rank);
        let (mut b, mut a_t) = match self.space {
            Space::Outputs => (basis, linalg::product(target.transpose(), dual)), // (m, r), (n, r)
            Space::Inputs => (linalg::product(target, dual), basis),
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
mod tests;
