//! Perplexity in named conventions, and divergence from a reference.

pub mod conventions;
pub mod divergence;

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;

use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::model::config::window_length;
use crate::model::{Decoder, Walk, WalkLimits};
use crate::progress::Progress;
use crate::report::{LRC_VERSION, PerplexityReport, SCHEMA_VERSION, peak_memory_bytes};
use crate::text::{Bos, Text, Tokenizer, Tokens};
use conventions::{Convention, Rules};
use divergence::Divergence;

/// What is measured.
#[derive(Debug, Clone)]
pub struct EvalSettings {
    /// The model as the user named it.
    pub model: String,
    pub text: PathBuf,
    pub convention: Convention,
    /// Window length; the convention's by default, capped by the model's context.
    pub seq_len: Option<usize>,
    pub max_windows: Option<usize>,
    pub bos: Bos,
    pub memory_bytes: u64,
}

/// A text cut into windows, by the rules of a convention.
pub struct Prepared {
    pub windows: Vec<Vec<u32>>,
    pub seq_len: usize,
    pub text: Text,
    rules: &'static dyn Rules,
    tokens: Tokens,
    bos_added: bool,
    tokenizer_sha256: String,
}

impl Prepared {
    /// # Errors
    /// The text or the tokenizer is broken, or the text is too short.
    pub fn new(checkpoint: &Checkpoint, settings: &EvalSettings) -> Result<Self> {
        let tokenizer = Tokenizer::open(checkpoint.root())?;
        let text = Text::read(&settings.text)?;
        let tokens = tokenizer.encode(&text.content, settings.bos)?;
        let rules = settings.convention.rules();
        let seq_len = window_length(checkpoint, settings.seq_len, rules.default_seq_len());
        if rules.scored(seq_len).is_empty() {
            return Err(Failure::usage(format!("`--seq-len {seq_len}` leaves no token to score")).into());
        }
        let bos = tokenizer.bos().filter(|_| settings.bos == Bos::Auto);
        let mut windows = rules.windows(&tokens, seq_len, bos);
        windows.truncate(settings.max_windows.unwrap_or(usize::MAX));
        if windows.is_empty() {
            return Err(text.too_short(&tokens, seq_len).into());
        }
        let (bos_added, tokenizer_sha256) = (bos.is_some(), tokenizer.sha256);
        Ok(Self { windows, seq_len, text, rules, tokens, bos_added, tokenizer_sha256 })
    }

    /// Positions of a window of `n_tokens` whose tokens are scored.
    pub fn scored(&self, n_tokens: usize) -> Range<usize> {
        self.rules.scored(n_tokens)
    }

    pub fn convention(&self) -> &'static str {
        self.rules.name()
    }
}

/// A model to compare with, and its name.
pub struct Reference<'a> {
    pub checkpoint: &'a Checkpoint,
    pub name: &'a str,
}

