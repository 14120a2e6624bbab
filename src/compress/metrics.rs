//! The metric of every linear, from the statistics of a calibration.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use faer::Mat;

use super::metric::Metric;
use super::presets::{Form, Preset};
use crate::calibrate::Statistics;
use crate::model::inventory::LinearInfo;
use crate::model::{InputSite, LinearId};

/// What metrics are made of.
#[derive(Clone, Copy)]
pub(super) struct Metrics<'a> {
    pub preset: Preset,
    pub damping_output: f64,
    pub damping_input: f64,
    pub statistics: Option<&'a Statistics>,
}

/// The input metrics of one block, each made when the first of its linears asks, and shared by those that follow.
#[derive(Debug, Default)]
pub(super) struct SharedInputs {
    by_site: BTreeMap<InputSite, OnceLock<Metric>>,
}

impl SharedInputs {
    pub fn new(linears: &[&LinearInfo]) -> Self {
        let sites = linears.iter().filter_map(|l| Some(l.id?.role.site()));
        Self { by_site: sites.map(|site| (site, OnceLock::new())).collect() }
    }
}

impl Metrics<'_> {
    /// The output metric of a linear (m, m).
    ///
    /// # Errors
    /// The statistics cannot be read.
    pub fn output(&self, linear: &LinearInfo) -> Result<Metric> {
        Ok(match self.preset.output {
            Form::Identity => Metric::Identity,
            Form::Gram => {
                let (statistics, id) = self.of(linear)?;
                Metric::damped(statistics.output_gram(id, linear.out_features)?, self.damping_output)
            }
            Form::SquaredGradient => {
                let (statistics, id) = self.of(linear)?;
                Metric::diagonal(statistics.squared_gradient_output(id)?)
            }
            Form::Magnitude { .. } | Form::GramDiagonal => unreachable!("invariant: these forms are of inputs"),
        })
    }

    /// Calls `f` with the input metric of a linear (n, n).
    ///
    /// # Errors
    /// The statistics cannot be read, or that of `f`.
    pub fn with_input<T>(
        &self,
        linear: &LinearInfo,
        shared: &SharedInputs,
        f: impl FnOnce(&Metric) -> Result<T>,
    ) -> Result<T> {
        match self.preset.input {
            Form::Identity => f(&Metric::Identity),
            Form::Gram => {
                let (statistics, id) = self.of(linear)?;
                let cell = &shared.by_site[&id.role.site()];
                if let Some(metric) = cell.get() {
                    return f(metric);
                }
                // Two linears may read the Gram at once; the first to be done keeps it.
                let gram = statistics.input_gram(id, linear.in_features)?;
                f(cell.get_or_init(|| Metric::damped(gram, self.damping_input)))
            }
            Form::Magnitude { alpha } => {
                let (statistics, id) = self.of(linear)?;
                let magnitudes = statistics.input_magnitude(id)?;
                f(&Metric::diagonal(magnitudes.into_iter().map(|v| v.powf(2.0 * alpha)).collect()))
            }
            Form::GramDiagonal => {
                let gram = self.input_gram(linear)?;
                f(&Metric::diagonal((0..linear.in_features).map(|i| gram[(i, i)]).collect()))
            }
            Form::SquaredGradient => {
                let (statistics, id) = self.of(linear)?;
                f(&Metric::diagonal(statistics.squared_gradient_input(id)?))
            }
        }
    }

    /// The Gram of the inputs of a linear (n, n), undamped.
    ///
    /// # Errors
    /// The statistics cannot be read.
    pub fn input_gram(&self, linear: &LinearInfo) -> Result<Mat<f64>> {
        let (statistics, id) = self.of(linear)?;
        statistics.input_gram(id, linear.in_features)
    }

    /// Metrics of the same statistics by another row of the table, with its own damping.
    pub fn with_preset(self, preset: Preset) -> Self {
        Self { preset, damping_output: preset.damping, damping_input: preset.damping, ..self }
    }

    fn of(&self, linear: &LinearInfo) -> Result<(&Statistics, LinearId)> {
        let statistics = self.statistics.context("invariant: a method that needs statistics has them")?;
        Ok((statistics, linear.id.context("invariant: calibrated linears have an id")?))
    }
}
