//! The pivot layout (PIFA, Zhao et al. 2025): rows of `B·A` and the coefficients of the others in them.

use crate::formats::Parts;
use crate::linalg::{self, RowSkeleton};
use crate::model::Layout;

use super::low_rank::LowRank;

/// Lays out a pair for a matrix (m, n). Pivots are rows of the largest volume among the rows of `B`, so that no
/// coefficient exceeds 2 and storage in 16 bits costs no more than that of the factors.
///
/// # Panics
/// When the pair does not belong to a matrix of that shape.
pub(super) fn lay_out(layout: Layout, pair: LowRank, (m, n): (usize, usize)) -> Parts {
    let LowRank { rank, b, a } = pair;
    if layout == Layout::Factors {
        return Parts::Factors { rank, b: b.into(), a: a.into() };
    }
    let b_t = linalg::transposed_from_row_major(&b, m, rank); // (r, m)
    let RowSkeleton { pivots, others, coefficients } = linalg::row_skeleton(b_t.transpose(), linalg::COEFFICIENT_BOUND);
    let order = order(&pivots, &others);
    let pivot_rows: Vec<f32> = pivots.iter().flat_map(|&row| &b[row * rank..][..rank]).copied().collect();
    Parts::Pivot {
        rank,
        pivots: linalg::product_row_major(&pivot_rows, &a, rank, rank, n).into(),
        coefficients: linalg::to_row_major(coefficients.as_ref()).into(),
        order,
    }
}

/// The place of every row among pivots, then others.
pub(super) fn order(pivots: &[usize], others: &[usize]) -> Vec<i32> {
    let mut order = vec![0; pivots.len() + others.len()];
    for (place, &row) in pivots.iter().chain(others).enumerate() {
        order[row] = i32::try_from(place).expect("invariant: a linear has fewer than 2^31 outputs");
    }
    order
}

/// The rows of `B` (m, r) that became pivots, (r, r) in the order of the pivots: with them the pair that was laid out, whose
/// ranks are in order of significance, is found again. None for factors, which keep that order.
pub(super) fn order_of_ranks(parts: &Parts, b: &[f32]) -> Option<Vec<f32>> {
    let Parts::Pivot { rank, order, .. } = parts else { return None };
    let mut rows = vec![0.0; rank * rank];
    for (row, &place) in b.chunks_exact((*rank).max(1)).zip(order) {
        if let Some(to) = rows.chunks_exact_mut((*rank).max(1)).nth(place as usize) {
            to.copy_from_slice(row);
        }
    }
    Some(rows)
}

/// The pair behind a pivot layout, from the factors `b` (m, r) and `a` (r, n) of its parts (pivot rows, and coefficients with
/// rows of a unit matrix) and its [`order_of_ranks`]; none where that is singular.
pub(super) fn reordered(LowRank { rank, b, a }: LowRank, order: &[f32], (m, n): (usize, usize)) -> Option<LowRank> {
    let order_t = linalg::transposed_from_row_major(order, rank, rank);
    let a_t = linalg::transposed_from_row_major(&a, rank, n); // (n, r)
    // B = [I; T] B_pivot, A = B_pivot⁻¹ P
    let solved = linalg::solve(order_t.transpose(), a_t.transpose())?;
    let b = linalg::product_row_major(&b, order, m, rank, rank);
    Some(LowRank { rank, b, a: linalg::to_row_major(solved.as_ref()) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::layout::expand_pivots;

    proptest! {
        #[test]
        fn both_layouts_are_one_matrix(
            (m, n, rank, values) in (1usize..12, 1usize..12).prop_flat_map(|(m, n)| (Just(m), Just(n), 1..=m.min(n)))
                .prop_flat_map(|(m, n, r)| (Just(m), Just(n), Just(r), proptest::collection::vec(-1.0f32..1.0, r * (m + n))))
        ) {
            let pair = LowRank { rank, b: values[..m * rank].to_vec(), a: values[m * rank..].to_vec() };
            let expected = linalg::product_row_major(&pair.b, &pair.a, m, rank, n);
            for layout in [Layout::Factors, Layout::Pivot] {
                let parts = lay_out(layout, pair.clone(), (m, n));
                let stored: usize = match &parts {
                    Parts::Factors { b, a, .. } => b.values().len() + a.values().len(),
                    Parts::Pivot { pivots, coefficients, .. } => {
                        prop_assert!(coefficients.values().iter().all(|c| c.abs() <= 2.0));
                        pivots.values().len() + coefficients.values().len()
                    }
                };
                prop_assert_eq!(stored as u64, layout.n_parameters(rank, (m, n)));
                if let Parts::Pivot { pivots, coefficients, order: places, .. } = &parts {
                    let places: Vec<usize> = places.iter().map(|&p| p as usize).collect();
                    let b = expand_pivots(&places, &coefficients.values(), rank);
                    let stored = LowRank { rank, b, a: pivots.values().into_owned() };
                    let order = order_of_ranks(&parts, &pair.b).unwrap();
                    // Rows that all but depend on each other have no stable inverse.
                    if let Some(again) = reordered(stored, &order, (m, n)) {
                        prop_assert!(again.b.iter().zip(&pair.b).all(|(x, y)| (x - y).abs() < 1e-4));
                    }
                }
                for (found, expected) in parts.product(m, n).iter().zip(&expected) {
                    prop_assert!((found - expected).abs() < 1e-4, "{} {}", found, expected);
                }
            }
        }
    }
}
