//! How a fit without a base is stored: in the layout that was asked for, rounded to the dtype of its weight, or in another
//! one with as many parameters that errs less.

use anyhow::{Context, Result};

use super::metrics::SharedInputs;
use super::plan::second_layout;
use super::presets::MetricForm;
use super::study::Study;
use crate::approx::low_rank::{ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::linalg;
use crate::model::inventory;
use crate::operator::{Form, Kind, Rounded, Side, Sides, Term};

/// A fit in its stored form.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Laid {
    pub form: Form,
    /// Error of rounding to the dtype, over the norm of the weight, in the metric.
    pub storage_error: f64,
    /// Error of the fit, over the norm of the weight, in the metric, where its curve does not have it.
    pub error: Option<f64>,
    /// The reason, if it differs from the request.
    pub note: Option<String>,
}

/// A fit and the errors of its ranks, of the `i`-th linear of a study.
struct Fit<'a> {
    study: &'a Study<'a>,
    i: usize,
    curve: &'a ErrorCurve,
}

/// Whether values are rounded or fitted anew as they are laid out.
pub(super) fn is_work(study: &Study<'_>, i: usize) -> bool {
    study.recipe.rounds(study.plan.linears[i].dtype) || second_layout(study.recipe, &study.plan.linears[i]).is_some()
}

/// A fit of the `i`-th linear in the `form` that was asked for, or in another layout that errs less with as many parameters.
///
/// # Errors
/// The weight or the statistics cannot be read.
pub(super) fn lay_out(
    study: &Study<'_>,
    (i, curve): (usize, Option<&ErrorCurve>),
    form: Form,
    pair: LowRank,
) -> Result<(Laid, Term)> {
    // Members of a unit stay as they were fitted together.
    if !is_work(study, i) || form.right != Default::default() {
        let parts = form.kind.fitting().lay_out(pair, study.plan.linears[i].shape());
        return Ok((Laid { form, storage_error: 0.0, error: None, note: None }, Term { form, parts }));
    }
    let curve = curve.context("invariant: a linear of low rank was decomposed")?;
    let fit = Fit { study, i, curve };
    let planned = fit.planned(form, pair)?;
    match second_layout(study.recipe, &study.plan.linears[i]) {
        Some(kind) => Ok(fit.second(kind, &planned.0)?.unwrap_or(planned)),
        None => Ok(planned),
    }
}

