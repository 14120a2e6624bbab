//! The passes that collect statistics: forward through the blocks, and backward if gradients are needed.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::addend::{Addend, Multiply};
use super::backward::{Backward, is_passed};
use super::needs::Needs;
use super::pieces::{Keep, Observation, Pass, entered_key, named, remove_states, settle, states_key};
use super::statistics::Sums;
use super::windows::TargetedWindows;
use crate::model::{Decoder, Hidden, Walk, WalkLimits};
use crate::progress::{Progress, Stage};
use crate::store::Journal;

/// Seconds of a calibration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seconds {
    /// Forward through all blocks.
    pub forward: f64,
    /// Back through all blocks; 0 if no statistic is of gradients.
    pub backward: f64,
}

/// Runs windows forward through the model, and the gradient of the summed loss of their targets
/// backward if it is needed.
///
/// The backward pass works on one block at a time: the inputs of all blocks are stored (on disk beyond the cap of
/// `limits`) for the windows whose gradients are taken, and each block is run again with candle's autograd. Blocks
/// whose sums are in `journal` are not run again.
///
/// # Errors
/// A value is not finite, a linear receives no gradient, or the work folder cannot be written.
pub fn observe(
    decoder: &Decoder<'_>,
    TargetedWindows { windows, targets, n_gradients }: TargetedWindows<'_>,
    observation: Observation,
    limits: &WalkLimits,
    journal: &Journal,
    progress: &dyn Progress,
    keep: &mut Keep<'_>,
) -> Result<Seconds> {
    let started = Instant::now();
    let needs = observation.needs;
    let n_blocks = decoder.n_blocks();
    if journal.has(&last_key(n_blocks, needs)) {
        return replay(journal, n_blocks, needs, keep);
    }
    let mut walk = Walk::in_two(decoder, windows, n_gradients, limits)?;
    walk.reserve(gram_bytes(decoder, needs))?;
    let back = walk.first(n_gradients)?;
    let mut hidden = walk.embed(decoder)?;
    // The inputs of each block, for the backward pass.
    let mut entered: Vec<Hidden> = Vec::new();
    {
        let stage = progress.stage("calibrate", (walk.n_tokens() * n_blocks) as u64, "tokens");
        for block_idx in 0..n_blocks {
            stage.note(&format!("block {block_idx}"));
            let done = journal.get(&Pass::Forward.key(block_idx))?;
            let after = if let Some((sums, after)) = done.zip(restored(&walk, &back, journal, block_idx, n_blocks)?) {
                keep(named(sums)?)?;
                stage.advance(walk.n_tokens() as u64);
                after
            } else {
                anyhow::ensure!(
                    hidden.n_batches() == walk.n_batches(),
                    "the stored states before block {block_idx} are damaged; start over with `--restart`"
                );
                let (after, sums) = through(&walk, decoder, &hidden, block_idx, needs, stage.as_ref())?;
                let after = walk.settle(after, journal, &states_key(block_idx))?;
                keep(settle(journal, Pass::Forward, block_idx, sums)?)?;
                after
            };
            let before = std::mem::replace(&mut hidden, after);
            if needs.gradients() {
                entered.push(narrowed(&walk, &back, before, journal, block_idx)?);
            } else {
                walk.release(before);
                remove_states(journal, block_idx.checked_sub(1));
            }
        }
    }
    let forward = started.elapsed().as_secs_f64();
    let started = Instant::now();
    if needs.gradients() {
        let backward = Backward { decoder, walk: &back, targets, observation, multiply: multiply(&walk) };
        backward.run(back.narrow(hidden), entered, journal, progress, keep)?;
    }
    remove_states(journal, 0..n_blocks);
    let backward = if needs.gradients() { started.elapsed().as_secs_f64() } else { 0.0 };
    Ok(Seconds { forward, backward })
}

/// When the Grams of a walk are multiplied: its batches side by side, or each with all threads.
pub(super) fn multiply(walk: &Walk<'_>) -> Multiply {
    if walk.workers().count() > 1 { Multiply::Now } else { Multiply::WhenAdded }
}

