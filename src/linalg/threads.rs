//! Routines that use all threads of the current pool if the matrices are large: the bytes are the same at any number of
//! threads.

use faer::Mat;
use rayon::ThreadPoolBuilder;

use super::*;

/// Independent values in [-0.5, 0.5).
fn values(m: usize, n: usize) -> Mat<f64> {
    let value = |i: usize| {
        let mixed = (i as u32 ^ 0x5bd1).wrapping_mul(2_654_435_761);
        f64::from((mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519) >> 8) / 16_777_216.0 - 0.5
    };
    Mat::from_fn(m, n, |i, j| value(i * n + j + 1))
}

fn check<T: PartialEq + Send>(f: impl Fn() -> T + Sync) {
    let with_threads = |n: usize| ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(&f);
    let one = with_threads(1);
    assert!((2..4).all(|n| with_threads(n) == one));
}

#[test]
fn factors_of_large_matrices_are_the_same_bytes_at_any_thread_count() {
    let n = 1900;
    let x = values(n, n);
    let mut gram = product_symmetric(x.as_ref(), x.transpose());
    (0..n).for_each(|i| gram[(i, i)] += 1.0);
    let lower = cholesky(gram.as_ref()).unwrap();
    check(|| cholesky(gram.as_ref()).unwrap());
    check(|| solve_transposed_lower(lower.as_ref(), x.as_ref()));
    check(|| inverse_cholesky(gram.as_ref()).unwrap());
    check(|| inverse_positive(gram.as_ref()).unwrap());
    check(|| solve(x.as_ref(), gram.as_ref()).unwrap());
}

#[test]
fn panels_of_a_large_elimination_are_the_same_bytes_at_any_thread_count() {
    let (left, right) = (values(4200, 128), values(4200, 128));
    check(|| {
        let mut matrix = Mat::zeros(4200, 4200);
        gram::subtract_product_symmetric(matrix.as_mut(), left.as_ref(), right.transpose());
        matrix
    });
}

#[test]
fn large_skeletons_are_the_same_bytes_at_any_thread_count() {
    let basis = values(2700, 1200);
    check(|| {
        let rows = row_skeleton(basis.as_ref(), 1.2);
        (rows.pivots, rows.coefficients)
    });
}
