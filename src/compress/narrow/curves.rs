//! The order of the channels or groups of every unit, with the error at every width: one pass each, in parallel as far
//! as memory allows. Finished units are pieces of the journal.

use std::time::Instant;

use anyhow::{Context as _, Result};
use faer::{Mat, MatRef};
use serde_json::json;

use super::super::metrics::SharedInputs;
use super::super::recipe::ChannelSelection;
use super::context::{Curve, Measure};
use crate::approx::metric::MetricPair;
use crate::approx::narrow::{self, Columns, Narrowing};
use crate::checkpoint::Checkpoint;
use crate::linalg;
use crate::model::ModelConfig;
use crate::model::inventory::{self, LinearInfo};
use crate::model::narrow::NarrowUnit;
use crate::store::Values;

/// Square matrices of f64, as wide as the input of a reader, that a unit takes at once.
const SQUARES: u64 = 6;

/// Bytes that the order or the refit of a unit takes.
pub(super) fn bytes(unit: &NarrowUnit) -> u64 {
    let (m, n) = unit.reader.shape();
    8 * (SQUARES * (n * n) as u64 + 3 * (m * n) as u64 + 2 * (m * m) as u64)
}

/// The orders of all units.
///
/// # Errors
/// A weight or a statistic is damaged, or the work folder cannot be written.
pub(super) fn all(measure: &Measure<'_>, units: &[NarrowUnit]) -> Result<Vec<Curve>> {
    let session = measure.session;
    let stage = session.progress.stage("narrow", units.len() as u64, "units");
    let costs: Vec<u64> = units.iter().map(bytes).collect();
    let workers = session.workers(&costs)?;
    workers.collect(&costs, |i| {
        let unit = &units[i];
        stage.note(&unit.reader.module);
        let key = format!("narrow-{}-{}", unit.block, unit.name());
        let piece = session.journal.piece(&key, || {
            let started = Instant::now();
            let Narrowing { order, errors } = order(measure, unit)?;
            let order: Vec<i32> = order.into_iter().map(|index| index as i32).collect();
            Ok((json!(started.elapsed().as_secs_f64()), vec![Values::from(order), Values::from(errors)]))
        });
        let mut piece = piece.with_context(|| format!("narrowing `{}`", unit.reader.module))?;
        stage.advance(1);
        let order = piece.take()?.read()?.i32s()?.into_iter().map(|index| index as usize).collect();
        let errors = piece.take()?.read()?.f64s()?;
        Ok(Curve { narrowing: Narrowing { order, errors }, seconds: serde_json::from_value(piece.fields)? })
    })
}

/// The weight of a linear, transposed (in, out).
///
/// # Errors
/// It is damaged.
pub(super) fn transposed(checkpoint: &Checkpoint, linear: &LinearInfo) -> Result<Mat<f64>> {
    let (m, n) = linear.shape();
    let values = inventory::weight(checkpoint, linear)?; // (out, in)
    Ok(linalg::transposed_from_row_major(&values, m, n))
}

/// The input form of the reader (in, in), positive definite.
///
/// # Errors
/// A statistic is damaged.
pub(super) fn form(measure: &Measure<'_>, unit: &NarrowUnit) -> Result<Mat<f64>> {
    let (reader, shared) = (&unit.reader, SharedInputs::new(&[&unit.reader]));
    measure.metrics.with_input(reader, &shared, |input| Ok(narrow::input_form(input, reader.in_features)))
}

fn order(measure: &Measure<'_>, unit: &NarrowUnit) -> Result<Narrowing> {
    let of_makers = match measure.selection {
        ChannelSelection::Lorap => scores_of_makers(measure, unit)?,
        _ => Vec::new(),
    };
    with_columns(measure, unit, |columns, weight| match measure.selection {
        ChannelSelection::Backward => narrow::backward(columns),
        ChannelSelection::Forward => narrow::forward(columns),
        ChannelSelection::Leverage => narrow::by_scores(columns, &narrow::leverage(columns)),
        ChannelSelection::WandaSp => narrow::by_scores(columns, &narrow::wanda_sp(columns, weight)),
        ChannelSelection::Lorap => narrow::by_scores(columns, &narrow::lorap(columns, weight, &of_makers)),
    })
}

/// What the matrices that make the values of each channel or group add to its score in LoRAP.
///
/// # Errors
/// A weight or a statistic is damaged.
fn scores_of_makers(measure: &Measure<'_>, unit: &NarrowUnit) -> Result<Vec<f64>> {
    let (_, architecture) = ModelConfig::of(measure.session.checkpoint)?;
    let mut scores = vec![0.0; unit.width()];
    for maker in &unit.makers {
        let weight = transposed(measure.session.checkpoint, maker)?;
        let norms = measure.metrics.with_input(maker, &SharedInputs::new(&[maker]), |input| {
            Ok(narrow::norms_of_rows(weight.as_ref(), input))
        })?;
        for (owner, norm) in unit.owners(maker, architecture).into_iter().zip(norms) {
            scores[owner] += norm;
        }
    }
    Ok(scores)
}

/// Calls `f` with the columns of the reader of a unit in the metric, and its weight (out, in).
///
/// # Errors
/// The weight or a statistic is damaged.
pub(super) fn with_columns<T>(
    measure: &Measure<'_>,
    unit: &NarrowUnit,
    f: impl FnOnce(&Columns, MatRef<'_, f64>) -> T,
) -> Result<T> {
    let transposed = transposed(measure.session.checkpoint, &unit.reader)?;
    let weight = transposed.transpose();
    let output = measure.metrics.output(&unit.reader)?;
    measure.metrics.with_input(&unit.reader, &SharedInputs::new(&[&unit.reader]), |input| {
        Ok(f(&Columns::new(weight, MetricPair { output: &output, input }, unit.run()), weight))
    })
}
