//! Symmetric eigenproblems in f64. A Gram squares the condition number of its matrix, so its eigenvalues span more
//! than an f32 mantissa.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{Mat, MatRef, Par};

use super::error::LinalgError;

/// `A = U diag(values) Uᵀ`, largest eigenvalue first.
#[derive(Debug, Clone)]
pub struct Eigh {
    /// (n), descending.
    pub values: Vec<f64>,
    /// (n, n); column i belongs to `values[i]`.
    pub vectors: Mat<f64>,
}

/// Exponents of the largest entry for which the squares of entries neither overflow nor vanish. Matrices outside this
/// range are scaled, as in LAPACK's `dsyev`; those inside keep every bit.
const SAFE_EXPONENTS: std::ops::RangeInclusive<i32> = -300..=300;

/// Eigenvalues and eigenvectors of a symmetric matrix (n, n), read from its lower triangle, at any scale including
/// zeros and subnormal numbers.
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

fn decompose(matrix: MatRef<'_, f64>, mut vectors: Option<&mut Mat<f64>>) -> Result<Vec<f64>, LinalgError> {
    let n = matrix.nrows();
    assert_eq!(n, matrix.ncols(), "invariant: an eigenproblem is square");
    if matrix.col_iter().any(|column| column.iter().any(|v| !v.is_finite())) {
        return Err(LinalgError::NonFinite { n });
    }
    let largest = matrix.norm_max();
    if largest == 0.0 {
        if let Some(vectors) = &mut vectors {
            **vectors = Mat::identity(n, n);
        }
        return Ok(vec![0.0; n]);
    }
    // Subnormal numbers have an exponent of 0, and are scaled up by as much as the smallest normal number.
    let exponent = ((largest.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    if SAFE_EXPONENTS.contains(&exponent) {
        return decompose_in_scale(matrix, vectors);
    }
    // Two steps, because the scale of a subnormal matrix exceeds the range of f64.
    let scaled = |matrix: MatRef<'_, f64>, by: i32| {
        let (first, second) = (2f64.powi(by / 2), 2f64.powi(by - by / 2));
        matrix * faer::Scale(first) * faer::Scale(second)
    };
    let mut matrix = scaled(matrix, -exponent);
    let mut shift = exponent;
    if exponent == -1023 {
        let rest = matrix.norm_max().log2().floor() as i32;
        matrix = scaled(matrix.as_ref(), -rest);
        shift += rest;
    }
    let values = decompose_in_scale(matrix.as_ref(), vectors)?;
    let (first, second) = (2f64.powi(shift / 2), 2f64.powi(shift - shift / 2));
    Ok(values.into_iter().map(|value| value * first * second).collect())
}

/// The same for a matrix whose squares are in the range of f64.
fn decompose_in_scale(matrix: MatRef<'_, f64>, vectors: Option<&mut Mat<f64>>) -> Result<Vec<f64>, LinalgError> {
    let n = matrix.nrows();
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

    #[test]
    fn matrices_of_any_scale_have_the_same_vectors_and_scaled_values() {
        let n = 40;
        let of_scale = |scale: f64| {
            Mat::from_fn(n, n, |i, j| {
                scale * (((i * 7 + j * 7 + i * j * 5) % 11) as f64 - 5.0 + 9.0 * f64::from(i == j))
            })
        };
        let plain = eigh(of_scale(1.0).as_ref()).unwrap();
        // Powers of two change no digit; at the ends of the range products would overflow or vanish.
        for exponent in [-1000, -600, -100, 100, 600, 1000] {
            let scale = 2f64.powi(exponent);
            let Eigh { values, vectors } = eigh(of_scale(scale).as_ref()).unwrap();
            for (value, expected) in values.iter().zip(&plain.values) {
                assert!((value / scale - expected).abs() < 1e-12, "2^{exponent}: {value}");
            }
            assert!((&vectors - &plain.vectors).norm_max() < 1e-9, "2^{exponent}");
            assert_eq!(eigenvalues(of_scale(scale).as_ref()).unwrap().len(), n);
        }
        // Matrices of subnormal entries are solved, though with few digits: the eigenvalues are 3 and 1 times the
        // smallest number.
        let tiny = f64::from_bits(1);
        let matrix = Mat::from_fn(2, 2, |i, j| if i == j { 2.0 * tiny } else { tiny });
        assert_eq!(eigh(matrix.as_ref()).unwrap().values, [3.0 * tiny, tiny]);
        let Eigh { values, vectors } = eigh(Mat::zeros(7, 7).as_ref()).unwrap();
        assert_eq!((values, vectors.transpose() * &vectors), (vec![0.0; 7], Mat::identity(7, 7)));
    }

    #[test]
    fn dead_rows_and_columns_are_eigenvectors_of_zero() {
        // Blocks of zeros of any size, among values of very different sizes.
        for n in [3, 64, 150] {
            for stride in [2, 3, 10, n] {
                let is_live = |i: usize| i.is_multiple_of(stride);
                let entry = |i: usize, j: usize| ((i * 31 + j * 31 + i * j * 17) % 23) as f64 - 11.0;
                let x =
                    Mat::from_fn(
                        n + 3,
                        n,
                        |i, j| if is_live(j) { entry(i, j) * 10f64.powi(-((j % 9) as i32)) } else { 0.0 },
                    );
                let gram = x.transpose() * &x;
                let Eigh { values, vectors } = eigh(gram.as_ref()).unwrap();
                let n_live = (0..n).filter(|&i| is_live(i)).count();
                assert!(values[n_live..].iter().all(|v| v.abs() <= 1e-12 * values[0]), "{n} {stride}");
                let residual = &gram * &vectors - Mat::from_fn(n, n, |i, j| vectors[(i, j)] * values[j]);
                assert!(residual.norm_max() < 1e-12 * values[0], "{n} {stride}");
            }
        }
    }
}
