//! The one engine of evaluation, calibration and compression: all windows through block 0, then all windows through
//! block 1, and so on. Weights are read once, and memory holds one block and the hidden states.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::attention::Rope;
use super::block::{Block, Observer};
use super::config::ModelConfig;
use super::decoder::{Decoder, embed};
use crate::progress::Stage;
use crate::spool::{Spool, Spooled};

/// How much memory a walk may use for what grows with the text.
#[derive(Debug, Clone)]
pub struct WalkLimits {
    /// Cap for hidden states; the rest goes to a file in `work_folder`.
    pub hidden_bytes: usize,
    /// Cap for the activations of one forward pass, which decides the batch.
    pub activation_bytes: usize,
    pub work_folder: PathBuf,
}

impl WalkLimits {
    /// Half of `memory_bytes` for hidden states, a quarter for activations; a quarter is left for weights.
    pub fn new(memory_bytes: u64, work_folder: PathBuf) -> Self {
        let memory = usize::try_from(memory_bytes).unwrap_or(usize::MAX);
        Self { hidden_bytes: memory / 2, activation_bytes: memory / 4, work_folder }
    }

    /// Windows that go through a block at once.
    pub fn batch_size(&self, config: &ModelConfig, n_tokens: usize) -> usize {
        // What lives at the widest point of a block: input, normed, q, k, v, mixed, or gate, up, product.
        let per_token = 4 * (6 * config.hidden_size + 3 * config.intermediate_size);
        (self.activation_bytes / (per_token * n_tokens.max(1))).max(1)
    }
}

/// Windows of one length that travel together.
struct Batch {
    range: Range<usize>,
    /// (batch, n_tokens, hidden_size)
    shape: [usize; 3],
    hidden: Spooled,
}

/// Windows of tokens on their way through a model.
pub struct Walk<'a> {
    windows: &'a [Vec<u32>],
    batches: Vec<Batch>,
    spool: Spool,
    rope: Rope,
}

impl<'a> Walk<'a> {
    /// Embeds `windows`.
    ///
    /// # Errors
    /// A token is outside of the vocabulary, or the work folder refuses.
    pub fn start(decoder: &Decoder<'_>, windows: &'a [Vec<u32>], limits: &WalkLimits) -> Result<Self> {
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let table = decoder.embeddings()?;
        let mut spool = Spool::new(limits.hidden_bytes, limits.work_folder.clone());
        let mut batches = Vec::new();
        for range in split(windows, limits.batch_size(&decoder.config, longest)) {
            let ids: Vec<&[u32]> = windows[range.clone()].iter().map(Vec::as_slice).collect();
            let x = embed(&table, &ids)?; // (batch, n_tokens, hidden_size)
            let (batch, n_tokens, hidden_size) = x.dims3()?;
            batches.push(Batch { range, shape: [batch, n_tokens, hidden_size], hidden: spool.push(values(&x)?)? });
        }
        Ok(Self { windows, batches, spool, rope: decoder.rope(longest)? })
    }

    /// Sends all windows through `block`; `observe` sees the inputs of its linears, batch after batch in order.
    ///
    /// # Errors
    /// Shapes that do not match, the observer's error, or the work folder's.
    pub fn advance(
        &mut self,
        decoder: &Decoder<'_>,
        block: &Block,
        observe: &mut Observer<'_>,
        progress: &dyn Stage,
    ) -> Result<()> {
        for batch in &mut self.batches {
            let x = batch.tensor(&mut self.spool)?;
            let y = block.forward(&x, &self.rope, decoder.kernels(), observe)?;
            self.spool.set(&mut batch.hidden, values(&y)?)?;
            progress.advance((batch.shape[0] * batch.shape[1]) as u64);
        }
        Ok(())
    }

    /// Negative log-likelihoods of the tokens at `scored` positions of each window, a list a window. Position 0 has
    /// no context and cannot be scored.
    ///
    /// # Errors
    /// A logit is not finite.
    pub fn finish(
        mut self,
        decoder: &Decoder<'_>,
        scored: &dyn Fn(usize) -> Range<usize>,
        progress: &dyn Stage,
    ) -> Result<Vec<Vec<f64>>> {
        let head = decoder.head()?;
        let mut nlls = Vec::with_capacity(self.windows.len());
        for batch in &self.batches {
            let x = batch.tensor(&mut self.spool)?;
            for (i, window) in self.windows[batch.range.clone()].iter().enumerate() {
                let range = scored(window.len());
                let rows = x.get(i)?.narrow(0, range.start - 1, range.len())?; // (n_scored, hidden_size)
                nlls.push(head.negative_log_likelihoods(&rows, &window[range])?);
                progress.advance(window.len() as u64);
            }
        }
        Ok(nlls)
    }
}

impl Batch {
    fn tensor(&self, spool: &mut Spool) -> Result<Tensor> {
        Ok(Tensor::from_vec(spool.get(&self.hidden)?, self.shape.as_slice(), &Device::Cpu)?)
    }
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// Runs of at most `batch_size` windows of one length.
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
