//! Rows that span all rows, with small coefficients: the maximum-volume submatrix (Goreinov, Oseledets, Savostyanov,
//! Tyrtyshnikov & Zamarashkin 2010).

use std::cmp::Ordering;

use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Accum, Mat, MatRef};

use super::gram::{product, threads_for};
use super::qr::orthonormal_columns;

/// `B = P [B_pivot; T B_pivot]`: r rows of a matrix (m, r), and the coefficients of the others in terms of them.
#[derive(Debug, Clone)]
pub struct RowSkeleton {
    /// The pivot rows, (r).
    pub pivots: Vec<usize>,
    /// The other rows, (m − r).
    pub others: Vec<usize>,
    /// `T` (m − r, r); no entry exceeds the bound in magnitude.
    pub coefficients: Mat<f64>,
}

/// A loose bound on the coefficients. Every swap at least doubles the volume of the pivot rows, so few are needed.
pub const COEFFICIENT_BOUND: f64 = 2.0;

/// If the residual of a row is below this share of the squared norm of the first pivot row, it is taken for a
/// rounding error. With orthonormal columns this never happens: a remaining row has at least 1 / (m − r).
const DEPENDENT_SHARE: f64 = 1e-8;

/// Number of pivots that are chosen between two products.
const BLOCK: usize = 64;

/// Number of rows from which the pivots of a block are chosen.
const CANDIDATES: usize = 4 * BLOCK;

/// Least squared norm of a pivot, relative to the longest row outside the candidates.
const NEAR_LONGEST: f64 = 0.9;

/// The skeleton of `basis` (m, r), m ≥ r, with coefficients up to `bound` > 1 in magnitude. Dependent columns are
/// replaced by independent ones first.
///
/// Each pivot is the row with the longest residual after those before it, with columns of equal length: the pivoted
/// Cholesky factorization of `B Bᵀ`, in blocks. Then `T = L₂ L₁⁻¹`, and while an entry of `T` exceeds the bound, its
/// row and its pivot are swapped. LU with partial pivoting looks at one column at a time, and finds rows of less
/// volume.
pub fn row_skeleton(basis: MatRef<'_, f64>, bound: f64) -> RowSkeleton {
    assert!(basis.nrows() >= basis.ncols(), "invariant: a basis has no more columns than rows");
    let (l_t, mut pivots) = pivoted_cholesky(&with_unit_columns(basis)).unwrap_or_else(|| {
        pivoted_cholesky(&orthonormal_columns(basis.to_owned()))
            .expect("invariant: what is left of orthonormal columns is long")
    });
    let mut is_pivot = vec![false; basis.nrows()];
    pivots.iter().for_each(|&row| is_pivot[row] = true);
    let mut others: Vec<usize> = (0..basis.nrows()).filter(|&row| !is_pivot[row]).collect();
    // T L₁ = L₂, solved as L₁ᵀ Tᵀ = L₂ᵀ.
    let mut transposed = columns(l_t.as_ref(), &others);
    let threads = threads_for(pivots.len().pow(2) * others.len() / 2);
    solve_upper_triangular_in_place(columns(l_t.as_ref(), &pivots).as_ref(), transposed.as_mut(), threads);
    let mut coefficients = transposed.transpose().to_owned();
    while let Some((i, j)) = largest_above(&coefficients, bound) {
        swap(&mut coefficients, i, j);
        std::mem::swap(&mut others[i], &mut pivots[j]);
    }
    RowSkeleton { pivots, others, coefficients }
}

fn with_unit_columns(matrix: MatRef<'_, f64>) -> Mat<f64> {
    let mut matrix = matrix.to_owned();
    for column in matrix.col_iter_mut() {
        let norm = column.norm_l2();
        if norm > 0.0 {
            column.iter_mut().for_each(|v| *v /= norm);
        }
    }
    matrix
}

fn columns(matrix: MatRef<'_, f64>, of: &[usize]) -> Mat<f64> {
    Mat::from_fn(matrix.nrows(), of.len(), |i, j| matrix[(i, of[j])])
}

