//! A quantized base of a linear, with factors that compensate its error; one fit per quantizer of the menu.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use faer::Mat;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::budget::compensation_ranks;
use super::super::compensate::{Compensate, CompensateRank};
use super::super::metrics::{Metrics, SharedInputs};
use super::super::plan::Plan;
use super::unit::{Approximation, Details, Fitted, Fitter, Made, Origin, Unit, floats};
use crate::approx::low_rank::{self, ErrorCurve, LowRank};
use crate::approx::metric::{MetricPair, PlainSides};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::operator::Shape;
use crate::quantize::{Blocks, Fallback, Grouped, Quant, Quantized, Sides, Storage};
use crate::store::{Piece, Spool, Spooled, Values};

/// One quantized base of a linear, with factors up to some rank.
struct QuantizedBase {
    quant: Quant,
    details: Details,
    /// Squared error in the metric of the method, for every available rank.
    errors: Vec<(usize, f64)>,
    shape: Shape,
    codes: Spooled,
    scales: Spooled,
    zeros: Vec<u8>,
    /// Rank, `B` and `A`.
    pair: Option<(usize, Spooled, Spooled)>,
    /// The error of the base alone, and the curve of what it leaves; see [`Fitted::residual`].
    residual: Option<(f64, ErrorCurve)>,
}

/// A new base.
struct MadeBase {
    quant: Quant,
    fallback: Option<Fallback>,
    errors: Vec<(usize, f64)>,
    seconds: f64,
    base: Quantized,
    pair: Option<LowRank>,
    residual: Option<(f64, ErrorCurve)>,
}

/// The record of a base without its arrays: codes, scales, zeros, `B`, `A`, and the residual's error and energies.
#[derive(Serialize, Deserialize)]
struct Record {
    quant: Quant,
    fallback: Option<Fallback>,
    seconds: f64,
    ranks: Vec<usize>,
    /// The rank of the factors.
    rank: Option<usize>,
}

impl MadeBase {
    fn record(&self) -> Record {
        Record {
            quant: self.quant,
            fallback: self.fallback,
            seconds: self.seconds,
            ranks: self.errors.iter().map(|(rank, _)| *rank).collect(),
            rank: self.pair.as_ref().map(|pair| pair.rank),
        }
    }

    fn into_arrays(self) -> [Values; 7] {
        let errors: Vec<f64> = self.errors.iter().map(|(_, error)| *error).collect();
        let (codes, scales, zeros) = match self.base {
            Quantized::Grouped(m) => (m.scheme.pack(&m.codes, m.cols), m.scales, m.zeros),
            Quantized::Block(blocks) => (blocks.bytes, Vec::new(), Vec::new()),
        };
        let (b, a) = self.pair.map_or_else(Default::default, |pair| (pair.b, pair.a));
        let residual = self.residual.map(|(alone, curve)| [&[alone], curve.energies()].concat()).unwrap_or_default();
        [errors.into(), codes.into(), scales.into(), zeros.into(), b.into(), a.into(), residual.into()]
    }
}

impl QuantizedBase {
    fn keep(
        record: Record,
        plain_sides: PlainSides,
        shape: Shape,
        piece: &mut Piece,
        spool: &mut Spool,
    ) -> Result<Self> {
        let errors = piece.take()?.read()?.f64s()?;
        let (codes, scales) = (spool.push(piece.take()?)?, spool.push(piece.take()?)?);
        let zeros = piece.take()?.read()?.bytes()?;
        let (b, a) = (piece.take()?, piece.take()?);
        let residual = piece.take()?.read()?.f64s()?;
        let residual = residual.split_first().map(|(&alone, energies)| (alone, ErrorCurve::new(energies.to_vec())));
        let pair = record.rank.map(|rank| Ok((rank, spool.push(b)?, spool.push(a)?))).transpose();
        let details = Details { seconds: record.seconds, fallback: record.fallback, plain_sides };
        let errors = record.ranks.into_iter().zip(errors).collect();
        let pair: Result<_> = pair;
        Ok(Self { quant: record.quant, details, errors, shape, codes, scales, zeros, pair: pair?, residual })
    }

