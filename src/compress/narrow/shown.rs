//! The narrower model as a checkpoint: which rows and columns of the source's tensors it has, and its config.

use std::collections::BTreeMap;

use anyhow::Result;

use super::context::{Chosen, Context};
use crate::checkpoint::{Checkpoint, Selected};
use crate::model::depth;
use crate::model::narrow::{column_dimension, experts_that_stay, narrowed_config, row_dimension};
use crate::model::widths::Widths;

/// The names of tensors of a model with fewer blocks or experts that are others in the source; `None` for those left out.
pub(super) type Names = BTreeMap<String, Option<String>>;

/// A model without the blocks that were dropped, and without experts of which nothing is kept.
pub(super) fn fewer(
    context: &Context<'_>,
    narrowed: Checkpoint,
    chosen: &Chosen,
    kept: &[Vec<usize>],
) -> (Checkpoint, Names) {
    let experts = experts_that_stay(context.units, kept);
    if !experts.is_empty() {
        return depth::with_experts(&narrowed, context.architecture, &experts);
    }
    if chosen.dropped.is_empty() {
        return (narrowed, Names::new());
    }
    let kept: Vec<usize> = (0..context.config.num_hidden_layers).filter(|b| !chosen.dropped.contains(b)).collect();
    depth::with_blocks(&narrowed, context.architecture, &kept)
}

/// The source with the channels and groups `kept` of each unit, in that order, and the rows of routers of the experts that
/// stay. Readers are not refitted, and experts of which nothing is kept are there.
///
/// # Errors
/// A tensor is absent.
pub(super) fn selected(context: &Context<'_>, kept: &[Vec<usize>]) -> Result<Checkpoint> {
    let checkpoint = context.checkpoint;
    let mut selected: BTreeMap<String, Selected> = BTreeMap::new();
    for (block, experts) in experts_that_stay(context.units, kept) {
        let router = depth::router(checkpoint, context.architecture, block);
        selected.extend(router.map(|router| (router, Selected { dimension: 0, indices: experts.into() })));
    }
    let stay = context.units.iter().zip(kept).filter(|(_, kept)| !kept.is_empty());
    for (unit, kept) in stay.filter(|(unit, kept)| unit.is_changed(kept)) {
        for maker in &unit.makers {
            let rows = unit.rows(maker, kept, context.architecture);
            let biases = maker.bias_names().into_iter().filter(|name| checkpoint.info(name).is_some());
            for bias in biases {
                selected.insert(bias, Selected { dimension: 0, indices: rows.clone().into() });
            }
            let weight = Selected { dimension: row_dimension(maker), indices: rows.into() };
            selected.insert(maker.weight_name(), weight);
        }
        let columns = Selected { dimension: column_dimension(&unit.reader), indices: unit.columns(kept).into() };
        selected.insert(unit.reader.weight_name(), columns);
    }
    let mut widths: Vec<Widths> = (0..context.config.num_hidden_layers).map(|b| context.config.widths(b)).collect();
    context.units.iter().zip(kept).for_each(|(unit, kept)| unit.narrow(&mut widths[unit.block], kept.len()));
    let config = checkpoint.config().expect("invariant: a model that is narrowed has a config");
    let config = narrowed_config(config, context.architecture, context.config, &widths);
    Ok(checkpoint.selected(&selected, config)?)
}
