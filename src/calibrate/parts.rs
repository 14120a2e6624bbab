//! A calibration in parts that separate processes make, with the sums of [`super::observe`] to the last bit.
//!
//! Windows are independent of each other until their sums are added, but sums in f64 depend on the order of their terms:
//! a sum of partial sums is another number. So parts of the windows make no sums. They keep the states before every
//! block and the gradients there ([`Parts::walk`]); the sums of a block are made from those of all windows, batch after
//! batch in their order ([`Parts::sums`]). States are smaller than Grams, too: 4 d bytes per token and block, where the
//! Grams of one window alone take 2 n² bytes per input of n features. The price is a second pass through every block.

use std::ops::Range;

use anyhow::{Context, Result};

use super::addend::Multiply;
use super::backward::Backward;
use super::needs::Needs;
use super::observe::{gram_bytes, multiply, through};
use super::pieces::{Observation, Pass, gradient_of_part, settle, states_of_part};
use super::statistics::Sums;
use super::windows::TargetedWindows;
use crate::model::{Decoder, Hidden, Walk, WalkLimits};
use crate::progress::Progress;
use crate::store::Journal;

/// A calibration, and the journal that has the pieces of all parts so far.
pub(crate) struct Parts<'a> {
    pub decoder: &'a Decoder<'a>,
    pub windows: TargetedWindows<'a>,
    pub observation: Observation,
    pub limits: &'a WalkLimits,
    pub journal: &'a Journal,
    pub progress: &'a dyn Progress,
}

