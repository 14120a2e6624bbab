//! Seconds of a forward pass, as lrc runs it: a figure for comparing a model with a smaller one in the same run.

use std::time::Instant;

use anyhow::Result;

use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::model::{Decoder, Walk, WalkLimits, config};
use crate::progress::Silent;

/// Tokens of the pass, if the context of the model has as many.
const TOKENS: usize = 64;

/// Times that a block runs; the fastest counts.
const TRIALS: usize = 3;

/// Seconds in which one window goes through all blocks in f32, without loading weights, embedding, and head.
///
/// # Errors
/// The model cannot be run.
pub(super) fn seconds(checkpoint: &Checkpoint, device: &Device, memory_bytes: u64) -> Result<f64> {
    let decoder = Decoder::open(checkpoint)?.on(device);
    let n_tokens = config::window_length(checkpoint, None, Some(TOKENS))?.min(TOKENS);
    let vocab_size = decoder.embeddings()?.vocab_size().max(1) as u32;
    let windows = [(0..n_tokens as u32).map(|id| id % vocab_size).collect::<Vec<u32>>()];
    let folder = tempfile::tempdir()?;
    let walk = Walk::new(&decoder, &windows, &WalkLimits::new(memory_bytes, folder.path().into()))?;
    let mut hidden = walk.embed(&decoder)?;
    let mut seconds = 0.0;
    for block_idx in 0..decoder.n_blocks() {
        let block = decoder.block(block_idx)?;
        let mut fastest = f64::INFINITY;
        let mut next = None;
        for _ in 0..TRIALS {
            let started = Instant::now();
            next = Some(walk.branch(&hidden, &decoder, &block, &Silent)?);
            fastest = fastest.min(started.elapsed().as_secs_f64());
        }
        hidden = next.unwrap_or(hidden);
        seconds += fastest;
    }
    Ok(seconds)
}
