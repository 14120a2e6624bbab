//! Where the metrics of a block's linears come from: nowhere (plain SVD), or a walk of calibration windows.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, ensure};

use super::metric::Metric;
use super::presets::InputMetric;
use super::recipe::Recipe;
use crate::calibrate::Observed;
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::model::config::window_length;
use crate::model::inventory::LinearInfo;
use crate::model::{Decoder, InputSite, Walk, WalkLimits};
use crate::progress::Progress;
use crate::report::CalibrationRecord;
use crate::text::{Bos, Text, Tokenizer};

/// Tokens in a window where the recipe names none; what the field's tools take, capped by the model's context.
const DEFAULT_SEQ_LEN: usize = 512;

/// Calibration text cut into windows, ready before a weight is read.
pub(super) struct CalibrationWindows {
    pub windows: Vec<Vec<u32>>,
    pub text_sha256: String,
    pub n_tokens: usize,
}

impl CalibrationWindows {
    /// # Errors
    /// The text or the tokenizer cannot be read, or the text is too short.
    pub fn load(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Option<Self>> {
        let Some(settings) = &recipe.calibration else { return Ok(None) };
        let tokenizer = Tokenizer::open(checkpoint.root())?;
        let text = Text::read(&settings.text)?;
        let tokens = tokenizer.encode(&text.content, Bos::Auto)?;
        let seq_len = window_length(checkpoint, settings.seq_len, DEFAULT_SEQ_LEN);
        let windows = tokens.sample(seq_len, settings.samples, settings.seed);
        if windows.is_empty() {
            return Err(text.too_short(&tokens, seq_len).into());
        }
        if windows.len() < settings.samples {
            tracing::warn!(
                "`{}` has {} windows, fewer than `--samples {}`",
                settings.text.display(),
                windows.len(),
                settings.samples
            );
        }
        let n_tokens = windows.len() * seq_len;
        Ok(Some(Self { windows, text_sha256: text.sha256, n_tokens }))
    }

    /// For the report.
    pub fn record(&self) -> CalibrationRecord {
        CalibrationRecord { text_sha256: self.text_sha256.clone(), windows: self.windows.len(), tokens: self.n_tokens }
    }
}

/// Gives the metrics of one block after another.
pub(super) enum Metrics<'a> {
    Identity(Metric),
    Calibrated(Box<Calibrated<'a>>),
}

pub(super) struct Calibrated<'a> {
    decoder: Decoder<'a>,
    windows: &'a CalibrationWindows,
    limits: WalkLimits,
    /// Begins when the first block is observed: until then, headers are all that was read.
    walk: Option<Walk<'a>>,
    next_block: usize,
    grams: BTreeMap<InputSite, Metric>,
}

impl<'a> Metrics<'a> {
    /// Reads headers only.
    ///
    /// # Errors
    /// The method needs activations and the model cannot be run.
    pub fn start(
        checkpoint: &'a Checkpoint,
        recipe: &Recipe,
        linears: &[LinearInfo],
        windows: Option<&'a CalibrationWindows>,
        memory_bytes: u64,
        work_folder: &Path,
    ) -> Result<Self> {
        let windows = match (recipe.method.input_metric(), windows) {
            (InputMetric::Identity, _) => return Ok(Self::Identity(Metric::Identity)),
            (InputMetric::Gram, windows) => windows.expect("invariant: a recipe that needs a text has one"),
        };
        let decoder = Decoder::open(checkpoint)?;
        if let Some(outside) = linears.iter().find(|l| l.id.is_none()) {
            return Err(Failure::unsupported(format!(
                "`{}` is outside of the blocks, and has no calibration statistics",
                outside.module
            ))
            .hint("compress it with `--method svd`, or leave it out")
            .into());
        }
        let limits = WalkLimits::new(memory_bytes, work_folder.into());
        let calibrated = Calibrated { decoder, windows, limits, walk: None, next_block: 0, grams: BTreeMap::new() };
        Ok(Self::Calibrated(Box::new(calibrated)))
    }

    /// Memory that observing will take: one block and its Grams, hidden states and activations up to their caps.
    pub fn expected_bytes(&self) -> u64 {
        match self {
            Self::Identity(_) => 0,
            Self::Calibrated(calibrated) => calibrated.expected_bytes(),
        }
    }

    /// Whether [`Self::observe`] has work to do, a block at a time.
    pub fn are_observed(&self) -> bool {
        matches!(self, Self::Calibrated(_))
    }

    /// Observes what the linears of one block need. Blocks come in ascending order.
    ///
    /// # Errors
    /// An activation is not finite, or the walk fails.
    pub fn observe(&mut self, linears: &[&LinearInfo], progress: &dyn Progress) -> Result<()> {
        match self {
            Self::Identity(_) => Ok(()),
            Self::Calibrated(calibrated) => calibrated.observe(linears, progress),
        }
    }

    /// The metric of a linear of the block observed last.
    pub fn of(&self, linear: &LinearInfo) -> &Metric {
        match self {
            Self::Identity(metric) => metric,
            Self::Calibrated(calibrated) => {
                let id = linear.id.expect("invariant: calibrated linears have an id");
                &calibrated.grams[&id.role.site()]
            }
        }
    }
}

impl Calibrated<'_> {
    fn expected_bytes(&self) -> u64 {
        let (config, architecture) = (&self.decoder.config, self.decoder.architecture);
        let (queries, _) = config.attention_widths();
        let square = |n: usize| (n * n) as u64;
        let elements = |shape: [usize; 2]| (shape[0] * shape[1]) as u64;
        let linears: u64 = architecture.linears.iter().map(|(role, _)| elements(role.shape(config).0)).sum();
        let grams = 2 * square(config.hidden_size) + square(queries) + square(config.intermediate_size);
        let hidden = 4 * (self.windows.n_tokens * config.hidden_size) as u64;
        let (hidden_cap, activations) = (self.limits.hidden_bytes as u64, self.limits.activation_bytes as u64);
        // Grams: the sums and their means in f64, one f32 chunk.
        4 * linears + 20 * grams + hidden.min(hidden_cap) + activations
    }

    fn observe(&mut self, linears: &[&LinearInfo], progress: &dyn Progress) -> Result<()> {
        let ids: Vec<_> = linears.iter().filter_map(|l| l.id).collect();
        let Some(target_block) = ids.first().map(|id| id.block) else { return Ok(()) };
        ensure!(ids.iter().all(|id| id.block == target_block), "linears of one block are observed together");
        let walk = match &mut self.walk {
            Some(walk) => walk,
            none => none.insert(Walk::start(&self.decoder, &self.windows.windows, &self.limits)?),
        };
        while self.next_block <= target_block {
            let stage =
                progress.stage(&format!("observe block {}", self.next_block), self.windows.n_tokens as u64, "tokens");
            let is_target = self.next_block == target_block;
            let sites = linears.iter().filter(|_| is_target).filter_map(|l| Some((l.id?.role.site(), l.in_features)));
            let mut observed = Observed::new(sites);
            let block = self.decoder.block(self.next_block)?;
            walk.advance(&self.decoder, &block, &mut |site, x| observed.observe(site, x), stage.as_ref())?;
            self.grams = observed.means()?.into_iter().map(|(site, mean)| (site, Metric::full(mean))).collect();
            self.next_block += 1;
        }
        Ok(())
    }
}
