//! The one engine of evaluation, calibration and compression: all windows through block 0, then all windows through
//! block 1, and so on. Weights are read once, and memory holds one block and the hidden states.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::batches::{BATCH_TOKENS, WalkLimits, batch_bytes, split};
use super::block::{Block, Observer};
use super::decoder::Decoder;
use super::ops::non_finite_window;
use super::rope::Rope;
use super::slot::InputSite;
use crate::device::{Device, to_host};
use crate::error::{Failure, NON_FINITE_HINT};
use crate::progress::Stage;
use crate::store::{Spool, Spooled};
use crate::workers::Workers;

/// Windows of tokens on their way through a model, and the store of their hidden states. Batches are independent:
/// several go through a block at once, and their results are used in order.
pub struct Walk<'a> {
    windows: &'a [Vec<u32>],
    /// Windows of equal length that are processed together.
    batches: Vec<Range<usize>>,
    limits: WalkLimits,
    batch_bytes: usize,
    workers: Workers,
    spool: Arc<Mutex<Spool>>,
    rope: Arc<Rope>,
    device: Device,
    /// The text of the windows, for messages.
    text: Option<String>,
}

/// The hidden states of all windows at one point of the model, batch after batch, (batch, n_tokens, hidden_size) each.
#[derive(Debug, Default)]
pub struct Hidden(Vec<Mutex<Spooled>>);

impl Hidden {
    pub(super) fn new(batches: impl IntoIterator<Item = Spooled>) -> Self {
        Self(batches.into_iter().map(Mutex::new).collect())
    }

    /// Batches that have states.
    pub(crate) fn n_batches(&self) -> usize {
        self.0.len()
    }

