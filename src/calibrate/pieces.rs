//! The sums of a block, on their way from a pass to their receiver and in the journal.

use anyhow::Result;
use serde_json::json;

use super::needs::Needs;
use super::statistics::Sums;
use crate::store::{Array, Journal, Piece, Values};

/// The statistics to collect.
#[derive(Debug, Clone, Copy)]
pub struct Observation {
    /// The sums to take. A backward pass runs if any is of gradients.
    pub needs: Needs,
    /// Whether per-token gradients are clipped.
    pub clip_gradients: bool,
}

/// Receives the statistics of each block in turn, by name: of inputs in the forward pass, of gradients in the backward
/// pass.
pub type Keep<'a> = dyn FnMut(Vec<(String, Array)>) -> Result<()> + 'a;

/// A pass through the model.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pass {
    Forward,
    Backward,
    /// Through the head, before the blocks; it has no block.
    Head,
    /// Through the embeddings, behind the blocks; it has no block.
    Table,
}

impl Pass {
    /// The journal key of the sums of a block.
    pub fn key(self, block_idx: usize) -> String {
        match self {
            Self::Forward => format!("forward-{block_idx}"),
            Self::Backward => format!("backward-{block_idx}"),
            Self::Head => "backward-head".into(),
            Self::Table => "backward-table".into(),
        }
    }
}

/// The journal key of the states of all windows after a block.
pub(super) fn states_key(block_idx: usize) -> String {
    format!("states-{block_idx}")
}

/// The journal key of the states before a block, of a part of the windows; before block `n_blocks`: after the last one.
pub(super) fn states_of_part(block_idx: usize, part: usize) -> String {
    format!("states-before-{block_idx}-part-{part}")
}

/// The journal key of the gradients at these states.
pub(super) fn gradient_of_part(block_idx: usize, part: usize) -> String {
    format!("gradient-before-{block_idx}-part-{part}")
}

/// The journal key of the states that enter a block, of the windows whose gradients are taken, if they are not all.
pub(super) fn entered_key(block_idx: usize) -> String {
    format!("entered-{block_idx}")
}

/// Removes the states after some blocks from the journal.
pub(super) fn remove_states(journal: &Journal, blocks: impl IntoIterator<Item = usize>) {
    for block_idx in blocks {
        journal.remove(&states_key(block_idx));
        journal.remove(&entered_key(block_idx + 1));
    }
}

/// Stores the sums of a block in the journal.
pub(super) fn settle(journal: &Journal, pass: Pass, block_idx: usize, sums: Sums) -> Result<Vec<(String, Array)>> {
    let sums = sums.pack(block_idx)?.into_iter().map(|(name, values)| (name, Values::from(values)));
    let (names, arrays): (Vec<String>, Vec<Values>) = sums.unzip();
    named(journal.put(&pass.key(block_idx), json!(names), arrays)?)
}

/// The sums in a piece of the journal.
pub(super) fn named(piece: Piece) -> Result<Vec<(String, Array)>> {
    let names: Vec<String> = serde_json::from_value(piece.fields.clone())?;
    Ok(names.into_iter().zip(piece.rest()).collect())
}
