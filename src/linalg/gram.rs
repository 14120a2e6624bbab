//! Matrix products. If the result is symmetric, only half of it is computed.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatMut, MatRef, Par};

use super::convert::{to_row_major, transpose_row_major, transposed_from_row_major};

/// Number of multiplications from which a product is divided among threads.
const LARGE: usize = 1 << 30;

/// Threads for a product with this number of multiplications: all of the current pool if it is large. They divide the
/// result, never a sum, so the bytes do not depend on their number.
pub(super) fn threads_for(n_multiplications: usize) -> Par {
    if n_multiplications >= LARGE { threads() } else { Par::Seq }
}

/// `a · b`, (m, k) · (k, n).
pub fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut result = Mat::zeros(a.nrows(), b.ncols());
    let threads = threads_for(a.nrows() * a.ncols() * b.ncols());
    matmul(&mut result, Accum::Replace, a, b, 1.0, threads);
    result
}

/// `a · b`, (m, k) · (k, n), in f32.
pub fn product_f32(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Mat<f32> {
    let mut result = Mat::zeros(a.nrows(), b.ncols());
    add_product_f32(result.as_mut(), 1.0, a, b);
    result
}

/// Adds `scale · a · b`, (m, k) · (k, n), to `sum` (m, n) in f32.
pub fn add_product_f32(sum: MatMut<'_, f32>, scale: f32, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    let threads = threads_for(a.nrows() * a.ncols() * b.ncols());
    matmul(sum, Accum::Add, a, b, scale, threads);
}

/// `a · l`, (m, n) · (n, n), for a lower triangular `l`: half the work.
pub fn product_with_lower(a: MatRef<'_, f64>, l: MatRef<'_, f64>) -> Mat<f64> {
    let mut result = Mat::zeros(a.nrows(), l.ncols());
    triangular::matmul(
        &mut result,
        BlockStructure::Rectangular,
        Accum::Replace,
        a,
        BlockStructure::Rectangular,
        l,
        BlockStructure::TriangularLower,
        1.0,
        threads_for(a.nrows() * l.nrows() * l.ncols() / 2),
    );
    result
}

/// `a · b`, (n, k) · (k, n), for a symmetric result: half the work.
pub fn product_symmetric(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut result = Mat::zeros(a.nrows(), a.nrows());
    lower_product(result.as_mut(), Accum::Replace, a, b, 1.0);
    mirror_lower(&mut result);
    result
}

/// Subtracts `a · b`, (n, k) · (k, n), which is symmetric, from the lower triangle of a matrix (n, n).
pub(super) fn subtract_product_symmetric(matrix: MatMut<'_, f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>) {
    lower_product(matrix, Accum::Add, a, b, -1.0);
}

/// The lower triangle of `scale · a · b`, (n, k) · (k, n), in place of that of a matrix or added to it.
fn lower_product(matrix: MatMut<'_, f64>, accum: Accum, a: MatRef<'_, f64>, b: MatRef<'_, f64>, scale: f64) {
    triangular::matmul(
        matrix,
        BlockStructure::TriangularLower,
        accum,
        a,
        BlockStructure::Rectangular,
        b,
        BlockStructure::Rectangular,
        scale,
        threads_for(a.nrows() * a.nrows() * a.ncols() / 2),
    );
}

/// Copies the upper triangle of a square matrix over its lower one.
fn mirror_upper(matrix: &mut Mat<f64>) {
    for j in 0..matrix.ncols() {
        for i in j + 1..matrix.nrows() {
            matrix[(i, j)] = matrix[(j, i)];
        }
    }
}

/// Copies the lower triangle of a square matrix over its upper one.
pub(super) fn mirror_lower(matrix: &mut Mat<f64>) {
    for j in 0..matrix.ncols() {
        for i in j + 1..matrix.nrows() {
            matrix[(j, i)] = matrix[(i, j)];
        }
    }
}

/// Columns of a Gram that are computed at a time: wide enough for the speed of a full product, narrow enough that
/// little of the upper triangle is computed.
const GRAM_PANEL: usize = 96;

/// Threads for one product: all of the current pool. They divide the tiles of the result, never a sum, so the bytes
/// do not depend on their number.
fn threads() -> Par {
    if rayon::current_num_threads() > 1 { Par::rayon(0) } else { Par::Seq }
}

/// The lower triangle of `xᵀ x` (n, n), row by row, for a chunk `x` (n_tokens, n) in row-major order, summed in f32.
///
/// Sums over several chunks are kept in f64 ([`add_gram_f32`]), so that the error does not grow with the number of
/// chunks.
///
/// # Panics
/// If `x` does not consist of rows of `n`.
pub fn gram_f32(x: &[f32], n_tokens: usize, n: usize) -> Vec<f32> {
    let mut gram = Vec::with_capacity(n * (n + 1) / 2);
    for_each_row(x, n_tokens, n, |row| gram.extend_from_slice(row));
    gram
}

/// Adds [`gram_f32`] to `sum`, a triangle of the same shape, without a second triangle in memory.
///
/// # Panics
/// If `x` does not consist of rows of `n`.
pub fn add_gram_f32(sum: &mut [f64], x: &[f32], n_tokens: usize, n: usize) {
    let mut rest = sum;
    for_each_row(x, n_tokens, n, |row| {
        let (here, later) = std::mem::take(&mut rest).split_at_mut(row.len());
        add_f32(here, row);
        rest = later;
    });
}

/// Calls `add` with the rows of the lower triangle of `xᵀ x`: row i has i + 1 entries.
fn for_each_row(x: &[f32], n_tokens: usize, n: usize, mut add: impl FnMut(&[f32])) {
    // The sum is over tokens: if they are contiguous in memory, they are packed without long strides.
    let x = transpose_row_major(x, n_tokens, n);
    let x = MatRef::from_column_major_slice(&x, n_tokens, n); // (n_tokens, n)
    let mut panel = Mat::<f32>::zeros(n, GRAM_PANEL.min(n));
    for first in (0..n).step_by(GRAM_PANEL) {
        let width = GRAM_PANEL.min(n - first);
        // The columns of a panel are rows of the Gram, up to the last diagonal entry among them.
        let rows = panel.as_mut().submatrix_mut(0, 0, first + width, width);
        matmul(rows, Accum::Replace, x.subcols(0, first + width).transpose(), x.subcols(first, width), 1.0, threads());
        for (i, row) in panel.as_ref().subcols(0, width).col_iter().enumerate() {
            let row = row.try_as_col_major().expect("invariant: an owned matrix is column-major");
            add(&row.as_slice()[..=first + i]);
        }
    }
}

/// `sum += addend`.
pub fn add_f32(sum: &mut [f64], addend: &[f32]) {
    sum.iter_mut().zip(addend).for_each(|(sum, &value)| *sum += f64::from(value));
}

/// A symmetric matrix (n, n) times `scale`, from its lower triangle, row by row.
///
/// # Panics
/// If the length does not match a triangle of size `n`.
pub fn unpack_lower<T: Copy + Into<f64>>(packed: &[T], n: usize, scale: f64) -> Mat<f64> {
    assert_eq!(packed.len(), n * (n + 1) / 2, "invariant: a triangle of {n}");
    let mut matrix = Mat::zeros(n, n);
    let mut rest = packed;
    // Rows of the lower triangle are columns of the upper one.
    for i in 0..n {
        let (row, later) = rest.split_at(i + 1);
        matrix.col_mut(i).iter_mut().zip(row).for_each(|(to, &from)| *to = from.into() * scale);
        rest = later;
    }
    mirror_upper(&mut matrix);
    matrix
}

/// `xᵀ y` (n, n) for chunks `x` and `y` (n_tokens, n) in row-major order, summed in f32.
///
/// # Panics
/// If the chunks do not consist of rows of `n`.
pub fn cross_f32(x: &[f32], y: &[f32], n: usize) -> Mat<f32> {
    let n_tokens = x.len() / n;
    let (x, y) = (transpose_row_major(x, n_tokens, n), transpose_row_major(y, n_tokens, n));
    let matrix = |values| MatRef::from_column_major_slice(values, n_tokens, n);
    let mut cross = Mat::<f32>::zeros(n, n);
    matmul(&mut cross, Accum::Replace, matrix(&x).transpose(), matrix(&y), 1.0, threads());
    cross
}

/// Adds `chunk` to `sum`, both (n, n).
pub fn add_all(sum: &mut Mat<f64>, chunk: &Mat<f32>) {
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

/// The sum of the rows of `values` (n_rows, n), row-major.
pub fn column_sums(values: &[f32], n: usize) -> Vec<f64> {
    let mut sums = vec![0.0; n];
    for row in values.chunks_exact(n) {
        sums.iter_mut().zip(row).for_each(|(sum, &v)| *sum += f64::from(v));
    }
    sums
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
    fn grams_have_the_entries_of_products() {
        // Several panels; the last is narrower.
        let (n_tokens, n) = (30, 2 * GRAM_PANEL + 5);
        let x = test_matrix(n_tokens, n);
        let gram = gram_f32(&to_row_major(x.as_ref()), n_tokens, n);
        assert_eq!(unpack_lower(&gram, n, 2.0), product(x.transpose(), x.as_ref()) * faer::Scale(2.0));
    }

    #[test]
    fn grams_are_the_same_bytes_at_any_thread_count() {
        let x: Vec<f32> = (0..333 * 301).map(|i| ((i * 7919) % 10_007) as f32 / 10_007.0 - 0.5).collect();
        let with_threads = |n: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| gram_f32(&x, 333, 301))
        };
        let one = with_threads(1);
        assert!((2..5).all(|n| with_threads(n) == one));
    }

    #[test]
    fn large_products_are_the_same_bytes_at_any_thread_count() {
        let value = |i: usize, j: usize| ((i * 7919 + j * 104_729) % 10_007) as f64 / 10_007.0 - 0.5;
        let (a, b) = (Mat::from_fn(1200, 1100, value), Mat::from_fn(1100, 1100, value));
        assert!(matches!(threads_for(a.nrows() * a.ncols() * b.ncols() / 2), Par::Seq));
        let with_threads = |n: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| product(a.as_ref(), b.as_ref()))
        };
        let one = with_threads(1);
        assert!((2..5).all(|n| with_threads(n) == one));
    }

    #[test]
    fn grams_add_over_chunks() {
        let x = test_matrix(50, 12);
        let rows = to_row_major(x.as_ref());
        let [mut at_once, mut by_panels] = [(); 2].map(|()| vec![0.0; 12 * 13 / 2]);
        for chunk in rows.chunks(20 * 12) {
            add_f32(&mut at_once, &gram_f32(chunk, chunk.len() / 12, 12));
            add_gram_f32(&mut by_panels, chunk, chunk.len() / 12, 12);
        }
        // Small integers: exact in f32 too.
        let expected = product(x.transpose(), x.as_ref());
        assert_eq!(unpack_lower(&at_once, 12, 1.0), expected);
        assert_eq!(at_once, by_panels);
        let mut sum = Mat::zeros(12, 12);
        for chunk in rows.chunks(20 * 12) {
            add_all(&mut sum, &cross_f32(chunk, chunk, 12));
        }
        assert_eq!(sum, expected);
    }
}
