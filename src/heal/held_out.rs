//! Perplexities of the held-out windows, before and after.

use anyhow::Result;

use super::tensors::{Healed, tensors};
use crate::checkpoint::Checkpoint;
use crate::model::{Decoder, Objective, Scored, Trained, Walk, WalkLimits};
use crate::progress::{Progress, Stage};
use crate::report::HeldOutPerplexity;

/// The perplexities of the teacher and of the student, without and with what was `healed`; `None` for models that predict
/// no next token.
///
/// # Errors
/// A model cannot be read or run.
pub(super) fn perplexities(
    [teacher, student]: [&Decoder<'_>; 2],
    checkpoint: &Checkpoint,
    healed: &Healed,
    windows: &[Vec<u32>],
    limits: &WalkLimits,
    progress: &dyn Progress,
) -> Result<Option<HeldOutPerplexity>> {
    if teacher.objective() != Objective::NextToken {
        return Ok(None);
    }
    let n_tokens: usize = windows.iter().map(Vec::len).sum();
    let stage = progress.stage("perplexity", (3 * n_tokens * (teacher.n_blocks() + 1)) as u64, "tokens");
    let of = |decoder: &Decoder<'_>| perplexity(decoder, windows, limits, stage.as_ref());
    let variables = tensors(healed, checkpoint, student.device())?;
    let trained = Trained { below: checkpoint, variables: &variables };
    Ok(Some(HeldOutPerplexity {
        teacher: of(teacher)?,
        before: of(student)?,
        after: of(&student.with_weights(&trained))?,
    }))
}

fn perplexity(decoder: &Decoder<'_>, windows: &[Vec<u32>], limits: &WalkLimits, stage: &dyn Stage) -> Result<f64> {
    let walk = Walk::new(decoder, windows, limits)?;
    let states = walk.embed(decoder)?;
    for block_idx in 0..decoder.n_blocks() {
        walk.advance(&states, decoder, &decoder.block(block_idx)?, stage)?;
    }
    let nlls = walk.score(&states, decoder, &Scored::all_but_first(windows), stage)?.concat();
    Ok((nlls.iter().sum::<f64>() / nlls.len().max(1) as f64).exp())
}
