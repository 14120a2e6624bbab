//! The metric of every linear, from the statistics of a calibration.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use anyhow::{Context, Result};
use faer::Mat;

use super::presets::{MetricForm, Preset};
use super::vocabulary::{self, Vocabulary};
use crate::approx::metric::Metric;
use crate::calibrate::{Key, Pooled, Statistics};
use crate::linalg::Packed;
use crate::model::inventory::LinearInfo;
use crate::model::{InputSite, LinearId, Slot};

/// The statistics that define the metrics.
#[derive(Clone, Copy)]
pub(super) struct Metrics<'a> {
    pub preset: Preset,
    pub damping_output: f64,
    pub damping_input: f64,
    pub statistics: Option<&'a Statistics>,
    /// The linears whose bias takes up the mean of their inputs, so that their errors are measured without it.
    pub centered: &'a BTreeSet<LinearId>,
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Input,
    Output,
}

/// The input metrics of one block, with the mean of the inputs and without, each computed when first requested and
/// shared by the linears with the same input.
#[derive(Debug, Default)]
pub(super) struct SharedInputs {
    by_site: BTreeMap<(InputSite, bool), OnceLock<Metric>>,
}

impl SharedInputs {
    pub fn new(linears: &[&LinearInfo]) -> Self {
        let sites = linears.iter().filter_map(|l| Some(l.id?.slot.site()));
        let places = sites.flat_map(|site| [false, true].map(|is_centered| (site, is_centered)));
        Self { by_site: places.map(|place| (place, OnceLock::new())).collect() }
    }
}

