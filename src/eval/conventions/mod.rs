//! How a text becomes windows, and which of their tokens are scored: tools disagree, and their numbers cannot be compared
//! across conventions. One convention a file, one line in [`Convention::rules`].

mod gptq;
mod hf_strided;
mod llamacpp;
mod lm_eval;

use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::text::Tokens;

/// The conventions, as a user names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Convention {
    /// Disjoint windows, all tokens but the first of each scored (GPTQ, AWQ, SVD-LLM)
    #[default]
    Gptq,
    /// Windows of the model's context that overlap, every token scored once (transformers' guide to perplexity)
    HfStrided,
    /// Disjoint windows that begin with BOS, second half scored (llama.cpp's perplexity tool)
    Llamacpp,
    /// A document at a time behind BOS, perplexity a word (lm-evaluation-harness)
    LmEval,
}

/// A piece of the text on its way through a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    pub ids: Vec<u32>,
    /// Places in `ids` whose tokens are scored; never the first.
    pub scored: Range<usize>,
    /// Where the text that the scored tokens stand for lies in its document, in bytes.
    pub bytes: Range<usize>,
}

/// What a perplexity is the mean over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Token,
    Word,
}

/// The lengths that a user may set.
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    pub seq_len: usize,
    pub stride: usize,
}

/// The rules of a convention.
pub trait Rules: Sync {
    fn name(&self) -> &'static str;

    /// Window length where the user names none, capped by the model's context; none: the context.
    fn default_seq_len(&self) -> Option<usize>;

    /// Whether documents are scored one by one, and not as one stream.
    fn is_by_document(&self) -> bool {
        false
    }

    fn unit(&self) -> Unit {
        Unit::Token
    }

    /// Whether `--stride` says something.
    fn takes_stride(&self) -> bool {
        false
    }

    /// Cuts a stream or a document; `bos` where the tokenizer adds one and the user allows it, `boundary` whether it does or not.
    fn windows(&self, tokens: &Tokens, lengths: Lengths, bos: Option<u32>, boundary: Option<u32>) -> Vec<Window>;
}

impl Convention {
    /// The rules behind the name.
    pub fn rules(self) -> &'static dyn Rules {
        match self {
            Self::Gptq => &gptq::Gptq,
            Self::HfStrided => &hf_strided::HfStrided,
            Self::Llamacpp => &llamacpp::Llamacpp,
            Self::LmEval => &lm_eval::LmEval,
        }
    }
}

impl Tokens {
    /// The window of `range` whose tokens from `first` (a place in the window, not 0) on are scored.
    fn window(&self, range: Range<usize>, first: usize) -> Window {
        let bytes = self.bytes_covered[range.start + first - 1]..self.bytes_covered[range.end - 1];
        Window { ids: self.ids[range.clone()].to_vec(), scored: first..range.len(), bytes }
    }

    /// Disjoint windows of `seq_len`, tail dropped, scored from `first` on.
    fn disjoint_from(&self, seq_len: usize, first: usize) -> Vec<Window> {
        (0..self.ids.len() / seq_len).map(|i| self.window(i * seq_len..(i + 1) * seq_len, first)).collect()
    }
}
