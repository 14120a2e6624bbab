//! A healing to run: student, teacher, texts and output.

use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::texts::{Drawn, WeightedText, file_name};
use crate::calibrate::WindowSettings;
use crate::checkpoint::{Beside, Checkpoint, Earlier, Existing, sha256_file};
use crate::device::Device;
use crate::error::Failure;
use crate::model::{Decoder, Objective, fingerprint};
use crate::report::{CompressReport, HealedText, LRC_VERSION};
use crate::text::{DEFAULT_FIELD, TOKENIZER_FILE};
use crate::train::Settings;

/// The student, its teacher, and how it is healed.
pub struct HealJob<'a> {
    /// The compressed model.
    pub checkpoint: &'a Checkpoint,
    /// Its source.
    pub teacher: &'a Checkpoint,
    /// The teacher as the user names it.
    pub teacher_name: &'a str,
    /// The stages, in this order.
    pub stages: &'a [HealStage],
    /// The texts.
    pub texts: &'a [WeightedText],
    /// The text of the windows that choose; without it, some windows of each text do.
    pub held_out: Option<&'a Path>,
    /// What is trained.
    pub train: Train,
    /// Windows of all texts together; its `text` is not used.
    pub windows: WindowSettings,
    /// Statistics of the teacher with Grams of output gradients, for errors in their metric and for steps in closed form.
    pub statistics: Option<&'a Path>,
    /// The distance of states that is trained; `None`: in the metric of the statistics, if there are any.
    pub loss: Option<Distance>,
    /// Most passes over the windows in a stage.
    pub epochs: usize,
    /// Windows of a step.
    pub batch: usize,
    /// The largest learning rate of the stage `blocks`, of which `model` takes a tenth; `None`: 2e-4, and by the
    /// divergence.
    pub learning_rate: Option<f64>,
    /// The share of the text's own next tokens in the loss of the stage `model`, in [0, 1]; the rest is divergence from
    /// the teacher.
    pub labels: f64,
    /// Steps of the stage `model` after which its state is kept, so that a run that was killed goes on from there.
    pub save_steps: usize,
    /// The output folder, which appears whole or not at all.
    pub output: &'a Path,
    /// How an output of an earlier run is treated.
    pub existing: Existing,
    /// How the progress of an interrupted run is treated.
    pub earlier: Earlier,
    /// Memory for hidden states and activations; the rest goes to files in the work folder.
    pub memory_bytes: u64,
    /// The device that runs the models.
    pub device: Device,
}

/// [`HealJob::save_steps`] unless it is given: a state is written in the time of a few steps.
pub const SAVE_STEPS: usize = 100;

/// The stage `model` moves all blocks at once, and takes smaller steps.
const MODEL_RATE: f64 = 0.1;
/// Times the divergence from the teacher, the largest rate of the stage `model` unless one is given: steps are as noisy near
/// the teacher as far from it, and must be shorter there. Near the rates that gained on SmolLM2-135M at divergences of
/// 0.024, 0.13 and 0.6 (docs/results.md, Healing).
const BY_DIVERGENCE: f64 = 1.5e-4;
/// The largest of these rates.
const MOST: f64 = 1e-4;
/// Times the share of labels, of which there is as much to learn near the teacher, the smallest (the same section).
const BY_LABELS: f64 = 4e-5;

/// A way to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum HealStage {
    /// Half a block after another, on the states of the source
    Blocks,
    /// The whole model, on the source's distributions of the next token
    Model,
    /// Natural-gradient steps on the same, in closed form; needs statistics of the source
    Closed,
}

impl HealStage {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blocks => "blocks",
            Self::Model => "model",
            Self::Closed => "closed",
        }
    }
}

/// The tensors of the blocks that are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Train {
    /// Every float: parts, dense weights, norms and biases
    #[default]
    All,
    /// Only matrices of low rank, whose gradients are of low rank too (WeLore, Jaiswal et al. 2024)
    Lrc,
}

impl Train {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Lrc => "lrc",
        }
    }
}

