//! FARMS: the tail exponent without the bias of the shape (Hu et al. 2025, "Eigenspectrum analysis of neural networks
//! without aspect ratio bias"). A long matrix has a narrower spectrum than a square one with the same distribution of
//! entries. So eigenvalues are those of square windows spread evenly over the matrix, pooled, and α is Hill's
//! estimate over their larger half.

use anyhow::Result;
use faer::MatRef;

use super::power_law::hill;
use crate::approx::low_rank::error_curve;
use crate::approx::metric::MetricPair;

/// Largest side of a window.
const SIDE: usize = 128;
/// Largest number of windows along a side of the matrix.
const PLACES: usize = 6;

/// α of `matrix` (m, n) and of its transpose; `None` if all eigenvalues are equal.
///
/// # Errors
/// An eigenproblem does not converge.
pub(super) fn alpha(matrix: MatRef<'_, f64>) -> Result<Option<f64>> {
    let side = SIDE.min(matrix.nrows()).min(matrix.ncols());
    let mut pooled = Vec::new();
    for row in places(matrix.nrows(), side) {
        for column in places(matrix.ncols(), side) {
            let window = matrix.submatrix(row, column, side, side);
            pooled.extend_from_slice(error_curve(window, MetricPair::IDENTITY)?.energies());
        }
    }
    Ok(hill(pooled))
}

/// Start positions of windows that cover a side once, evenly spaced from end to end, at most [`PLACES`].
fn places(length: usize, side: usize) -> Vec<usize> {
    let n = length.div_ceil(side.max(1)).clamp(1, PLACES);
    (0..n).map(|i| if n > 1 { i * (length - side) / (n - 1) } else { 0 }).collect()
}

#[cfg(test)]
mod tests {
    use faer::Mat;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    use super::*;

    #[test]
    fn windows_are_spread_from_end_to_end() {
        assert_eq!(places(128, 128), [0]);
        assert_eq!(places(130, 128), [0, 2]);
        assert_eq!(places(1280, 128), [0, 230, 460, 691, 921, 1152]);
    }

    fn own(m: &Mat<f64>) -> f64 {
        hill(error_curve(m.as_ref(), MetricPair::IDENTITY).unwrap().energies().to_vec()).unwrap()
    }

    fn farms(m: &Mat<f64>) -> f64 {
        alpha(m.as_ref()).unwrap().unwrap()
    }

    /// A long and a square matrix with entries of the same distribution have the same α by windows, but not by their
    /// own eigenvalues.
    #[test]
    fn alpha_does_not_depend_on_the_shape() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut entries =
            |columns| Mat::from_fn(128, columns, |_, _| f64::from(random.next_u32()) / 2f64.powi(32) - 0.5);
        let (square, long) = (entries(128), entries(1024));
        assert!((farms(&square) - own(&square)).abs() < 1e-12, "one window is the matrix");
        let (bias, rest) = (own(&long) - own(&square), farms(&long) - farms(&square));
        assert!(bias.abs() > 10.0 * rest.abs() && bias > 1.0, "{bias} {rest}");
    }
}
