//! Which windows of which text are observed.

use std::path::PathBuf;

use anyhow::Result;

use super::store::Part;
use crate::checkpoint::Checkpoint;
use crate::model::config::window_length;
use crate::text::{Bos, Text, Tokenizer};

/// Tokens in a window where the user names none; what the field's tools take, capped by the model's context.
const DEFAULT_SEQ_LEN: usize = 512;

/// Which text is observed, and how much of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowSettings {
    pub text: PathBuf,
    /// Of the documents of a `.jsonl` or `.parquet` file.
    pub field: String,
    pub samples: usize,
    /// By default 512, at most the model's context.
    pub seq_len: Option<usize>,
    pub seed: u64,
}

/// Calibration text cut into windows, ready before a weight is read.
#[derive(Debug, Clone)]
pub struct Windows {
    pub windows: Vec<Vec<u32>>,
    pub part: Part,
}

impl Windows {
    /// Draws windows, and takes the `part`-th (from 1) of `n_parts` equal runs of them.
    ///
    /// # Errors
    /// The text or the tokenizer cannot be read, or the text is too short.
    pub fn load(checkpoint: &Checkpoint, settings: &WindowSettings, (part, n_parts): (usize, usize)) -> Result<Self> {
        let tokenizer = Tokenizer::open(checkpoint.root())?;
        let text = Text::read(&settings.text, &settings.field)?;
        let tokens = tokenizer.encode(&text.joined(), Bos::Auto)?;
        let seq_len = window_length(checkpoint, settings.seq_len, DEFAULT_SEQ_LEN);
        let mut windows = tokens.sample(seq_len, settings.samples, settings.seed);
        if windows.len() < n_parts {
            return Err(text.too_short(tokens.ids.len(), seq_len * n_parts).into());
        }
        if windows.len() < settings.samples {
            tracing::warn!(
                "`{}` has {} windows, fewer than `--samples {}`",
                settings.text.display(),
                windows.len(),
                settings.samples
            );
        }
        let bound = |i: usize| i * windows.len() / n_parts;
        windows = windows[bound(part - 1)..bound(part)].to_vec();
        let part = Part {
            text_sha256: text.sha256,
            samples: settings.samples,
            seq_len,
            seed: settings.seed,
            part: (part, n_parts),
            windows: windows.len(),
            tokens: windows.len() * seq_len,
        };
        Ok(Self { windows, part })
    }
}
