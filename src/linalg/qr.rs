//! Orthonormal bases.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj,
};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::{Conj, Mat, Par};

/// An orthonormal matrix (m, r) whose first k columns span the first k columns of `matrix` (m, r), m ≥ r, for
/// every k. Columns that depend on earlier ones become some unit vector orthogonal to all others.
pub fn orthonormal_columns(mut matrix: Mat<f64>) -> Mat<f64> {
    let (m, r) = (matrix.nrows(), matrix.ncols());
    assert!(m >= r, "invariant: a basis has no more columns than rows");
    let block = recommended_block_size::<f64>(m, r);
    let mut coefficients = Mat::zeros(block, r);
    let scratch = qr_in_place_scratch::<f64>(m, r, block, Par::Seq, Default::default());
    qr_in_place(
        matrix.as_mut(),
        coefficients.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    );
    let mut basis = Mat::identity(m, r);
    let scratch = apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(m, block, r);
    apply_block_householder_sequence_on_the_left_in_place_with_conj(
        matrix.as_ref(),
        coefficients.as_ref(),
        Conj::No,
        basis.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
    );
    basis
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_kept_and_columns_are_orthonormal() {
        let mut matrix = Mat::from_fn(20, 6, |i, j| ((i * i + 3 * j * i + j) % 17) as f64);
        // A dependent column and a zero column.
        for i in 0..20 {
            matrix[(i, 3)] = matrix[(i, 0)] - matrix[(i, 1)];
            matrix[(i, 5)] = 0.0;
        }
        let basis = orthonormal_columns(matrix.clone());
        let gram = basis.transpose() * &basis;
        assert!((&gram - Mat::<f64>::identity(6, 6)).norm_max() < 1e-13);
        for k in 1..=6 {
            let (prefix, part) = (basis.subcols(0, k), matrix.subcols(0, k));
            let residual = part - prefix * (prefix.transpose() * part);
            assert!(residual.norm_max() < 1e-11, "{k}");
        }
    }
}
