//! The windows of one or several texts.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;

use crate::calibrate::{Needs, WindowSettings, Windows};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::report::HealedText;

/// Every so many windows one is held out.
pub(super) const HELD_OUT: usize = 8;

/// A text, and its share of the tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedText {
    /// A text, or documents.
    pub path: PathBuf,
    /// Relative to the weights of the other texts.
    pub weight: f64,
}

impl FromStr for WeightedText {
    type Err = String;

    /// `FILE` or `FILE:WEIGHT`. A file whose name ends like a weight needs one.
    fn from_str(text: &str) -> Result<Self, String> {
        let weighted = text.rsplit_once(':').and_then(|(path, weight)| Some((path, weight.parse::<f64>().ok()?)));
        let (path, weight) = weighted.unwrap_or((text, 1.0));
        if !(weight > 0.0 && weight.is_finite()) || path.is_empty() {
            return Err("expected FILE or FILE:WEIGHT with a weight above 0, such as `a.txt:0.7`".into());
        }
        Ok(Self { path: path.into(), weight })
    }
}

/// The windows of all texts, in turn.
pub(super) struct Drawn {
    pub windows: Vec<Vec<u32>>,
    parts: Vec<Windows>,
}

impl Drawn {
    /// # Errors
    /// A text or the tokenizer cannot be read, or there are too few windows to hold one out.
    pub fn of(checkpoint: &Checkpoint, texts: &[WeightedText], of_all: &WindowSettings) -> Result<Self> {
        let whole: f64 = texts.iter().map(|text| text.weight).sum();
        let mut parts = Vec::new();
        for text in texts {
            let samples = ((text.weight / whole * of_all.samples as f64).round() as usize).max(1);
            let settings = WindowSettings { text: text.path.clone(), samples, ..of_all.clone() };
            parts.push(Windows::load(checkpoint, &settings, Needs::default(), (1, 1))?);
        }
        let n_windows: usize = parts.iter().map(|part| part.windows.len()).sum();
        if n_windows < HELD_OUT {
            let named: Vec<String> = parts.iter().map(|part| format!("`{}`", part.text)).collect();
            let message = format!(
                "{} gives {n_windows} windows, and healing needs {} to hold one out",
                named.join(" and "),
                HELD_OUT
            );
            return Err(Failure::usage(message)
                .hint("raise `--samples`, shorten `--seq-len`, or give a longer text")
                .into());
        }
        // In turn, so that windows of every text are held out.
        let mut turns: Vec<(f64, usize, usize)> = Vec::new();
        for (part_idx, part) in parts.iter().enumerate() {
            let n = part.windows.len();
            turns.extend((0..n).map(|i| ((i as f64 + 0.5) / n as f64, part_idx, i)));
        }
        turns.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let windows = turns.into_iter().map(|(_, part_idx, i)| parts[part_idx].windows[i].clone()).collect();
        Ok(Self { windows, parts })
    }

    /// The texts in errors.
    pub fn names(&self) -> String {
        self.parts.iter().map(|part| part.text.clone()).collect::<Vec<_>>().join(", ")
    }

    pub fn records(&self) -> Vec<HealedText> {
        let record = |part: &Windows| HealedText {
            text_sha256: part.part.text_sha256.clone(),
            windows: part.part.windows,
            tokens: part.part.tokens,
            seq_len: part.part.seq_len,
        };
        self.parts.iter().map(record).collect()
    }
}
