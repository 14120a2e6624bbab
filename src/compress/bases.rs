//! The decompositions of all targeted linears, made once and kept: ranks are shared out over all of them, and one
//! decomposition serves every budget.

use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde_json::{Value, json};

use super::low_rank::{self, ErrorCurve, LowRank};
use super::metric::{MetricPair, PlainSides};
use super::metrics::{Metrics, SharedInputs};
use super::plan::Plan;
use crate::checkpoint::Checkpoint;
use crate::journal::{Array, Journal};
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::progress::Progress;
use crate::spool::{Spool, Spooled};

/// What is known of one linear.
pub(super) struct Basis {
    /// Its error in the metric of the method.
    pub curve: ErrorCurve,
    /// That of the plain weight, where an allocator asks for it.
    pub plain: Option<ErrorCurve>,
    /// Diagonals of the metric: output (m) and input (n); see `elastic`.
    pub diagonals: (Vec<f64>, Vec<f64>),
    /// Sides of the metric that are plain because their form was all zeros.
    pub plain_sides: PlainSides,
    pub seconds: f64,
    max_rank: usize,
    b: Spooled,
    a: Spooled,
}

/// One [`Basis`] a linear of the plan; none where no rank was asked for.
pub(super) struct Bases {
    linears: Vec<Option<Basis>>,
    spool: Mutex<Spool>,
}

/// What is decomposed, and how.
pub(super) struct Decompose<'a> {
    pub checkpoint: &'a Checkpoint,
    pub plan: &'a Plan,
    pub metrics: Metrics<'a>,
    /// The largest rank that may be asked for, a linear; 0 for those left dense.
    pub max_ranks: &'a [usize],
    pub with_plain: bool,
    pub journal: &'a Journal,
}

impl Decompose<'_> {
    /// Decomposes block after block, the linears of a block in parallel, one thread each.
    ///
    /// # Errors
    /// A weight or a statistic is broken, an eigenproblem fails, or the work folder refuses.
    pub fn run(&self, spool: Spool, progress: &dyn Progress) -> Result<Bases> {
        let wanted: Vec<usize> = (0..self.max_ranks.len()).filter(|&i| self.max_ranks[i] > 0).collect();
        let stage = progress.stage("decompose", wanted.len() as u64, "matrices");
        let spool = Mutex::new(spool);
        let mut linears: Vec<Option<Basis>> = self.max_ranks.iter().map(|_| None).collect();
        // A block's input metrics are shared, and dropped behind it; without them all linears are one group.
        let is_one_group = |i: &usize, j: &usize| {
            self.metrics.statistics.is_none() || self.plan.linears[*i].block == self.plan.linears[*j].block
        };
        for group in wanted.chunk_by(is_one_group) {
            let infos: Vec<&LinearInfo> = group.iter().map(|&i| &self.plan.linears[i]).collect();
            let shared = SharedInputs::new(&infos);
            let decomposed: Vec<Basis> = group
                .par_iter()
                .map(|&i| {
                    let linear = &self.plan.linears[i];
                    stage.note(&linear.module);
                    let basis =
                        self.one(i, &shared, &spool).with_context(|| format!("decompose `{}`", linear.module))?;
                    stage.advance(1);
                    Ok(basis)
                })
                .collect::<Result<_>>()?;
            for (&i, basis) in group.iter().zip(decomposed) {
                linears[i] = Some(basis);
            }
        }
        Ok(Bases { linears, spool })
    }

    fn one(&self, i: usize, shared: &SharedInputs, spool: &Mutex<Spool>) -> Result<Basis> {
        let piece = self.journal.piece(&format!("decompose-{i}"), || self.decompose(i, shared))?;
        let (seconds, max_rank, plain_sides) = serde_json::from_value(piece.fields)?;
        let [curve, plain, output, input, b, a] = <[Array; 6]>::try_from(piece.arrays)
            .map_err(|_| anyhow::anyhow!("a piece has another number of arrays"))?;
        let mut spool = spool.lock().expect("invariant: no holder of the spool panics");
        Ok(Basis {
            curve: ErrorCurve::new(curve.f64s()),
            plain: self.with_plain.then(|| ErrorCurve::new(plain.f64s())),
            diagonals: (output.f64s(), input.f64s()),
            plain_sides,
            seconds,
            max_rank,
            b: spool.push_array(b)?,
            a: spool.push_array(a)?,
        })
    }

    /// Seconds, rank and plain sides of a pair, and its arrays: its curve, the plain one, the diagonals of its metric, `B` and `A`.
    fn decompose(&self, i: usize, shared: &SharedInputs) -> Result<(Value, Vec<Vec<f32>>)> {
        let (linear, max_rank) = (&self.plan.linears[i], self.max_ranks[i]);
        let started = Instant::now();
        let (m, n) = linear.shape();
        let values = inventory::weight(self.checkpoint, linear)?; // (out, in)
        let transposed = linalg::transposed_from_row_major(&values, m, n);
        drop(values);
        let target = transposed.transpose();
        let output = self.metrics.output(linear)?;
        let (curve, pair, input_diagonal, plain_sides) = self.metrics.with_input(linear, shared, |input| {
            let metric = MetricPair { output: &output, input };
            let decomposition = low_rank::decompose(target, metric, max_rank)?;
            let pair = decomposition.truncate(target, max_rank);
            Ok((decomposition.curve, pair, input.to_diagonal(n), metric.plain_sides()))
        })?;
        let plain = match self.with_plain {
            true if self.metrics.statistics.is_some() => low_rank::error_curve(target, MetricPair::IDENTITY)?,
            true => curve.clone(),
            false => ErrorCurve::new(Vec::new()),
        };
        let [curve, plain] = [curve, plain].map(|curve| Array::bits(curve.energies()));
        let diagonals = [output.to_diagonal(m), input_diagonal].map(|diagonal| Array::bits(&diagonal));
        let [output, input] = diagonals;
        let fields = json!([started.elapsed().as_secs_f64(), pair.rank, plain_sides]);
        Ok((fields, vec![curve, plain, output, input, pair.b, pair.a]))
    }
}

