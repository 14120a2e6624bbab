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
        return Parts::Factors { rank, b, a };
    }
    let b_t = linalg::transposed_from_row_major(&b, m, rank); // (r, m)
    let RowSkeleton { pivots, others, coefficients } = linalg::row_skeleton(b_t.transpose());
    let mut order = vec![0; m];
    for (place, &row) in pivots.iter().chain(&others).enumerate() {
        order[row] = i32::try_from(place).expect("invariant: a linear has fewer than 2^31 outputs");
    }
    let pivot_rows: Vec<f32> = pivots.iter().flat_map(|&row| &b[row * rank..][..rank]).copied().collect();
    Parts::Pivot {
        rank,
        pivots: linalg::product_row_major(&pivot_rows, &a, rank, rank, n),
        coefficients: linalg::to_row_major(coefficients.as_ref()),
        order,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
                    Parts::Factors { b, a, .. } => b.len() + a.len(),
                    Parts::Pivot { pivots, coefficients, .. } => {
                        prop_assert!(coefficients.iter().all(|c| c.abs() <= 2.0));
                        pivots.len() + coefficients.len()
                    }
                };
                prop_assert_eq!(stored as u64, layout.n_parameters(rank, (m, n)));
                for (found, expected) in parts.product(m, n).iter().zip(&expected) {
                    prop_assert!((found - expected).abs() < 1e-4, "{} {}", found, expected);
                }
            }
        }
    }
}
