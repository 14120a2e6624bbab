//! One rank for every linear, whether it saves parameters or not; at full rank, a check that factoring loses nothing.

use super::{Allocator, Choice, ErrorCurve, Shape};

pub(super) struct Fixed {
    pub rank: usize,
}

impl Allocator for Fixed {
    fn from_shapes(&self, shapes: &[Shape], _: f64) -> Option<Vec<Choice>> {
        Some(shapes.iter().map(|&shape| Choice::Rank(self.max_rank(shape))).collect())
    }

    fn from_curves(&self, shapes: &[Shape], _: &[ErrorCurve], _: f64) -> Vec<Choice> {
        shapes.iter().map(|&shape| Choice::Rank(self.max_rank(shape))).collect()
    }

    fn max_rank(&self, (m, n): Shape) -> usize {
        self.rank.min(m).min(n)
    }
}
