//! The passes that fill the statistics: forward through the blocks, and back where gradients are asked for.

use std::time::Instant;

use anyhow::Result;

use super::backward;
use super::statistics::{Needs, Sums};
use crate::model::{Decoder, Hidden, Walk, WalkLimits};
use crate::progress::Progress;

/// What is observed, and how.
#[derive(Debug, Clone, Copy)]
pub struct Observation {
    pub needs: Needs,
    /// Whether the gradients of tokens are clipped.
    pub clip_gradients: bool,
}

/// Seconds of a calibration.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seconds {
    pub forward: f64,
    pub backward: f64,
}

/// Sends `windows` through the model, and the gradient of their summed next-token loss back where it is needed. `keep`
/// gets the statistics of one block after another: of the inputs on the way up, of the gradients on the way down.
///
/// Gradients are those of one block at a time: the states that enter the blocks are kept (on disk past the cap of
/// `limits`), and each block is run again with candle's autograd.
///
/// # Errors
/// A value is not finite, a linear gets no gradient, or the work folder refuses.
pub fn observe(
    decoder: &Decoder<'_>,
    windows: &[Vec<u32>],
    observation: Observation,
    limits: &WalkLimits,
    progress: &dyn Progress,
    keep: &mut dyn FnMut(usize, Sums) -> Result<()>,
) -> Result<Seconds> {
    let started = Instant::now();
    let needs = observation.needs;
    let mut walk = Walk::new(decoder, windows, limits)?;
    let mut hidden = walk.embed(decoder)?;
    // The states that enter each block, where the way back needs them.
    let mut entered: Vec<Hidden> = Vec::new();
    {
        let stage = progress.stage("calibrate", (walk.n_tokens() * decoder.n_blocks()) as u64, "tokens");
        for block_idx in 0..decoder.n_blocks() {
            stage.note(&format!("block {block_idx}"));
            let block = decoder.block(block_idx)?;
            let mut sums = Sums::default();
            let mut observer = |site, x: &candle_core::Tensor| sums.add_inputs(site, x, needs);
            if needs.gradients() {
                let after = walk.branch(&hidden, decoder, &block, &mut observer, stage.as_ref())?;
                entered.push(std::mem::replace(&mut hidden, after));
            } else {
                walk.advance(&mut hidden, decoder, &block, &mut observer, stage.as_ref())?;
            }
            keep(block_idx, sums)?;
        }
    }
    let forward = started.elapsed().as_secs_f64();
    if !needs.gradients() {
        return Ok(Seconds { forward, backward: 0.0 });
    }
    let started = Instant::now();
    backward::run(decoder, &mut walk, hidden, entered, observation, progress, keep)?;
    Ok(Seconds { forward, backward: started.elapsed().as_secs_f64() })
}
