//! The engine of evaluation, calibration and compression: all windows go through block 0, then all windows through
//! block 1, and so on. Weights are read once, and memory holds one block and the hidden states.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use super::block::{Block, Observer};
use super::config::ModelConfig;
use super::decoder::Decoder;
use super::rope::Rope;
use crate::error::{Failure, NON_FINITE_HINT};
use crate::progress::Stage;
use crate::store::{Array, Journal, Spool, Spooled, Values};

/// Memory limits of a walk for data that grows with the text.
#[derive(Debug, Clone)]
pub struct WalkLimits {
    /// Cap for hidden states; the rest goes to a file in `work_folder`.
    pub hidden_bytes: usize,
    /// Cap for the activations of one forward pass; it determines the batch size.
    pub activation_bytes: usize,
    pub work_folder: PathBuf,
}

impl WalkLimits {
    /// Half of `memory_bytes` is for hidden states and a quarter for activations; the last quarter is left for weights.
    pub fn new(memory_bytes: u64, work_folder: PathBuf) -> Self {
        let memory = usize::try_from(memory_bytes).unwrap_or(usize::MAX);
        Self { hidden_bytes: memory / 2, activation_bytes: memory / 4, work_folder }
    }

    /// Limits for one window at a time: products of very small ranks depend on the batch in their last digits, and the
    /// output must not depend on memory.
    #[must_use]
    pub fn one_window(&self) -> Self {
        Self { activation_bytes: 0, ..self.clone() }
    }

    /// Number of windows that go through a block at once.
    pub fn batch_size(&self, config: &ModelConfig, n_tokens: usize) -> usize {
        // Tensors alive at the widest point of a block: input, normed, q, k, v, mixed, or gate, up, product.
        let inner = config.block_widths().distinct().map(|widths| widths.intermediate_size).max().unwrap_or(0);
        let per_token = 4 * (6 * config.hidden_size + 3 * inner);
        (self.activation_bytes / (per_token * n_tokens.max(1))).max(1)
    }
}

/// Windows of tokens on their way through a model, and the store of their hidden states.
pub struct Walk<'a> {
    windows: &'a [Vec<u32>],
    /// Windows of equal length that are processed together.
    batches: Vec<Range<usize>>,
    spool: Spool,
    rope: Rope,
    /// The text of the windows, for messages.
    text: Option<String>,
}

/// The hidden states of all windows at one point of the model, batch after batch, (batch, n_tokens, hidden_size) each.
#[derive(Debug)]
pub struct Hidden(Vec<Spooled>);

/// The tokens of a window that are scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scored {
    /// Positions of the scored tokens, never 0. Each is predicted from the state before it, so the last may equal the window length.
    pub places: Range<usize>,
    pub tokens: Vec<u32>,
}

impl Scored {
    /// All tokens that have context, in each of `windows`.
    pub fn all_but_first(windows: &[Vec<u32>]) -> Vec<Self> {
        windows.iter().map(|ids| Self { places: 1..ids.len(), tokens: ids[1..].to_vec() }).collect()
    }

    /// The states (n_scored, hidden_size) of a window that predict the scored tokens.
    ///
    /// # Errors
    /// The window is too short.
    pub fn rows(&self, states: &Tensor) -> Result<Tensor> {
        Ok(states.narrow(0, self.places.start - 1, self.places.len())?)
    }
}

impl<'a> Walk<'a> {
    /// Prepares for `windows`; [`Self::embed`] starts the walk.
    ///
    /// # Errors
    /// The rotary embedding of the config is not supported.
    pub fn new(decoder: &Decoder<'_>, windows: &'a [Vec<u32>], limits: &WalkLimits) -> Result<Self> {
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let spool = Spool::new(limits.hidden_bytes, limits.work_folder.clone());
        let batches = split(windows, limits.batch_size(&decoder.config, longest));
        Ok(Self { windows, batches, spool, rope: decoder.rope(longest)?, text: None })
    }

    /// Names the text of the windows in errors.
    #[must_use]
    pub fn of_text(mut self, text: &str) -> Self {
        self.text = Some(text.into());
        self
    }