/// The distance between the states of student and teacher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Distance {
    /// Squared error
    Output,
    /// Squared error in the metric of the gradients of the loss; needs statistics of the source
    Fisher,
}

impl Distance {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Fisher => "fisher",
        }
    }
}

impl HealJob<'_> {
    /// The flags that give the same bytes, with files by their names alone.
    pub(super) fn flags(&self) -> Vec<String> {
        let WindowSettings { field, samples, seq_len, seed, .. } = &self.windows;
        let mut flags = Vec::new();
        let is_mixture = self.texts.len() > 1;
        for text in self.texts {
            let weight = if is_mixture { format!(":{}", text.weight) } else { String::new() };
            flags.extend(["--text".into(), file_name(&text.path) + &weight]);
        }
        let stages: Vec<&str> = self.stages.iter().map(|stage| stage.name()).collect();
        let given = [
            ("--held-out", self.held_out.map(file_name)),
            ("--field", (field != DEFAULT_FIELD).then(|| field.clone())),
            ("--samples", Some(samples.to_string())),
            ("--seq-len", seq_len.map(|seq_len| seq_len.to_string())),
            ("--seed", Some(seed.to_string())),
            ("--statistics", self.statistics.map(file_name)),
            ("--stage", Some(stages.join(","))),
            ("--train", (self.train != Train::All).then(|| self.train.name().into())),
            ("--loss", self.loss.map(|loss| loss.name().into())),
            ("--labels", (self.labels > 0.0).then(|| self.labels.to_string())),
            ("--epochs", Some(self.epochs.to_string())),
            ("--learning-rate", self.learning_rate.map(|rate| rate.to_string())),
            ("--batch", Some(self.batch.to_string())),
        ];
        flags.extend(given.into_iter().filter_map(|(flag, value)| Some([flag.into(), value?])).flatten());
        flags
    }

    /// How long and how fast half a block trains.
    pub(super) fn settings(&self) -> Settings {
        let learning_rate = self.learning_rate.unwrap_or(Settings::default().learning_rate);
        Settings { epochs: self.epochs, batch: self.batch, learning_rate, seed: self.windows.seed }
    }

    /// The same of the whole model, with this divergence from the teacher.
    pub(super) fn settings_of_model(&self, divergence: f64) -> Settings {
        let by_losses = (BY_DIVERGENCE * divergence).clamp(BY_LABELS * self.labels, MOST);
        let learning_rate = self.learning_rate.map_or(by_losses, |rate| MODEL_RATE * rate);
        Settings { learning_rate, ..self.settings() }
    }

    /// The distance that is trained.
    pub fn distance(&self) -> Distance {
        let by_statistics = if self.statistics.is_some() { Distance::Fisher } else { Distance::Output };
        self.loss.unwrap_or(by_statistics)
    }

    /// Everything that is read, which the output may not contain.
    pub(super) fn inputs(&self) -> impl Iterator<Item = &Path> {
        let texts = self.texts.iter().map(|text| text.path.as_path());
        texts.chain(self.held_out).chain(self.statistics).chain(self.checkpoint.roots()).chain(self.teacher.roots())
    }

    /// All that decides the bytes of the output: an interrupted run of the same is resumed.
    pub(super) fn description(&self, drawn: &Drawn) -> Result<Value> {
        let text = |text: &HealedText| json!([text.text_sha256, text.windows, text.seq_len]);
        let texts: Vec<Value> = drawn.records().iter().map(text).collect();
        Ok(json!({
            "command": "heal",
            "version": LRC_VERSION,
            "model": fingerprint(self.checkpoint)?,
            "teacher": fingerprint(self.teacher)?,
            "texts": texts,
            "held_out": drawn.held_out_record().as_ref().map(text),
            "train": self.train.name(),
            "loss": self.distance().name(),
            "seed": self.windows.seed,
            "statistics": self.statistics.map(sha256_file).transpose()?,
            "stages": self.stages.iter().map(|stage| stage.name()).collect::<Vec<_>>(),
            "labels": self.labels,
            "epochs": self.epochs,
            "batch": self.batch,
            "learning_rate": self.learning_rate,
        }))
    }
}

