//! Errors in the metric of a method, for inspection before compressing: spectra of linears, and what leaving out parts of
//! the model costs.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use rayon::prelude::*;
use tempfile::TempDir;

use super::inputs::Inputs;
use super::metrics::{Metrics, SharedInputs};
use super::narrow::{Measure, importance};
use super::plan::Plan;
use super::recipe::{ChannelSelection, Recipe, default_damping};
use crate::approx::low_rank::{self, ErrorCurve};
use crate::approx::metric::MetricPair;
use crate::checkpoint::Checkpoint;
use crate::device::Device;
use crate::error::Failure;
use crate::linalg;
use crate::model::inventory;
use crate::progress::Progress;
use crate::report::ImportanceRecord;
use crate::session::Session;
use crate::store::Journal;

/// A curve in a metric, and the sides of the metric that were plain.
pub struct Weighted {
    /// Squared singular values in the metric.
    pub curve: ErrorCurve,
    /// The sides that calibration left plain; `None` if there are none.
    pub note: Option<String>,
}

/// A model with the statistics that the metric of a method needs.
pub struct Observed<'a> {
    session: Session<'a>,
    recipe: &'a Recipe,
    plan: Plan,
    inputs: Inputs,
    /// Removed with it.
    _work: TempDir,
}

impl<'a> Observed<'a> {
    /// Measures the statistics, or reads them from the file of `recipe`.
    ///
    /// # Errors
    /// As [`super::compress`], up to its decompositions.
    pub fn measure(
        checkpoint: &'a Checkpoint,
        recipe: &'a Recipe,
        device: &Device,
        memory_bytes: u64,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        expect_weights(checkpoint, recipe)?;
        let plan = Plan::new(checkpoint, recipe)?;
        let mut inputs = Inputs::load(checkpoint, recipe, &plan)?;
        let work = tempfile::tempdir()?;
        let session = Session::new(checkpoint, device, memory_bytes, work.path().into(), Journal::default(), progress);
        inputs.measure(&session, recipe)?;
        Ok(Self { session, recipe, plan, inputs, _work: work })
    }

    /// The error curves of all linears that the recipe targets, in the metric of its method, by module.
    ///
    /// # Errors
    /// A weight or a statistic is damaged.
    pub fn curves(&self) -> Result<BTreeMap<String, Weighted>> {
        let (metrics, linears) = (self.inputs.metrics(self.recipe), &self.plan.linears);
        let stage = self.session.progress.stage("metric", linears.len() as u64, "matrices");
        let mut curves = BTreeMap::new();
        for block in linears.chunk_by(|a, b| a.block == b.block) {
            let infos: Vec<_> = block.iter().collect();
            let shared = SharedInputs::new(&infos);
            let one = |linear: &&inventory::LinearInfo| -> Result<(String, Weighted)> {
                stage.note(&linear.module);
                let (m, n) = linear.shape();
                let values = inventory::weight(self.session.checkpoint, linear)?; // (out, in)
                let weight = linalg::transposed_from_row_major(&values, m, n);
                let output = metrics.output(linear)?;
                let curve = metrics.with_input(linear, &shared, |input| {
                    let metric = MetricPair { output: &output, input };
                    let note = metric.plain_sides().note();
                    Ok(Weighted { curve: low_rank::error_curve(weight.transpose(), metric)?, note })
                });
                stage.advance(1);
                let curve = curve.with_context(|| format!("applying the metric to `{}`", linear.module))?;
                Ok((linear.module.clone(), curve))
            };
            curves.extend(infos.par_iter().map(one).collect::<Result<Vec<_>>>()?);
        }
        Ok(curves)
    }

    /// The errors of leaving out blocks, groups of heads and channels, as `--structure narrow` and `--structure depth`
    /// measure them.
    ///
    /// # Errors
    /// A weight or a statistic is damaged.
    pub fn importance(&self) -> Result<ImportanceRecord> {
        let damping = default_damping(self.recipe.method());
        let own = self.inputs.metrics(self.recipe);
        let metrics = Metrics { damping_output: damping, damping_input: damping, ..own };
        let measure = Measure { session: &self.session, metrics, selection: ChannelSelection::default() };
        importance(&measure, &self.plan.linears)
    }
}

/// Checks that the linears that `recipe` targets are stored as weights.
fn expect_weights(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<()> {
    let is_compressed = |linear: &inventory::LinearInfo| {
        let is_coded = checkpoint.info(&linear.weight_name()).is_some_and(|t| t.storage().is_some());
        let is_target =
            if recipe.targets.is_empty() { linear.is_default_target } else { recipe.targets.matches(&linear.module) };
        is_target && !recipe.exclude.matches(&linear.module) && (is_coded || linear.is_low_rank())
    };
    let Some(linear) = inventory::linears(checkpoint).into_iter().find(is_compressed) else { return Ok(()) };
    let message = format!("`{}` is compressed: the metric of a method is one of weights", linear.module);
    let hint = "leave out `--calibration` and `--statistics`, or restore weights with `lrc export MODEL --format dense -o OUT`";
    Err(Failure::unsupported(message).hint(hint).into())
}
