//! The two sides of the driver: a [`Fitter`] makes the fit of a [`Unit`], and a [`Fitted`] gives
//! the sizes and values of it.

use std::sync::Mutex;

use anyhow::Result;
use faer::Mat;
use serde_json::Value;

use crate::approx::low_rank::{ErrorCurve, LowRank};
use crate::approx::metric::PlainSides;
use crate::checkpoint::Checkpoint;
use crate::compress::plan::Plan;
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::quantize::{Fallback, Quant, Quantized};
use crate::store::{Journal, Piece, Spool, Spooled, Values};

/// Linears that are replaced together, by index in the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Unit {
    pub members: Vec<usize>,
}

/// One way to approximate a unit.
pub(in super::super) trait Fitted: Send + Sync {
    /// The available ranks, ascending, each with the squared error of every member in the metric of the method.
    fn errors(&self) -> Vec<(usize, Vec<f64>)>;

    /// Base and factors of a member.
    ///
    /// # Errors
    /// The source or the work folder cannot be read.
    fn values(&self, member: usize, rank: usize, origin: &Origin<'_>) -> Result<Approximation>;

    /// The error of a single linear at every rank, if it has no base.
    fn curve(&self) -> Option<&ErrorCurve> {
        None
    }

    /// The squared error of a base alone in the metric of the method, and the error of the factors over it at every
    /// rank in the metric of the compensation.
    fn residual(&self) -> Option<(f64, &ErrorCurve)> {
        None
    }

    /// The error of a member at every rank up to the largest, if several linears share a part.
    fn shared_curve(&self, _member: usize) -> Option<&ErrorCurve> {
        None
    }

    /// The curve of the plain weight, if an allocator needs it.
    fn plain_curve(&self) -> Option<&ErrorCurve> {
        None
    }

    /// Diagonals of the metric: output (m) and input (n); see `curves`.
    fn diagonals(&self) -> Option<&(Vec<f64>, Vec<f64>)> {
        None
    }

    /// Indices in the plan of the linears that share a part; empty for a single linear.
    fn unit(&self) -> &[usize] {
        &[]
    }

    /// The quantizer of the base.
    fn quant(&self) -> Option<Quant> {
        None
    }

    /// The details for the report.
    fn details(&self) -> Details;
}

/// The places that the values of a fit are read from.
pub(in super::super) struct Origin<'a> {
    pub checkpoint: &'a Checkpoint,
    pub plan: &'a Plan,
    pub spool: &'a Mutex<Spool>,
}

impl Origin<'_> {
    /// The weight of the `i`-th linear, transposed: (n, m).
    ///
    /// # Errors
    /// The source cannot be read.
    pub fn transposed(&self, i: usize) -> Result<Mat<f64>> {
        let linear = &self.plan.linears[i];
        let (m, n) = linear.shape();
        Ok(linalg::transposed_from_row_major(&inventory::weight(self.checkpoint, linear)?, m, n))
    }
}

/// A base, factors, or both.
pub(in super::super) struct Approximation {
    pub base: Option<Quantized>,
    pub pair: Option<LowRank>,
}

/// Details of a fit for the report.
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct Details {
    pub seconds: f64,
    /// The reason, if the base was rounded to nearest.
    pub fallback: Option<Fallback>,
    /// Sides of the metric that are plain because their form was all zeros.
    pub plain_sides: PlainSides,
}

/// A new fit.
pub(super) struct Made {
    pub fields: Value,
    /// Arrays that are read until the end: errors, diagonals.
    pub kept: Vec<Values>,
    /// Arrays that are not read once the unit is written.
    pub values: Vec<Values>,
}

/// A way to fit units one by one.
pub(super) trait Fitter: Sync {
    type Output: Send;
    /// Data that the units of a block share while they are fitted.
    type Shared: Sync;

    /// The verb for progress bars and errors.
    fn verb(&self) -> &'static str;

    /// The journal key of the fit of a unit.
    fn key(&self, unit: &Unit) -> String;

    /// Whether units are fitted block by block, because units of a block share data.
    fn goes_by_block(&self) -> bool;

    fn shared(&self, linears: &[&LinearInfo]) -> Self::Shared;

    fn fit(&self, unit: &Unit, shared: &Self::Shared) -> Result<Made>;

    /// The fit from its pieces; the second is absent if nothing reads it anymore.
    fn keep(&self, unit: &Unit, piece: Piece, values: Option<Piece>, spool: &mut Spool) -> Result<Self::Output>;

    /// Whether the values of a unit are already written, so that nothing reads them anymore.
    fn is_spent(&self, _unit: &Unit, _journal: &Journal) -> bool {
        false
    }

    /// Called when the units of a block are done.
    fn after_block(&self, _unit: &Unit) -> Result<()> {
        Ok(())
    }
}

/// An array of floats from a spool.
pub(super) fn floats(spool: &Mutex<Spool>, array: &Spooled) -> Result<Vec<f32>> {
    spool.lock().expect("invariant: no holder of the spool panics").get(array)?.f32s()
}