/// Measures perplexity, and divergence where there is a reference; weights are read once, a block at a time, of both models
/// together.
///
/// # Errors
/// A model cannot be run, the text is too short, a logit is not finite, or the reference has another tokenizer.
pub fn perplexity(
    checkpoint: &Checkpoint,
    reference: Option<&Reference<'_>>,
    settings: &EvalSettings,
    progress: &dyn Progress,
) -> Result<PerplexityReport> {
    let started = Instant::now();
    let decoder = Decoder::open(checkpoint)?;
    let reference_decoder = reference.map(|r| Decoder::open(r.checkpoint)).transpose()?;
    let prepared = Prepared::new(checkpoint, settings)?;
    if let Some(reference) = reference {
        expect_same_tokens(reference, &prepared)?;
    }
    let windows = &prepared.windows;
    let n_tokens = windows.len() * prepared.seq_len;
    let decoders: Vec<&Decoder<'_>> = std::iter::once(&decoder).chain(&reference_decoder).collect();
    let n_steps: usize = decoders.iter().map(|d| d.n_blocks() + 1).sum();
    let stage = progress.stage("evaluate", (n_tokens * n_steps) as u64, "tokens");
    let limits = WalkLimits::new(settings.memory_bytes / decoders.len() as u64, std::env::temp_dir());
    let mut walks = Vec::new();
    for decoder in &decoders {
        let mut walk = Walk::new(decoder, windows, &limits)?;
        let mut hidden = walk.embed(decoder)?;
        for block_idx in 0..decoder.n_blocks() {
            stage.note(&format!("block {block_idx}"));
            let block = decoder.block(block_idx)?;
            walk.advance(&mut hidden, decoder, &block, &mut |_, _| Ok(()), stage.as_ref())?;
        }
        walks.push((walk, hidden));
    }
    stage.note("head");
    let scored = |n_tokens: usize| prepared.scored(n_tokens);
    let (mut walk, hidden) = walks.remove(0);
    let nlls: Vec<f64> = walk.score(&hidden, &decoder, &scored, stage.as_ref())?.concat();
    let divergence = match (reference, &reference_decoder, walks.pop()) {
        (Some(reference), Some(reference_decoder), Some((mut reference_walk, reference_hidden))) => {
            let (head, reference_head) = (decoder.head()?, reference_decoder.head()?);
            let mut divergence = Divergence::default();
            for (i, window) in windows.iter().enumerate() {
                let range = scored(window.len());
                let x = walk.window(&hidden, i)?.narrow(0, range.start - 1, range.len())?;
                let reference_x =
                    reference_walk.window(&reference_hidden, i)?.narrow(0, range.start - 1, range.len())?;
                divergence.extend(divergence::compare(&reference_head, &reference_x, &head, &x, &window[range])?);
                stage.advance(window.len() as u64);
            }
            Some(divergence.record(reference.name))
        }
        _ => None,
    };

    let elapsed_seconds = started.elapsed().as_secs_f64();
    let mean = mean(&nlls);
    let ppl = mean.exp();
    let nll_sum: f64 = nlls.iter().sum();
    let bytes = bytes_scored(&prepared.tokens, prepared.seq_len, windows.len(), scored(prepared.seq_len));
    Ok(PerplexityReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: settings.model.clone(),
        convention: prepared.convention().into(),
        ppl,
        ppl_standard_error: ppl * standard_error(&nlls, mean),
        nll_sum,
        bits_per_byte: nll_sum / std::f64::consts::LN_2 / bytes as f64,
        scored_tokens: nlls.len() as u64,
        windows: windows.len(),
        seq_len: prepared.seq_len,
        total_tokens: prepared.tokens.ids.len(),
        bos: if settings.bos == Bos::Auto { "auto" } else { "never" }.into(),
        bos_added: prepared.bos_added,
        compute_dtype: "f32".into(),
        text: settings.text.display().to_string(),
        text_sha256: prepared.text.sha256,
        tokenizer_sha256: prepared.tokenizer_sha256,
        parameters: checkpoint.n_elements(),
        size_bytes: checkpoint.n_bytes(),
        divergence,
        elapsed_seconds,
        tokens_per_second: n_tokens as f64 / elapsed_seconds,
        peak_memory_bytes: peak_memory_bytes(),
    })
}

/// Both models must read the text as the same tokens.
fn expect_same_tokens(reference: &Reference<'_>, prepared: &Prepared) -> Result<()> {
    let tokens = Tokenizer::open(reference.checkpoint.root())?.encode(&prepared.text.content, Bos::Never)?;
    let own = &prepared.tokens.ids;
    if own.ends_with(&tokens.ids) {
        return Ok(());
    }
    let message = format!("`{}` cuts the text into other tokens than the model", reference.name);
    Err(Failure::unsupported(message).hint("a reference must share its model's tokenizer").into())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard error of the mean: √(variance / (n − 1)).
fn standard_error(values: &[f64], mean: f64) -> f64 {
    let n = values.len() as f64;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    if n > 1.0 { (variance / (n - 1.0)).sqrt() } else { 0.0 }
}

/// Bytes of the text that the scored tokens stand for.
fn bytes_scored(tokens: &Tokens, seq_len: usize, n_windows: usize, scored: Range<usize>) -> usize {
    (0..n_windows)
        .map(|w| {
            let at = |position: usize| tokens.bytes_covered[w * seq_len + position];
            at(scored.end - 1) - at(scored.start - 1)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_have_their_closed_forms() {
        let values = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(mean(&values), 2.5);
        // Variance 1.25 over n, standard error √(1.25 / 3).
        assert!((standard_error(&values, 2.5) - (1.25f64 / 3.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn scored_bytes_are_those_of_scored_tokens() {
        let tokens = Tokens { ids: vec![0; 6], bytes_covered: vec![0, 2, 5, 6, 6, 10] };
        // Windows [0, 2, 5] and [6, 6, 10]: tokens 1 and 2 of each are scored.
        assert_eq!(bytes_scored(&tokens, 3, 2, 1..3), 5 + 4);
    }
}
