//! The header of statistics: the model and the texts that they were measured on.

use serde::{Deserialize, Serialize};

use super::needs::Needs;
use super::pieces::Observation;
use crate::checkpoint::Fingerprint;

/// The origin of the sums.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`Self::VERSION`] when it was written.
    pub lrc_statistics_version: u32,
    /// SHA-256 of the files on which the sums depend (`model::fingerprint`).
    pub model: Fingerprint,
    /// The statistics that were collected.
    pub needs: Needs,
    /// Whether per-token gradients were clipped to 0.1 to 10 times their mean norm.
    pub clip_gradients: bool,
    /// At least one; several after a merge.
    #[serde(rename = "parts")]
    pub texts: Vec<TextPart>,
}

/// Windows of one text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextPart {
    /// SHA-256 of the file, before decompression, in 64 hexadecimal digits.
    pub text_sha256: String,
    /// Number of windows requested for all parts.
    pub samples: usize,
    /// Tokens per window.
    pub seq_len: usize,
    /// Seed of the choice of windows, the same for all parts.
    pub seed: u64,
    /// (i, n): the i-th of n parts, counted from 1.
    pub part: (usize, usize),
    /// Windows of this part.
    pub windows: usize,
    /// Tokens of these windows.
    pub tokens: usize,
    /// The windows whose gradients were taken; none: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradients: Option<WindowCount>,
}

/// Some of the windows of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowCount {
    /// Number of windows.
    pub windows: usize,
    /// Their tokens.
    pub tokens: usize,
}

impl TextPart {
    /// Whether some window belongs to both parts: they are of the same choice of windows, and
    /// their shares of it overlap.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let is_same_choice = self.text_sha256 == other.text_sha256
            && (self.samples, self.seq_len, self.seed) == (other.samples, other.seq_len, other.seed);
        // The i-th of n parts holds the windows from (i - 1) / n to i / n of all.
        let [(i, n), (other_i, other_n)] = [self.part, other.part].map(|(i, n)| (i as u128, n as u128));
        is_same_choice && (i - 1) * other_n < other_i * n && (other_i - 1) * n < i * other_n
    }

    /// Windows and tokens whose gradients were taken.
    pub fn with_gradients(&self) -> WindowCount {
        self.gradients.unwrap_or(WindowCount { windows: self.windows, tokens: self.tokens })
    }
}

impl Header {
    /// The version of the file format; files of others are refused.
    pub const VERSION: u32 = 1;

    /// The header of sums over `texts`, at this version.
    pub fn new(model: Fingerprint, observation: Observation, texts: Vec<TextPart>) -> Self {
        let Observation { needs, clip_gradients } = observation;
        Self { lrc_statistics_version: Self::VERSION, model, needs, clip_gradients, texts }
    }

    /// Tokens of all parts.
    pub fn n_tokens(&self) -> usize {
        self.texts.iter().map(|p| p.tokens).sum()
    }

    /// Tokens of all parts whose gradients were taken.
    pub fn n_gradient_tokens(&self) -> usize {
        self.texts.iter().map(|part| part.with_gradients().tokens).sum()
    }

    /// Windows whose gradients were taken, if not all.
    pub fn gradient_windows(&self) -> Option<usize> {
        Self::gradient_windows_of(&self.texts)
    }

    /// Windows of `parts` whose gradients were taken, if not all.
    pub fn gradient_windows_of(parts: &[TextPart]) -> Option<usize> {
        let is_part = parts.iter().any(|part| part.gradients.is_some());
        is_part.then(|| parts.iter().map(|part| part.with_gradients().windows).sum())
    }

    /// Windows of all parts.
    pub fn n_windows(&self) -> usize {
        self.texts.iter().map(|p| p.windows).sum()
    }

    /// Describes a header that no run of `lrc calibrate` writes.
    pub(super) fn fault(&self) -> Option<String> {
        if self.lrc_statistics_version != Self::VERSION {
            return Some(format!("version {}", self.lrc_statistics_version));
        }
        let is_hash = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let is_sound = |p: &&TextPart| {
            let (i, n) = p.part;
            // Small enough that sums over parts do not overflow.
            let is_small = [p.samples, p.seq_len, p.windows, p.tokens, n].iter().all(|&n| n < 1 << 40);
            let is_part = p.gradients.is_none_or(|g| g.windows <= p.windows && g.tokens <= p.tokens);
            is_hash(&p.text_sha256) && 1 <= i && i <= n && is_small && is_part
        };
        let broken = self.texts.iter().find(|part| !is_sound(part));
        if let Some(TextPart { text_sha256, part: (i, n), .. }) = broken {
            return Some(format!("part {i}/{n} of a text with hash `{text_sha256}` is not valid"));
        }
        self.texts.is_empty().then(|| "it has no text parts".into())
    }
}
