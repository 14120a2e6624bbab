//! The backward pass: gradients of the summed loss, one block at a time from the last to the first.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};

use super::addend::{Addend, Multiply};
use super::needs::Key;
use super::pieces::{Keep, Observation, Pass, named, remove_states, settle};
use super::statistics::Sums;
use super::windows::Targets;
use crate::error::{Failure, NON_FINITE_HINT};
use crate::model::{Block, Decoder, Head, Hidden, InputSite, Objective, Pooler, Walk, is_finite};
use crate::progress::{Progress, Stage};
use crate::store::{Array, Journal};

/// The backward pass through all blocks.
pub(super) struct Backward<'b, 'w> {
    pub decoder: &'b Decoder<'b>,
    pub walk: &'b Walk<'w>,
    pub targets: &'b [Targets],
    pub observation: Observation,
    pub multiply: Multiply,
}

impl Backward<'_, '_> {
    /// Propagates gradients back through all blocks. `last` has the states after the last block, `entered`
    /// the inputs of each block.
    pub fn run(
        &self,
        last: Hidden,
        entered: Vec<Hidden>,
        journal: &Journal,
        progress: &dyn Progress,
        keep: &mut Keep<'_>,
    ) -> Result<()> {
        let Self { decoder, walk, .. } = *self;
        let stage = progress.stage("gradients", (walk.n_tokens() * (decoder.n_blocks() + 1)) as u64, "tokens");
        // The gradient at the input of a block is stored before the block's sums: if the sums
        // exist, so does the gradient.
        let is_done = |block_idx: usize| journal.has(&Pass::Backward.key(block_idx));
        let n_left = (0..entered.len()).rev().find(|&block_idx| !is_done(block_idx)).map_or(0, |last| last + 1);
        for block_idx in n_left..entered.len() {
            let piece = journal.get(&Pass::Backward.key(block_idx))?;
            keep(named(piece.with_context(|| {
                format!("the stored sums of block {block_idx} are damaged; start over with `--restart`")
            })?)?)?;
        }
        let (mut gradient, of_head) = match journal.get(&gradient_key(n_left))? {
            Some(piece) => {
                stage.advance((walk.n_tokens() * (entered.len() + 1 - n_left)) as u64);
                let of_head = journal.get(&Pass::Head.key(0))?.map(named).transpose()?;
                (walk.restore(piece.rest())?, of_head)
            }
            None => {
                anyhow::ensure!(
                    n_left == entered.len(),
                    "the stored gradient of block {n_left} is damaged; start over with `--restart`"
                );
                stage.note("head");
                let mut sums = Sums::default();
                let gradient = self.at_head(&last, stage.as_ref(), &mut sums)?;
                let of_head = settle(journal, Pass::Head, 0, sums)?;
                (walk.settle(gradient, journal, &gradient_key(n_left))?, Some(of_head))
            }
        };
        keep(of_head.context("the stored sums of the head are damaged; start over with `--restart`")?)?;
        walk.release(last);
        // States of the blocks that the gradient has passed are not read again.
        remove_states(journal, n_left.saturating_sub(1)..entered.len());
        for (block_idx, x) in entered.into_iter().enumerate().take(n_left).rev() {
            let sums = self.at_block(block_idx, &gradient, &x, stage.as_ref())?;
            walk.release(x);
            gradient = walk.settle(gradient, journal, &gradient_key(block_idx))?;
            keep(settle(journal, Pass::Backward, block_idx, sums)?)?;
            journal.remove(&gradient_key(block_idx + 1));
            remove_states(journal, block_idx.checked_sub(1));
        }
        if self.observation.needs.vocabulary {
            keep(self.at_embeddings(&gradient, journal)?)?;
        }
        journal.remove(&gradient_key(0));
        Ok(())
    }

    /// Replaces the gradient at the output of a block by the gradient at its input `x`, and returns the sums.
    pub fn at_block(&self, block_idx: usize, gradient: &Hidden, x: &Hidden, stage: &dyn Stage) -> Result<Sums> {
        let Self { decoder, walk, observation, .. } = *self;
        stage.note(&format!("block {block_idx}"));
        let block = decoder.block(block_idx)?;
        let mut sums = Sums::for_gradients(&decoder.linears(block_idx), observation.needs);
        let place = walk.place();
        let through = |window_idx, gradient: &Tensor, x: &Tensor| {
            stage.advance(x.dim(0)? as u64);
            self.through_block(&block, x, gradient).with_context(|| place(window_idx))
        };
        walk.replace_windows(gradient, x, through, |addend| sums.add(addend))?;
        Ok(sums)
    }

    /// The gradients of the loss with respect to the last states, and the sums of the head.
    pub fn at_head(&self, last: &Hidden, stage: &dyn Stage, sums: &mut Sums) -> Result<Hidden> {
        let Self { decoder, walk, targets, .. } = *self;
        let (gradient, loss) = (walk.copy(last)?, Loss::of(decoder)?);
        if let (true, Loss::Tokens(head)) = (self.observation.needs.vocabulary, &loss) {
            *sums = Sums::for_vocabulary([Key::HeadGram, Key::HeadSquares], head.vocab_size(), head.width());
        }
        let of_window = |window_idx: usize, _: &Tensor, x: &Tensor| {
            stage.advance(x.dim(0)? as u64);
            let mut addend = Addend::default();
            let gradient = self.at_last(&loss, x, &targets[window_idx], &mut addend);
            Ok((gradient.with_context(|| walk.place()(window_idx))?, addend))
        };
        walk.replace_windows(&gradient, last, of_window, |addend| sums.add(addend))?;
        Ok(gradient)
    }

