//! The narrower model as a checkpoint: which rows and columns of the source's tensors it has, and its config.

use std::collections::BTreeMap;

use anyhow::Result;

use super::context::{Context, Width};
use crate::checkpoint::{Checkpoint, Selected};
use crate::model::narrow::{column_dimension, narrowed_config, row_dimension};

/// The source with the channels and groups `kept` of each unit. Readers are not refitted.
///
/// # Errors
/// A tensor is absent.
pub(super) fn selected(context: &Context<'_>, width: Width, kept: &[Vec<usize>]) -> Result<Checkpoint> {
    let checkpoint = context.session.checkpoint;
    let mut selected: BTreeMap<String, Selected> = BTreeMap::new();
    let narrower = context.units.iter().zip(kept).filter(|(unit, kept)| kept.len() < unit.width());
    for (unit, kept) in narrower {
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
    let common = context.config.widths(0);
    let config = checkpoint.config().expect("invariant: a model that is narrowed has a config");
    let config = narrowed_config(config, context.architecture, &common, [width.channels, width.groups]);
    Ok(checkpoint.selected(&selected, config)?)
}