impl Fit<'_> {
    /// The fit as it was asked for, or in another structure whose rounding costs less.
    fn planned(&self, form: Form, pair: LowRank) -> Result<(Laid, Term)> {
        let linear = &self.study.plan.linears[self.i];
        let (shape, kind) = (linear.shape(), form.kind);
        let asked = Laid { form, storage_error: 0.0, error: None, note: None };
        if !self.study.recipe.rounds(linear.dtype) {
            return Ok((asked, Term { form, parts: kind.fitting().lay_out(pair, shape) }));
        }
        let truncated = |rank: usize| self.curve.squared_error(rank);
        let relative = |squared: f64| if truncated(0) > 0.0 { (squared / truncated(0)).sqrt() } else { 0.0 };
        self.with_sides(|sides| {
            let Rounded { parts, squared_error } = kind.fitting().round(&pair, shape, sides, linear.dtype);
            let rounded = Laid { storage_error: relative(squared_error), ..asked };
            // Another structure with as many parameters may be better if its truncation error is below the cost of
            // rounding.
            let Some(other) = kind.fitting().alternative() else { return Ok((rounded, Term { form, parts })) };
            let n_parameters = kind.n_parameters(pair.rank, shape);
            let fewer = other.rank_within(n_parameters, shape, self.study.recipe.rank_multiple());
            if fewer == 0 || squared_error <= truncated(fewer) - truncated(pair.rank) {
                return Ok((rounded, Term { form, parts }));
            }
            let smaller = kind.fitting().prefix(&pair, fewer, shape);
            let of_other = other.fitting().round(&smaller, shape, sides, linear.dtype);
            let error = relative(truncated(pair.rank) + squared_error);
            let other_error = relative(truncated(fewer) + of_other.squared_error);
            if other_error >= error {
                return Ok((rounded, Term { form, parts }));
            }
            let note = format!(
                "stored as `{other}` of rank {fewer}, not as `{kind}` of rank {}: in {:?} their errors are {other_error:.2e} and {error:.2e}",
                pair.rank, linear.dtype,
            );
            let form = Form::of_rank(other, fewer, shape);
            let laid =
                Laid { form, storage_error: relative(of_other.squared_error), error: None, note: Some(note) };
            Ok((laid, Term { form, parts: of_other.parts }))
        })
    }

    /// A linear in a layout that is fitted at one rank, if it errs less than as `planned`.
    fn second(&self, kind: Kind, planned: &Laid) -> Result<Option<(Laid, Term)>> {
        let linear = &self.study.plan.linears[self.i];
        let (shape, fitting) = (linear.shape(), kind.fitting());
        let alone = fitting.alone().context("invariant: a second layout is fitted alone")?;
        let rank = kind.rank_within(planned.form.n_parameters(shape), shape, self.study.recipe.rank_multiple());
        let curve = self.curve;
        if rank == 0 || curve.squared_error(0) == 0.0 {
            return Ok(None);
        }
        let weight = inventory::weight(self.study.session.checkpoint, linear)?;
        let transposed = linalg::transposed_from_row_major(&weight, shape.0, shape.1);
        let target = transposed.transpose();
        drop(weight);
        let metrics = self.study.metrics();
        let output = &metrics.output(linear)?;
        metrics.with_input(linear, &SharedInputs::new(&[linear]), |input| {
            let metric = MetricPair { output, input };
            let relative = |squared: f64| (squared.max(0.0) / curve.squared_error(0)).sqrt();
            let of_planned = planned.form.size.rank().map_or(0.0, |rank| curve.relative_error(rank));
            let limit = of_planned.hypot(planned.storage_error);
            let fit = alone.fit(target, metric, rank, limit.powi(2) * curve.squared_error(0))?;
            let (form, Some(mut parts)) = (Form::of_rank(kind, rank, shape), fit) else { return Ok(None) };
            let mut storage_error = 0.0;
            if self.study.recipe.rounds(linear.dtype) {
                let sides = Sides { output, input: Side::Whole(input), energies: curve.energies() };
                let rounded = fitting.round_parts(&parts, form.size, shape, &sides, linear.dtype);
                (parts, storage_error) = (rounded.parts, relative(rounded.squared_error));
            }
            let term = Term { form, parts };
            let product = linalg::transposed_from_row_major(&term.product(shape), shape.0, shape.1);
            let error = relative(metric.squared_norm((target - product.transpose()).as_ref()));
            if error >= limit {
                return Ok(None);
            }
            Ok(Some((Laid { form, storage_error, error: Some(error), note: None }, term)))
        })
    }

    /// Calls `f` with the metric of the linear. The Gram of a larger input side is not read, because its
    /// diagonal is kept with the fit.
    fn with_sides<T>(&self, f: impl FnOnce(&Sides<'_>) -> Result<T>) -> Result<T> {
        let linear = &self.study.plan.linears[self.i];
        let energies = self.curve.energies();
        let metrics = self.study.metrics();
        let output = &metrics.output(linear)?;
        if linear.out_features <= linear.in_features && metrics.preset.input == MetricForm::Gram {
            let diagonals = self.study.fits.low_rank(self.i).and_then(|fitted| fitted.diagonals());
            let (_, inputs) = diagonals.expect("invariant: a decomposition has the diagonals of its metric");
            return f(&Sides { output, input: Side::Diagonal(Metric::diagonal(inputs.clone())), energies });
        }
        metrics.with_input(linear, &SharedInputs::new(&[linear]), |input| {
            f(&Sides { output, input: Side::Whole(input), energies })
        })
    }
}
