//! Perplexity in named conventions, and divergence from a reference.

pub mod conventions;
pub mod divergence;
mod encoder;
mod mean;
mod settings;

use std::ops::Range;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Tensor;

use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::model::config::window_length;
use crate::model::{Decoder, Hidden, ModelConfig, Scored, Walk, WalkLimits};
use crate::progress::{Progress, Stage};
use crate::report::{
    AdapterRecord, DivergenceRecord, LRC_VERSION, PerplexityReport, SCHEMA_VERSION, peak_memory_bytes,
};
use crate::text::{Bos, Text, Tokenizer};
use conventions::{Lengths, Rules, Unit, Window};
use divergence::Divergence;
pub use encoder::{Masking, encoder};
use mean::{mean, standard_error};
pub use settings::{EvalSettings, Reference};
use settings::{expect_same_tokens, last_states};

/// Default stride, as in the guide of transformers; half a window if that is less.
const DEFAULT_STRIDE: usize = 512;

/// A text cut into windows by the rules of a convention.
pub struct Prepared {
    /// Tokens that the model reads.
    pub windows: Vec<Vec<u32>>,
    /// The scored tokens of each window.
    pub scored: Vec<Scored>,
    /// Tokens per window, at most the model's context.
    pub seq_len: usize,
    /// The text before it was cut.
    pub text: Text,
    rules: &'static dyn Rules,
    stride: Option<usize>,
    total_tokens: usize,
    /// Bytes and words of the text that the scored tokens cover.
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
                "a `{}` has no perplexity: it is an encoder, which sees the tokens it would have to predict",
                config.model_type
            );
            return Err(Failure::unsupported(message)
                .hint("`--reference MODEL` compares hidden states; `--convention masked` masks each token in turn")
                .into());
        }
        let rules = settings.convention.rules();
        if settings.stride.is_some() && !rules.takes_stride() {
            let message = format!("`--stride` has no effect with `--convention {}`", rules.name());
            return Err(Failure::usage(message).hint("only `--convention hf-strided` has overlapping windows").into());
        }
        let tokenizer = Tokenizer::open(checkpoint)?;
        let text = Text::read(&settings.text, &settings.field, checkpoint)?;
        let seq_len = window_length(checkpoint, settings.seq_len, rules.default_seq_len())?;
        let stride = settings.stride.unwrap_or(DEFAULT_STRIDE.min(seq_len / 2).max(1));
        if stride > seq_len {
            let message = format!("a stride of {stride} leaves gaps between windows of {seq_len} tokens");
            return Err(Failure::usage(message).hint("give a `--stride` no larger than `--seq-len`").into());
        }
        let bos = tokenizer.bos().filter(|_| settings.bos == Bos::Auto);
        let Cut { windows, total_tokens, n_bytes, n_words } =
            cut(rules, &text, &tokenizer, settings, Lengths { seq_len, stride })?;
        if windows.is_empty() {
            return Err(text.too_short(total_tokens, seq_len).into());
        }
        let scored = |window: &Window| Scored {
            places: window.scored.clone(),
            tokens: window.ids[window.scored.clone()].to_vec(),
        };
        let scored = windows.iter().map(scored).collect();
        // The last token of a window may be predicted without being read.
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

    /// The name of the convention, as on the command line.
    pub fn convention(&self) -> &'static str {
        self.rules.name()
    }

    /// Tokens of all windows.
    fn n_tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }
}

/// Windows, with the bytes and words that their scored tokens cover.
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
    lengths: Lengths,
) -> Result<Cut> {
    let bos = tokenizer.bos().filter(|_| settings.bos == Bos::Auto);
    let most = settings.max_windows.unwrap_or(usize::MAX);
    let streams = if rules.is_by_document() { text.documents.clone() } else { vec![text.joined()] };
    let mut cut = Cut::default();
    for stream in &streams {
        let tokens = tokenizer.encode(stream, settings.bos)?;
        cut.total_tokens += tokens.ids.len();
        let windows = rules.windows(&tokens, lengths, bos, tokenizer.boundary());
        let scoring = windows.into_iter().filter(|window| !window.scored.is_empty());
        for window in scoring.take(most - cut.windows.len()) {
            cut.n_bytes += window.bytes.len();
            cut.n_words += words_in(stream, &window.bytes);
            cut.windows.push(window);
        }
    }
    Ok(cut)
}