    fn base(&self, spool: &mut Spool) -> Result<Quantized> {
        let (rows, cols) = self.shape;
        let bytes = spool.get(&self.codes)?.bytes()?;
        Ok(match self.quant.storage() {
            Storage::Grouped(scheme) => {
                let codes = scheme.unpack(&bytes, rows, cols);
                let codes = codes.expect("invariant: what was packed is unpacked");
                let scales = spool.get(&self.scales)?.f32s()?;
                Quantized::Grouped(Grouped { rows, cols, scheme, codes, scales, zeros: self.zeros.clone() })
            }
            Storage::Block(block_type) => Quantized::Block(Blocks { rows, cols, block_type, bytes }),
        })
    }
}

impl Fitted for QuantizedBase {
    fn errors(&self) -> Vec<(usize, Vec<f64>)> {
        self.errors.iter().map(|&(rank, error)| (rank, vec![error])).collect()
    }

    fn values(&self, _: usize, rank: usize, &Origin { spool, .. }: &Origin<'_>) -> Result<Approximation> {
        let base = self.base(&mut spool.lock().expect("invariant: no holder of the spool panics"))?;
        let pair = match &self.pair {
            Some((largest, b, a)) if rank > 0 => {
                let pair = LowRank { rank: *largest, b: floats(spool, b)?, a: floats(spool, a)? };
                Some(if rank == pair.rank { pair } else { pair.prefix(rank) })
            }
            _ => None,
        };
        Ok(Approximation { base: Some(base), pair })
    }

    fn residual(&self) -> Option<(f64, &ErrorCurve)> {
        self.residual.as_ref().map(|(alone, curve)| (*alone, curve))
    }

    fn quant(&self) -> Option<Quant> {
        Some(self.quant)
    }

    fn details(&self) -> Details {
        self.details
    }
}

/// The linears to quantize, and how.
pub(in super::super) struct Quantize<'a> {
    pub checkpoint: &'a Checkpoint,
    pub plan: &'a Plan,
    /// The method's metric, in which errors are reported.
    pub metrics: Metrics<'a>,
    pub compensate: Compensate,
    pub rank: CompensateRank,
    /// The menu of the `i`-th linear.
    pub quants: &'a (dyn Fn(usize) -> Vec<Quant> + Sync),
    /// Number of earlier rounds: the first adds the menu, the second the equal-bytes baseline.
    pub round: usize,
}

impl Fitter for Quantize<'_> {
    /// Squared norm in the metric of the method, and the bases.
    type Output = (f64, Vec<Arc<dyn Fitted>>);
    /// Input metrics of the method and of the compensation.
    type Shared = [SharedInputs; 2];

    fn verb(&self) -> &'static str {
        "quantize"
    }

    fn key(&self, unit: &Unit) -> String {
        format!("quantize-{}-{}", self.round, unit.members[0])
    }

    fn goes_by_block(&self) -> bool {
        true
    }

    fn shared(&self, linears: &[&LinearInfo]) -> [SharedInputs; 2] {
        [SharedInputs::new(linears), SharedInputs::new(linears)]
    }

    fn fit(&self, unit: &Unit, shared: &[SharedInputs; 2]) -> Result<Made> {
        let i = unit.members[0];
        let linear = &self.plan.linears[i];
        // Rows of the vocabulary are read one by one: codes alone.
        let compensate = if linear.vocabulary.is_some() { Compensate::None } else { self.compensate };
        let (norm, plain, made) = Self { compensate, ..*self }.make(linear, &(self.quants)(i), shared)?;
        let records: Vec<Record> = made.iter().map(MadeBase::record).collect();
        let values = made.into_iter().flat_map(MadeBase::into_arrays).collect();
        Ok(Made { fields: json!((plain, records)), kept: vec![vec![norm].into()], values })
    }

    fn keep(&self, unit: &Unit, mut piece: Piece, values: Option<Piece>, spool: &mut Spool) -> Result<Self::Output> {
        let mut values = values.context("invariant: quantized bases are kept to the end")?;
        let (plain, records): (PlainSides, Vec<Record>) = serde_json::from_value(piece.fields.take())?;
        let norm = piece.take()?.read()?.f64s()?.first().copied().unwrap_or(0.0);
        let shape = self.plan.linears[unit.members[0]].shape();
        let mut fits: Vec<Arc<dyn Fitted>> = Vec::new();
        for record in records {
            fits.push(Arc::new(QuantizedBase::keep(record, plain, shape, &mut values, spool)?));
        }
        Ok((norm, fits))
    }
}