    /// The gradient with respect to the last states of a window, (n_tokens, hidden_size), and the addend of its head.
    fn at_last(&self, loss: &Loss, x: &Tensor, targets: &Targets, addend: &mut Addend) -> Result<Tensor> {
        let head = match loss {
            Loss::Tokens(head) => head,
            Loss::Pooled(pooler) => return pooler.norm_gradient(x),
            Loss::Sentence(pooler) => return pooler.probe_gradient(x, targets.probe),
        };
        if !self.observation.needs.vocabulary {
            return head.loss_gradient(x, &targets.rows, &targets.tokens, None);
        }
        let mut squares = vec![0.0; head.vocab_size()];
        let gradient = head.loss_gradient(x, &targets.rows, &targets.tokens, Some(&mut squares))?;
        addend.add_head(&head.inputs(x, &targets.rows)?, squares, self.multiply)?;
        Ok(gradient)
    }

    /// The sums of the embedding table, from the gradients at the input of the first block, and the sums of the head.
    pub fn at_embeddings(&self, gradient: &Hidden, journal: &Journal) -> Result<Vec<(String, Array)>> {
        let Self { decoder, walk, multiply, .. } = *self;
        let embeddings = decoder.embeddings()?;
        let (vocab_size, width) = (embeddings.vocab_size(), embeddings.width());
        let mut sums = Sums::for_vocabulary([Key::TableGram, Key::TokenCounts], vocab_size, width);
        let of_window = |window_idx: usize, states: &[Tensor]| {
            let ids = walk.ids(window_idx);
            let mut addend = Addend::default();
            addend.add_table(ids, vocab_size, &embeddings.gradient(ids, &states[0])?, multiply)?;
            Ok(addend)
        };
        walk.for_each_window(&[gradient], of_window, |_, addend| sums.add(addend))?;
        settle(journal, Pass::Table, 0, sums)
    }

    /// The gradient at the input `x` of a block from the gradient at its output, for one window (n_tokens,
    /// hidden_size), and the addends of the window.
    fn through_block(&self, block: &Block, x: &Tensor, gradient: &Tensor) -> Result<(Tensor, Addend)> {
        let Self { decoder, observation, multiply, .. } = *self;
        // Other windows go through the block at the same time, with taps of their own.
        let mut block = block.clone();
        let mut addend = Addend::default();
        let mut inputs: BTreeMap<InputSite, Tensor> = BTreeMap::new();
        let taps = block.tap_gradients();
        let variable = Var::from_tensor(&x.unsqueeze(0)?)?;
        let y = block.forward(&variable, self.walk.rope(), &mut |site, x| {
            inputs.insert(site, x.squeeze(0)?.detach());
            Ok(())
        })?;
        // The derivative of Σ y ⊙ ∂L/∂y with respect to x is ∂L/∂x; candle takes the gradients of the sum.
        let store = (y * gradient.unsqueeze(0)?)?.backward()?;
        let mut broken = None;
        for (slot, tap) in taps {
            let Some(x) = inputs.get(&slot.site()) else {
                // An expert without tokens in this window has no input.
                anyhow::ensure!(slot.expert.is_some(), "invariant: `{}` observed its input", slot.name());
                continue;
            };
            // candle silently stops gradients at operations without a backward pass.
            let gradient = tap.take().with_context(|| format!("no gradient reached `{}`", slot.name()))?;
            if !is_finite(&gradient)? {
                // The backward pass reaches later linears first.
                broken = broken.max(Some((slot.site(), slot)));
            }
            if observation.needs.output_gram {
                addend.add_output_gradients(slot, &gradient, observation.clip_gradients, multiply)?;
            }
            if observation.needs.squared_gradient {
                addend.add_squared_gradient(slot, x, &gradient)?;
            }
        }
        let gradient = store.get(&variable).context("no gradient reached the input of the block")?.squeeze(0)?;
        let what = match broken {
            Some((_, slot)) => format!("the gradient at the output of `{}`", decoder.module(block.index(), slot)),
            None if !is_finite(&gradient)? => {
                format!("the gradient at the input of `{}`", decoder.block_name(block.index()))
            }
            None => return Ok((gradient, addend)),
        };
        Err(Failure::numeric(format!("{what} is not finite")).hint(NON_FINITE_HINT).into())
    }
}

/// Whether the gradient at the output of a block of a journal is known, so that the states there are not read again;
/// block `n_blocks` is the head.
pub(super) fn is_passed(journal: &Journal, block_idx: usize, n_blocks: usize) -> bool {
    let has_sums = |block_idx: usize| journal.has(&Pass::Backward.key(block_idx));
    match block_idx < n_blocks {
        true => has_sums(block_idx),
        false => journal.has(&gradient_key(n_blocks)) || n_blocks.checked_sub(1).is_some_and(has_sums),
    }
}

/// The journal key of the gradient at the input of a block.
fn gradient_key(block_idx: usize) -> String {
    format!("gradient-{block_idx}")
}

/// The loss, as a function of the last states.
enum Loss {
    Tokens(Head),
    Pooled(Pooler),
    Sentence(Pooler),
}

impl Loss {
    fn of(decoder: &Decoder<'_>) -> Result<Self> {
        Ok(match decoder.objective() {
            Objective::NextToken | Objective::Masked => Self::Tokens(decoder.head()?),
            Objective::Pooled => Self::Pooled(decoder.pooler()?),
            Objective::Sentence => Self::Sentence(decoder.pooler()?),
        })
    }
}
