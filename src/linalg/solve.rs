//! Linear systems.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::lu::partial_pivoting::factor::{lu_in_place, lu_in_place_scratch};
use faer::linalg::triangular_solve::{solve_unit_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Mat, MatRef};

use super::gram::threads_for;

/// `P A = L U` in place of `matrix` (m, n), m ≥ n, with partial pivoting; returns the permutation of the rows.
fn lu(matrix: &mut Mat<f64>) -> Vec<usize> {
    let (m, n) = (matrix.nrows(), matrix.ncols());
    let (mut forward, mut inverse) = (vec![0usize; m], vec![0usize; m]);
    let threads = threads_for(m * n * n / 3);
    let scratch = lu_in_place_scratch::<usize, f64>(m, n, threads, Default::default());
    lu_in_place(
        matrix.as_mut(),
        &mut forward,
        &mut inverse,
        threads,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    );
    forward
}

/// `A⁻¹ X` for (n, n) and (n, k); `None` if `A` is singular.
pub fn solve(matrix: MatRef<'_, f64>, right: MatRef<'_, f64>) -> Option<Mat<f64>> {
    let mut lu_factors = matrix.to_owned();
    let permutation = lu(&mut lu_factors);
    let mut solution = Mat::from_fn(right.nrows(), right.ncols(), |i, j| right[(permutation[i], j)]);
    let threads = threads_for(right.nrows().pow(2) * right.ncols() / 2);
    solve_unit_lower_triangular_in_place(lu_factors.as_ref(), solution.as_mut(), threads);
    solve_upper_triangular_in_place(lu_factors.as_ref(), solution.as_mut(), threads);
    let is_finite = solution.col_iter().all(|column| column.iter().all(|v| v.is_finite()));
    is_finite.then_some(solution)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solutions_solve() {
        let n = 30;
        let matrix =
            Mat::from_fn(n, n, |i, j| ((i * 17 + j * j * 7 + 3) % 23) as f64 - 11.0 + if i == j { 9.0 } else { 0.0 });
        let expected = Mat::from_fn(n, 4, |i, j| (i as f64 - 3.0 * j as f64).sin());
        let solution = solve(matrix.as_ref(), (&matrix * &expected).as_ref()).unwrap();
        assert!((&solution - &expected).norm_max() < 1e-9);
        assert!(solve(Mat::zeros(2, 2).as_ref(), Mat::<f64>::identity(2, 2).as_ref()).is_none());
    }
}
