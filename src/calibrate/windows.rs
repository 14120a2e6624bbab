//! The calibration windows and their targets.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::Result;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::header::{TextPart, WindowCount};
use super::needs::Needs;
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::model::config::window_length;
use crate::model::{Decoder, Objective, SentenceModules};
use crate::text::{Bos, Text, Tokenizer, draw};

/// Default tokens per window, capped by the model's context.
const DEFAULT_SEQ_LEN: usize = 512;

/// The calibration text, and how much of it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowSettings {
    /// A text, or documents; see [`Text::read`].
    pub text: PathBuf,
    /// Field of a document that holds its text.
    pub field: String,
    /// Windows to draw; a short text gives fewer.
    pub samples: usize,
    /// Number of these windows whose gradients are taken, evenly spread; none: all.
    pub gradient_samples: Option<usize>,
    /// Tokens per window; none: 512, at most the model's context.
    pub seq_len: Option<usize>,
    /// Seed of the draw: the same seed gives the same windows on every machine.
    pub seed: u64,
}

/// Number of windows of `n` whose gradients are taken: as requested, or all. Fewer save time and disk, but Grams of
/// output gradients need as many tokens as Grams of inputs (`docs/results.md` 23).
///
/// # Errors
/// A request for a model with experts, or for statistics without gradients.
fn n_with_gradients(requested: Option<usize>, needs: Needs, decoder: &Decoder<'_>, n: usize) -> Result<usize> {
    let Some(few) = requested else { return Ok(n) };
    let linears = (0..decoder.n_blocks()).flat_map(|block| decoder.linears(block));
    let reason = if !needs.gradients() {
        "has no effect: no gradients are taken"
    } else if linears.into_iter().any(|(slot, _)| slot.expert.is_some()) {
        "cannot be used for a model with experts, each of which sees few tokens"
    } else {
        return Ok(few.min(n));
    };
    Err(Failure::usage(format!("`--gradient-samples` {reason}")).hint("remove `--gradient-samples`").into())
}

/// The `part`-th of `n_parts` equal parts of windows, of which `few` have gradients: those that do come
/// first, and how many they are.
fn part_of(
    windows: Vec<(Vec<u32>, Targets)>,
    few: usize,
    (part, n_parts): (usize, usize),
) -> (Vec<(Vec<u32>, Targets)>, usize) {
    let n = windows.len();
    let bounds = (part - 1) * n / n_parts..part * n / n_parts;
    // Spread evenly over all parts, so that the parts together have the gradients of the whole.
    let has_gradients = |i: &usize| (i + 1) * few / n > i * few / n;
    let here = windows.into_iter().enumerate().filter(|(i, _)| bounds.contains(i));
    let (first, rest): (Vec<_>, Vec<_>) = here.partition(|(i, _)| has_gradients(i));
    let n_first = first.len();
    (first.into_iter().chain(rest).map(|(_, window)| window).collect(), n_first)
}

fn n_tokens(windows: &[(Vec<u32>, Targets)]) -> usize {
    windows.iter().map(|(ids, _)| ids.len()).sum()
}

/// A calibration text cut into windows.
#[derive(Debug, Clone)]
pub struct Windows {
    /// Token ids, at most `seq_len` per window. Those with gradients come first.
    pub windows: Vec<Vec<u32>>,
    /// The targets of the loss of each window.
    pub targets: Vec<Targets>,
    /// Number of windows whose gradients are taken.
    pub n_gradients: usize,
    /// The entry for these windows in the header of a file of statistics.
    pub part: TextPart,
    /// The text as the user named it.
    pub text: String,
}

/// Windows, and the targets of the loss of each.
#[derive(Debug, Clone, Copy)]
pub struct TargetedWindows<'a> {
    /// Token ids of each window.
    pub windows: &'a [Vec<u32>],
    /// The targets of the loss, one entry per window.
    pub targets: &'a [Targets],
    /// Number of windows, from the first, that also go backward.
    pub n_gradients: usize,
}

