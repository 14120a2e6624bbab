//! Encoders: agreement of hidden states with a reference's, and the pseudo-perplexity of a masked language model.

use std::ops::Range;
use std::time::Instant;

use anyhow::Result;
use candle_core::Tensor;

use super::mean::{mean, standard_error};
use super::settings::{EvalSettings, Reference, expect_same_tokens, last_states};
use crate::checkpoint::Checkpoint;
use crate::device::to_host;
use crate::error::{Failure, NON_FINITE_HINT};
use crate::model::config::window_length;
use crate::model::{Decoder, Objective, SentenceModules, Walk, WalkLimits};
use crate::progress::Progress;
use crate::report::{
    AdapterRecord, Agreement, EncoderReport, FidelityRecord, LRC_VERSION, PseudoPerplexity, SCHEMA_VERSION,
    peak_memory_bytes,
};
use crate::text::{Bos, Text, Tokenizer};

/// Default tokens per window: the length that encoders were trained on.
const DEFAULT_SEQ_LEN: usize = 512;

/// Whether the pseudo-perplexity is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masking {
    /// Only hidden states and embeddings are compared.
    Never,
    /// Each token is masked in turn, which takes one pass per token of a window.
    Always,
}

/// Measures an encoder over a text, in windows as the tokenizer wraps them; the last one may be shorter. For a
/// sentence-transformers model and a file with several documents, each document is a window, truncated to the longest
/// text that the model reads.
///
/// # Errors
/// A model cannot be run or is not an encoder, the reference has another tokenizer or width, or the head
/// for `masking` is missing.
pub fn encoder(
    checkpoint: &Checkpoint,
    reference: Option<&Reference<'_>>,
    masking: Masking,
    settings: &EvalSettings,
    progress: &dyn Progress,
) -> Result<EncoderReport> {
    let started = Instant::now();
    if settings.stride.is_some() {
        return Err(Failure::usage("`--stride` has no effect on encoders").hint("remove `--stride`").into());
    }
    let decoder = settings.decoder(checkpoint)?;
    if masking == Masking::Always && !decoder.has_head() {
        let message = format!(
            "`{}` is an encoder without a masked-language-model head: it has neither perplexity nor pseudo-perplexity",
            settings.model
        );
        return Err(Failure::unsupported(message).hint("`--reference MODEL` compares hidden states").into());
    }
    let tokenizer = Tokenizer::open(checkpoint)?;
    let text = Text::read(&settings.text, &settings.field, checkpoint)?;
    let reference_decoder = reference.map(|r| settings.decoder(r.checkpoint)).transpose()?;
    // The output folder may lack the modules of its source.
    let modules = reference_decoder.as_ref().and_then(Decoder::sentence).or(decoder.sentence());
    let longest = modules.and_then(|modules| modules.max_seq_length).unwrap_or(DEFAULT_SEQ_LEN);
    let seq_len = window_length(checkpoint, settings.seq_len, Some(longest.min(DEFAULT_SEQ_LEN)))?;
    let wrapped = wrapped(&tokenizer, &text, modules, seq_len, settings.max_windows)?;
    let windows: Vec<Vec<u32>> = wrapped.iter().map(|(ids, _)| ids.clone()).collect();
    let limits = WalkLimits::new(settings.memory_bytes / 2, std::env::temp_dir());
    let fidelity = match reference.zip(reference_decoder) {
        Some((reference, reference_decoder)) => {
            expect_comparable(reference, &reference_decoder, &decoder)?;
            expect_same_tokens(reference, checkpoint, &text)?;
            Some(fidelity(reference.name, [&reference_decoder, &decoder], &windows, &limits, progress)?)
        }
        None => None,
    };
    let pseudo = match masking {
        Masking::Always => Some(pseudo_perplexity(&decoder, &wrapped, tokenizer.mask()?, &limits, progress)?),
        Masking::Never => None,
    };
    Ok(EncoderReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: settings.model.clone(),
        adapter: AdapterRecord::of(checkpoint)?,
        fidelity,
        pseudo,
        windows: windows.len(),
        seq_len,
        tokens: wrapped.iter().map(|(_, places)| places.len() as u64).sum(),
        compute_dtype: "f32".into(),
        text: settings.text.display().to_string(),
        text_sha256: text.sha256,
        tokenizer_sha256: tokenizer.sha256,
        parameters: checkpoint.n_elements(),
        size_bytes: checkpoint.n_bytes(),
        elapsed_seconds: started.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory_bytes(),
    })
}

