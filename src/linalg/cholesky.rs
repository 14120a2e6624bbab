//! Cholesky factors, of matrices and of their inverses.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::cholesky::llt::inverse;
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, MatRef};

use super::gram::{mirror_lower, threads_for};

/// The lower triangular `L` (n, n) of `M = L Lᵀ`, from the lower triangle of `M`; `None` if `M` is not positive
/// definite.
pub fn cholesky(matrix: MatRef<'_, f64>) -> Option<Mat<f64>> {
    let n = matrix.nrows();
    let mut lower = matrix.to_owned();
    factor(&mut lower)?;
    // The factorization works in blocks and leaves nonzero values above the diagonal.
    for j in 1..n {
        lower.col_mut(j).subrows_mut(0, j).fill(0.0);
    }
    Some(lower)
}

/// `L` in place of the lower triangle of `M`.
fn factor(lower: &mut Mat<f64>) -> Option<()> {
    let threads = threads_for(lower.nrows().pow(3) / 6);
    let scratch = cholesky_in_place_scratch::<f64>(lower.nrows(), threads, Default::default());
    let memory = &mut MemBuffer::new(scratch);
    cholesky_in_place(lower.as_mut(), Default::default(), threads, MemStack::new(memory), Default::default()).ok()?;
    Some(())
}

/// The inverse (n, n) of a positive definite matrix, from its lower triangle; `None` if it is not positive definite.
pub fn inverse_positive(matrix: MatRef<'_, f64>) -> Option<Mat<f64>> {
    let n = matrix.nrows();
    let mut lower = matrix.to_owned();
    factor(&mut lower)?;
    let mut found = Mat::zeros(n, n);
    let threads = threads_for(n.pow(3) / 6);
    let memory = &mut MemBuffer::new(inverse::inverse_scratch::<f64>(n, threads));
    inverse::inverse(found.as_mut(), lower.as_ref(), threads, MemStack::new(memory));
    mirror_lower(&mut found);
    Some(found)
}

/// `L⁻ᵀ X` for a lower triangular `L` (n, n) and `x` (n, k).
pub fn solve_transposed_lower(lower: MatRef<'_, f64>, x: MatRef<'_, f64>) -> Mat<f64> {
    let mut solution = x.to_owned();
    let threads = threads_for(x.nrows().pow(2) * x.ncols() / 2);
    solve_upper_triangular_in_place(lower.transpose(), solution.as_mut(), threads);
    solution
}

/// The upper triangular `U` (n, n) with `M⁻¹ = Uᵀ U`, and its inverse; `None` if `M` is not positive definite.
///
/// With rows and columns in reversed order, `M = L Lᵀ` becomes `M = Ũ Ũᵀ` with an upper triangular `Ũ`, and `U =
/// Ũ⁻¹`. This takes one factorization and one triangular inverse; inverting `M` and factoring again costs three times
/// as much.
pub fn inverse_cholesky(matrix: MatRef<'_, f64>) -> Option<(Mat<f64>, Mat<f64>)> {
    let n = matrix.nrows();
    let mut lower = Mat::from_fn(n, n, |i, j| matrix[(n - 1 - i, n - 1 - j)]);
    factor(&mut lower)?;
    let mut inverse = Mat::zeros(n, n);
    invert_lower_triangular(inverse.as_mut(), lower.as_ref(), threads_for(n.pow(3) / 6));
    let reversed =
        |lower: &Mat<f64>| Mat::from_fn(n, n, |i, j| if i <= j { lower[(n - 1 - i, n - 1 - j)] } else { 0.0 });
    let (factor, inverse) = (reversed(&lower), reversed(&inverse));
    let is_finite = inverse.col_iter().all(|column| column.iter().all(|v| v.is_finite()));
    is_finite.then_some((inverse, factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(n: usize) -> Mat<f64> {
        let value = |i: usize| {
            let mixed = (i as u32 ^ 0x5bd1).wrapping_mul(2_654_435_761);
            f64::from((mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519) >> 8) / 8_388_608.0 - 1.0
        };
        Mat::from_fn(2 * n, n, |i, j| value(i * n + j + 1))
    }

    #[test]
    fn a_matrix_is_the_product_of_its_factors() {
        let n = 70;
        let x = samples(n);
        let gram = x.transpose() * &x;
        let lower = cholesky(gram.as_ref()).unwrap();
        assert!((0..n).all(|i| (i + 1..n).all(|j| lower[(i, j)] == 0.0)));
        assert!((&lower * lower.transpose() - &gram).norm_max() < 1e-12 * gram.norm_max());
        let solved = solve_transposed_lower(lower.as_ref(), x.transpose());
        assert!((lower.transpose() * solved - x.transpose()).norm_max() < 1e-12);
        assert!(cholesky(Mat::<f64>::zeros(2, 2).as_ref()).is_none());
    }

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        let n = 23;
        let x = samples(n);
        let gram = x.transpose() * &x;
        let (upper, inverse) = inverse_cholesky(gram.as_ref()).unwrap();
        assert!((0..n).all(|j| (j + 1..n).all(|i| upper[(i, j)] == 0.0)));
        let identity = &gram * (upper.transpose() * &upper);
        assert!((&identity - Mat::<f64>::identity(n, n)).norm_max() < 1e-9);
        assert!((&upper * &inverse - Mat::<f64>::identity(n, n)).norm_max() < 1e-9);
        assert!((inverse_positive(gram.as_ref()).unwrap() - upper.transpose() * &upper).norm_max() < 1e-9);
        assert!(inverse_cholesky(Mat::<f64>::zeros(2, 2).as_ref()).is_none());
        assert!(inverse_positive(Mat::<f64>::zeros(2, 2).as_ref()).is_none());
    }
}
