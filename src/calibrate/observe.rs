//! The passes that collect statistics: forward through the blocks, and backward if gradients are needed.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::addend::{Addend, Multiply};
use super::backward::Backward;
use super::needs::Needs;
use super::pieces::{Keep, Observation, Pass, named, settle};
use super::statistics::Sums;
use super::windows::TargetedWindows;
use crate::model::{Decoder, Hidden, Walk, WalkLimits};
use crate::progress::Progress;
use crate::store::Journal;

/// Seconds of a calibration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seconds {
    /// Forward through all blocks.
    pub forward: f64,
    /// Back through all blocks; 0 if no statistic is of gradients.
    pub backward: f64,
}

/// Runs windows forward through the model, and the gradient of the summed loss of their targets backward if it is needed.
///
/// The backward pass works on one block at a time: the inputs of all blocks are stored (on disk beyond the cap of `limits`), and each
/// block is run again with candle's autograd. Blocks whose sums are in `journal` are not run again.
///
/// # Errors
/// A value is not finite, a linear receives no gradient, or the work folder cannot be written.
pub fn observe(
    decoder: &Decoder<'_>,
    TargetedWindows { windows, targets }: TargetedWindows<'_>,
    observation: Observation,
    limits: &WalkLimits,
    journal: &Journal,
    progress: &dyn Progress,
    keep: &mut Keep<'_>,
) -> Result<Seconds> {
    let started = Instant::now();
    let needs = observation.needs;
    let n_blocks = decoder.n_blocks();
    let last = if needs.gradients() { Pass::Backward.key(0) } else { Pass::Forward.key(n_blocks.saturating_sub(1)) };
    if journal.has(&last) {
        return replay(journal, n_blocks, needs, keep);
    }
    let mut walk = Walk::new(decoder, windows, limits)?;
    walk.reserve(gram_bytes(decoder, needs))?;
    let multiply = if walk.workers().count() > 1 { Multiply::Now } else { Multiply::WhenAdded };
    let mut hidden = walk.embed(decoder)?;
    // The inputs of each block, for the backward pass.
    let mut entered: Vec<Hidden> = Vec::new();
    {
        let stage = progress.stage("calibrate", (walk.n_tokens() * n_blocks) as u64, "tokens");
        for block_idx in 0..n_blocks {
            stage.note(&format!("block {block_idx}"));
            let states = format!("states-{block_idx}");
            let done = journal.get(&Pass::Forward.key(block_idx))?.zip(journal.get(&states)?);
            let after = if let Some((sums, after)) = done {
                keep(named(sums)?)?;
                stage.advance(walk.n_tokens() as u64);
                walk.restore(after.rest())?
            } else {
                let block = decoder.block(block_idx)?;
                let mut sums = Sums::for_inputs(&decoder.linears(block_idx), needs);
                let see = |addend: &mut Addend, site, x: &Tensor| addend.add_inputs(site, x, needs, multiply);
                let after = walk.observe(&hidden, decoder, &block, stage.as_ref(), see, |addend| {
                    sums.add(addend);
                    Ok(())
                })?;
                let after = walk.settle(after, journal, &states)?;
                keep(settle(journal, Pass::Forward, block_idx, sums)?)?;
                after
            };
            let before = std::mem::replace(&mut hidden, after);
            if needs.gradients() {
                entered.push(before);
            } else {
                walk.release(before);
                remove_states(journal, block_idx.checked_sub(1));
            }
        }
    }
    let forward = started.elapsed().as_secs_f64();
    let started = Instant::now();
    if needs.gradients() {
        let backward = Backward { decoder, walk: &walk, targets, observation, multiply };
        backward.run(hidden, entered, journal, progress, keep)?;
    }
    remove_states(journal, 0..n_blocks);
    let backward = if needs.gradients() { started.elapsed().as_secs_f64() } else { 0.0 };
    Ok(Seconds { forward, backward })
}

/// Bytes of the Grams that one batch adds to the sums of a block, in the larger of the two passes.
fn gram_bytes(decoder: &Decoder<'_>, needs: Needs) -> usize {
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

fn remove_states(journal: &Journal, blocks: impl IntoIterator<Item = usize>) {
    blocks.into_iter().for_each(|block_idx| journal.remove(&format!("states-{block_idx}")));
}

/// The sums of a calibration that is complete in the journal.
fn replay(journal: &Journal, n_blocks: usize, needs: Needs, keep: &mut Keep<'_>) -> Result<Seconds> {
    let passes = [Pass::Forward, Pass::Backward].into_iter().take(1 + usize::from(needs.gradients()));
    for key in passes.flat_map(|pass| (0..n_blocks).map(move |block_idx| pass.key(block_idx))) {
        let damaged =
            || format!("the stored piece `{key}` of the interrupted run is damaged; start over with `--restart`");
        keep(named(journal.get(&key)?.with_context(damaged)?)?)?;
    }
    remove_states(journal, 0..n_blocks);
    Ok(Seconds::default())
}
