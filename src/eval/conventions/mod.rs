//! How a text becomes windows, and which of their tokens are scored: tools disagree, and their numbers cannot be compared
//! across conventions. One convention a file, one line in [`Convention::rules`].

mod gptq;
mod llamacpp;

use std::ops::Range;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::text::Tokens;

/// The conventions, as a user names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Convention {
    /// Disjoint windows, all tokens but the first of each scored (GPTQ, AWQ, SVD-LLM)
    #[default]
    Gptq,
    /// Disjoint windows that begin with BOS, second half scored (llama.cpp's perplexity tool)
    Llamacpp,
}

/// The rules of a convention.
pub trait Rules {
    fn name(&self) -> &'static str;

    /// Window length where the user names none; capped by the model's context.
    fn default_seq_len(&self) -> usize;

    /// Cuts the stream; `bos` where the tokenizer adds one and the user allows it.
    fn windows(&self, tokens: &Tokens, seq_len: usize, bos: Option<u32>) -> Vec<Vec<u32>>;

    /// Positions of a window whose tokens are scored.
    fn scored(&self, seq_len: usize) -> Range<usize>;
}

impl Convention {
    /// The rules behind the name.
    pub fn rules(self) -> &'static dyn Rules {
        match self {
            Self::Gptq => &gptq::Gptq,
            Self::Llamacpp => &llamacpp::Llamacpp,
        }
    }
}
