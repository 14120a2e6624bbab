//! The error of leaving out a block or an expert: its linears that add to the states between blocks add nothing.

use anyhow::{Context as _, Result};

use super::super::metrics::SharedInputs;
use super::context::Measure;
use crate::approx::metric::MetricPair;
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::model::{LinearId, Role};

/// Square matrices of f64, as wide as the input, that the error of a linear takes at once.
const SQUARES: u64 = 2;

/// The squared errors of all blocks, of those of their linears that are among `linears`, in the unit of the curves of
/// narrower modules.
///
/// # Errors
/// A weight or a statistic is damaged.
pub(super) fn all(measure: &Measure<'_>, linears: &[LinearInfo], n_blocks: usize) -> Result<Vec<f64>> {
    let (blocks, readers): (Vec<usize>, Vec<&LinearInfo>) = linears.iter().filter_map(adding).unzip();
    let mut losses = vec![0.0; n_blocks];
    blocks.iter().zip(each(measure, &readers)?).for_each(|(block, error)| losses[*block] += error);
    Ok(losses)
}

/// The squared error of each linear, if it were of zeros.
///
/// # Errors
/// A weight or a statistic is damaged.
pub(super) fn each(measure: &Measure<'_>, linears: &[&LinearInfo]) -> Result<Vec<f64>> {
    let costs: Vec<u64> = linears.iter().map(|linear| bytes(linear)).collect();
    measure
        .session
        .workers(&costs)?
        .collect(&costs, |i| error(measure, linears[i]).with_context(|| format!("measuring `{}`", linears[i].module)))
}

/// A linear that adds to the states, with its block.
fn adding(linear: &LinearInfo) -> Option<(usize, &LinearInfo)> {
    let LinearId { block, slot } = linear.id?;
    matches!(slot.role, Role::OProj | Role::DownProj).then_some((block, linear))
}

/// Bytes that the error of a linear takes.
pub(super) fn bytes(linear: &LinearInfo) -> u64 {
    let (m, n) = linear.shape();
    8 * (SQUARES * (n * n) as u64 + 3 * (m * n) as u64 + 2 * (m * m) as u64)
}

/// The squared error of a linear of zeros.
fn error(measure: &Measure<'_>, linear: &LinearInfo) -> Result<f64> {
    let (m, n) = linear.shape();
    let values = inventory::weight(measure.session.checkpoint, linear)?; // (out, in)
    let weight = linalg::transposed_from_row_major(&values, m, n);
    let output = measure.metrics.output(linear)?;
    measure.metrics.with_input(linear, &SharedInputs::new(&[linear]), |input| {
        Ok(MetricPair { output: &output, input }.squared_norm(weight.transpose()))
    })
}
