//! Perplexity in named conventions.

pub mod conventions;

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
use conventions::Convention;

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

/// Measures perplexity; weights are read once, a block at a time.
///
/// # Errors
/// The model cannot be run, the text is too short, or a logit is not finite.
pub fn perplexity(
    checkpoint: &Checkpoint,
    settings: &EvalSettings,
    progress: &dyn Progress,
) -> Result<PerplexityReport> {
    let started = Instant::now();
    let decoder = Decoder::open(checkpoint)?;
    let tokenizer = Tokenizer::open(checkpoint.root())?;
    let text = Text::read(&settings.text)?;
    let tokens = tokenizer.encode(&text.content, settings.bos)?;

    let rules = settings.convention.rules();
    let seq_len = window_length(checkpoint, settings.seq_len, rules.default_seq_len());
    let scored = |n_tokens: usize| rules.scored(n_tokens);
    if scored(seq_len).is_empty() {
        return Err(Failure::usage(format!("`--seq-len {seq_len}` leaves no token to score")).into());
    }
    let bos = tokenizer.bos().filter(|_| settings.bos == Bos::Auto);
    let mut windows = rules.windows(&tokens, seq_len, bos);
    windows.truncate(settings.max_windows.unwrap_or(usize::MAX));
    if windows.is_empty() {
        return Err(text.too_short(&tokens, seq_len).into());
    }
    let n_tokens = windows.len() * seq_len;
    let stage = progress.stage("evaluate", (n_tokens * (decoder.n_blocks() + 1)) as u64, "tokens");
    let limits = WalkLimits::new(settings.memory_bytes, std::env::temp_dir());
    let mut walk = Walk::start(&decoder, &windows, &limits)?;
    for block_idx in 0..decoder.n_blocks() {
        stage.note(&format!("block {block_idx}"));
        let block = decoder.block(block_idx)?;
        walk.advance(&decoder, &block, &mut |_, _| Ok(()), stage.as_ref())?;
    }
    stage.note("head");
    let nlls: Vec<f64> = walk.finish(&decoder, &scored, stage.as_ref())?.concat();

    let elapsed_seconds = started.elapsed().as_secs_f64();
    let mean = mean(&nlls);
    let ppl = mean.exp();
    let nll_sum: f64 = nlls.iter().sum();
    Ok(PerplexityReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: settings.model.clone(),
        convention: rules.name().into(),
        ppl,
        ppl_standard_error: ppl * standard_error(&nlls, mean),
        nll_sum,
        bits_per_byte: nll_sum
            / std::f64::consts::LN_2
            / bytes_scored(&tokens, seq_len, windows.len(), scored(seq_len)) as f64,
        scored_tokens: nlls.len() as u64,
        windows: windows.len(),
        seq_len,
        total_tokens: tokens.ids.len(),
        bos: if settings.bos == Bos::Auto { "auto" } else { "never" }.into(),
        bos_added: bos.is_some(),
        compute_dtype: "f32".into(),
        text: settings.text.display().to_string(),
        text_sha256: text.sha256,
        tokenizer_sha256: tokenizer.sha256,
        parameters: checkpoint.n_elements(),
        size_bytes: checkpoint.n_bytes(),
        elapsed_seconds,
        tokens_per_second: n_tokens as f64 / elapsed_seconds,
        peak_memory_bytes: peak_memory_bytes(),
    })
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
