//! Records of `lrc heal`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Fingerprint;

/// A healing.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HealRecord {
    /// The teacher as the user named it.
    pub teacher: String,
    /// SHA-256 of the files of the teacher.
    pub teacher_files: Fingerprint,
    /// SHA-256 of the files of the model before healing.
    pub source_files: Fingerprint,
    /// The flags of `lrc heal` that give the same bytes, with files by their names alone.
    #[serde(default)]
    pub flags: Vec<String>,
    /// The stages, in their order.
    #[serde(default)]
    pub stages: Vec<String>,
    /// The texts.
    pub texts: Vec<HealedText>,
    /// Windows whose gradients were taken, in an epoch.
    pub trained_windows: usize,
    /// Windows that chose the best epoch.
    pub held_out_windows: usize,
    /// The text of those windows; none if they are from `texts`.
    #[serde(default)]
    pub held_out_text: Option<HealedText>,
    /// `all`: every float of the blocks is trained; `lrc`: matrices of low rank only.
    #[serde(default)]
    pub trained: String,
    /// `output`: squared error; `fisher`: in the metric of the gradients of the loss.
    pub distance: String,
    /// Share of the text's own next tokens in the loss of the stage `model`; the rest is divergence from the teacher.
    #[serde(default)]
    pub labels: f64,
    /// Most epochs of a half.
    pub epochs: usize,
    /// Windows of a step.
    pub batch: usize,
    /// Largest learning rate that was given, of which the stage `model` took a tenth; none: 2e-4 in the stage `blocks`,
    /// and by the divergence in `model`.
    #[serde(default)]
    pub learning_rate: Option<f64>,
    /// Seed of the order of the windows.
    pub seed: u64,
    /// Steps of all stages: of AdamW, each over a batch of windows, and in closed form.
    #[serde(default)]
    pub steps: u64,
    /// Wall-clock seconds of the healing.
    #[serde(default)]
    pub seconds: f64,
    /// Parameters that have other values now.
    pub parameters: u64,
    /// The halves of the blocks, in their order; none without the stage `blocks`.
    pub parts: Vec<HealedPart>,
    /// The model as a whole; none without the stage `model`.
    pub model: Option<HealedModel>,
    /// The steps in closed form; none without the stage `closed`.
    #[serde(default)]
    pub closed: Option<HealedClosed>,
    /// Perplexities of the held-out windows; none for encoders.
    pub perplexity: Option<HeldOutPerplexity>,
}

impl HealRecord {
    /// What was done and what it gave, in sentences without a full stop.
    pub fn lines(&self) -> Vec<String> {
        let named = |text: &HealedText| format!("{} tokens of `{}`", text.tokens, text.name);
        let texts: Vec<String> = self.texts.iter().map(named).collect();
        let mut lines = vec![format!(
            "Healed ({}) in {} steps on {}: {} parameters have other values",
            self.stages.join(", "),
            self.steps,
            texts.join(" and "),
            self.parameters
        )];
        lines.push(format!("{} windows were trained, and {} held out", self.trained_windows, self.held_out_windows));
        if !self.parts.is_empty() {
            let ratio = |part: &HealedPart| part.error_after / part.error_before.max(f64::MIN_POSITIVE);
            let ratios: Vec<f64> = self.parts.iter().filter(|part| part.error_before > 0.0).map(ratio).collect();
            let mean = ratios.iter().sum::<f64>() / ratios.len().max(1) as f64;
            lines.push(format!(
                "Halves of blocks: {mean:.3} of the held-out error before, on average over {}",
                ratios.len()
            ));
        }
        if let Some(HealedModel { divergence_before, divergence_after, best_epoch, trained, .. }) = &self.model {
            let labels = match self.labels > 0.0 {
                true => format!(" ({} of the loss on the tokens of the texts)", self.labels),
                false => String::new(),
            };
            lines.push(format!(
                "The whole model{labels}: held-out divergence {divergence_before:.4} before, {divergence_after:.4} after, epoch {best_epoch} of {}",
                trained.len()
            ));
        }
        if let Some(HealedClosed { divergence_before, divergence_after, steps }) = &self.closed {
            let n_taken = steps.iter().filter(|step| step.size > 0.0).count();
            lines.push(format!(
                "In closed form: held-out divergence {divergence_before:.4} before, {divergence_after:.4} after, {n_taken} of {} steps taken",
                steps.len()
            ));
        }
        if let Some(HeldOutPerplexity { teacher, before, after }) = self.perplexity {
            lines.push(format!(
                "Perplexity of the held-out windows: {before:.3} before, {after:.3} after, {teacher:.3} of the source"
            ));
        }
        lines
    }
}