impl Windows {
    /// The input of [`super::observe`].
    pub fn targeted(&self) -> TargetedWindows<'_> {
        TargetedWindows { windows: &self.windows, targets: &self.targets, n_gradients: self.n_gradients }
    }
}

/// The targets of the loss of a window: tokens with the rows they are predicted from, or an embedding.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Targets {
    /// Empty if the loss has no token targets.
    pub rows: Vec<u32>,
    /// The token that each of `rows` should predict.
    pub tokens: Vec<u32>,
    /// Seeds the direction in which the gradient of an embedding is taken.
    pub probe: u64,
}

impl Targets {
    /// All tokens of a window but the first, each predicted from the state before it.
    pub fn next(ids: &[u32]) -> Self {
        let tokens = ids.get(1..).unwrap_or_default().to_vec();
        Self { rows: (0..tokens.len() as u32).collect(), tokens, ..Self::default() }
    }

    /// Masks a random share of the tokens in `places`, which become the targets.
    fn masked(ids: &mut [u32], places: Range<usize>, mask: u32, generator: &mut ChaCha8Rng) -> Self {
        let n_masked = (places.len() * MASKED_PERCENT).div_ceil(100);
        let mut rows: Vec<u32> = places.map(|place| place as u32).collect();
        for i in 0..n_masked {
            let rest = (rows.len() - i) as u64;
            rows.swap(i, i + (generator.next_u64() % rest) as usize);
        }
        rows.truncate(n_masked);
        rows.sort_unstable();
        let tokens = rows.iter().map(|&row| std::mem::replace(&mut ids[row as usize], mask)).collect();
        Self { rows, tokens, ..Self::default() }
    }
}

/// Percentage of masked tokens, as in the training of BERT, which also replaces some of them by other tokens (Devlin
/// et al. 2019).
const MASKED_PERCENT: usize = 15;

impl Windows {
    /// Draws windows for statistics, and keeps the `part`-th (from 1) of `n_parts` equal parts.
    ///
    /// # Errors
    /// The text or the tokenizer cannot be read, the text is too short, or the model takes no part of the gradients.
    pub fn load(
        checkpoint: &Checkpoint,
        settings: &WindowSettings,
        needs: Needs,
        (part, n_parts): (usize, usize),
    ) -> Result<Self> {
        let tokenizer = Tokenizer::open(checkpoint)?;
        let text = Text::read(&settings.text, &settings.field, checkpoint)?;
        let decoder = Decoder::open(checkpoint)?;
        let objective = decoder.objective();
        let longest = decoder.sentence().and_then(|modules| modules.max_seq_length).unwrap_or(DEFAULT_SEQ_LEN);
        let seq_len = window_length(checkpoint, settings.seq_len, Some(longest.min(DEFAULT_SEQ_LEN)))?;
        let (bos, n_added) = match objective {
            Objective::NextToken => (Bos::Auto, 0),
            Objective::Masked | Objective::Pooled | Objective::Sentence => (Bos::Never, tokenizer.n_added()),
        };
        let n_of_text = seq_len.saturating_sub(n_added);
        if n_of_text == 0 {
            let message =
                format!("a window of {seq_len} tokens has no room beside the {n_added} that the tokenizer adds");
            return Err(Failure::usage(message).hint("give a larger `--seq-len`").into());
        }
        let drawn = match decoder.sentence() {
            Some(modules) => {
                modules.warn_of_ignored();
                sentences(&tokenizer, &text, modules, settings, n_of_text, n_added)?
            }
            None => tokenizer.encode(&text.joined(), bos)?.sample(n_of_text, settings.samples, settings.seed),
        };
        let mut generator = ChaCha8Rng::seed_from_u64(settings.seed);
        let target = |window| targeted(window, objective, &tokenizer, &mut generator);
        let windows = drawn.into_iter().map(target).collect::<Result<Vec<_>>>()?;
        if windows.is_empty() {
            let n_tokens = tokenizer.encode(&text.joined(), bos)?.ids.len();
            return Err(text.too_short(n_tokens, seq_len).into());
        }
        if windows.len() < n_parts {
            let message = format!("{} windows cannot be divided into {n_parts} parts", windows.len());
            let hint = match windows.len() < settings.samples {
                true => "give a longer text, or fewer parts",
                false => "raise `--samples`, or give fewer parts",
            };
            return Err(Failure::usage(message).hint(hint).into());
        }
        if windows.len() < settings.samples {
            tracing::warn!(
                "`{}` yields only {} windows, fewer than `--samples {}`",
                settings.text.display(),
                windows.len(),
                settings.samples
            );
        }
        let few = n_with_gradients(settings.gradient_samples, needs, &decoder, windows.len())?;
        let (windows, n_gradients) = part_of(windows, few, (part, n_parts));
        let part = TextPart {
            text_sha256: text.sha256,
            samples: settings.samples,
            seq_len,
            seed: settings.seed,
            part: (part, n_parts),
            windows: windows.len(),
            tokens: n_tokens(&windows),
            gradients: (n_gradients < windows.len())
                .then(|| WindowCount { windows: n_gradients, tokens: n_tokens(&windows[..n_gradients]) }),
        };
        let (windows, targets) = windows.into_iter().unzip();
        Ok(Self { windows, targets, n_gradients, part, text: settings.text.display().to_string() })
    }
}

