//! The windows of one or several texts.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Result;

use crate::calibrate::{Needs, WindowSettings, Windows};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::report::HealedText;
use crate::train::Pieces;

/// Every so many windows one is held out.
const HELD_OUT: usize = 8;

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

/// The windows of all texts, in turn, and behind them those of the text that is held out.
pub(super) struct Drawn {
    pub windows: Vec<Vec<u32>>,
    parts: Vec<Windows>,
    /// Of the parts.
    weights: Vec<f64>,
    held_out: Option<Windows>,
}

impl Drawn {
    /// Without a text that is `held_out`, some windows of each text are.
    ///
    /// # Errors
    /// A text or the tokenizer cannot be read, or there are too few windows to hold one out.
    pub fn of(
        checkpoint: &Checkpoint,
        texts: &[WeightedText],
        held_out: Option<&Path>,
        of_all: &WindowSettings,
    ) -> Result<Self> {
        let whole: f64 = texts.iter().map(|text| text.weight).sum();
        let (mut parts, mut weight, mut n_before) = (Vec::new(), 0.0, 0);
        for text in texts {
            weight += text.weight;
            let n = (weight / whole * of_all.samples as f64).round() as usize;
            if n == n_before {
                let message = format!("`{}` has no share in {} windows", text.path.display(), of_all.samples);
                return Err(Failure::usage(message).hint("raise its weight or `--samples`").into());
            }
            parts.push(load(checkpoint, &text.path, n - n_before, of_all)?);
            n_before = n;
        }
        let held_out = held_out.map(|path| load(checkpoint, path, of_all.samples.div_ceil(HELD_OUT), of_all));
        let held_out = held_out.transpose()?;
        let n_windows: usize = parts.iter().map(|part| part.windows.len()).sum();
        if held_out.is_none() {
            let named: Vec<String> = parts.iter().map(|part| format!("`{}`", part.text)).collect();
            expect_enough(&named.join(" and "), n_windows)?;
        }
        // In turn, so that windows of every text are held out.
        let mut turns: Vec<(f64, usize, usize)> = Vec::new();
        for (part_idx, part) in parts.iter().enumerate() {
            let n = part.windows.len();
            turns.extend((0..n).map(|i| ((i as f64 + 0.5) / n as f64, part_idx, i)));
        }
        turns.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let windows = turns.into_iter().map(|(_, part_idx, i)| parts[part_idx].windows[i].clone());
        let windows = windows.chain(held_out.iter().flat_map(|part| part.windows.clone())).collect();
        let weights = texts.iter().map(|text| text.weight).collect();
        Ok(Self { windows, parts, weights, held_out })
    }

    /// The windows that are trained, and those that choose.
    pub fn pieces(&self) -> Pieces {
        let n_apart = self.held_out.as_ref().map(|part| part.windows.len());
        let n = self.windows.len();
        let is_held_out = |i: &usize| n_apart.map_or(i % HELD_OUT == HELD_OUT - 1, |n_apart| *i >= n - n_apart);
        let (held_out, trained) = (0..n).partition(is_held_out);
        Pieces { trained, held_out }
    }

    /// The texts in errors.
    pub fn names(&self) -> String {
        self.parts.iter().chain(&self.held_out).map(|part| part.text.clone()).collect::<Vec<_>>().join(", ")
    }

    pub fn records(&self) -> Vec<HealedText> {
        self.parts.iter().zip(&self.weights).map(|(part, &weight)| record(part, weight)).collect()
    }

    /// The record of the text that is held out.
    pub fn held_out_record(&self) -> Option<HealedText> {
        self.held_out.as_ref().map(|part| record(part, 1.0))
    }
}

/// Checks that one of the windows of a text can be held out.
///
/// # Errors
/// They are too few.
pub(crate) fn expect_enough(text: &str, n_windows: usize) -> Result<()> {
    if n_windows >= HELD_OUT {
        return Ok(());
    }
    let message = format!("healing needs {HELD_OUT} windows, to hold one out; found in {text}: {n_windows}");
    let hint = "raise `--samples`, shorten `--seq-len`, or give a longer text; `lrc heal` also takes another text for it, `--held-out`";
    Err(Failure::usage(message).hint(hint).into())
}

fn load(checkpoint: &Checkpoint, text: &Path, samples: usize, of_all: &WindowSettings) -> Result<Windows> {
    let settings = WindowSettings { text: text.into(), samples, ..of_all.clone() };
    Windows::load(checkpoint, &settings, Needs::default(), (1, 1))
}

fn record(part: &Windows, weight: f64) -> HealedText {
    HealedText {
        name: file_name(Path::new(&part.text)),
        weight,
        text_sha256: part.part.text_sha256.clone(),
        windows: part.part.windows,
        tokens: part.part.tokens,
        seq_len: part.part.seq_len,
    }
}

/// The name of a file without its folder, which says nothing on another machine.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
