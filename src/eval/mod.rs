//! Perplexity in named conventions, and divergence from a reference.

pub mod conventions;
pub mod divergence;
mod encoder;

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::model::config::window_length;
use crate::model::{Decoder, ModelConfig, Scored, Walk, WalkLimits};
use crate::progress::Progress;
use crate::report::{LRC_VERSION, PerplexityReport, SCHEMA_VERSION, peak_memory_bytes};
use crate::text::{Bos, Text, Tokenizer};
use conventions::{Convention, Lengths, Rules, Unit, Window};
use divergence::Divergence;
pub use encoder::{Masking, encoder};

/// What is measured.
#[derive(Debug, Clone)]
pub struct EvalSettings {
    /// The model as the user named it.
    pub model: String,
    pub text: PathBuf,
    /// Of the documents of a `.jsonl` or `.parquet` file.
    pub field: String,
    pub convention: Convention,
    /// Window length; the convention's by default, capped by the model's context.
    pub seq_len: Option<usize>,
    /// Between the beginnings of windows that overlap.
    pub stride: Option<usize>,
    pub max_windows: Option<usize>,
    pub bos: Bos,
    pub memory_bytes: u64,
}

/// Distance of overlapping windows where the user names none, as in transformers' guide; half a window if that is less.
const DEFAULT_STRIDE: usize = 512;

/// A text cut into windows, by the rules of a convention.
pub struct Prepared {
    /// What goes through the model.
    pub windows: Vec<Vec<u32>>,
    pub scored: Vec<Scored>,
    pub seq_len: usize,
    pub text: Text,
    rules: &'static dyn Rules,
    stride: Option<usize>,
    total_tokens: usize,
    /// Bytes and words of the text that the scored tokens stand for.
    n_bytes: usize,
    n_words: usize,
    bos_added: bool,
    tokenizer_sha256: String,
}

impl Prepared {
    /// # Errors
    /// The text or the tokenizer is broken, or the text is too short.
    pub fn new(checkpoint: &Checkpoint, settings: &EvalSettings) -> Result<Self> {
        let (config, architecture) = ModelConfig::of(checkpoint)?;
        if architecture.encoder.is_some() {
            let message = format!(
                "a `{}` has no perplexity: it is an encoder, and sees the tokens that it would have to foretell",
                config.model_type
            );
            return Err(Failure::unsupported(message)
                .hint("`lrc eval --reference MODEL` compares hidden states, `--convention masked` hides each token in turn")
                .into());
        }
        let rules = settings.convention.rules();
        if settings.stride.is_some() && !rules.takes_stride() {
            let message = format!("`--stride` is nothing in the convention `{}`", rules.name());
            return Err(Failure::usage(message).hint("`--convention hf-strided` has windows that overlap").into());
        }
        let tokenizer = Tokenizer::open(checkpoint.root())?;
        let text = Text::read(&settings.text, &settings.field, checkpoint.root())?;
        let seq_len = window_length(checkpoint, settings.seq_len, rules.default_seq_len())?;
        let stride = settings.stride.unwrap_or(DEFAULT_STRIDE.min(seq_len / 2).max(1));
        if stride > seq_len {
            let message = format!("a stride of {stride} leaves out what lies between windows of {seq_len}");
            return Err(Failure::usage(message).hint("give a `--stride` of at most `--seq-len`").into());
        }
        let bos = tokenizer.bos().filter(|_| settings.bos == Bos::Auto);
        let Cut { windows, total_tokens, n_bytes, n_words } =
            cut(rules, &text, &tokenizer, settings, (seq_len, stride))?;
        if windows.is_empty() {
            return Err(text.too_short(total_tokens, seq_len).into());
        }
        let scored = |window: &Window| Scored {
            places: window.scored.clone(),
            tokens: window.ids[window.scored.clone()].to_vec(),
        };
        let scored = windows.iter().map(scored).collect();
        // The last token of a window may be foretold without being read.
        let read = |mut window: Window| {
            window.ids.truncate(seq_len);
            window.ids
        };
        let windows: Vec<Vec<u32>> = windows.into_iter().map(read).collect();
        Ok(Self {
            windows,
            scored,
            seq_len,
            text,
            rules,
            stride: rules.takes_stride().then_some(stride),
            total_tokens,
            n_bytes,
            n_words,
            bos_added: bos.is_some(),
            tokenizer_sha256: tokenizer.sha256,
        })
    }

    pub fn convention(&self) -> &'static str {
        self.rules.name()
    }
}

/// Windows, and what their scored tokens stand for.
#[derive(Default)]
struct Cut {
    windows: Vec<Window>,
    total_tokens: usize,
    n_bytes: usize,
    n_words: usize,
}

fn cut(
    rules: &dyn Rules,
    text: &Text,
    tokenizer: &Tokenizer,
    settings: &EvalSettings,
    (seq_len, stride): (usize, usize),
) -> Result<Cut> {
    let bos = tokenizer.bos().filter(|_| settings.bos == Bos::Auto);
    let most = settings.max_windows.unwrap_or(usize::MAX);
    let streams = if rules.is_by_document() { text.documents.clone() } else { vec![text.joined()] };
    let mut cut = Cut::default();
    for stream in &streams {
        let tokens = tokenizer.encode(stream, settings.bos)?;
        cut.total_tokens += tokens.ids.len();
        let windows = rules.windows(&tokens, Lengths { seq_len, stride }, bos, tokenizer.boundary());
        let scoring = windows.into_iter().filter(|window| !window.scored.is_empty());
        for window in scoring.take(most - cut.windows.len()) {
            cut.n_bytes += window.bytes.len();
            cut.n_words += words_in(stream, &window.bytes);
            cut.windows.push(window);
        }
    }
    Ok(cut)
}