impl Quantize<'_> {
    /// Squared norm of a linear in the metric of the method, the plain sides of its metrics, and its bases.
    fn make(
        &self,
        linear: &LinearInfo,
        quants: &[Quant],
        [own, shared]: &[SharedInputs; 2],
    ) -> Result<(f64, PlainSides, Vec<MadeBase>)> {
        let (m, n) = linear.shape();
        let values = inventory::weight(self.checkpoint, linear)?; // (out, in)
        let transposed = linalg::transposed_from_row_major(&values, m, n);
        let inputs = quants.iter().any(|q| q.needs_gram()).then(|| self.metrics.input_gram(linear)).transpose()?;
        let compensating = self.metrics.with_preset(self.compensate.preset());
        let output = self.metrics.output(linear)?;
        let outputs = if quants.iter().any(|q| q.descends()) { output.to_dense() } else { None };
        let pair_output = compensating.output(linear)?;
        let is_reported_in_pair = self.metrics.preset == compensating.preset
            && self.metrics.damping_input == compensating.damping_input
            && self.metrics.damping_output == compensating.damping_output;
        self.metrics.with_input(linear, own, |input| {
            let reported = MetricPair { output: &output, input };
            compensating.with_input(linear, shared, |input| {
                let pair = MetricPair { output: &pair_output, input };
                let one = Attempt {
                    values: &values,
                    weight: &transposed,
                    shape: (m, n),
                    sides: inputs
                        .as_ref()
                        .map(|inputs| Sides { inputs: inputs.as_ref(), outputs: outputs.as_ref().map(Mat::as_ref) }),
                    reported,
                    pair,
                    is_reported_in_pair,
                };
                let fitting = quants.iter().filter(|quant| quant.storage().fits(n));
                check_range(fitting.clone(), &values)?;
                let mut made = Vec::new();
                for &quant in fitting {
                    made.extend(self.bases(&one, quant)?);
                }
                let mut plain = reported.plain_sides().union(pair.plain_sides());
                plain.input |= inputs.as_ref().is_some_and(|gram| gram.norm_max() == 0.0);
                Ok((reported.squared_norm(transposed.transpose()), plain, made))
            })
        })
    }

    /// One base whose factors serve every rank; one per rank if base and factors alternate.
    fn bases(&self, one: &Attempt<'_>, quant: Quant) -> Result<Vec<MadeBase>> {
        let ranks = compensation_ranks(self.compensate, self.rank, one.shape);
        let turns = self.compensate.turns();
        let started = Instant::now();
        let first = one.quantize(one.values, quant)?;
        if turns == 1 {
            return Ok(vec![one.base(quant, first, &ranks, started)?]);
        }
        let mut made = Vec::new();
        for rank in ranks {
            let started = if rank == 0 { started } else { Instant::now() };
            let base = if rank == 0 { first.clone() } else { one.alternate(quant, first.clone(), rank, turns)? };
            made.push(one.base(quant, base, &[rank], started)?);
        }
        Ok(made)
    }
}

/// Codes of `target` (out, in), row-major, by one quantizer on other `sides` than those of the statistics, as the record
/// and the arrays of a piece; their error is the one from the target, in `metric`.
///
/// # Errors
/// A value exceeds the range of scales, or is not finite.
pub(in super::super) fn requantized(
    target: &[f32],
    shape: Shape,
    quant: Quant,
    sides: Sides<'_>,
    metric: MetricPair<'_>,
) -> Result<(Value, Vec<Values>)> {
    let started = Instant::now();
    check_range(std::iter::once(&quant), target)?;
    let weight = linalg::transposed_from_row_major(target, shape.0, shape.1);
    let one = Attempt {
        values: target,
        weight: &weight,
        shape,
        sides: Some(sides),
        reported: metric,
        pair: metric,
        is_reported_in_pair: true,
    };
    let made = one.base(quant, one.quantize(target, quant)?, &[0], started)?;
    Ok((json!(made.record()), made.into_arrays().into()))
}

/// The fit of the next arrays of a piece, which [`requantized`] made.
///
/// # Errors
/// The work folder cannot be read or written.
pub(in super::super) fn requantized_fit(
    record: Value,
    plain_sides: PlainSides,
    shape: Shape,
    piece: &mut Piece,
    spool: &mut Spool,
) -> Result<Arc<dyn Fitted>> {
    let record = serde_json::from_value(record)?;
    Ok(Arc::new(QuantizedBase::keep(record, plain_sides, shape, piece, spool)?))
}

