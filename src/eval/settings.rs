//! The input of an evaluation: settings and a reference; and a model's hidden states after all blocks.

use std::path::PathBuf;

use anyhow::Result;

use super::conventions::Convention;
use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::error::Failure;
use crate::model::{Decoder, Hidden, Walk};
use crate::progress::Stage;
use crate::text::{Bos, Text, Tokenizer};

/// The settings of an evaluation.
#[derive(Debug, Clone)]
pub struct EvalSettings {
    /// The model as the user named it.
    pub model: String,
    /// A text, or documents; see [`Text::read`].
    pub text: PathBuf,
    /// Field of a document that holds its text.
    pub field: String,
    /// How the text is cut and what is scored. Figures of different conventions cannot be compared.
    pub convention: Convention,
    /// Tokens per window; none: set by the convention, at most the model's context.
    pub seq_len: Option<usize>,
    /// Tokens between the starts of overlapping windows.
    pub stride: Option<usize>,
    /// Only the first windows are scored; none: all.
    pub max_windows: Option<usize>,
    /// Whether the token stream begins with BOS.
    pub bos: Bos,
    /// Memory for hidden states, of both models together; the rest goes to a temporary file.
    pub memory_bytes: u64,
    /// The device that runs the models.
    pub device: Device,
}

impl EvalSettings {
    /// A model on the device of the evaluation.
    pub(super) fn decoder<'c>(&self, checkpoint: &'c Checkpoint) -> Result<Decoder<'c>> {
        Ok(Decoder::open(checkpoint)?.on(&self.device))
    }
}

/// The model to compare with.
pub struct Reference<'a> {
    /// It must tokenize the text as the model does.
    pub checkpoint: &'a Checkpoint,
    /// The reference as the user named it, for the report.
    pub name: &'a str,
}

/// Runs the windows of a walk through all blocks.
pub(super) fn last_states<'a>(decoder: &Decoder<'_>, walk: Walk<'a>, stage: &dyn Stage) -> Result<(Walk<'a>, Hidden)> {
    let hidden = walk.embed(decoder)?;
    for block_idx in 0..decoder.n_blocks() {
        stage.note(&format!("block {block_idx}"));
        let block = decoder.block(block_idx)?;
        walk.advance(&hidden, decoder, &block, stage)?;
    }
    Ok((walk, hidden))
}

/// Checks that both models tokenize the text alike.
pub(super) fn expect_same_tokens(reference: &Reference<'_>, checkpoint: &Checkpoint, text: &Text) -> Result<()> {
    let (own, other) = (Tokenizer::open(checkpoint)?, Tokenizer::open(reference.checkpoint)?);
    if own.sha256 == other.sha256 {
        return Ok(());
    }
    for document in &text.documents {
        if own.encode(document, Bos::Never)?.ids != other.encode(document, Bos::Never)?.ids {
            let message = format!("`{}` and the model tokenize the text differently", reference.name);
            return Err(Failure::unsupported(message).hint("the reference must share the model's tokenizer").into());
        }
    }
    Ok(())
}
