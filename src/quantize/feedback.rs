//! Rounding with feedback (Frantar et al. 2022): columns are rounded one after another, and the error of each is made up for by
//! those that are still to come, in a metric `H` of the columns.
//!
//! With `H⁻¹ = Uᵀ U`, rounding column j by `e` shifts the later ones by `−(e / U_jj) U_j,j+1…`; the squares of `e / U_jj` add up
//! to `tr(E H Eᵀ)`. What values a column may take is not its concern.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par, RowRef};
use pulp::Arch;

/// Columns that are finished before the others hear of them.
const BLOCK: usize = 128;

/// Rounds the columns of `weights` (rows, cols) in their order. `upper` is the `U` of their metric; `round` rounds the column of
/// an index in place; `spend` is given its errors over `U_jj`, whose squares are what it costs each row.
pub fn feed_back(
    mut weights: MatMut<'_, f32>,
    upper: MatRef<'_, f32>,
    mut round: impl FnMut(usize, &mut [f32]),
    mut spend: impl FnMut(&[f32]),
) {
    let (rows, cols) = (weights.nrows(), weights.ncols());
    let mut errors = Mat::<f32>::zeros(rows, BLOCK);
    for first in (0..cols).step_by(BLOCK) {
        let width = BLOCK.min(cols - first);
        for at in 0..width {
            let j = first + at;
            let diagonal = upper[(j, j)];
            let (mut left, later) = weights.as_mut().subcols_mut(j, first + width - j).split_at_col_mut(1);
            let error = contiguous(errors.as_mut(), at);
            let weight = contiguous(left.as_mut(), 0);
            error.copy_from_slice(weight);
            round(j, weight);
            for (weight, error) in weight.iter().zip(error.iter_mut()) {
                *error = (*error - weight) / diagonal;
            }
            spend(error);
            spread(error, later, upper.row(j).subcols(j + 1, first + width - j - 1));
        }
        let rest = first + width;
        let later = upper.submatrix(first, rest, width, cols - rest);
        let done = errors.as_ref().subcols(0, width);
        matmul(weights.as_mut().subcols_mut(rest, cols - rest), Accum::Add, done, later, -1.0f32, Par::Seq);
    }
}

fn contiguous(matrix: MatMut<'_, f32>, column: usize) -> &mut [f32] {
    let column = matrix.col_mut(column).try_as_col_major_mut();
    column.expect("invariant: an owned matrix is column-major").as_slice_mut()
}

/// `later[:, k] −= error · row[k]`.
fn spread(error: &[f32], mut later: MatMut<'_, f32>, row: RowRef<'_, f32>) {
    Arch::new().dispatch(|| {
        for k in 0..later.ncols() {
            let factor = row[k];
            for (weight, error) in contiguous(later.as_mut(), k).iter_mut().zip(error) {
                *weight -= error * factor;
            }
        }
    });
}