impl Bases {
    /// What is known of the `i`-th linear of the plan.
    pub fn get(&self, i: usize) -> Option<&Basis> {
        self.linears[i].as_ref()
    }

    /// The best pair of `rank` of the `i`-th linear.
    ///
    /// # Errors
    /// The work folder refuses.
    ///
    /// # Panics
    /// When more was asked for than was decomposed.
    pub fn pair(&self, i: usize, rank: usize) -> Result<LowRank> {
        if rank == 0 {
            return Ok(LowRank { rank, b: Vec::new(), a: Vec::new() });
        }
        let basis = self.linears[i].as_ref().expect("invariant: a linear of low rank was decomposed");
        let (b, a) = {
            let mut spool = self.spool.lock().expect("invariant: no holder of the spool panics");
            (spool.get(&basis.b)?, spool.get(&basis.a)?)
        };
        let pair = LowRank { rank: basis.max_rank, b, a };
        Ok(if rank == pair.rank { pair } else { pair.prefix(rank) })
    }

    /// Keeps other values beside the pairs.
    ///
    /// # Errors
    /// The work folder refuses.
    pub fn keep(&self, values: Array) -> Result<Spooled> {
        self.spool.lock().expect("invariant: no holder of the spool panics").push_array(values)
    }

    /// What [`Self::keep`] kept.
    ///
    /// # Errors
    /// The work folder refuses.
    pub fn kept(&self, values: &Spooled) -> Result<Vec<f32>> {
        self.spool.lock().expect("invariant: no holder of the spool panics").get(values)
    }

    /// Takes another pair (`B`, `A`), with its curve, for the `i`-th linear; `plain` are further sides that were plain.
    ///
    /// # Errors
    /// The work folder refuses.
    pub fn replace(
        &mut self,
        i: usize,
        curve: ErrorCurve,
        (rank, plain): (usize, PlainSides),
        (b, a): (Array, Array),
    ) -> Result<()> {
        let spool = self.spool.get_mut().expect("invariant: no holder of the spool panics");
        let basis = self.linears[i].as_mut().expect("invariant: a linear of low rank was decomposed");
        let (b, a) = (spool.push_array(b)?, spool.push_array(a)?);
        for old in [std::mem::replace(&mut basis.b, b), std::mem::replace(&mut basis.a, a)] {
            spool.release(old);
        }
        (basis.max_rank, basis.curve) = (rank, curve);
        basis.plain_sides = basis.plain_sides.union(plain);
        Ok(())
    }
}
