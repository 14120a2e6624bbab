//! Cholesky factors of inverses.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Mat, MatRef, Par};

/// The upper triangular `U` (n, n) with `M⁻¹ = Uᵀ U`, and its inverse; none where `M` is not positive definite.
///
/// With the order of rows and columns reversed, `M = L Lᵀ` is `M = Ũ Ũᵀ` of an upper triangular `Ũ`, and `U = Ũ⁻¹`: one
/// factorization and one triangular inverse, where inverting and factoring again costs three times as much.
pub fn inverse_cholesky(matrix: MatRef<'_, f64>) -> Option<(Mat<f64>, Mat<f64>)> {
    let n = matrix.nrows();
    let mut lower = Mat::from_fn(n, n, |i, j| matrix[(n - 1 - i, n - 1 - j)]);
    let scratch = cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
    let memory = &mut MemBuffer::new(scratch);
    cholesky_in_place(lower.as_mut(), Default::default(), Par::Seq, MemStack::new(memory), Default::default()).ok()?;
    let mut inverse = Mat::zeros(n, n);
    invert_lower_triangular(inverse.as_mut(), lower.as_ref(), Par::Seq);
    let reversed =
        |lower: &Mat<f64>| Mat::from_fn(n, n, |i, j| if i <= j { lower[(n - 1 - i, n - 1 - j)] } else { 0.0 });
    let (factor, inverse) = (reversed(&lower), reversed(&inverse));
    let is_finite = inverse.col_iter().all(|column| column.iter().all(|v| v.is_finite()));
    is_finite.then_some((inverse, factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        let n = 23;
        let value = |i: usize| {
            let mixed = (i as u32 ^ 0x5bd1).wrapping_mul(2_654_435_761);
            f64::from((mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519) >> 8) / 8_388_608.0 - 1.0
        };
        let x = Mat::from_fn(40, n, |i, j| value(i * n + j + 1));
        let gram = x.transpose() * &x;
        let (upper, inverse) = inverse_cholesky(gram.as_ref()).unwrap();
        assert!((0..n).all(|j| (j + 1..n).all(|i| upper[(i, j)] == 0.0)));
        let identity = &gram * (upper.transpose() * &upper);
        assert!((&identity - Mat::<f64>::identity(n, n)).norm_max() < 1e-9);
        assert!((&upper * &inverse - Mat::<f64>::identity(n, n)).norm_max() < 1e-9);
        assert!(inverse_cholesky(Mat::<f64>::zeros(2, 2).as_ref()).is_none());
    }
}