/// `Lᵀ` (r, m) with `B Bᵀ = L Lᵀ`, and the r rows in whose order `L` is lower triangular; `None` if columns are
/// dependent.
fn pivoted_cholesky(basis: &Mat<f64>) -> Option<(Mat<f64>, Vec<usize>)> {
    let (m, r) = (basis.nrows(), basis.ncols());
    let basis_t = basis.transpose().to_owned();
    let mut l_t = Mat::zeros(r, m);
    let mut pivots: Vec<usize> = Vec::with_capacity(r);
    // Squared norms of the residuals of the rows; the norms of pivots are not read again.
    let mut rest: Vec<f64> = basis_t.col_iter().map(|row| row.squared_norm_l2()).collect();
    let mut open: Vec<usize> = (0..m).collect();
    let smallest = DEPENDENT_SHARE * rest.iter().copied().fold(0.0, f64::max);
    while pivots.len() < r {
        let longest_first = |i: &usize, j: &usize| rest[*j].total_cmp(&rest[*i]).then(i.cmp(j));
        let mut others_longest = 0.0;
        if open.len() > CANDIDATES {
            let (_, next, _) = open.select_nth_unstable_by(CANDIDATES, longest_first);
            others_longest = rest[*next];
        }
        let candidates = &mut open[..CANDIDATES.min(m - pivots.len())];
        candidates.sort_unstable_by(longest_first);
        let done = l_t.subrows(0, pivots.len());
        let of_candidates = [columns(basis_t.as_ref(), candidates), columns(done, candidates)];
        let gram = rests(&of_candidates, of_candidates.each_ref().map(Mat::as_ref));
        let (picked, factor) = pick(gram, BLOCK.min(r - pivots.len()), NEAR_LONGEST * others_longest, smallest)?;
        let of_block = of_candidates.map(|rows| columns(rows.as_ref(), &picked));
        let mut rows = rests(&of_block, [basis_t.as_ref(), done]); // (b, m)
        let threads = threads_for(factor.nrows().pow(2) * m / 2);
        solve_lower_triangular_in_place(factor.as_ref(), rows.as_mut(), threads);
        for (rest, row) in rest.iter_mut().zip(rows.col_iter()) {
            *rest = (*rest - row.squared_norm_l2()).max(0.0);
        }
        let block: Vec<usize> = picked.iter().map(|&at| candidates[at]).collect();
        l_t.subrows_mut(pivots.len(), block.len()).copy_from(&rows);
        open.retain(|row| !block.contains(row));
        pivots.extend(block);
    }
    Some((l_t, pivots))
}

