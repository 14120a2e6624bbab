//! One rank for every linear, whether or not it saves parameters; at full rank it checks that factoring loses nothing.

use super::allocator::{Allocator, Spectra};
use super::item::{Item, Pick, Rules};

pub(super) struct Fixed {
    pub rank: usize,
}

impl Allocator for Fixed {
    fn spectra(&self) -> Spectra {
        Spectra::None
    }

    fn choices(&self, items: &[Item<'_>], _: &Rules) -> Vec<Pick> {
        items.iter().map(|item| Pick::Candidate(self.rank.min(item.ladder().largest_rank()))).collect()
    }
}
