//! The report of `lrc generate`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A text, and the text of the reference if there is one.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GenerateReport {
    /// Version of the fields of this report.
    pub schema_version: u32,
    /// Version of lrc that wrote the report.
    pub lrc_version: String,
    /// What the text continues, as it was given.
    pub prompt: String,
    /// Temperature of the draw; 0 takes the likeliest token.
    pub temperature: f64,
    /// Only so many of the likeliest tokens are drawn from.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together have this probability are drawn from.
    pub top_p: f64,
    /// Seed of the draw.
    pub seed: u64,
    /// The text of the model.
    #[serde(flatten)]
    pub generated: GeneratedRecord,
    /// The text of `--reference`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reference: Option<GeneratedRecord>,
    /// Tokens at the beginning that both texts have in common, with `--reference`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub same_tokens: Option<usize>,
    /// Peak resident memory of the process in bytes; Linux only.
    pub peak_memory_bytes: Option<u64>,
}

/// A text that a model generated.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GeneratedRecord {
    /// The model as the user named it.
    pub model: String,
    /// The text, without the prompt and without special tokens.
    pub text: String,
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ends.
    pub stop: Stop,
    /// Seconds to load the weights.
    pub load_seconds: f64,
    /// Tokens of the prompt, with those that the tokenizer adds.
    pub prompt_tokens: usize,
    /// Seconds to read the prompt.
    pub prompt_seconds: f64,
    /// Seconds to generate the tokens, the first of which is known when the prompt is read.
    pub seconds: f64,
}

/// Why a text ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The model ended it.
    End,
    /// It has as many tokens as were asked for.
    Length,
    /// It fills the model's context.
    Context,
}

impl GeneratedRecord {
    /// Tokens at the beginning that it has in common with another.
    pub fn same_tokens(&self, other: &Self) -> usize {
        self.tokens.iter().zip(&other.tokens).take_while(|(own, other)| own == other).count()
    }

    /// Tokens per second after the prompt; none for fewer than two tokens.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let n = self.tokens.len().checked_sub(1).filter(|&n| n > 0)?;
        Some(n as f64 / self.seconds)
    }
}
