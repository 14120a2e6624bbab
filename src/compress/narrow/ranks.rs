//! Ranks beside widths: the error of every linear of the source at every rank. A narrower matrix of the same rank errs
//! about as much and costs less, so that one knapsack weighs both; ranks are chosen anew for the narrower matrices.

use anyhow::{Context as _, Result};
use serde_json::json;

use super::super::allocate::{self, Point};
use super::super::metrics::SharedInputs;
use super::super::plan::Plan;
use super::super::recipe::Recipe;
use super::context::Measure;
use crate::approx::low_rank::{ErrorCurve, error_curve};
use crate::approx::metric::MetricPair;
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::model::narrow::NarrowUnit;
use crate::operator::{Kind, Shape};
use crate::store::Values;

/// The errors of linears at every rank.
pub(super) struct RankCurves<'p> {
    pub linears: &'p [LinearInfo],
    /// The squared errors of each, from rank 0 up.
    errors: Vec<Vec<f64>>,
    layout: Kind,
    /// Ranks are multiples of this.
    multiple: usize,
}

impl<'p> RankCurves<'p> {
    /// Finds the spectrum of every linear in the metric of the widths, so that the errors of both compare.
    ///
    /// # Errors
    /// A weight or a statistic is damaged, or the work folder cannot be written.
    pub fn measure(measure: &Measure<'_>, plan: &'p Plan, then: &Recipe) -> Result<Self> {
        let (session, linears) = (measure.session, &plan.linears);
        let stage = session.progress.stage("ranks", linears.len() as u64, "matrices");
        let costs: Vec<u64> = linears.iter().map(bytes).collect();
        let errors = session.workers(&costs)?.collect(&costs, |i| {
            let linear = &linears[i];
            stage.note(&linear.module);
            let piece = session.journal.piece(&format!("ranks-{i}"), || {
                Ok((json!(null), vec![Values::from(curve(measure, linear)?.energies().to_vec())]))
            });
            let mut piece = piece.with_context(|| format!("decomposing `{}`", linear.module))?;
            stage.advance(1);
            let energies = ErrorCurve::new(piece.take()?.read()?.f64s()?);
            let ranks = 0..=energies.energies().len();
            Ok(ranks.map(|rank| energies.squared_error(rank)).collect())
        })?;
        Ok(Self { linears, errors, layout: then.layout(), multiple: then.rank_multiple() })
    }

    /// A linear with another shape, whole and at every rank that saves.
    pub fn points(&self, i: usize, shape: Shape) -> Vec<Point<usize>> {
        let largest = self.layout.fitting().largest_saving_rank(shape);
        let ranks = (self.multiple..=largest).step_by(self.multiple);
        let of = |rank: usize| (self.layout.n_parameters(rank, shape), self.errors[i][rank], 0);
        ranks.map(of).chain([((shape.0 * shape.1) as u64, 0.0, 0)]).collect()
    }

    /// A unit at these widths with their errors, its linears at any rank: the best at every cost.
    pub fn of_unit(&self, unit: &NarrowUnit, options: &[usize], errors: &[f64]) -> Vec<Point<usize>> {
        let mut points = Vec::new();
        for &width in options {
            let share = |features: usize| features / unit.width() * width;
            let maker = |linear: &LinearInfo| (share(linear.out_features), linear.in_features);
            let shapes = unit.makers.iter().map(|linear| (linear, maker(linear)));
            let reader = (unit.reader.out_features, share(unit.reader.in_features));
            let lists: Vec<Vec<Point<usize>>> = shapes
                .chain([(&unit.reader, reader)])
                .filter_map(|(linear, shape)| Some(self.points(self.index(linear)?, shape)))
                .collect();
            let sums = allocate::frontier(&lists).into_iter();
            points.extend(sums.map(|(cost, error, _)| (cost, errors[width] + error, width)));
        }
        allocate::frontier(&[points]).into_iter().map(|(cost, error, of)| (cost, error, of[0])).collect()
    }

    fn index(&self, linear: &LinearInfo) -> Option<usize> {
        self.linears.iter().position(|own| own.module == linear.module)
    }
}

/// Bytes that the spectrum of a linear takes.
pub(super) fn bytes(linear: &LinearInfo) -> u64 {
    let (m, n) = linear.shape();
    8 * (3 * (n * n) as u64 + 3 * (m * n) as u64 + 3 * (m * m) as u64)
}

fn curve(measure: &Measure<'_>, linear: &LinearInfo) -> Result<ErrorCurve> {
    let (m, n) = linear.shape();
    let values = inventory::weight(measure.session.checkpoint, linear)?; // (out, in)
    let transposed = linalg::transposed_from_row_major(&values, m, n);
    let output = measure.metrics.output(linear)?;
    measure.metrics.with_input(linear, &SharedInputs::new(&[linear]), |input| {
        Ok(error_curve(transposed.transpose(), MetricPair { output: &output, input })?)
    })
}