/// Refuses weights that exceed the range of scales: they would be clipped to almost nothing.
fn check_range<'a>(mut quants: impl Iterator<Item = &'a Quant>, values: &[f32]) -> Result<()> {
    let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    match quants.find(|quant| quant.largest() < largest) {
        Some(quant) => {
            Err(Failure::numeric(format!("a weight of {largest:e} exceeds the range of the f16 scales of `{quant}`"))
                .hint("leave the linear out with `--exclude`, or remove `--quant`")
                .into())
        }
        None => Ok(()),
    }
}

/// One linear with two metrics: the one its factors are fitted in, and the one its error is reported in.
struct Attempt<'a> {
    values: &'a [f32],
    /// The weight, (in, out).
    weight: &'a Mat<f64>,
    shape: Shape,
    /// What quantizers with a metric use: the Gram of the inputs, and the output's side of the metric of the method.
    sides: Option<Sides<'a>>,
    /// The metric of the method.
    reported: MetricPair<'a>,
    /// The metric of the compensation.
    pair: MetricPair<'a>,
    is_reported_in_pair: bool,
}

type Base = (Quantized, Option<Fallback>);

impl Attempt<'_> {
    fn quantize(&self, values: &[f32], quant: Quant) -> Result<Base> {
        quant.quantize(values, self.shape, self.sides)
    }

    /// `W − Q`, transposed: (in, out).
    fn residual(&self, base: &Quantized) -> Mat<f64> {
        let (m, n) = self.shape;
        let quantized = linalg::transposed_from_row_major(&base.dequantize(), m, n);
        self.weight - quantized
    }

    /// Alternates base and factors, and returns the base whose factors leave the least error. The first iteration is
    /// the one-shot method, so the result is never worse than that.
    fn alternate(&self, quant: Quant, first: Base, rank: usize, turns: usize) -> Result<Base> {
        let (m, n) = self.shape;
        let (mut current, mut best): (Base, Option<(f64, Base)>) = (first, None);
        for turn in 0..turns {
            let residual = self.residual(&current.0);
            let decomposition = low_rank::decompose(residual.transpose(), self.pair, rank)?;
            let error = decomposition.curve.squared_error(rank);
            if best.as_ref().is_some_and(|(least, _)| error >= *least) {
                break;
            }
            if turn + 1 < turns {
                let LowRank { b, a, .. } = decomposition.truncate(residual.transpose(), rank);
                let product = linalg::product_row_major(&b, &a, m, rank, n);
                let left: Vec<f32> = self.values.iter().zip(product).map(|(w, p)| w - p).collect();
                let next = self.quantize(&left, quant)?;
                best = Some((error, std::mem::replace(&mut current, next)));
            } else {
                return Ok(current);
            }
        }
        Ok(best.expect("invariant: the first turn is kept").1)
    }

    /// A base with factors of the largest of `ranks`, and the errors at all of them.
    fn base(&self, quant: Quant, (base, fallback): Base, ranks: &[usize], started: Instant) -> Result<MadeBase> {
        let residual = self.residual(&base);
        let alone = self.reported.squared_norm(residual.transpose());
        let largest = ranks.iter().copied().max().unwrap_or(0);
        let decomposed =
            (largest > 0).then(|| low_rank::decompose(residual.transpose(), self.pair, largest)).transpose()?;
        let curve = decomposed.as_ref().map(|d| &d.curve);
        let errors = ranks.iter().map(|&rank| (rank, self.error(alone, curve, rank))).collect();
        let pair = decomposed.as_ref().map(|d| d.truncate(residual.transpose(), largest));
        let residual = decomposed.map(|d| (alone, d.curve));
        Ok(MadeBase { quant, fallback, errors, seconds: started.elapsed().as_secs_f64(), base, pair, residual })
    }

    /// Squared error in the metric of the method. Factors fitted in another metric are assumed to save the same share
    /// of it as of their own; the written values are measured.
    fn error(&self, alone: f64, curve: Option<&ErrorCurve>, rank: usize) -> f64 {
        match curve {
            Some(curve) if rank > 0 && self.is_reported_in_pair => curve.squared_error(rank),
            Some(curve) if rank > 0 => {
                let total = curve.squared_error(0);
                if total > 0.0 { alone * curve.squared_error(rank) / total } else { 0.0 }
            }
            _ => alone,
        }
    }
}
