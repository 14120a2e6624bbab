//! Statistics of the narrower model: those of the source, of what is kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::context::{Chosen, Context};
use crate::calibrate::{Key, SelectedStatistic};
use crate::model::LinearId;
use crate::model::inventory::LinearInfo;

/// The statistics that the narrower model has from others, by name.
pub(super) fn selected(
    context: &Context<'_>,
    linears: &[LinearInfo],
    chosen: &Chosen,
    kept: &[Vec<usize>],
) -> BTreeMap<String, SelectedStatistic> {
    let mut features: BTreeMap<String, (Arc<[usize]>, usize)> = BTreeMap::new();
    for (unit, kept) in context.units.iter().zip(kept).filter(|(unit, kept)| kept.len() < unit.width()) {
        let of = |linear: &LinearInfo| linear.id.expect("invariant: linears of a unit have a role").slot;
        let columns: Arc<[usize]> = unit.columns(kept).into();
        let name = Key::InputGram(of(&unit.reader).site()).name(unit.block);
        features.insert(name, (columns, unit.reader.in_features));
        for maker in &unit.makers {
            let rows: Arc<[usize]> = unit.rows(maker, kept, context.architecture).into();
            features.insert(Key::OutputGram(of(maker)).name(unit.block), (rows, maker.out_features));
        }
    }
    let blocks = (0..context.config.num_hidden_layers).filter(|block| !chosen.dropped.contains(block));
    let at: BTreeMap<usize, usize> = blocks.enumerate().map(|(at, block)| (block, at)).collect();
    let mut selected = BTreeMap::new();
    for LinearId { block, slot } in linears.iter().filter_map(|linear| linear.id) {
        let Some(&to) = at.get(&block) else { continue };
        for key in [Key::InputGram(slot.site()), Key::OutputGram(slot)] {
            let (of, name) = (key.name(block), key.name(to));
            let features = features.get(&of).cloned();
            if features.is_some() || name != of {
                selected.insert(name, SelectedStatistic { of, features });
            }
        }
    }
    selected
}