/// Products of the residuals of rows `a` and `b`, from the columns of `Bᵀ` and of the finished part of `Lᵀ`.
fn rests(a: &[Mat<f64>; 2], b: [MatRef<'_, f64>; 2]) -> Mat<f64> {
    let mut products = product(a[0].transpose(), b[0]);
    let threads = threads_for(a[1].ncols() * a[1].nrows() * b[1].ncols());
    matmul(products.as_mut(), Accum::Add, a[1].transpose(), b[1], -1.0, threads);
    products
}

/// Up to `n` pivots of a Gram, longest residual first, until it falls below `near`, with their Cholesky factor;
/// `None` if a residual is below `smallest`.
fn pick(mut gram: Mat<f64>, n: usize, near: f64, smallest: f64) -> Option<(Vec<usize>, Mat<f64>)> {
    let size = gram.nrows();
    let mut picked: Vec<usize> = Vec::with_capacity(n);
    let mut factor = Mat::zeros(size, n);
    while picked.len() < n {
        let open = (0..size).filter(|at| !picked.contains(at));
        let at = open.max_by(|&i, &j| gram[(i, i)].total_cmp(&gram[(j, j)]).then(j.cmp(&i)));
        let longest = at.map_or(0.0, |at| gram[(at, at)]);
        if !picked.is_empty() && longest < near {
            break;
        }
        let at = at.filter(|_| longest > smallest)?;
        let scale = 1.0 / longest.sqrt();
        let column: Vec<f64> = gram.col(at).iter().map(|v| v * scale).collect();
        for (target, &c) in gram.col_iter_mut().zip(&column) {
            target.iter_mut().zip(&column).for_each(|(v, d)| *v -= c * d);
        }
        factor.col_mut(picked.len()).iter_mut().zip(&column).for_each(|(v, c)| *v = *c);
        picked.push(at);
    }
    let rows = Mat::from_fn(picked.len(), picked.len(), |i, j| match i.cmp(&j) {
        Ordering::Less => 0.0,
        _ => factor[(picked[i], j)],
    });
    Some((picked, rows))
}

/// The position of the largest entry of a matrix, if it exceeds `bound` in magnitude.
fn largest_above(matrix: &Mat<f64>, bound: f64) -> Option<(usize, usize)> {
    let mut largest = (bound, None);
    for (j, column) in matrix.col_iter().enumerate() {
        for (i, v) in column.iter().enumerate() {
            if v.abs() > largest.0 {
                largest = (v.abs(), Some((i, j)));
            }
        }
    }
    largest.1
}

/// Row `i` becomes pivot `j` and pivot `j` becomes row `i`: a rank-one update of the coefficients.
fn swap(coefficients: &mut Mat<f64>, i: usize, j: usize) {
    let pivot = coefficients[(i, j)];
    let update: Vec<f64> =
        (0..coefficients.ncols()).map(|k| (coefficients[(i, k)] - f64::from(u8::from(k == j))) / pivot).collect();
    let column: Vec<f64> = coefficients.col(j).iter().copied().collect();
    for (target, &scale) in coefficients.col_iter_mut().zip(&update) {
        target.iter_mut().zip(&column).for_each(|(v, c)| *v -= c * scale);
    }
    for (k, value) in update.iter().enumerate() {
        coefficients[(i, k)] = f64::from(u8::from(k == j)) - value;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_skeleton_rebuilds_every_row_with_small_coefficients(
            (m, r, values) in (1usize..30).prop_flat_map(|m| (Just(m), 1..=m))
                .prop_flat_map(|(m, r)| (Just(m), Just(r), proptest::collection::vec(-1.0f64..1.0, m * r))),
            decay in 0.5f64..1.0,
            zero_column in 0usize..40,
            bound in prop_oneof![Just(COEFFICIENT_BOUND), Just(1.1)],
        ) {
            let basis = Mat::from_fn(m, r, |i, j| if j == zero_column { 0.0 } else { values[i * r + j] * decay.powi(j as i32) });
            let skeleton = row_skeleton(basis.as_ref(), bound);
            let mut all: Vec<usize> = skeleton.pivots.iter().chain(&skeleton.others).copied().collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..m).collect::<Vec<_>>());
            prop_assert!(skeleton.coefficients.norm_max() <= bound);
            for (i, &row) in skeleton.others.iter().enumerate() {
                for k in 0..r {
                    let rebuilt: f64 = (0..r).map(|j| skeleton.coefficients[(i, j)] * basis[(skeleton.pivots[j], k)]).sum();
                    prop_assert!((rebuilt - basis[(row, k)]).abs() < 1e-9, "{} {}", rebuilt, basis[(row, k)]);
                }
            }
        }
    }

    #[test]
    fn growth_of_partial_pivoting_is_undone() {
        // Wilkinson's matrix with rows appended: L₁⁻¹ grows as 2^k, and swaps reduce the coefficients again.
        let r = 24;
        let basis = Mat::from_fn(r + 3, r, |i, j| match i.cmp(&j) {
            std::cmp::Ordering::Less => 0.0,
            std::cmp::Ordering::Equal => 1.0,
            std::cmp::Ordering::Greater => -1.0,
        });
        let skeleton = row_skeleton(basis.as_ref(), COEFFICIENT_BOUND);
        assert!(skeleton.coefficients.norm_max() <= COEFFICIENT_BOUND);
    }
}