/// Counts the words that begin in a range of bytes of a text. Words are the pieces between runs of white space, as in
/// Python's `re.split(r"\s+", text)`: the first may be empty.
fn words_in(text: &str, bytes: &Range<usize>) -> usize {
    // Python's \s is Unicode white space and the separators 0x1c to 0x1f.
    let is_space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
    // A token may end inside a character, which then belongs to the range where it begins.
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

/// Measures perplexity, and the divergence from a reference if there is one. Weights are read once, one block at a
/// time, of both models in turn.
///
/// ```
/// # use lrc::checkpoint::Checkpoint;
/// # use lrc::eval::{EvalSettings, Reference, conventions::Convention, perplexity};
/// # use lrc::{progress::Silent, text::Bos};
/// # let settings = EvalSettings {
/// #     model: "tiny-llama".into(),
/// #     text: "fixtures/text/held-out.txt".into(),
/// #     field: "text".into(),
/// #     convention: Convention::Gptq,
/// #     seq_len: Some(32),
/// #     stride: None,
/// #     max_windows: Some(2),
/// #     bos: Bos::Auto,
/// #     memory_bytes: 1 << 30,
/// #     device: lrc::device::DeviceChoice::Cpu.open()?,
/// # };
/// let model = Checkpoint::open("fixtures/tiny-llama".as_ref())?;
/// let reference = Reference { checkpoint: &model, name: "itself" };
/// let report = perplexity(&model, Some(&reference), &settings, &Silent)?; // 2 windows of 32 tokens
/// assert_eq!(report.scored_tokens, 2 * 31); // `gptq` does not score the first token of a window
/// assert!((report.ppl - (report.nll_sum / 62.0).exp()).abs() < 1e-9);
/// assert_eq!(report.divergence.expect("there is a reference").kl.mean, 0.0);
/// # Ok::<(), anyhow::Error>(())
/// ```
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
    let decoder = settings.decoder(checkpoint)?;
    let reference_decoder = reference.map(|r| settings.decoder(r.checkpoint)).transpose()?;
    let prepared = Prepared::new(checkpoint, settings)?;
    if let Some(reference) = reference {
        expect_same_tokens(reference, checkpoint, &prepared.text)?;
    }
    let decoders: Vec<&Decoder<'_>> = std::iter::once(&decoder).chain(&reference_decoder).collect();
    let n_steps: usize = decoders.iter().map(|d| d.n_blocks() + 1).sum();
    let stage = progress.stage("evaluate", (prepared.n_tokens() * n_steps) as u64, "tokens");
    let limits = WalkLimits::new(settings.memory_bytes / decoders.len() as u64, std::env::temp_dir());
    let text = settings.text.display().to_string();
    let walk = |decoder| Ok::<_, anyhow::Error>(Walk::new(decoder, &prepared.windows, &limits)?.of_text(&text));
    let walked = last_states(&decoder, walk(&decoder)?, stage.as_ref())?;
    let reference_decoder = match &reference_decoder {
        Some(reference_decoder) => {
            Some((reference_decoder, last_states(reference_decoder, walk(reference_decoder)?, stage.as_ref())?))
        }
        None => None,
    };
    stage.note("head");
    let nlls = walked.0.score(&walked.1, &decoder, &prepared.scored, stage.as_ref())?.concat();
    let divergence = match (reference, reference_decoder) {
        (Some(reference), Some((reference_decoder, states))) => {
            let found = diverge(&prepared, (&decoder, walked), (reference_decoder, states), stage.as_ref())?;
            Some(found.record(reference.name))
        }
        _ => None,
    };
    report(checkpoint, settings, prepared, &nlls, divergence, started)
}