/// Checks that the reference is an encoder of the same width.
fn expect_comparable(reference: &Reference<'_>, reference_decoder: &Decoder<'_>, decoder: &Decoder<'_>) -> Result<()> {
    if reference_decoder.objective() != Objective::NextToken
        && reference_decoder.config.hidden_size == decoder.config.hidden_size
    {
        return Ok(());
    }
    let message = format!("`{}` is not an encoder with the hidden size of the model", reference.name);
    Err(Failure::unsupported(message).hint("give the model that was compressed").into())
}

/// Windows as the tokenizer wraps them, each with the positions of its text; at most `max_windows`.
fn wrapped(
    tokenizer: &Tokenizer,
    text: &Text,
    modules: Option<&SentenceModules>,
    seq_len: usize,
    max_windows: Option<usize>,
) -> Result<Vec<(Vec<u32>, Range<usize>)>> {
    let n_of_text = seq_len.saturating_sub(tokenizer.n_added()).max(1);
    if let Some(modules) = modules {
        modules.warn_of_ignored();
    }
    let (n_tokens, pieces) = pieces(tokenizer, text, modules, n_of_text)?;
    let pieces = pieces.iter().take(max_windows.unwrap_or(usize::MAX));
    let wrapped: Vec<(Vec<u32>, Range<usize>)> = pieces.map(|piece| tokenizer.wrap(piece)).collect();
    if wrapped.is_empty() { Err(text.too_short(n_tokens, n_of_text).into()) } else { Ok(wrapped) }
}

/// The number of tokens of a text, and its pieces: windows without the tokens that the tokenizer adds.
fn pieces(
    tokenizer: &Tokenizer,
    text: &Text,
    modules: Option<&SentenceModules>,
    n_of_text: usize,
) -> Result<(usize, Vec<Vec<u32>>)> {
    let encode = |text: String| {
        let text = match modules {
            Some(modules) => modules.prepare(text),
            None => text,
        };
        Ok::<_, anyhow::Error>(tokenizer.encode(&text, Bos::Never)?.ids)
    };
    if modules.is_none() || text.documents.len() == 1 {
        let tokens = encode(text.joined())?;
        return Ok((tokens.len(), tokens.chunks(n_of_text).map(<[u32]>::to_vec).collect()));
    }
    let documents = text.documents.iter().map(|document| encode(document.clone())).collect::<Result<Vec<_>>>()?;
    let n_tokens = documents.iter().map(Vec::len).sum();
    let cut = |mut ids: Vec<u32>| {
        ids.truncate(n_of_text);
        ids
    };
    Ok((n_tokens, documents.into_iter().map(cut).collect()))
}

/// Accumulates the agreement of vectors with a reference's.
#[derive(Default)]
struct Comparison {
    cosines: Vec<f64>,
    squared_error: f64,
    squared_norm: f64,
}

impl Comparison {
    /// Adds rows of `x` and of `reference`, both (n, width).
    fn add(&mut self, reference: &Tensor, x: &Tensor) -> Result<()> {
        let width = x.dim(1)?;
        let (reference, x) = (to_host(reference)?, to_host(x)?);
        for (r, x) in reference.chunks_exact(width).zip(x.chunks_exact(width)) {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let (rr, xx, rx) = (dot(r, r), dot(x, x), dot(r, x));
            self.cosines.push(rx / (rr * xx).sqrt());
            self.squared_error += r.iter().zip(x).map(|(r, x)| (f64::from(*r) - f64::from(*x)).powi(2)).sum::<f64>();
            self.squared_norm += rr;
        }
        Ok(())
    }

