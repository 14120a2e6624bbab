//! One rank for every linear, whether it saves parameters or not; at full rank, a check that factoring loses nothing.

use super::{Allocator, Choice, Item, Rules, Spectra};

pub(super) struct Fixed {
    pub rank: usize,
}

impl Allocator for Fixed {
    fn spectra(&self) -> Spectra {
        Spectra::None
    }

    fn choices(&self, items: &[Item<'_>], _: &Rules) -> Vec<Choice> {
        items.iter().map(|item| Choice::Rank(self.rank.min(item.shape.0).min(item.shape.1))).collect()
    }
}