impl Metrics<'_> {
    /// The output metric of a linear (m, m).
    ///
    /// # Errors
    /// The statistics cannot be read.
    pub fn output(&self, linear: &LinearInfo) -> Result<Metric> {
        if let Some((rows, _)) = self.of_vocabulary(linear)? {
            return Ok(rows);
        }
        if let Some(size) = self.size_without_tokens(linear, self.preset.output, Side::Output)? {
            return Ok(Metric::diagonal(vec![size; linear.out_features]));
        }
        let metric = match self.preset.output {
            MetricForm::Identity => Metric::Identity,
            MetricForm::Gram => {
                let (statistics, id) = self.of(linear)?;
                Metric::damped(statistics.output_gram(id, linear.out_features)?, self.damping_output)
            }
            MetricForm::SquaredGradient => {
                let (statistics, id) = self.of(linear)?;
                Metric::diagonal(statistics.squared_gradient_output(id, linear.out_features)?)
            }
            MetricForm::Magnitude { .. } | MetricForm::GramDiagonal => {
                unreachable!("invariant: these forms are of inputs")
            }
        };
        metric.sized(|| self.usual_size(linear, self.preset.output, Side::Output))
    }

    /// Calls `f` with the input metric of a linear (n, n).
    ///
    /// # Errors
    /// The statistics cannot be read, or `f` fails.
    pub fn with_input<T>(
        &self,
        linear: &LinearInfo,
        shared: &SharedInputs,
        f: impl FnOnce(&Metric) -> Result<T>,
    ) -> Result<T> {
        if let Some((_, columns)) = self.of_vocabulary(linear)? {
            return f(&columns);
        }
        if let Some(size) = self.size_without_tokens(linear, self.preset.input, Side::Input)? {
            return f(&Metric::diagonal(vec![size; linear.in_features]));
        }
        let sized = |metric: Metric| metric.sized(|| self.usual_size(linear, self.preset.input, Side::Input));
        match self.preset.input {
            MetricForm::Identity => f(&Metric::Identity),
            MetricForm::Gram => {
                let (_, id) = self.of(linear)?;
                let cell = &shared.by_site[&(id.slot.site(), self.is_centered(linear))];
                if let Some(metric) = cell.get() {
                    return f(metric);
                }
                // Two linears may read the Gram at the same time; the first to finish keeps it.
                let metric = sized(Metric::damped(self.measured_gram(linear)?, self.damping_input))?;
                f(cell.get_or_init(|| metric))
            }
            MetricForm::Magnitude { alpha } => {
                let (statistics, id) = self.of(linear)?;
                let magnitudes = statistics.input_magnitude(id, linear.in_features)?;
                f(&sized(Metric::diagonal(magnitudes.into_iter().map(|v| v.powf(2.0 * alpha)).collect()))?)
            }
            MetricForm::GramDiagonal => f(&sized(Metric::diagonal(self.measured_gram(linear)?.diagonal()))?),
            MetricForm::SquaredGradient => {
                let (statistics, id) = self.of(linear)?;
                f(&sized(Metric::diagonal(statistics.squared_gradient_input(id, linear.in_features)?))?)
            }
        }
    }

    /// Both metrics of a matrix of the vocabulary; `None` for all others, and in a plain metric.
    fn of_vocabulary(&self, linear: &LinearInfo) -> Result<Option<(Metric, Metric)>> {
        let (Some(of), Some(statistics)) = (linear.vocabulary, self.statistics) else { return Ok(None) };
        if self.preset.output != MetricForm::Gram {
            return Ok(Some((Metric::Identity, Metric::Identity)));
        }
        let Vocabulary { rows, columns } = vocabulary::of(statistics, of, linear.shape())?;
        let mean = rows.iter().sum::<f64>() / rows.len().max(1) as f64;
        let rows = rows.into_iter().map(|row| (1.0 - self.damping_output) * row + self.damping_output * mean);
        Ok(Some((Metric::diagonal(rows.collect()), Metric::damped(columns, self.damping_input))))
    }

    /// The Gram of the inputs of a linear (n, n), undamped; for a matrix of the vocabulary the form of its columns.
    ///
    /// # Errors
    /// The statistics cannot be read.
    pub fn input_gram(&self, linear: &LinearInfo) -> Result<Mat<f64>> {
        if let (Some(of), Some(statistics)) = (linear.vocabulary, self.statistics) {
            return Ok(vocabulary::of(statistics, of, linear.shape())?.columns.dense().into_owned());
        }
        if let Some(size) = self.size_without_tokens(linear, MetricForm::Gram, Side::Input)? {
            let n = linear.in_features;
            return Ok(Mat::from_fn(n, n, |i, j| if i == j { size } else { 0.0 }));
        }
        Ok(self.measured_gram(linear)?.to_dense())
    }

    /// Whether the bias of a linear takes up the mean of its inputs.
    pub fn is_centered(&self, linear: &LinearInfo) -> bool {
        linear.id.is_some_and(|id| self.centered.contains(&id))
    }

    /// The mean of the inputs of a linear (n), if its bias takes it up; `None` also for an expert with too few tokens.
    ///
    /// # Errors
    /// The statistics cannot be read.
    pub fn mean(&self, linear: &LinearInfo) -> Result<Option<Vec<f64>>> {
        if !self.is_centered(linear) || self.too_few_tokens(linear)?.is_some() {
            return Ok(None);
        }
        let (statistics, id) = self.of(linear)?;
        statistics.input_mean(id, linear.in_features).map(Some)
    }

    /// The Gram of the inputs of a linear, without their mean if its bias takes it up.
    fn measured_gram(&self, linear: &LinearInfo) -> Result<Packed> {
        let ((statistics, id), n) = (self.of(linear)?, linear.in_features);
        match self.is_centered(linear) {
            true => statistics.centered_input_gram(id, n),
            false => statistics.input_gram(id, n),
        }
    }

    /// The metrics of another preset from the same statistics, with the preset's damping.
    pub fn with_preset(self, preset: Preset) -> Self {
        Self { preset, damping_output: preset.damping, damping_input: preset.damping, ..self }
    }

    /// Number of tokens that the expert of a linear saw, if they are too few for a metric: fewer than its input
    /// features, so that some directions do not occur.
    ///
    /// # Errors
    /// The statistics cannot be read.
    pub fn too_few_tokens(&self, linear: &LinearInfo) -> Result<Option<u64>> {
        let (Some(statistics), Some(id)) = (self.statistics, linear.id) else { return Ok(None) };
        let seen = statistics.expert_tokens(id)?;
        Ok(seen.filter(|&seen| seen < linear.in_features as f64).map(|seen| seen as u64))
    }

    /// For an expert with too few tokens the metric is λ I, where λ is the mean diagonal over the experts of its block,
    /// as if each had seen just enough. Errors stay comparable, and unused experts are not pruned for free. `None` for
    /// all other linears.
    fn size_without_tokens(&self, linear: &LinearInfo, form: MetricForm, side: Side) -> Result<Option<f64>> {
        if matches!(form, MetricForm::Identity) || self.too_few_tokens(linear)?.is_none() {
            return Ok(None);
        }
        self.usual_size(linear, form, side).map(Some)
    }

    /// The mean diagonal of a form over the experts of a block, or over the same linear in all blocks: the scale of a
    /// plain metric for linears without statistics of their own. 1 if none of them has any.
    fn usual_size(&self, linear: &LinearInfo, form: MetricForm, side: Side) -> Result<f64> {
        let (statistics, LinearId { block, slot }) = self.of(linear)?;
        let key = |slot: Slot| match (form, side) {
            (MetricForm::Magnitude { .. }, _) => Key::InputMagnitude(slot.site()),
            (MetricForm::SquaredGradient, Side::Input) => Key::SquaredGradientInput(slot),
            (MetricForm::SquaredGradient, Side::Output) => Key::SquaredGradientOutput(slot),
            (_, Side::Input) => Key::InputGram(slot.site()),
            (_, Side::Output) => Key::OutputGram(slot),
        };
        let mut pooled = match slot.expert {
            Some(_) => statistics.pooled(block, &|expert| key(Slot { expert: Some(expert), ..slot }))?,
            None => Pooled::default(),
        };
        if pooled.sum == 0.0 {
            pooled = statistics.pooled_over_blocks(key(slot), slot.expert)?;
        }
        if pooled.sum == 0.0 {
            return Ok(1.0);
        }
        let a_token = pooled.sum / pooled.tokens.max(1.0);
        Ok(match (form, side) {
            (MetricForm::Magnitude { alpha }, _) => a_token.powf(2.0 * alpha),
            // Gradients are summed over sequences and not averaged.
            (MetricForm::SquaredGradient, _) => pooled.sum / pooled.members.max(1) as f64,
            (_, Side::Input) if slot.expert.is_some() => {
                a_token * linear.in_features as f64 / statistics.header.n_tokens().max(1) as f64
            }
            (_, Side::Input | Side::Output) => a_token,
        })
    }

    fn of(&self, linear: &LinearInfo) -> Result<(&Statistics, LinearId)> {
        let statistics = self.statistics.context("invariant: a method that needs statistics has them")?;
        Ok((statistics, linear.id.context("invariant: calibrated linears have an id")?))
    }
}
