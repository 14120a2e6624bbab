//! A model that reads tokens, and remembers those it has read.

use anyhow::Result;

use crate::device::to_host;
use crate::error::{ExitClass, Failure, NON_FINITE_HINT};
use crate::model::{Block, Decoder, Embeddings, Head, Rope};
use crate::progress::Progress;

/// A model in memory, with the keys and values of the tokens that it has read.
pub struct Generator {
    embeddings: Embeddings,
    blocks: Vec<Block>,
    head: Head,
    rope: Rope,
    n_read: usize,
}

impl Generator {
    /// Loads a model that reads up to `n_positions` tokens.
    ///
    /// # Errors
    /// A tensor is damaged, or the rotary embedding of the config is not supported.
    pub fn new(decoder: &Decoder<'_>, n_positions: usize, progress: &dyn Progress) -> Result<Self> {
        let stage = progress.stage("load", decoder.n_blocks() as u64, "blocks");
        let block = |block_idx: usize| {
            let block = decoder.block(block_idx)?.continued();
            stage.advance(1);
            Ok(block)
        };
        Ok(Self {
            blocks: (0..decoder.n_blocks()).map(block).collect::<Result<_>>()?,
            embeddings: decoder.embeddings()?,
            head: decoder.head()?,
            rope: decoder.rope(n_positions)?,
            n_read: 0,
        })
    }

    /// Reads the next tokens, at least one. Returns the logits (vocab_size) of the token after them.
    ///
    /// # Errors
    /// A token is outside of the vocabulary, there are more tokens than positions, or logits are not finite.
    pub fn read(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let rope = self.rope.from(self.n_read)?;
        let mut x = self.embeddings.from(self.n_read, ids)?;
        for block in &self.blocks {
            x = block.forward(&x, &rope, &mut |_, _| Ok(()))?;
        }
        self.n_read += ids.len();
        let last = x.get(0)?.narrow(0, ids.len() - 1, 1)?;
        let logits = to_host(&self.head.logits(&last)?)?;
        if logits.iter().all(|logit| logit.is_finite()) {
            return Ok(logits);
        }
        let message = format!("the logits after token {} are not finite", self.n_read);
        Err(Failure::new(ExitClass::Numeric, message).hint(NON_FINITE_HINT).into())
    }
}
