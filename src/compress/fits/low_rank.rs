//! The decomposition of a linear in the metric of the method, in the layout of the recipe.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;

use super::super::metrics::{Metrics, SharedInputs};
use super::super::pieces;
use super::super::plan::Plan;
use super::unit::{Approximation, Details, Fitted, Fitter, Made, Origin, Unit, floats};
use crate::approx::low_rank::{DualVectors, ErrorCurve, LowRank, Space};
use crate::approx::metric::{MetricPair, PlainSides};
use crate::checkpoint::Checkpoint;
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::operator::{self, FitValues, Kind, Shape};
use crate::store::{Journal, Piece, Spool, Spooled, Values};

struct Decomposed {
    /// Index in the plan.
    linear: usize,
    curve: ErrorCurve,
    plain: Option<ErrorCurve>,
    diagonals: (Vec<f64>, Vec<f64>),
    details: Details,
    layout: Kind,
    shape: Shape,
    max_rank: usize,
    /// The space of the dual vectors; `None` if the values are a pair.
    space: Option<Space>,
    /// A basis and its dual, or `B` and `A`, until nothing reads them anymore.
    values: Option<[Spooled; 2]>,
}

impl Fitted for Decomposed {
    fn errors(&self) -> Vec<(usize, Vec<f64>)> {
        (0..=self.max_rank).map(|rank| (rank, vec![self.curve.squared_error(rank)])).collect()
    }

    fn values(&self, _: usize, rank: usize, origin: &Origin<'_>) -> Result<Approximation> {
        if rank == 0 {
            return Ok(Approximation { base: None, pair: Some(LowRank { rank, b: Vec::new(), a: Vec::new() }) });
        }
        let [first, second] = self.values.as_ref().context("invariant: what was written is not read again")?;
        let (first, second) = (floats(origin.spool, first)?, floats(origin.spool, second)?);
        let values = match self.space {
            Some(space) => FitValues::Dual(DualVectors::from_arrays(space, self.shape, rank, &first, &second)),
            None => FitValues::Pair(LowRank { rank: self.max_rank, b: first, a: second }),
        };
        let transposed = origin.transposed(self.linear)?;
        Ok(Approximation { base: None, pair: Some(values.pair(self.layout, transposed.transpose(), rank)) })
    }

    fn curve(&self) -> Option<&ErrorCurve> {
        Some(&self.curve)
    }

    fn plain_curve(&self) -> Option<&ErrorCurve> {
        self.plain.as_ref()
    }

    fn diagonals(&self) -> Option<&(Vec<f64>, Vec<f64>)> {
        Some(&self.diagonals)
    }

    fn details(&self) -> Details {
        self.details
    }
}

/// The linears to decompose, and how.
pub(in super::super) struct Decompose<'a> {
    pub checkpoint: &'a Checkpoint,
    pub plan: &'a Plan,
    pub metrics: Metrics<'a>,
    /// The largest rank that may be requested, per linear; 0 for linears that stay dense.
    pub max_ranks: &'a [usize],
    /// Whether allocators read the curves of plain weights.
    pub with_plain: bool,
    pub layout: &'a (dyn Fn(&LinearInfo) -> Kind + Sync),
    /// Whether anything will read the values of a fit, and not only its curve.
    pub keeps_values: &'a (dyn Fn(&LinearInfo) -> bool + Sync),
    /// Called with a block whose linears are decomposed.
    pub after_block: &'a (dyn Fn(Option<usize>) -> Result<()> + Sync),
}

impl Fitter for Decompose<'_> {
    type Output = Arc<dyn Fitted>;
    type Shared = SharedInputs;

    fn verb(&self) -> &'static str {
        "decompose"
    }

    fn key(&self, unit: &Unit) -> String {
        pieces::decomposed(unit.members[0])
    }

    fn goes_by_block(&self) -> bool {
        self.metrics.statistics.is_some()
    }

    fn shared(&self, linears: &[&LinearInfo]) -> SharedInputs {
        SharedInputs::new(linears)
    }

    fn fit(&self, unit: &Unit, shared: &SharedInputs) -> Result<Made> {
        let i = unit.members[0];
        let (linear, max_rank) = (&self.plan.linears[i], self.max_ranks[i]);
        let (started, layout) = (Instant::now(), (self.layout)(linear));
        let (m, n) = linear.shape();
        let values = inventory::weight(self.checkpoint, linear)?; // (out, in)
        let transposed = linalg::transposed_from_row_major(&values, m, n);
        drop(values);
        let target = transposed.transpose();
        let output = self.metrics.output(linear)?;
        let (fit, input_diagonal, plain_sides) = self.metrics.with_input(linear, shared, |input| {
            let metric = MetricPair { output: &output, input };
            let fit = layout.fitting().fit(target, metric, max_rank)?;
            Ok((fit, input.to_diagonal(n), metric.plain_sides()))
        })?;
        let operator::Fit { curve, values } = fit;
        let plain = match self.with_plain {
            true if self.metrics.statistics.is_some() => {
                layout.fitting().curve(target, MetricPair::IDENTITY)?.energies().to_vec()
            }
            true => curve.energies().to_vec(),
            false => Vec::new(),
        };
        let (space, largest, arrays) = match values {
            FitValues::Dual(dual) => {
                let (space, basis, dual_basis) = dual.to_arrays();
                (Some(space), dual.max_rank(), [basis, dual_basis])
            }
            FitValues::Pair(pair) => (None, pair.rank, [pair.b, pair.a]),
        };
        let fields = json!([started.elapsed().as_secs_f64(), largest, plain_sides, space]);
        let kept = [curve.energies().to_vec(), plain, output.to_diagonal(m), input_diagonal].map(Values::from).into();
        let values = if (self.keeps_values)(linear) { arrays.map(Values::from).into() } else { Vec::new() };
        Ok(Made { fields, kept, values })
    }

    fn keep(&self, unit: &Unit, mut piece: Piece, values: Option<Piece>, spool: &mut Spool) -> Result<Arc<dyn Fitted>> {
        let linear = &self.plan.linears[unit.members[0]];
        let (seconds, max_rank, plain_sides, space): (f64, usize, PlainSides, Option<Space>) =
            serde_json::from_value(piece.fields.take())?;
        let mut next = || piece.take()?.read()?.f64s();
        let (curve, plain) = (ErrorCurve::new(next()?), ErrorCurve::new(next()?));
        let diagonals = (next()?, next()?);
        let values = match values {
            Some(mut values) if (self.keeps_values)(linear) => {
                Some([spool.push(values.take()?)?, spool.push(values.take()?)?])
            }
            _ => None,
        };
        Ok(Arc::new(Decomposed {
            linear: unit.members[0],
            curve,
            plain: self.with_plain.then_some(plain),
            diagonals,
            details: Details { seconds, plain_sides, ..Details::default() },
            layout: (self.layout)(linear),
            shape: linear.shape(),
            max_rank,
            space,
            values,
        }))
    }

    fn is_spent(&self, unit: &Unit, journal: &Journal) -> bool {
        pieces::is_laid(unit.members[0], journal)
    }

    fn after_block(&self, unit: &Unit) -> Result<()> {
        (self.after_block)(self.plan.linears[unit.members[0]].block)
    }
}
