//! The metric in which the error of an approximation is measured, on the input side.
//!
//! With inputs `x` of mean second moment `C = Σ x xᵀ / n_tokens`, the mean squared error of a linear's output is
//! `tr((W − B·A) C (W − B·A)ᵀ)`. Plain SVD is `C = I`.

use std::sync::OnceLock;

use faer::{Mat, MatRef};

use crate::linalg::{self, LinalgError};

/// A symmetric positive semidefinite form on the input space (n).
#[derive(Debug)]
pub enum Metric {
    /// `C = I`: the Frobenius norm.
    Identity,
    /// `C` as given.
    Full(FullMetric),
}

/// A Gram matrix and its root, which is computed once, when the first linear asks.
#[derive(Debug)]
pub struct FullMetric {
    gram: Mat<f64>,
    root: OnceLock<Result<Mat<f64>, LinalgError>>,
}

/// Eigenvalues under this share of the largest are raised to it, so that directions which calibration never
/// excited still have an order (that of the weight), at a cost of 1e-12 of the error.
const ROOT_FLOOR: f64 = 1e-12;

impl Metric {
    /// From a symmetric `gram` (n, n).
    pub fn full(gram: Mat<f64>) -> Self {
        Self::Full(FullMetric { gram, root: OnceLock::new() })
    }

    /// `T C`, (m, n).
    pub(super) fn apply(&self, target: MatRef<'_, f64>) -> Mat<f64> {
        match self {
            Self::Identity => target.to_owned(),
            Self::Full(full) => linalg::product(target, full.gram.as_ref()),
        }
    }

    /// `T C Tᵀ`, (m, m): the second moment of the outputs.
    pub(super) fn output_gram(&self, target: MatRef<'_, f64>) -> Mat<f64> {
        match self {
            Self::Identity => linalg::product_symmetric(target, target.transpose()),
            Self::Full(_) => linalg::product_symmetric(self.apply(target).as_ref(), target.transpose()),
        }
    }

    /// `T H` (m, n), where `C = H Hᵀ`.
    pub(super) fn whiten(&self, target: MatRef<'_, f64>) -> Result<Mat<f64>, LinalgError> {
        match self {
            Self::Identity => Ok(target.to_owned()),
            Self::Full(full) => Ok(linalg::product(target, full.root()?)),
        }
    }

    /// `tr(E C Eᵀ)` of an error `E` (m, n): what [`super::low_rank::ErrorCurve`] foretells.
    pub fn squared_norm(&self, error: MatRef<'_, f64>) -> f64 {
        let weighted = self.apply(error);
        error
            .col_iter()
            .zip(weighted.col_iter())
            .map(|(e, w)| e.iter().zip(w.iter()).map(|(e, w)| e * w).sum::<f64>())
            .sum()
    }
}

impl FullMetric {
    /// `H = Q √Λ` of `C = Q Λ Qᵀ`.
    fn root(&self) -> Result<MatRef<'_, f64>, LinalgError> {
        let root = self.root.get_or_init(|| {
            let linalg::Eigh { values, mut vectors } = linalg::eigh(self.gram.as_ref())?;
            let floor = values.first().copied().unwrap_or(0.0).max(0.0) * ROOT_FLOOR;
            for (column, value) in vectors.col_iter_mut().zip(&values) {
                let scale = value.max(floor).sqrt();
                column.iter_mut().for_each(|v| *v *= scale);
            }
            Ok(vectors)
        });
        root.as_ref().map(Mat::as_ref).map_err(|e| *e)
    }
}
