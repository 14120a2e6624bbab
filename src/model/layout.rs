//! The two ways to store a matrix of low rank.

use serde::{Deserialize, Serialize};

/// How `B·A` (m, n) of rank r is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// `B` (m, r) and `A` (r, n): r (m + n) parameters, fewer than the matrix up to rank m n / (m + n)
    Factors,
    /// r rows of the product and the coefficients of the others in them: r (m + n - r) parameters, fewer at every rank (PIFA)
    #[default]
    Pivot,
}

impl Layout {
    pub const ALL: [Self; 2] = [Self::Factors, Self::Pivot];

    /// As flags and reports spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Factors => "factors",
            Self::Pivot => "pivot",
        }
    }

    /// Parameters of a matrix (m, n) of `rank`.
    pub fn n_parameters(self, rank: usize, (m, n): (usize, usize)) -> u64 {
        let factors = rank as u64 * (m + n) as u64;
        match self {
            Self::Factors => factors,
            Self::Pivot => factors - (rank * rank.min(m)) as u64,
        }
    }

    /// Largest rank with fewer parameters than the matrix: r (m + n) < m n for factors, r < min(m, n) for pivots.
    pub fn largest_saving_rank(self, (m, n): (usize, usize)) -> usize {
        match self {
            Self::Factors => break_even_rank(m, n),
            Self::Pivot => m.min(n).saturating_sub(1),
        }
    }
}

/// The factor `B` (m, rank) of a pivot layout, row-major, whose other factor are the pivot rows: rows of a unit matrix at the
/// pivots, coefficients elsewhere. `order` (m) holds the place of each row among pivots, then others.
pub fn expand_pivots(order: &[usize], coefficients: &[f32], rank: usize) -> Vec<f32> {
    let mut b = vec![0.0; order.len() * rank];
    for (row, place) in b.chunks_exact_mut(rank.max(1)).zip(order) {
        match place.checked_sub(rank) {
            None => row[*place] = 1.0,
            Some(other) => row.copy_from_slice(&coefficients[other * rank..][..rank]),
        }
    }
    b
}

/// Largest r with r (m + n) < m n.
pub fn break_even_rank(m: usize, n: usize) -> usize {
    (m * n).saturating_sub(1) / (m + n).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_saving_rank_is_the_last_that_saves() {
        for shape in [(64, 64), (172, 64), (1, 5), (2048, 5632)] {
            for layout in [Layout::Factors, Layout::Pivot] {
                let (r, dense) = (layout.largest_saving_rank(shape), (shape.0 * shape.1) as u64);
                assert!(r == 0 || layout.n_parameters(r, shape) < dense, "{shape:?} {layout:?}");
                assert!(layout.n_parameters(r + 1, shape) >= dense, "{shape:?} {layout:?}");
            }
        }
    }
}