/// Words that begin in a run of bytes of a text: the pieces between runs of white space, of which there is one even if it is
/// empty, as Python's `re.split(r"\s+", text)` has it.
fn words_in(text: &str, bytes: &Range<usize>) -> usize {
    // Python's \s has the separators 0x1c to 0x1f besides what Unicode calls white space.
    let is_space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
    // Bytes of a token may end inside of a character: it belongs to where it begins.
    let (start, end) = (text.ceil_char_boundary(bytes.start), text.ceil_char_boundary(bytes.end));
    let before = text[..start].chars().next_back();
    let mut is_in_break = before.is_some_and(is_space);
    let mut n_words = usize::from(bytes.start == 0 && end > 0);
    for c in text[start..end.max(start)].chars() {
        n_words += usize::from(is_space(c) && !is_in_break);
        is_in_break = is_space(c);
    }
    n_words
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
        expect_same_tokens(reference, checkpoint, &prepared.text)?;
    }
    let windows = &prepared.windows;
    let n_tokens: usize = windows.iter().map(Vec::len).sum();
    let decoders: Vec<&Decoder<'_>> = std::iter::once(&decoder).chain(&reference_decoder).collect();
    let n_steps: usize = decoders.iter().map(|d| d.n_blocks() + 1).sum();
    let stage = progress.stage("evaluate", (n_tokens * n_steps) as u64, "tokens");
    let limits = WalkLimits::new(settings.memory_bytes / decoders.len() as u64, std::env::temp_dir());
    let mut walks = Vec::new();
    for decoder in &decoders {
        let mut walk = Walk::new(decoder, windows, &limits)?.of_text(&settings.text.display().to_string());
        let mut hidden = walk.embed(decoder)?;
        for block_idx in 0..decoder.n_blocks() {
            stage.note(&format!("block {block_idx}"));
            let block = decoder.block(block_idx)?;
            walk.advance(&mut hidden, decoder, &block, &mut |_, _| Ok(()), stage.as_ref())?;
        }
        walks.push((walk, hidden));
    }
    stage.note("head");
    let (mut walk, hidden) = walks.remove(0);
    let nlls: Vec<f64> = walk.score(&hidden, &decoder, &prepared.scored, stage.as_ref())?.concat();
    let divergence = match (reference, &reference_decoder, walks.pop()) {
        (Some(reference), Some(reference_decoder), Some((mut reference_walk, reference_hidden))) => {
            let (head, reference_head) = (decoder.head()?, reference_decoder.head()?);
            let mut divergence = Divergence::default();
            for (i, scored) in prepared.scored.iter().enumerate() {
                let x = scored.rows(&walk.window(&hidden, i)?)?;
                let reference_x = scored.rows(&reference_walk.window(&reference_hidden, i)?)?;
                let found = divergence::compare(&reference_head, &reference_x, &head, &x, &scored.tokens);
                divergence.extend(found.with_context(|| walk.place()(i))?);
                stage.advance(windows[i].len() as u64);
            }
            Some(divergence.record(reference.name))
        }
        _ => None,
    };

    let elapsed_seconds = started.elapsed().as_secs_f64();
    let mean = mean(&nlls);
    let nll_sum: f64 = nlls.iter().sum();
    // Of one unit of the convention: a token, or a word.
    let n_units = match prepared.rules.unit() {
        Unit::Token => nlls.len(),
        Unit::Word => prepared.n_words,
    };
    let per_unit = nlls.len() as f64 / n_units as f64;
    let ppl = (mean * per_unit).exp();
    Ok(PerplexityReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: settings.model.clone(),
        convention: prepared.convention().into(),
        ppl,
        ppl_standard_error: ppl * per_unit * standard_error(&nlls, mean),
        nll_sum,
        token_ppl: mean.exp(),
        bits_per_byte: nll_sum / std::f64::consts::LN_2 / prepared.n_bytes as f64,
        scored_tokens: nlls.len() as u64,
        scored_words: prepared.n_words as u64,
        scored_bytes: prepared.n_bytes as u64,
        windows: windows.len(),
        seq_len: prepared.seq_len,
        stride: prepared.stride,
        documents: prepared.text.documents.len(),
        total_tokens: prepared.total_tokens,
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
fn expect_same_tokens(reference: &Reference<'_>, checkpoint: &Checkpoint, text: &Text) -> Result<()> {
    let (own, other) = (Tokenizer::open(checkpoint.root())?, Tokenizer::open(reference.checkpoint.root())?);
    if own.sha256 == other.sha256 {
        return Ok(());
    }
    for document in &text.documents {
        if own.encode(document, Bos::Never)?.ids != other.encode(document, Bos::Never)?.ids {
            let message = format!("`{}` cuts the text into other tokens than the model", reference.name);
            return Err(Failure::unsupported(message).hint("a reference must share its model's tokenizer").into());
        }
    }
    Ok(())
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
    fn words_are_counted_as_python_splits() {
        for (text, expected) in [("a b", 2), (" a  b\n", 4), ("", 0), ("a\u{a0}b\u{1c}", 3), ("one", 1)] {
            assert_eq!(words_in(text, &(0..text.len())), expected, "{text:?}");
            // Wherever it is cut.
            for at in 1..text.len() {
                assert_eq!(words_in(text, &(0..at)) + words_in(text, &(at..text.len())), expected, "{text:?} at {at}");
            }
        }
    }
}
