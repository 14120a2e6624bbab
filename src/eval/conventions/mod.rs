//! Conventions for cutting a text into windows and choosing the tokens to score. Perplexities are comparable within a
//! convention only. One convention a file, one line in [`Convention::rules`].

mod gptq;
mod hf_strided;
mod llamacpp;
mod lm_eval;
mod rules;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use rules::{Lengths, Rules, Unit, Window};

/// The conventions, as a user names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Convention {
    /// Disjoint windows; all tokens but the first of each are scored (GPTQ, AWQ, SVD-LLM)
    #[default]
    Gptq,
    /// Overlapping windows of the model's context; every token is scored once (guide of transformers)
    HfStrided,
    /// Disjoint windows that begin with BOS; the second half is scored (llama.cpp's perplexity tool)
    Llamacpp,
    /// Each document on its own, after BOS; word perplexity (lm-evaluation-harness)
    LmEval,
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
