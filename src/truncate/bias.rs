//! Biases that take up the mean of the inputs (`--center`): they also take up what truncation changes in it.

use anyhow::{Context, Result};

use crate::checkpoint::Checkpoint;
use crate::formats::{Format, Source};
use crate::model::inventory::{self, LinearInfo};
use crate::operator::Term;

/// The bytes of [`refitted_values`].
///
/// # Errors
/// A tensor is absent, or a value does not fit its dtype.
pub(super) fn refitted(
    checkpoint: &Checkpoint,
    linear: &LinearInfo,
    name: &str,
    mean: &[f32],
    smaller: &Term,
) -> Result<Vec<u8>> {
    let values = refitted_values(checkpoint, linear, name, mean, smaller)?;
    let (source, info) = (Source::new(checkpoint), checkpoint.require(name)?);
    Ok(Format::Factored.exporter().encode_other(&source, info, values)?)
}

/// The bias `name` (m) of a linear: `b + (W − W') μ` with the `smaller` matrix `W'` and the mean of the
/// inputs (n).
///
/// # Errors
/// A tensor is absent.
pub(super) fn refitted_values(
    checkpoint: &Checkpoint,
    linear: &LinearInfo,
    name: &str,
    mean: &[f32],
    smaller: &Term,
) -> Result<Vec<f32>> {
    let shape = linear.shape();
    let (before, after) = (inventory::term(checkpoint, linear)?.product(shape), smaller.product(shape));
    let rows = before.chunks_exact(shape.1).zip(after.chunks_exact(shape.1));
    let lost = rows.map(|(before, after)| {
        let terms = before.iter().zip(after).zip(mean);
        terms.map(|((&b, &a), &x)| (f64::from(b) - f64::from(a)) * f64::from(x)).sum::<f64>()
    });
    let bias = checkpoint.values(name).context("a centered linear has a bias")?;
    Ok(bias.into_iter().zip(lost).map(|(bias, lost)| (f64::from(bias) + lost) as f32).collect())
}