/// A window with the tokens that the tokenizer adds, and its targets.
fn targeted(
    window: Vec<u32>,
    objective: Objective,
    tokenizer: &Tokenizer,
    generator: &mut ChaCha8Rng,
) -> Result<(Vec<u32>, Targets)> {
    if objective == Objective::NextToken {
        let targets = Targets::next(&window);
        return Ok((window, targets));
    }
    let (mut window, places) = tokenizer.wrap(&window);
    let targets = match objective {
        Objective::Sentence => Targets { probe: generator.next_u64(), ..Targets::default() },
        Objective::Masked => Targets::masked(&mut window, places, tokenizer.mask()?, generator),
        Objective::Pooled | Objective::NextToken => Targets::default(),
    };
    Ok((window, targets))
}

/// Tokens of the shortest piece of a text, including those that the tokenizer adds.
const SHORTEST_PIECE: usize = 16;

/// Texts for a model of sentence embeddings, without the tokens that the tokenizer adds; about `samples` × `seq_len`
/// tokens in total. They are the documents of a file, truncated to the longest window, or pieces of a single text.
/// Embeddings of short and of long texts have different errors, so the lengths of pieces double from [`SHORTEST_PIECE`]
/// to the longest window, and every length has the same share of the tokens.
fn sentences(
    tokenizer: &Tokenizer,
    text: &Text,
    modules: &SentenceModules,
    settings: &WindowSettings,
    n_of_text: usize,
    n_added: usize,
) -> Result<Vec<Vec<u32>>> {
    let encode = |text: String| tokenizer.encode(&modules.prepare(text), Bos::Never);
    let seq_len = n_of_text + n_added;
    let mut budget = settings.samples * seq_len;
    let mut drawn = Vec::new();
    if text.documents.len() > 1 {
        for i in draw(text.documents.len(), text.documents.len(), settings.seed) {
            let mut ids = encode(text.documents[i].clone())?.ids;
            ids.truncate(n_of_text);
            budget = budget.saturating_sub(ids.len() + n_added);
            drawn.push(ids);
            if budget == 0 {
                break;
            }
        }
        // Windows of equal length share a batch.
        drawn.sort_by_key(Vec::len);
        return Ok(drawn);
    }
    let tokens = encode(text.joined())?;
    let longer = |&length: &usize| Some(2 * length);
    let shorter = std::iter::successors(Some(SHORTEST_PIECE.max(n_added + 1)), longer);
    let lengths: Vec<usize> = shorter.take_while(|&length| length < seq_len).chain([seq_len]).collect();
    for &length in &lengths {
        let n_pieces = (budget / lengths.len() / length).max(1);
        drawn.extend(tokens.sample(length - n_added, n_pieces, settings.seed));
    }
    Ok(drawn)
}