/// Perplexities of the held-out windows.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub struct HeldOutPerplexity {
    /// Of the teacher.
    pub teacher: f64,
    /// Of the student before healing.
    pub before: f64,
    /// Of the student after healing.
    pub after: f64,
}

/// What training did to the model as a whole.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HealedModel {
    /// Mean KL divergence, in nats per token, from the teacher's next tokens on held-out windows, before this stage: the 64
    /// likeliest one by one, all others as one.
    pub divergence_before: f64,
    /// The same after it, with values rounded to their dtype.
    pub divergence_after: f64,
    /// Largest learning rate of the first epoch.
    #[serde(default)]
    pub learning_rate: f64,
    /// The epoch whose values were kept; 0: those before the first.
    pub best_epoch: usize,
    /// Mean loss of the trained windows in each epoch: the divergence, and with `labels` for that share the negative
    /// log-likelihood of the text's tokens.
    pub trained: Vec<f64>,
    /// The same of the held-out windows, before the first epoch and after each.
    pub held_out: Vec<f64>,
}

/// What steps of the natural gradient did.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HealedClosed {
    /// Mean KL divergence from the teacher's next tokens on held-out windows, in nats per token, before this stage.
    pub divergence_before: f64,
    /// The same after it, with values rounded to their dtype.
    pub divergence_after: f64,
    /// The steps, each over all trained windows.
    pub steps: Vec<HealedStep>,
}

/// A step of the natural gradient.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HealedStep {
    /// The size that was kept, in lengths; 0: none lowered the divergence.
    pub size: f64,
    /// Polyak's length: the share of the natural gradient at which the divergence would be zero if it fell linearly.
    pub length: f64,
    /// Mean rank of the steps of the linears: what is not noise in their gradients.
    pub mean_rank: f64,
    /// Divergences of the held-out windows after two lengths, one, half, and a quarter of one.
    pub divergences: Vec<f64>,
}

/// The windows of a text.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HealedText {
    /// Name of its file.
    #[serde(default)]
    pub name: String,
    /// Its share of the windows, relative to those of the other texts.
    #[serde(default)]
    pub weight: f64,
    /// SHA-256 of the text.
    pub text_sha256: String,
    /// Number of windows.
    pub windows: usize,
    /// Tokens in all windows.
    pub tokens: usize,
    /// Largest number of tokens in a window.
    pub seq_len: usize,
}

/// Half a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HealedHalf {
    /// Attention and its residual.
    Attention,
    /// The feed-forward layer and its residual.
    FeedForward,
    /// Both, where both read the input of the block.
    Whole,
}

impl HealedHalf {
    /// The name in messages and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::FeedForward => "feed-forward",
            Self::Whole => "both layers",
        }
    }
}

/// What training did to half a block.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct HealedPart {
    /// Index of the block.
    pub block: usize,
    /// The half.
    pub half: HealedHalf,
    /// Mean squared error of a token's state on held-out windows, in the metric, before healing.
    pub error_before: f64,
    /// The same after healing, with values rounded to their dtype.
    pub error_after: f64,
    /// The epoch whose values were kept; 0: those before the first.
    pub best_epoch: usize,
    /// Mean loss of the trained windows in each epoch, relative to `error_before`.
    pub trained: Vec<f64>,
    /// The same of the held-out windows, before the first epoch and after each.
    pub held_out: Vec<f64>,
}
