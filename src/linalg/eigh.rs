//! Symmetric eigenproblems in f64. A Gram squares the condition number of its matrix, so its eigenvalues span more
//! than an f32 mantissa.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{Mat, MatRef, Par};

use super::LinalgError;

/// `A = U diag(values) Uᵀ`, largest eigenvalue first.
#[derive(Debug, Clone)]
pub struct Eigh {
    /// (n), descending.
    pub values: Vec<f64>,
    /// (n, n); column i belongs to `values[i]`.
    pub vectors: Mat<f64>,
}

/// Eigenvalues and eigenvectors of a symmetric matrix (n, n), of which the lower triangle is read.
///
/// # Errors
/// The matrix holds NaN or infinity, or the iteration did not converge.
pub fn eigh(matrix: MatRef<'_, f64>) -> Result<Eigh, LinalgError> {
    let n = matrix.nrows();
    let mut vectors = Mat::zeros(n, n);
    let values = decompose(matrix, Some(&mut vectors))?;
    // faer sorts ascending.
    Ok(Eigh { values, vectors: vectors.reverse_cols().to_owned() })
}

/// Eigenvalues of a symmetric matrix (n, n), largest first, cheaper than [`eigh`].
///
/// # Errors
/// As [`eigh`].
pub fn eigenvalues(matrix: MatRef<'_, f64>) -> Result<Vec<f64>, LinalgError> {
    decompose(matrix, None)
}

fn decompose(matrix: MatRef<'_, f64>, vectors: Option<&mut Mat<f64>>) -> Result<Vec<f64>, LinalgError> {
    let n = matrix.nrows();
    assert_eq!(n, matrix.ncols(), "invariant: an eigenproblem is square");
    if matrix.col_iter().any(|column| column.iter().any(|v| !v.is_finite())) {
        return Err(LinalgError::NonFinite { n });
    }
    let compute = if vectors.is_some() { ComputeEigenvectors::Yes } else { ComputeEigenvectors::No };
    let mut values = Diag::<f64>::zeros(n);
    let scratch = self_adjoint_evd_scratch::<f64>(n, compute, Par::Seq, Default::default());
    self_adjoint_evd(
        matrix,
        values.as_mut(),
        vectors.map(|v| v.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| LinalgError::NotConverged { n })?;
    let mut values: Vec<f64> = values.column_vector().iter().copied().collect();
    values.reverse();
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_made_matrix_has_its_eigenvalues() {
        // Closed form: [[2, 1], [1, 2]] has 3 and 1.
        let matrix = Mat::from_fn(2, 2, |i, j| if i == j { 2.0 } else { 1.0 });
        let Eigh { values, vectors } = eigh(matrix.as_ref()).unwrap();
        assert!((values[0] - 3.0).abs() < 1e-14 && (values[1] - 1.0).abs() < 1e-14);
        assert!((vectors[(0, 0)] - vectors[(1, 0)]).abs() < 1e-14);
        assert_eq!(eigenvalues(matrix.as_ref()).unwrap().len(), 2);
    }

    #[test]
    fn the_second_difference_matrix_has_its_closed_form_spectrum() {
        // tridiag(-1, 2, -1) has eigenvalues 2 - 2 cos(k π / (n + 1)).
        let n = 200;
        let matrix = Mat::from_fn(n, n, |i, j| match i.abs_diff(j) {
            0 => 2.0,
            1 => -1.0,
            _ => 0.0,
        });
        let Eigh { values, vectors } = eigh(matrix.as_ref()).unwrap();
        for (i, value) in values.iter().enumerate() {
            let k = (n - i) as f64;
            let expected = 2.0 - 2.0 * (k * std::f64::consts::PI / (n + 1) as f64).cos();
            assert!((value - expected).abs() < 1e-12, "{i}: {value} {expected}");
        }
        let rebuilt =
            Mat::from_fn(n, n, |i, j| (0..n).map(|k| vectors[(i, k)] * values[k] * vectors[(j, k)]).sum::<f64>());
        assert!((&rebuilt - &matrix).norm_max() < 1e-12);
    }

    #[test]
    fn nan_is_an_error() {
        let matrix = Mat::from_fn(3, 3, |_, _| f64::NAN);
        assert_eq!(eigh(matrix.as_ref()).unwrap_err(), LinalgError::NonFinite { n: 3 });
    }
}
