//! Rows that span all rows, with small coefficients: the maximum-volume submatrix (Goreinov, Oseledets, Savostyanov,
//! Tyrtyshnikov & Zamarashkin 2010).

use faer::linalg::triangular_solve::solve_unit_upper_triangular_in_place;
use faer::{Mat, MatRef, Par};

use super::orthonormal_columns;

/// `B = P [B_pivot; T B_pivot]`: r of the rows of a matrix (m, r), and the others in terms of them.
#[derive(Debug, Clone)]
pub struct RowSkeleton {
    /// The pivot rows, (r).
    pub pivots: Vec<usize>,
    /// The other rows, (m − r).
    pub others: Vec<usize>,
    /// `T` (m − r, r), no entry of which exceeds the bound in size.
    pub coefficients: Mat<f64>,
}

/// A loose bound on the coefficients. A swap under way to it doubles the volume of the pivot rows, so few are needed.
pub const COEFFICIENT_BOUND: f64 = 2.0;

/// Under this share of the largest pivot of the LU factorisation, columns are taken for dependent.
const DEPENDENT_SHARE: f64 = 1e-10;

/// The skeleton of `basis` (m, r), m ≥ r, with coefficients up to `bound` > 1 in size; dependent columns are replaced by independent ones first.
///
/// LU with partial pivoting picks the rows, `T = L₂ L₁⁻¹`; then, while an entry of `T` exceeds the bound, its row and its
/// pivot change places.
pub fn row_skeleton(basis: MatRef<'_, f64>, bound: f64) -> RowSkeleton {
    let (m, r) = (basis.nrows(), basis.ncols());
    assert!(m >= r, "invariant: a basis has no more columns than rows");
    let (lu, permutation) = lu(basis.to_owned()).unwrap_or_else(|| {
        lu(orthonormal_columns(basis.to_owned())).expect("invariant: orthonormal columns are independent")
    });
    // T L₁ = L₂, solved as L₁ᵀ Tᵀ = L₂ᵀ.
    let mut transposed = lu.subrows(r, m - r).transpose().to_owned(); // (r, m - r)
    solve_unit_upper_triangular_in_place(lu.subrows(0, r).transpose(), transposed.as_mut(), Par::Seq);
    let mut coefficients = transposed.transpose().to_owned();
    let (mut pivots, mut others) = (permutation[..r].to_vec(), permutation[r..].to_vec());
    while let Some((i, j)) = largest_above(&coefficients, bound) {
        swap(&mut coefficients, i, j);
        std::mem::swap(&mut others[i], &mut pivots[j]);
    }
    RowSkeleton { pivots, others, coefficients }
}

/// `P A = L U`, and the row order; none where a pivot vanishes.
fn lu(mut matrix: Mat<f64>) -> Option<(Mat<f64>, Vec<usize>)> {
    let order = super::solve::lu(&mut matrix);
    let pivots: Vec<f64> = (0..matrix.ncols()).map(|i| matrix[(i, i)].abs()).collect();
    let largest = pivots.iter().copied().fold(0.0, f64::max);
    let is_sound = pivots.iter().all(|&p| p > DEPENDENT_SHARE * largest);
    is_sound.then_some((matrix, order))
}

/// The largest entry of a matrix, where it exceeds `bound` in size.
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
        // Wilkinson's matrix, rows appended: L₁⁻¹ grows as 2^k, the swaps bring the coefficients back.
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