    /// Names a window in errors.
    pub fn place(&self) -> impl Fn(usize) -> String + use<> {
        let text = self.text.as_ref().map_or(String::new(), |text| format!(" of `{text}`"));
        move |window_idx| format!("window {window_idx}{text}")
    }

    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    pub fn n_tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }

    /// Embeds the windows.
    ///
    /// # Errors
    /// A token is outside the vocabulary, or the work folder cannot be written.
    pub fn embed(&mut self, decoder: &Decoder<'_>) -> Result<Hidden> {
        let embeddings = decoder.embeddings()?;
        let mut hidden = Vec::new();
        for range in &self.batches {
            let ids: Vec<&[u32]> = self.windows[range.clone()].iter().map(Vec::as_slice).collect();
            hidden.push(self.spool.push(values(&embeddings.of_windows(&ids)?)?)?);
        }
        Ok(Hidden(hidden))
    }

    /// Runs all windows through `block`, in place; `observe` sees the inputs of its linears, batch after batch in
    /// order.
    ///
    /// # Errors
    /// The shapes do not match, the observer fails, or the work folder cannot be used.
    pub fn advance(
        &mut self,
        hidden: &mut Hidden,
        decoder: &Decoder<'_>,
        block: &Block,
        observe: &mut Observer<'_>,
        progress: &dyn Stage,
    ) -> Result<()> {
        for i in 0..self.batches.len() {
            let y = self.forward(hidden, i, decoder, block, observe, progress)?;
            self.spool.set(&mut hidden.0[i], y.into())?;
        }
        Ok(())
    }

    /// Like [`Self::advance`], but also keeps the states that enter the block.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn branch(
        &mut self,
        hidden: &Hidden,
        decoder: &Decoder<'_>,
        block: &Block,
        observe: &mut Observer<'_>,
        progress: &dyn Stage,
    ) -> Result<Hidden> {
        let mut after = Vec::new();
        for i in 0..self.batches.len() {
            let y = self.forward(hidden, i, decoder, block, observe, progress)?;
            after.push(self.spool.push(y)?);
        }
        Ok(Hidden(after))
    }

    fn forward(
        &mut self,
        hidden: &Hidden,
        batch_idx: usize,
        decoder: &Decoder<'_>,
        block: &Block,
        observe: &mut Observer<'_>,
        progress: &dyn Stage,
    ) -> Result<Vec<f32>> {
        let x = self.batch(hidden, batch_idx)?;
        let y = block.forward(&x, &self.rope, decoder.kernels(), observe)?;
        progress.advance((y.dim(0)? * y.dim(1)?) as u64);
        let values = values(&y)?;
        let Some(at) = values.iter().position(|v| !v.is_finite()) else { return Ok(values) };
        let window_in_batch = at / (y.dim(1)? * y.dim(2)?).max(1);
        let site = block.first_non_finite(&x.narrow(0, window_in_batch, 1)?, &self.rope, decoder.kernels())?;
        let reader =
            site.and_then(|site| decoder.linears(block.index()).into_iter().find(|(slot, _)| slot.site() == site));
        let place = self.place()(self.batches[batch_idx].start + window_in_batch);
        let what = match reader {
            Some((slot, _)) => format!("the inputs of `{}`", decoder.module(block.index(), slot)),
            None => format!("the states after `{}`", decoder.block_name(block.index())),
        };
        Err(Failure::numeric(format!("{place}: {what} are not finite")).hint(NON_FINITE_HINT).into())
    }

    pub fn n_batches(&self) -> usize {
        self.batches.len()
    }

    /// One batch (batch, n_tokens, hidden_size).
    ///
    /// # Errors
    /// The work folder cannot be read.
    pub fn batch(&mut self, hidden: &Hidden, batch_idx: usize) -> Result<Tensor> {
        let range = &self.batches[batch_idx];
        let shape = (range.len(), self.windows[range.start].len(), ());
        Ok(Tensor::new(self.spool.get(&hidden.0[batch_idx])?.f32s()?, &Device::Cpu)?.reshape(shape)?)
    }

    /// The states (n_tokens, hidden_size) of one window.
    ///
    /// # Errors
    /// The work folder cannot be read.
    pub fn window(&mut self, hidden: &Hidden, window_idx: usize) -> Result<Tensor> {
        let batch_idx = self.batches.partition_point(|range| range.end <= window_idx);
        let first = self.batches[batch_idx].start;
        Ok(self.batch(hidden, batch_idx)?.get(window_idx - first)?)
    }

    /// Calls `f` with the tokens of every window and its states in all `streams`, (n_tokens, hidden_size) each.
    ///
    /// # Errors
    /// `f` fails, or the work folder cannot be read.
    pub fn for_each_window(
        &mut self,
        streams: &[&Hidden],
        mut f: impl FnMut(&[u32], &[Tensor]) -> Result<()>,
    ) -> Result<()> {
        for batch_idx in 0..self.batches.len() {
            let batches = streams.iter().map(|hidden| self.batch(hidden, batch_idx)).collect::<Result<Vec<_>>>()?;
            for (i, window) in self.windows[self.batches[batch_idx].clone()].iter().enumerate() {
                let states = batches.iter().map(|batch| Ok(batch.get(i)?)).collect::<Result<Vec<_>>>()?;
                f(window, &states)?;
            }
        }
        Ok(())
    }

    /// Like [`Self::for_each_window`] over one stream; `f` returns the states that replace the window's, in the same
    /// shape.
    ///
    /// # Errors
    /// As [`Self::for_each_window`].
    pub fn replace_windows(
        &mut self,
        hidden: &mut Hidden,
        kept: &Hidden,
        mut f: impl FnMut(&[u32], &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        for batch_idx in 0..self.batches.len() {
            let (states, others) = (self.batch(hidden, batch_idx)?, self.batch(kept, batch_idx)?);
            let mut replaced = Vec::with_capacity(states.elem_count());
            for (i, window) in self.windows[self.batches[batch_idx].clone()].iter().enumerate() {
                replaced.extend(values(&f(window, &states.get(i)?, &others.get(i)?)?)?);
            }
            self.spool.set(&mut hidden.0[batch_idx], replaced.into())?;
        }
        Ok(())
    }

    /// Copies states.
    ///
    /// # Errors
    /// The work folder cannot be used.
    pub fn copy(&mut self, hidden: &Hidden) -> Result<Hidden> {
        let copies = hidden.0.iter().map(|array| {
            let values = self.spool.get(array)?;
            self.spool.push(values)
        });
        Ok(Hidden(copies.collect::<Result<_>>()?))
    }

    /// Restores the states of an earlier walk over the same windows in the same batches.
    ///
    /// # Errors
    /// The work folder cannot be written.
    pub(crate) fn restore(&mut self, batches: Vec<Array>) -> Result<Hidden> {
        anyhow::ensure!(batches.len() == self.batches.len(), "invariant: a walk is resumed in the same batches");
        Ok(Hidden(batches.into_iter().map(|batch| self.spool.push(batch)).collect::<Result<_>>()?))
    }

    /// The values of states, batch by batch.
    ///
    /// # Errors
    /// The work folder cannot be read.
    pub(crate) fn arrays(&mut self, hidden: &Hidden) -> Result<Vec<Values>> {
        hidden.0.iter().map(|array| self.spool.get(array)).collect()
    }

    /// Keeps states in a journal, under `key`.
    ///
    /// # Errors
    /// The work folder or the journal cannot be used.
    pub(crate) fn settle(&mut self, hidden: Hidden, journal: &Journal, key: &str) -> Result<Hidden> {
        if !journal.keeps() {
            return Ok(hidden);
        }
        let batches = self.arrays(&hidden)?;
        self.release(hidden);
        let piece = journal.put(key, serde_json::Value::Null, batches)?;
        self.restore(piece.rest())
    }

    /// Releases the space of states.
    pub fn release(&mut self, hidden: Hidden) {
        hidden.0.into_iter().for_each(|array| self.spool.release(array));
    }

    /// Negative log-likelihoods of the `scored` tokens of each window, one list per window.
    ///
    /// # Errors
    /// A logit is not finite.
    pub fn score(
        &mut self,
        hidden: &Hidden,
        decoder: &Decoder<'_>,
        scored: &[Scored],
        progress: &dyn Stage,
    ) -> Result<Vec<Vec<f64>>> {
        let head = decoder.head()?;
        let mut nlls = Vec::with_capacity(self.windows.len());
        let place = self.place();
        self.for_each_window(&[hidden], |window, states| {
            let scored = &scored[nlls.len()];
            let found = head.negative_log_likelihoods(&scored.rows(&states[0])?, &scored.tokens);
            nlls.push(found.with_context(|| place(nlls.len()))?);
            progress.advance(window.len() as u64);
            Ok(())
        })?;
        Ok(nlls)
    }
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// Splits windows into runs of equal length, with at most `batch_size` windows each.
fn split(windows: &[Vec<u32>], batch_size: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    for i in 0..windows.len() {
        match batches.last_mut() {
            Some(last) if last.len() < batch_size && windows[last.start].len() == windows[i].len() => last.end = i + 1,
            _ => batches.push(i..i + 1),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cover_all_windows_and_share_a_length() {
        let windows: Vec<Vec<u32>> = [4, 4, 4, 3, 3, 4].iter().map(|&n| vec![0; n]).collect();
        assert_eq!(split(&windows, 2), [0..2, 2..3, 3..5, 5..6]);
        assert_eq!(split(&windows, 9), [0..3, 3..5, 5..6]);
        assert!(split(&[], 2).is_empty());
    }
}
