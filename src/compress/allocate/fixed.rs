//! One rank for every linear, whether it saves parameters or not; at full rank, a check that factoring loses nothing.

use super::{Allocator, Choice, ErrorCurve, Shape};

pub(super) struct Fixed {
    pub rank: usize,
}

impl Allocator for Fixed {
    fn by_shapes(&self, shapes: &[Shape], _: f64) -> Option<Vec<Choice>> {
        Some(self.choices(shapes))
    }

    fn by_spectra(&self, shapes: &[Shape], _: &[ErrorCurve], _: f64) -> Vec<Choice> {
        self.choices(shapes)
    }
}

impl Fixed {
    fn choices(&self, shapes: &[Shape]) -> Vec<Choice> {
        shapes.iter().map(|&(m, n)| Choice::Rank(self.rank.min(m).min(n))).collect()
    }
}