    fn record(&self) -> Result<Agreement> {
        if !self.cosines.iter().all(|cosine| cosine.is_finite()) {
            return Err(Failure::numeric("hidden states of the model or the reference are not finite, or all zero")
                .hint(NON_FINITE_HINT)
                .into());
        }
        Ok(Agreement {
            cosine_mean: mean(&self.cosines),
            cosine_min: self.cosines.iter().copied().fold(f64::INFINITY, f64::min),
            relative_error: (self.squared_error / self.squared_norm).sqrt(),
        })
    }
}

fn fidelity(
    name: &str,
    [reference_decoder, model]: [&Decoder<'_>; 2],
    windows: &[Vec<u32>],
    limits: &WalkLimits,
    progress: &dyn Progress,
) -> Result<FidelityRecord> {
    let n_tokens: usize = windows.iter().map(Vec::len).sum();
    let n_steps = n_tokens * (reference_decoder.n_blocks() + model.n_blocks());
    let stage = progress.stage("compare", n_steps as u64, "tokens");
    let (walk, hidden) =
        last_states(reference_decoder, Walk::new(reference_decoder, windows, limits)?, stage.as_ref())?;
    let (other_walk, other_hidden) = last_states(model, Walk::new(model, windows, limits)?, stage.as_ref())?;
    let pooler = reference_decoder.pooler()?;
    // Sentence-transformers modules are never compressed: the reference's apply to both.
    let own = if pooler.is_of_sentences() { None } else { Some(model.pooler()?) };
    let other_pooler = own.as_ref().unwrap_or(&pooler);
    let (mut states, mut pooled) = (Comparison::default(), Comparison::default());
    for window_idx in 0..windows.len() {
        let (reference, x) = (walk.window(&hidden, window_idx)?, other_walk.window(&other_hidden, window_idx)?);
        states.add(&reference, &x)?;
        pooled.add(&pooler.pool(&reference)?.unsqueeze(0)?, &other_pooler.pool(&x)?.unsqueeze(0)?)?;
    }
    Ok(FidelityRecord {
        reference: name.into(),
        states: states.record()?,
        pooled: pooled.record()?,
        pooling: pooler.name().into(),
    })
}

/// Masks each token of the text in turn and predicts it from all others of its window (Salazar et al. 2020,
/// arXiv:1910.14659). Takes one pass per token.
fn pseudo_perplexity(
    decoder: &Decoder<'_>,
    wrapped: &[(Vec<u32>, Range<usize>)],
    mask: u32,
    limits: &WalkLimits,
    progress: &dyn Progress,
) -> Result<PseudoPerplexity> {
    let head = decoder.head()?;
    let n_passes: usize = wrapped.iter().map(|(ids, places)| ids.len() * places.len()).sum();
    let stage = progress.stage("masked tokens", (n_passes * decoder.n_blocks()) as u64, "tokens");
    let mut nlls = Vec::new();
    // One window at a time, with one copy per token.
    for (ids, places) in wrapped {
        let copy = |place: usize| {
            let mut copy = ids.clone();
            copy[place] = mask;
            copy
        };
        let copies: Vec<Vec<u32>> = places.clone().map(copy).collect();
        let (walk, hidden) = last_states(decoder, Walk::new(decoder, &copies, limits)?, stage.as_ref())?;
        for (i, place) in places.clone().enumerate() {
            let x = walk.window(&hidden, i)?.narrow(0, place, 1)?;
            nlls.extend(head.negative_log_likelihoods(&x, &[ids[place]])?);
        }
    }
    let mean = mean(&nlls);
    let ppl = mean.exp();
    Ok(PseudoPerplexity {
        pseudo_ppl: ppl,
        pseudo_ppl_standard_error: ppl * standard_error(&nlls, mean),
        nll_sum: nlls.iter().sum(),
        scored_tokens: nlls.len() as u64,
    })
}
