//! The kernel: the best `B·A` in a metric, for every rank at once.
//!
//! Minimises `tr((T − B·A) C (T − B·A)ᵀ)` over `B` (m, r) and `A` (r, n). The columns of the best `B` are the top
//! eigenvectors of the output Gram `T C Tᵀ` (m, m), `A = Bᵀ T`, and the eigenvalues are the error curve: dropping
//! the ranks behind r costs `Σ_{i ≥ r} λ_i`. No inverse and no Cholesky factor, so a singular `C` is no special case.
//! When m > n, the twin problem of size n is solved: with `C = H Hᵀ`, `V` the top eigenvectors of `Hᵀ Tᵀ T H`,
//! `B = orth(T H V)`.
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

/// An orthonormal basis of the best output subspaces of a target, and the error of each.
#[derive(Debug, Clone)]
pub struct Decomposition {
    pub curve: ErrorCurve,
    /// `B` (m, max_rank), orthonormal: its first r columns are the best r.
    basis: Mat<f64>,
}

/// The error curve of `target` (m, n) alone, without bases: about a third of the work.
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
        let eigh = linalg::eigh(metric.output_gram(target).as_ref())?;
        let basis = eigh.vectors.subcols(0, max_rank).to_owned();
        return Ok(Decomposition { curve: ErrorCurve::new(eigh.values), basis });
    }
    let whitened = metric.whiten(target)?; // T H (m, n)
    let eigh = linalg::eigh(linalg::product_symmetric(whitened.transpose(), whitened.as_ref()).as_ref())?;
    let images = linalg::product(whitened.as_ref(), eigh.vectors.subcols(0, max_rank)); // T H V (m, max_rank)
    Ok(Decomposition { curve: ErrorCurve::new(eigh.values), basis: linalg::orthonormal_columns(images) })
}

impl Decomposition {
    /// The best pair of `rank`, at most `max_rank`, for the target it was made from: `B = basis[:, ..rank]`,
    /// `A = Bᵀ T`, with the norm of each rank-one term shared evenly between its column and its row.
    ///
    /// # Panics
    /// When `rank` exceeds the kept basis.
    pub fn truncate(&self, target: MatRef<'_, f64>, rank: usize) -> LowRank {
        let mut b = self.basis.subcols(0, rank).to_owned(); // (m, r)
        let mut a_t = linalg::product(target.transpose(), b.as_ref()); // Aᵀ (n, r)
        for i in 0..rank {
            // Columns of B have norm 1, so the term's norm is that of A's row.
            let scale = a_t.col(i).norm_l2().sqrt();
            if scale > 0.0 {
                b.col_mut(i).iter_mut().for_each(|v| *v *= scale);
                a_t.col_mut(i).iter_mut().for_each(|v| *v /= scale);
            }
        }
        LowRank { rank, b: linalg::to_row_major(b.as_ref()), a: linalg::to_row_major(a_t.transpose()) }
    }
}
