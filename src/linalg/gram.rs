//! Matrix products; only half is computed of those whose result is symmetric.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par};

use super::convert::{to_row_major, transpose_row_major, transposed_from_row_major};

/// `a · b`, (m, k) · (k, n).
pub fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut result = Mat::zeros(a.nrows(), b.ncols());
    matmul(&mut result, Accum::Replace, a, b, 1.0, Par::Seq);
    result
}

/// `a · b`, (n, k) · (k, n), where the result is known to be symmetric: half the work.
pub fn product_symmetric(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let n = a.nrows();
    let mut result = Mat::zeros(n, n);
    triangular::matmul(
        &mut result,
        BlockStructure::TriangularLower,
        Accum::Replace,
        a,
        BlockStructure::Rectangular,
        b,
        BlockStructure::Rectangular,
        1.0,
        Par::Seq,
    );
    mirror_lower(&mut result);
    result
}

/// Copies the lower triangle of a square matrix over its upper one.
pub fn mirror_lower(matrix: &mut Mat<f64>) {
    for j in 0..matrix.ncols() {
        for i in j + 1..matrix.nrows() {
            matrix[(j, i)] = matrix[(i, j)];
        }
    }
}

/// Adds `xᵀ x` to the lower triangle of `sum` (n, n), for a chunk `x` (n_tokens, n) in row-major order.
///
/// The products of a chunk are summed in f32, chunks in f64: the error is that of one chunk, however many come.
/// Uses all threads: they divide the tiles of the result, never a sum, so the bytes do not depend on their number.
///
/// # Panics
/// When `x` is not made of rows of `n`.
pub fn add_gram_f32(sum: &mut Mat<f64>, x: &[f32], n_tokens: usize) {
    let n = sum.nrows();
    // Tokens are what is summed over: side by side in memory they are packed without long strides.
    let x = transpose_row_major(x, n_tokens, n);
    let x = MatRef::from_column_major_slice(&x, n_tokens, n); // (n_tokens, n)
    let mut chunk = Mat::<f32>::zeros(n, n);
    triangular::matmul(
        &mut chunk,
        BlockStructure::TriangularLower,
        Accum::Replace,
        x.transpose(),
        BlockStructure::Rectangular,
        x,
        BlockStructure::Rectangular,
        1.0,
        Par::rayon(0),
    );
    for (to, from) in sum
        .col_iter_mut()
        .zip(chunk.col_iter())
        .enumerate()
        .map(|(j, (to, from))| (to.subrows_mut(j, n - j), from.subrows(j, n - j)))
    {
        for (to, from) in to.iter_mut().zip(from.iter()) {
            *to += f64::from(*from);
        }
    }
}

/// Adds `xᵀ y` to `sum` (n, n), for chunks `x` and `y` (n_tokens, n) in row-major order, summed as by [`add_gram_f32`].
///
/// # Panics
/// When the chunks are not made of rows of `n`.
pub fn add_product_f32(sum: &mut Mat<f64>, x: &[f32], y: &[f32], n: usize) {
    let n_tokens = x.len() / n;
    let (x, y) = (transpose_row_major(x, n_tokens, n), transpose_row_major(y, n_tokens, n));
    let matrix = |values| MatRef::from_column_major_slice(values, n_tokens, n);
    let mut chunk = Mat::<f32>::zeros(n, n);
    matmul(&mut chunk, Accum::Replace, matrix(&x).transpose(), matrix(&y), 1.0, Par::rayon(0));
    for (to, from) in sum.col_iter_mut().zip(chunk.col_iter()) {
        to.iter_mut().zip(from.iter()).for_each(|(to, from)| *to += f64::from(*from));
    }
}

/// `B·A`, (m, r) · (r, n), all row-major, multiplied in f64 and rounded once.
pub fn product_row_major(b: &[f32], a: &[f32], m: usize, r: usize, n: usize) -> Vec<f32> {
    let b_t = transposed_from_row_major(b, m, r);
    let a_t = transposed_from_row_major(a, r, n);
    to_row_major(product(b_t.transpose(), a_t.transpose()).as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test_matrix(m: usize, n: usize) -> Mat<f64> {
        Mat::from_fn(m, n, |i, j| ((i * 7 + j * 13) % 11) as f64 - 5.0)
    }

    #[test]
    fn products_agree_with_sums_of_products() {
        let (a, b) = (test_matrix(5, 9), test_matrix(9, 4));
        let expected = Mat::from_fn(5, 4, |i, j| (0..9).map(|k| a[(i, k)] * b[(k, j)]).sum::<f64>());
        assert_eq!(product(a.as_ref(), b.as_ref()), expected);
    }

    #[test]
    fn the_mirrored_half_is_the_whole() {
        let a = test_matrix(37, 23);
        let whole = product(a.as_ref(), a.transpose());
        assert_eq!(product_symmetric(a.as_ref(), a.transpose()), whole);
    }

    #[test]
    fn grams_are_the_same_bytes_at_any_thread_count() {
        let x: Vec<f32> = (0..333 * 301).map(|i| ((i * 7919) % 10_007) as f32 / 10_007.0 - 0.5).collect();
        let with_threads = |n: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            let mut sum = Mat::zeros(301, 301);
            pool.install(|| add_gram_f32(&mut sum, &x, 333));
            sum
        };
        let one = with_threads(1);
        assert!((2..5).all(|n| with_threads(n) == one));
    }

    #[test]
    fn grams_add_over_chunks() {
        let x = test_matrix(50, 12);
        let rows = to_row_major(x.as_ref());
        let mut sum = Mat::zeros(12, 12);
        for chunk in rows.chunks(20 * 12) {
            add_gram_f32(&mut sum, chunk, chunk.len() / 12);
        }
        mirror_lower(&mut sum);
        // Small integers: exact in f32 too.
        let expected = product(x.transpose(), x.as_ref());
        assert_eq!(sum, expected);
        let mut sum = Mat::zeros(12, 12);
        for chunk in rows.chunks(20 * 12) {
            add_product_f32(&mut sum, chunk, chunk, 12);
        }
        assert_eq!(sum, expected);
    }
}