/// Checks that the states of two models can be compared.
pub(super) fn expect_same_shape(job: &HealJob<'_>, teacher: &Decoder<'_>, student: &Decoder<'_>) -> Result<()> {
    let of = |decoder: &Decoder<'_>| {
        let config = &decoder.config;
        [
            ("hidden_size", config.hidden_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("vocab_size", config.vocab_size),
            ("head_dim", config.widths(0).head_dim),
        ]
    };
    for ((field, expected), (_, found)) in of(teacher).into_iter().zip(of(student)) {
        if found != expected {
            let hint = match field {
                "num_hidden_layers" => {
                    "the teacher is the model that was compressed; an output without some of its blocks (`--structure depth`) cannot be healed"
                }
                _ => "the teacher is the model that was compressed",
            };
            let message = format!(
                "`{}` has {field} {expected}, and `{}` has {found}",
                job.teacher_name,
                job.checkpoint.root().display()
            );
            return Err(Failure::unsupported(message).hint(hint).into());
        }
    }
    Ok(())
}

/// Checks that the teacher's tokenizer, if it has one, draws the same windows from the texts.
///
/// # Errors
/// It does not, or cannot be read.
pub(super) fn expect_same_tokens(job: &HealJob<'_>, drawn: &Drawn) -> Result<()> {
    if job.teacher.read(TOKENIZER_FILE)?.is_none() {
        return Ok(());
    }
    let theirs = Drawn::of(job.teacher, job.texts, job.held_out, &job.windows)?;
    if theirs.windows == drawn.windows {
        return Ok(());
    }
    let student = job.checkpoint.root().display();
    let message = format!("`{}` and `{student}` divide {} into other tokens", job.teacher_name, drawn.names());
    Err(Failure::unsupported(message).hint("the teacher is the model that was compressed").into())
}

/// Checks that stages are given once each, and that a model predicts tokens if one of them needs that.
///
/// # Errors
/// They are not, or it has no head.
pub(crate) fn expect_stages(stages: &[HealStage], decoder: &Decoder<'_>) -> Result<()> {
    if let Some(at) = (1..stages.len()).find(|&at| stages[..at].contains(&stages[at])) {
        let message = format!("the stage `{}` is given twice", stages[at].name());
        return Err(Failure::usage(message).hint("more `--epochs` train for longer").into());
    }
    match stages.iter().find(|stage| **stage != HealStage::Blocks) {
        Some(stage) if !decoder.has_head() => {
            let message = format!("the stage `{}` compares predicted tokens, and this model has no head", stage.name());
            Err(Failure::unsupported(message).hint("the stage `blocks` compares states, and needs none").into())
        }
        _ => Ok(()),
    }
}

/// Checks that labels, if they are in the loss, are tokens that the student does not see.
///
/// # Errors
/// It reads them.
pub(super) fn expect_labels(job: &HealJob<'_>, student: &Decoder<'_>) -> Result<()> {
    if job.labels == 0.0 || student.objective() == Objective::NextToken {
        return Ok(());
    }
    let message = format!("`--labels {}`: an encoder reads the tokens that it would learn to predict", job.labels);
    Err(Failure::unsupported(message).hint("remove `--labels`: it learns from the source alone").into())
}

/// Warns if the teacher is not the model that was compressed. It may be the same in other files.
///
/// # Errors
/// The teacher cannot be read.
pub(super) fn warn_of_another_source(job: &HealJob<'_>, report: &CompressReport) -> Result<()> {
    let found = fingerprint(job.teacher)?;
    if report.source_files.iter().any(|(file, sha256)| found.get(file) != Some(sha256)) {
        tracing::warn!(
            "`{}` is not the folder that `{}` was compressed from: its files are others",
            job.teacher_name,
            job.checkpoint.root().display()
        );
    }
    Ok(())
}
