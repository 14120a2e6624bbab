//! Conversions between row-major `f32` weights, as checkpoints store them, and faer's column-major `f64` matrices.

use faer::{Mat, MatRef};

/// The transpose (n_cols, n_rows) of a row-major matrix (n_rows, n_cols). In column-major order it has the same
/// bytes, so the copy is contiguous. Take `.transpose()` of it for the matrix itself.
///
/// # Panics
/// When `values` does not have `n_rows * n_cols` elements.
pub fn transposed_from_row_major(values: &[f32], n_rows: usize, n_cols: usize) -> Mat<f64> {
    assert_eq!(values.len(), n_rows * n_cols, "invariant: a matrix has rows x columns values");
    let mut matrix = Mat::zeros(n_cols, n_rows);
    for (row, column) in values.chunks_exact(n_cols.max(1)).zip(matrix.col_iter_mut()) {
        let column = column.try_as_col_major_mut().expect("invariant: an owned matrix is column-major");
        for (to, from) in column.as_slice_mut().iter_mut().zip(row) {
            *to = f64::from(*from);
        }
    }
    matrix
}

const LOWEST: f64 = f32::MIN as f64;
const HIGHEST: f64 = f32::MAX as f64;

/// A matrix (n_rows, n_cols) as row-major `f32`, rounded to the nearest finite value: an approximation of weights
/// near the end of the range may exceed it.
pub fn to_row_major(matrix: MatRef<'_, f64>) -> Vec<f32> {
    let mut values = Vec::with_capacity(matrix.nrows() * matrix.ncols());
    for row in matrix.row_iter() {
        values.extend(row.iter().map(|&v| if v.is_finite() { v.clamp(LOWEST, HIGHEST) as f32 } else { v as f32 }));
    }
    values
}

/// A row-major matrix (n_rows, n_cols) as row-major (n_cols, n_rows), in tiles that fit the cache.
pub fn transpose_row_major(values: &[f32], n_rows: usize, n_cols: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let mut transposed = vec![0.0; values.len()];
    for first_row in (0..n_rows).step_by(TILE) {
        for first_col in (0..n_cols).step_by(TILE) {
            for col in first_col..(first_col + TILE).min(n_cols) {
                for row in first_row..(first_row + TILE).min(n_rows) {
                    transposed[col * n_rows + row] = values[row * n_cols + col];
                }
            }
        }
    }
    transposed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_moves_every_element() {
        for (n_rows, n_cols) in [(1, 1), (3, 70), (65, 33), (64, 32)] {
            let values: Vec<f32> = (0..n_rows * n_cols).map(|i| i as f32).collect();
            let transposed = transpose_row_major(&values, n_rows, n_cols);
            let is_moved = |i: usize| transposed[(i % n_cols) * n_rows + i / n_cols] == values[i];
            assert!((0..values.len()).all(is_moved), "{n_rows} {n_cols}");
        }
    }

    #[test]
    fn rows_stay_rows() {
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let transposed = transposed_from_row_major(&values, 2, 3);
        assert_eq!((transposed.nrows(), transposed.ncols()), (3, 2));
        assert_eq!(transposed.transpose()[(1, 0)], 4.0);
        assert_eq!(to_row_major(transposed.transpose()), values);
        let ends = Mat::from_fn(1, 3, |_, j| [3.5e38, -1e300, f64::INFINITY][j]);
        assert_eq!(to_row_major(ends.as_ref()), [f32::MAX, f32::MIN, f32::INFINITY]);
    }
}
