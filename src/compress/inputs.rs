//! Inputs besides the weights: texts and statistics, checked before any work.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::metrics::Metrics;
use super::plan::Plan;
use super::recipe::Recipe;
use crate::calibrate::{self, Header, Observation, Statistics, Windows};
use crate::checkpoint::{Checkpoint, Existing, Fingerprint};
use crate::error::Failure;
use crate::model::{Decoder, LinearId, fingerprint};
use crate::report::CalibrationRecord;
use crate::session::Session;

pub(super) struct Inputs {
    pub windows: Option<Windows>,
    pub statistics: Option<Statistics>,
    /// The linears whose bias takes up the mean of their inputs.
    pub centered: BTreeSet<LinearId>,
    /// The file where statistics that are measured are kept.
    pub kept_in: Option<PathBuf>,
}

impl Inputs {
    /// # Errors
    /// A text, a tokenizer or a statistics file is damaged or belongs to another model, or the model cannot be run.
    pub fn load(checkpoint: &Checkpoint, recipe: &Recipe, plan: &Plan) -> Result<Self> {
        let windows = recipe.calibration().map(|c| Windows::load(checkpoint, c, recipe.needs(), (1, 1))).transpose()?;
        let statistics = recipe.statistics().map(Statistics::open).transpose()?;
        let inputs = Self { windows, statistics, centered: plan.centered.clone(), kept_in: None };
        inputs.check_statistics(checkpoint, recipe)?;
        if inputs.windows.is_some() || inputs.statistics.is_some() {
            let decoder = Decoder::open(checkpoint)?;
            if recipe.runs_trials() && !decoder.has_head() {
                return Err(Failure::unsupported("the model has no head, so there are no logits to compare trials by")
                    .hint("remove `--sensitivity measured` and `--depth-weight auto`")
                    .into());
            }
            if let Some(outside) = plan.linears.iter().find(|l| l.id.is_none() && l.vocabulary.is_none()) {
                let message =
                    format!("`{}` is outside of the blocks, and so has no calibration statistics", outside.module);
                return Err(Failure::unsupported(message)
                    .hint("compress it with `--method svd`, or leave it out with `--exclude`")
                    .into());
            }
        }
        Ok(inputs)
    }

    /// Checks that statistics from a file belong to this model and text, and are sufficient.
    fn check_statistics(&self, checkpoint: &Checkpoint, recipe: &Recipe) -> Result<()> {
        let (Some(statistics), Some(path)) = (&self.statistics, recipe.statistics()) else { return Ok(()) };
        let named = path.display().to_string();
        statistics.expect_model(&fingerprint(checkpoint)?, &named)?;
        statistics.expect_needs(recipe.needs(), &named)?;
        let texts = &statistics.header.texts;
        if let Some(windows) = &self.windows
            && texts.iter().all(|part| part.text_sha256 != windows.part.text_sha256)
        {
            return Err(Failure::unsupported(format!("`{named}` was not measured on the text of `--calibration`"))
                .hint("give the text that the statistics were measured on")
                .into());
        }
        Ok(())
    }

    /// Measures the statistics that the method needs, unless they come from a file.
    ///
    /// # Errors
    /// The model cannot be run, a value is not finite, or the work folder cannot be written.
    pub fn measure(&mut self, session: &Session<'_>, recipe: &Recipe) -> Result<calibrate::Seconds> {
        if !recipe.measures_statistics() || self.statistics.is_some() {
            return Ok(calibrate::Seconds::default());
        }
        let (windows, observation) = (self.drawn(), observation(recipe));
        let decoder = session.decoder()?;
        let limits = &session.limits;
        let of_model = if self.kept_in.is_some() { fingerprint(session.model)? } else { Fingerprint::new() };
        let header = Header::new(of_model, observation, vec![windows.part.clone()]);
        let mut statistics = Statistics::new(header, limits.activation_bytes, &limits.work_folder);
        let seconds = calibrate::observe(
            &decoder,
            windows.targeted(),
            observation,
            limits,
            &session.journal,
            session.progress,
            &mut |sums| statistics.keep(sums),
        );
        let seconds = seconds.with_context(|| format!("calibrating on `{}`", windows.text))?;
        if let Some(path) = &self.kept_in {
            statistics.write(path, Existing::Replace)?;
        }
        self.statistics = Some(statistics);
        Ok(seconds)
    }

    /// The windows of a recipe that needs a text.
    pub fn drawn(&self) -> &Windows {
        self.windows.as_ref().expect("invariant: a recipe that needs a text has one")
    }

    /// The metric of every linear, from its statistics.
    pub fn metrics(&self, recipe: &Recipe) -> Metrics<'_> {
        Metrics {
            preset: recipe.method().preset(),
            damping_output: recipe.damping_output(),
            damping_input: recipe.damping_input(),
            statistics: self.statistics.as_ref(),
            centered: &self.centered,
        }
    }

    /// The record for the report.
    pub fn record(&self, recipe: &Recipe) -> Option<CalibrationRecord> {
        let own = self.windows.as_ref().map(|w| vec![w.part.clone()]);
        let kept = self.statistics.as_ref().map(|s| s.header.texts.clone());
        let texts = if recipe.statistics().is_some() { kept } else { own }?;
        Some(CalibrationRecord {
            text_sha256: texts.iter().map(|p| p.text_sha256.clone()).collect(),
            windows: texts.iter().map(|p| p.windows).sum(),
            tokens: texts.iter().map(|p| p.tokens).sum(),
            gradient_windows: Header::gradient_windows_of(&texts),
        })
    }
}

/// The statistics that a recipe measures.
pub(super) fn observation(recipe: &Recipe) -> Observation {
    Observation { needs: recipe.needs(), clip_gradients: recipe.clips_gradients() }
}