/// Compares the logits of a model with the logits of the reference, window by window.
fn diverge(
    prepared: &Prepared,
    (decoder, (walk, hidden)): (&Decoder<'_>, (Walk<'_>, Hidden)),
    (reference_decoder, (reference_walk, reference_hidden)): (&Decoder<'_>, (Walk<'_>, Hidden)),
    stage: &dyn Stage,
) -> Result<Divergence> {
    let (head, reference_head) = (decoder.head()?, reference_decoder.head()?);
    let mut divergence = Divergence::default();
    let compare = |i: usize, states: &[Tensor]| {
        let scored = &prepared.scored[i];
        let x = scored.rows(&states[0])?;
        let reference_x = scored.rows(&reference_walk.window(&reference_hidden, i)?)?;
        let found = divergence::compare(&reference_head, &reference_x, &head, &x, &scored.tokens);
        stage.advance(prepared.windows[i].len() as u64);
        found.with_context(|| walk.place()(i))
    };
    walk.for_each_window(&[&hidden], compare, |_, found| {
        divergence.extend(found);
        Ok(())
    })?;
    Ok(divergence)
}

fn report(
    checkpoint: &Checkpoint,
    settings: &EvalSettings,
    prepared: Prepared,
    nlls: &[f64],
    divergence: Option<DivergenceRecord>,
    started: Instant,
) -> Result<PerplexityReport> {
    let elapsed_seconds = started.elapsed().as_secs_f64();
    let mean = mean(nlls);
    let nll_sum: f64 = nlls.iter().sum();
    let n_units = match prepared.rules.unit() {
        Unit::Token => nlls.len(),
        Unit::Word => prepared.n_words,
    };
    let tokens_per_unit = nlls.len() as f64 / n_units as f64;
    let ppl = (mean * tokens_per_unit).exp();
    Ok(PerplexityReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: settings.model.clone(),
        source_quantization: checkpoint.source_quantization(),
        adapter: AdapterRecord::of(checkpoint)?,
        convention: prepared.convention().into(),
        ppl,
        ppl_standard_error: ppl * tokens_per_unit * standard_error(nlls, mean),
        nll_sum,
        token_ppl: mean.exp(),
        bits_per_byte: nll_sum / std::f64::consts::LN_2 / prepared.n_bytes as f64,
        scored_tokens: nlls.len() as u64,
        scored_words: prepared.n_words as u64,
        scored_bytes: prepared.n_bytes as u64,
        windows: prepared.windows.len(),
        seq_len: prepared.seq_len,
        stride: prepared.stride,
        documents: prepared.text.documents.len(),
        total_tokens: prepared.total_tokens,
        bos: if settings.bos == Bos::Auto { "auto" } else { "never" }.into(),
        bos_added: prepared.bos_added,
        compute_dtype: "f32".into(),
        text: settings.text.display().to_string(),
        tokens_per_second: prepared.n_tokens() as f64 / elapsed_seconds,
        text_sha256: prepared.text.sha256,
        tokenizer_sha256: prepared.tokenizer_sha256,
        parameters: checkpoint.n_elements(),
        size_bytes: checkpoint.n_bytes(),
        divergence,
        elapsed_seconds,
        peak_memory_bytes: peak_memory_bytes(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_as_python_splits() {
        for (text, expected) in [("a b", 2), (" a  b\n", 4), ("", 0), ("a\u{a0}b\u{1c}", 3), ("one", 1)] {
            assert_eq!(words_in(text, &(0..text.len())), expected, "{text:?}");
            // The same wherever the text is cut.
            for at in 1..text.len() {
                assert_eq!(words_in(text, &(0..at)) + words_in(text, &(at..text.len())), expected, "{text:?} at {at}");
            }
        }
    }
}