    pub(super) fn lock(&self, batch_idx: usize) -> MutexGuard<'_, Spooled> {
        self.0[batch_idx].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn into_batches(self) -> impl Iterator<Item = Spooled> {
        self.0.into_iter().map(|batch| batch.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The tokens of a window that are scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scored {
    /// Positions of scored tokens, never 0. The state before predicts each, so the last may equal the window length.
    pub places: Range<usize>,
    /// The tokens at these positions.
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
    /// The rotary embedding of the config is not supported, or the system refuses threads.
    pub fn new(decoder: &Decoder<'_>, windows: &'a [Vec<u32>], limits: &WalkLimits) -> Result<Self> {
        Self::in_two(decoder, windows, windows.len(), limits)
    }

    /// Like [`Self::new`], for windows of which the first `n_first` also walk [by themselves](Self::first).
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn in_two(decoder: &Decoder<'_>, windows: &'a [Vec<u32>], n_first: usize, limits: &WalkLimits) -> Result<Self> {
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let spool = Arc::new(Mutex::new(Spool::new(limits.hidden_bytes, limits.work_folder.clone())));
        let batches = split(windows, n_first);
        let batch_bytes = batch_bytes(&decoder.config, longest.max(BATCH_TOKENS));
        let rope = Arc::new(decoder.rope(longest)?);
        let device = decoder.device().clone();
        let workers = limits.workers(&device, batch_bytes, batches.len())?;
        Ok(Self { windows, batches, limits: limits.clone(), batch_bytes, workers, spool, rope, device, text: None })
    }

    /// The walk of the first `n_first` windows, with states in the same store.
    ///
    /// # Errors
    /// The system refuses threads.
    ///
    /// # Panics
    /// When a batch has windows on both sides.
    pub fn first(&self, n_first: usize) -> Result<Self> {
        let first = self.batches.partition_point(|batch| batch.start < n_first);
        assert!(first == 0 || self.batches[first - 1].end == n_first, "invariant: no batch is in both walks");
        self.of_batches(0..first)
    }

    /// The walk of some of the batches, with states in the same store. Windows keep their indices.
    ///
    /// # Errors
    /// The system refuses threads.
    pub fn of_batches(&self, batches: Range<usize>) -> Result<Self> {
        let batches = self.batches[batches].to_vec();
        Ok(Self {
            windows: self.windows,
            workers: Workers::new(self.workers.count().min(batches.len()))?,
            batches,
            limits: self.limits.clone(),
            batch_bytes: self.batch_bytes,
            spool: Arc::clone(&self.spool),
            rope: Arc::clone(&self.rope),
            device: self.device.clone(),
            text: self.text.clone(),
        })
    }

    /// Reserves memory for results of `bytes` per batch, which are kept until they are merged.
    ///
    /// # Errors
    /// The system refuses threads.
    pub fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.workers = self.limits.workers(&self.device, self.batch_bytes + 2 * bytes, self.batches.len())?;
        Ok(())
    }

    /// The workers that share the batches.
    pub fn workers(&self) -> &Workers {
        &self.workers
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

    /// Rotary embeddings for the longest window.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// The tokens of a window.
    pub fn ids(&self, window_idx: usize) -> &[u32] {
        &self.windows[window_idx]
    }

    /// Tokens of all windows.
    pub fn n_tokens(&self) -> usize {
        self.batch_tokens().sum()
    }

    /// Tokens of each batch.
    pub fn batch_tokens(&self) -> impl Iterator<Item = usize> {
        self.batches.iter().map(|batch| self.windows[batch.clone()].iter().map(Vec::len).sum())
    }

    pub(super) fn spool(&self) -> MutexGuard<'_, Spool> {
        self.spool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Embeds the windows.
    ///
    /// # Errors
    /// A token is outside the vocabulary, or the work folder cannot be written.
    pub fn embed(&self, decoder: &Decoder<'_>) -> Result<Hidden> {
        let embeddings = decoder.embeddings()?;
        let mut hidden = Vec::new();
        for range in &self.batches {
            let ids: Vec<&[u32]> = self.windows[range.clone()].iter().map(Vec::as_slice).collect();
            hidden.push(self.spool().push(to_host(&embeddings.of_windows(&ids)?)?)?);
        }
        Ok(Hidden::new(hidden))
    }

    /// Sends all windows through `block`, in place.
    ///
    /// # Errors
    /// The shapes do not match, a state is not finite, or the work folder cannot be written.
    pub fn advance(&self, hidden: &Hidden, decoder: &Decoder<'_>, block: &Block, progress: &dyn Stage) -> Result<()> {
        self.workers.in_order(
            self.batches.len(),
            |i| self.forward(hidden, i, decoder, block, &mut |_, _| Ok(()), progress),
            |i, y| self.spool().set(&mut hidden.lock(i), y.into()),
        )
    }

    /// Like [`Self::advance`], but keeps the states that enter the block as well.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn branch(
        &self,
        hidden: &Hidden,
        decoder: &Decoder<'_>,
        block: &Block,
        progress: &dyn Stage,
    ) -> Result<Hidden> {
        self.observe(hidden, decoder, block, progress, |(), _, _| Ok(()), |()| Ok(()))
    }

    /// Like [`Self::branch`]; `see` collects from the inputs of the linears of one batch, and `merge` receives the
    /// collections in the order of the batches.
    ///
    /// # Errors
    /// As [`Self::advance`], and the errors of `see` and `merge`.
    pub fn observe<S: Default + Send>(
        &self,
        hidden: &Hidden,
        decoder: &Decoder<'_>,
        block: &Block,
        progress: &dyn Stage,
        see: impl Fn(&mut S, InputSite, &Tensor) -> Result<()> + Sync,
        mut merge: impl FnMut(S) -> Result<()> + Send,
    ) -> Result<Hidden> {
        let mut after = Vec::new();
        self.workers.in_order(
            self.batches.len(),
            |i| {
                let mut seen = S::default();
                let observe = &mut |site, x: &Tensor| see(&mut seen, site, x);
                let y = self.forward(hidden, i, decoder, block, observe, progress)?;
                Ok((y, seen))
            },
            |_, (y, seen)| {
                after.push(self.spool().push(y)?);
                merge(seen)
            },
        )?;
        Ok(Hidden::new(after))
    }

    fn forward(
        &self,
        hidden: &Hidden,
        batch_idx: usize,
        decoder: &Decoder<'_>,
        block: &Block,
        observe: &mut Observer<'_>,
        progress: &dyn Stage,
    ) -> Result<Vec<f32>> {
        let x = self.batch(hidden, batch_idx)?;
        let y = block.forward(&x, &self.rope, observe)?;
        progress.advance((y.dim(0)? * y.dim(1)?) as u64);
        let values = to_host(&y)?;
        let Some(window_in_batch) = non_finite_window(&values, &y)? else { return Ok(values) };
        let site = block.first_non_finite(&x.narrow(0, window_in_batch, 1)?, &self.rope)?;
        Err(self.not_finite(decoder, block, site, (batch_idx, window_in_batch)))
    }

    /// The error for inputs at `site`, or for states after the block, that are not finite.
    pub(super) fn not_finite(
        &self,
        decoder: &Decoder<'_>,
        block: &Block,
        site: Option<InputSite>,
        (batch_idx, window_in_batch): (usize, usize),
    ) -> anyhow::Error {
        let linears = decoder.linears(block.index());
        let reader = linears.into_iter().find(|(slot, _)| Some(slot.site()) == site);
        let place = self.place()(self.batches[batch_idx].start + window_in_batch);
        let states = || format!("the states after `{}`", decoder.block_name(block.index()));
        let what =
            reader.map_or_else(states, |(slot, _)| format!("the inputs of `{}`", decoder.module(block.index(), slot)));
        Failure::numeric(format!("{place}: {what} are not finite")).hint(NON_FINITE_HINT).into()
    }

    /// Batches of windows of one length.
    pub fn n_batches(&self) -> usize {
        self.batches.len()
    }

    /// One batch (batch, n_tokens, hidden_size).
    ///
    /// # Errors
    /// The work folder cannot be read.
    pub fn batch(&self, hidden: &Hidden, batch_idx: usize) -> Result<Tensor> {
        let range = &self.batches[batch_idx];
        let values = self.spool().get(&hidden.lock(batch_idx))?.f32s()?;
        Ok(Tensor::from_vec(values, (range.len(), self.windows[range.start].len(), ()), &self.device)?)
    }

    /// The states (n_tokens, hidden_size) of one window.
    ///
    /// # Errors
    /// The work folder cannot be read.
    pub fn window(&self, hidden: &Hidden, window_idx: usize) -> Result<Tensor> {
        let batch_idx = self.batches.partition_point(|range| range.end <= window_idx);
        let first = self.batches[batch_idx].start;
        Ok(self.batch(hidden, batch_idx)?.get(window_idx - first)?)
    }

    /// Calls `work` with the index of every window and its states (n_tokens, hidden_size) in all `streams`, and passes
    /// the results to `merge` in the order of the windows.
    ///
    /// # Errors
    /// The error of `work` or `merge`, or the work folder cannot be read.
    pub fn for_each_window<T: Send>(
        &self,
        streams: &[&Hidden],
        work: impl Fn(usize, &[Tensor]) -> Result<T> + Sync,
        mut merge: impl FnMut(usize, T) -> Result<()> + Send,
    ) -> Result<()> {
        self.workers.in_order(
            self.batches.len(),
            |batch_idx| {
                let batches = streams.iter().map(|hidden| self.batch(hidden, batch_idx)).collect::<Result<Vec<_>>>()?;
                let one = |(i, window_idx)| {
                    let states = batches.iter().map(|batch| Ok(batch.get(i)?)).collect::<Result<Vec<_>>>()?;
                    Ok((window_idx, work(window_idx, &states)?))
                };
                self.batches[batch_idx].clone().enumerate().map(one).collect::<Result<Vec<_>>>()
            },
            |_, results| results.into_iter().try_for_each(|(window_idx, result)| merge(window_idx, result)),
        )
    }

    /// Like [`Self::for_each_window`] for two streams; `work` also returns new states for the first.
    ///
    /// # Errors
    /// As [`Self::for_each_window`], or the work folder cannot be written.
    pub fn replace_windows<T: Send>(
        &self,
        replaced: &Hidden,
        other: &Hidden,
        work: impl Fn(usize, &Tensor, &Tensor) -> Result<(Tensor, T)> + Sync,
        mut merge: impl FnMut(T) -> Result<()> + Send,
    ) -> Result<()> {
        self.workers.in_order(
            self.batches.len(),
            |batch_idx| {
                let (states, others) = (self.batch(replaced, batch_idx)?, self.batch(other, batch_idx)?);
                let (mut made, mut results) = (Vec::with_capacity(states.elem_count()), Vec::new());
                for (i, window_idx) in self.batches[batch_idx].clone().enumerate() {
                    let (states, result) = work(window_idx, &states.get(i)?, &others.get(i)?)?;
                    made.extend(to_host(&states)?);
                    results.push(result);
                }
                Ok((made, results))
            },
            |batch_idx, (made, results)| {
                self.spool().set(&mut replaced.lock(batch_idx), made.into())?;
                results.into_iter().try_for_each(&mut merge)
            },
        )
    }

    /// A copy of states.
    ///
    /// # Errors
    /// The work folder cannot be read or written.
    pub fn copy(&self, hidden: &Hidden) -> Result<Hidden> {
        let mut copies = Vec::with_capacity(self.batches.len());
        for values in self.arrays(hidden)? {
            copies.push(self.spool().push(values)?);
        }
        Ok(Hidden::new(copies))
    }

    /// Keeps the states of this walk among the states of a longer walk over the same store, and releases the others.
    pub fn narrow(&self, mut hidden: Hidden) -> Hidden {
        if hidden.n_batches() > self.batches.len() {
            self.release(Hidden(hidden.0.split_off(self.batches.len())));
        }
        hidden
    }

    /// Releases the storage of states.
    pub fn release(&self, hidden: Hidden) {
        let mut spool = self.spool();
        hidden.into_batches().for_each(|array| spool.release(array));
    }

    /// Negative log-likelihoods of the `scored` tokens of each window, one list per window.
    ///
    /// # Errors
    /// A logit is not finite.
    pub fn score(
        &self,
        hidden: &Hidden,
        decoder: &Decoder<'_>,
        scored: &[Scored],
        progress: &dyn Stage,
    ) -> Result<Vec<Vec<f64>>> {
        let head = decoder.head()?;
        let mut nlls = Vec::with_capacity(self.windows.len());
        let place = self.place();
        let score = |window_idx: usize, states: &[Tensor]| {
            let scored: &Scored = &scored[window_idx];
            let found = head.negative_log_likelihoods(&scored.rows(&states[0])?, &scored.tokens);
            progress.advance(self.windows[window_idx].len() as u64);
            found.with_context(|| place(window_idx))
        };
        self.for_each_window(&[hidden], score, |_, found| {
            nlls.push(found);
            Ok(())
        })?;
        Ok(nlls)
    }
}