/// Sends all windows through a block: the states after it, and the sums of its inputs.
pub(super) fn through(
    walk: &Walk<'_>,
    decoder: &Decoder<'_>,
    hidden: &Hidden,
    block_idx: usize,
    needs: Needs,
    stage: &dyn Stage,
) -> Result<(Hidden, Sums)> {
    let block = decoder.block(block_idx)?;
    let mut sums = Sums::for_inputs(&decoder.linears(block_idx), needs);
    let multiply = multiply(walk);
    let see = |addend: &mut Addend, site, x: &Tensor| addend.add_inputs(site, x, needs, multiply);
    let after = walk.observe(hidden, decoder, &block, stage, see, |addend| sums.add(addend))?;
    Ok((after, sums))
}

/// The key of the last piece of a calibration.
fn last_key(n_blocks: usize, needs: Needs) -> String {
    match (needs.vocabulary, needs.gradients()) {
        (true, _) => Pass::Table.key(0),
        (false, true) => Pass::Backward.key(0),
        (false, false) => Pass::Forward.key(n_blocks.saturating_sub(1)),
    }
}

/// Bytes of the Grams that one batch adds to the sums of a block, in the larger of the two passes.
pub(super) fn gram_bytes(decoder: &Decoder<'_>, needs: Needs) -> usize {
    let of_block = |block_idx| {
        let linears = decoder.linears(block_idx);
        let mut inputs: Vec<_> = linears.iter().map(|&(slot, [_, n])| (slot.site(), n)).collect();
        inputs.dedup();
        let inputs: usize = inputs.iter().map(|(_, n)| n * n).sum();
        let outputs: usize = linears.iter().map(|(_, [m, _])| m * m).sum();
        4 * (inputs * usize::from(needs.input_gram)).max(outputs * usize::from(needs.output_gram))
    };
    (0..decoder.n_blocks()).map(of_block).max().unwrap_or(0)
}

/// The states after a block of an earlier run: of all windows, of those that go back, or of none if the
/// gradient there is known.
fn restored(
    walk: &Walk<'_>,
    back: &Walk<'_>,
    journal: &Journal,
    block_idx: usize,
    n_blocks: usize,
) -> Result<Option<Hidden>> {
    if let Some(whole) = journal.get(&states_key(block_idx))? {
        return walk.restore(whole.rest()).map(Some);
    }
    match journal.get(&entered_key(block_idx + 1))? {
        Some(few) => back.restore(few.rest()).map(Some),
        None => Ok(is_passed(journal, block_idx + 1, n_blocks).then(Hidden::default)),
    }
}

/// Keeps the states before a block for the windows that go back, and removes the others from the store and the journal.
fn narrowed(walk: &Walk<'_>, back: &Walk<'_>, before: Hidden, journal: &Journal, block_idx: usize) -> Result<Hidden> {
    if back.n_batches() == walk.n_batches() || before.n_batches() < walk.n_batches() {
        return Ok(before);
    }
    let few = back.narrow(before);
    // Embeddings are not in the journal.
    let Some(previous) = block_idx.checked_sub(1) else { return Ok(few) };
    let few = back.settle(few, journal, &entered_key(block_idx))?;
    journal.remove(&states_key(previous));
    Ok(few)
}

/// The sums of a calibration that is complete in the journal.
fn replay(journal: &Journal, n_blocks: usize, needs: Needs, keep: &mut Keep<'_>) -> Result<Seconds> {
    let passes = [Pass::Forward, Pass::Backward].into_iter().take(1 + usize::from(needs.gradients()));
    let of_blocks = passes.flat_map(|pass| (0..n_blocks).map(move |block_idx| pass.key(block_idx)));
    let of_vocabulary = [Pass::Head, Pass::Table].map(|pass| pass.key(0)).into_iter().filter(|_| needs.vocabulary);
    for key in of_blocks.chain(of_vocabulary) {
        let damaged =
            || format!("the stored piece `{key}` of the interrupted run is damaged; start over with `--restart`");
        keep(named(journal.unread(&key)?.with_context(damaged)?)?)?;
    }
    remove_states(journal, 0..n_blocks);
    Ok(Seconds::default())
}