impl Parts<'_> {
    /// Tokens of the batches in which the windows go through the model, which are divided among parts, and how many of
    /// the first batches go back.
    ///
    /// # Errors
    /// As [`Walk::new`].
    pub fn batches(&self) -> Result<(Vec<usize>, usize)> {
        let all = self.all()?;
        Ok((all.batch_tokens().collect(), all.first(self.windows.n_gradients)?.n_batches()))
    }

    fn all(&self) -> Result<Walk<'_>> {
        Walk::in_two(self.decoder, self.windows.windows, self.windows.n_gradients, self.limits)
    }

    /// Keeps the states of a part of the windows, `batches`, before every block, and the gradients at these states if a
    /// statistic is of gradients.
    ///
    /// # Errors
    /// A value is not finite, or the journal cannot be written.
    pub fn walk(&self, part: usize, batches: Range<usize>) -> Result<()> {
        let Self { decoder, journal, .. } = *self;
        let (needs, n_blocks) = (self.observation.needs, decoder.n_blocks());
        let all = self.all()?;
        let walk = all.of_batches(batches.clone())?;
        // States behind the last block are read for gradients alone.
        let last = if needs.gradients() { n_blocks } else { n_blocks.saturating_sub(1) };
        let mut entered: Vec<Hidden> = Vec::new();
        {
            let stage = self.progress.stage("calibrate", (walk.n_tokens() * last) as u64, "tokens");
            for block_idx in 0..=last {
                let key = states_of_part(block_idx, part);
                if let Some(piece) = journal.get(&key)? {
                    entered.push(walk.restore(piece.rest())?);
                    continue;
                }
                stage.note(&format!("block {block_idx}"));
                let made = match entered.last() {
                    None => walk.embed(decoder)?,
                    Some(before) => walk.branch(before, decoder, &decoder.block(block_idx - 1)?, stage.as_ref())?,
                };
                entered.push(walk.settle(made, journal, &key)?);
            }
        }
        if !needs.gradients() {
            return Ok(());
        }
        let n_back = all.first(self.windows.n_gradients)?.n_batches();
        let back = all.of_batches(batches.start.min(n_back)..batches.end.min(n_back))?;
        self.walk_back(part, &back, entered)
    }

    /// Keeps the gradients at the states `entered` of a part of the windows.
    fn walk_back(&self, part: usize, back: &Walk<'_>, mut entered: Vec<Hidden>) -> Result<()> {
        let journal = self.journal;
        // Nothing is summed here.
        let observation = Observation { needs: Needs::default(), ..self.observation };
        let backward = self.backward(back, observation, Multiply::WhenAdded);
        let stage = self.progress.stage("gradients", (back.n_tokens() * entered.len()) as u64, "tokens");
        let mut gradient: Option<Hidden> = None;
        while let Some(states) = entered.pop() {
            let (states, key) = (back.narrow(states), gradient_of_part(entered.len(), part));
            let found = journal.get(&key)?.map(|piece| back.restore(piece.rest())).transpose()?;
            let made = match (found, gradient) {
                (Some(found), _) => found,
                (None, None) => {
                    let made = backward.at_head(&states, stage.as_ref(), &mut Sums::default())?;
                    back.settle(made, journal, &key)?
                }
                (None, Some(gradient)) => {
                    backward.at_block(entered.len(), &gradient, &states, stage.as_ref())?;
                    back.settle(gradient, journal, &key)?
                }
            };
            back.release(states);
            gradient = Some(made);
        }
        Ok(())
    }

    /// Keeps the sums of a block over all windows, from the states of all `n_parts` parts.
    ///
    /// # Errors
    /// A piece is absent or damaged, a sum is not finite, or the journal cannot be written.
    pub fn sums(&self, block_idx: usize, n_parts: usize) -> Result<()> {
        let Self { decoder, journal, observation, .. } = *self;
        let is_done = |pass: Pass| journal.has(&pass.key(block_idx));
        let mut all = self.all()?;
        all.reserve(gram_bytes(decoder, observation.needs))?;
        let stage = self.progress.stage("sums", all.n_tokens() as u64, "tokens");
        stage.note(&format!("block {block_idx}"));
        let states = self.gathered(&all, n_parts, |part| states_of_part(block_idx, part))?;
        if !is_done(Pass::Forward) {
            let (after, sums) = through(&all, decoder, &states, block_idx, observation.needs, stage.as_ref())?;
            all.release(after);
            settle(journal, Pass::Forward, block_idx, sums)?;
        }
        if observation.needs.gradients() && !is_done(Pass::Backward) {
            let back = all.first(self.windows.n_gradients)?;
            let states = back.narrow(states);
            let gradient = self.gathered(&back, n_parts, |part| gradient_of_part(block_idx + 1, part))?;
            let backward = self.backward(&back, observation, multiply(&all));
            let sums = backward.at_block(block_idx, &gradient, &states, stage.as_ref())?;
            settle(journal, Pass::Backward, block_idx, sums)?;
        }
        Ok(())
    }

    /// Keeps the sums of the head and of the embedding table. They are empty if the vocabulary is not needed.
    ///
    /// # Errors
    /// As [`Self::sums`].
    pub fn sums_of_vocabulary(&self, n_parts: usize) -> Result<()> {
        let Self { journal, observation, decoder, .. } = *self;
        if !observation.needs.gradients() {
            return Ok(());
        }
        if !observation.needs.vocabulary {
            return settle(journal, Pass::Head, 0, Sums::default()).map(|_| ());
        }
        let all = self.all()?;
        let back = all.first(self.windows.n_gradients)?;
        let stage = self.progress.stage("sums", back.n_tokens() as u64, "tokens");
        let backward = self.backward(&back, observation, multiply(&all));
        let last = self.gathered(&all, n_parts, |part| states_of_part(decoder.n_blocks(), part))?;
        let mut sums = Sums::default();
        backward.at_head(&back.narrow(last), stage.as_ref(), &mut sums)?;
        settle(journal, Pass::Head, 0, sums)?;
        let gradient = self.gathered(&back, n_parts, |part| gradient_of_part(0, part))?;
        backward.at_embeddings(&gradient, journal).map(|_| ())
    }

    fn backward<'b>(&'b self, back: &'b Walk<'b>, observation: Observation, multiply: Multiply) -> Backward<'b, 'b> {
        Backward { decoder: self.decoder, walk: back, targets: self.windows.targets, observation, multiply }
    }

    /// The states of all parts, in the order of the windows.
    fn gathered(&self, walk: &Walk<'_>, n_parts: usize, key: impl Fn(usize) -> String) -> Result<Hidden> {
        let mut batches = Vec::new();
        for part in 0..n_parts {
            let key = key(part);
            let piece = self.journal.get(&key)?.with_context(|| format!("the piece `{key}` is absent"))?;
            batches.extend(piece.rest());
        }
        walk.restore(batches)
    }
}
