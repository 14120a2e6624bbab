//! Quantised bases of all targeted linears, with the factors that make up for what quantising lost: made once and kept, every
//! base of the menu for every linear, so that a budget is shared out over all of them.

use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use faer::Mat;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::allocate::{Choice, Coded};
use super::compensate::{Compensate, CompensateRank};
use super::low_rank::{self, ErrorCurve, LowRank};
use super::metric::{MetricPair, PlainSides};
use super::metrics::{Metrics, SharedInputs};
use super::plan::Plan;
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::journal::{Array, Journal};
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::progress::Progress;
use crate::quantize::{Blocks, Fallback, Grouped, Quant, Quantized, Storage, bits};
use crate::spool::{Spool, Spooled, bytes_of, words};

/// One quantised base of a linear, with factors up to some rank.
pub(super) struct Variant {
    pub quant: Quant,
    pub fallback: Option<Fallback>,
    /// Squared error in the metric of the method, by rank: of the ranks that may be chosen, the first 0 where that is one.
    errors: Vec<(usize, f64)>,
    pub seconds: f64,
    base: KeptMatrix,
    /// Rank, `B` and `A`.
    pair: Option<(usize, Spooled, Spooled)>,
}

/// A quantised matrix in the spool.
struct KeptMatrix {
    storage: Storage,
    shape: (usize, usize),
    n_code_bytes: usize,
    codes: Spooled,
    scales: Spooled,
    zeros: Vec<u8>,
}

/// A variant that was just made.
struct Made {
    quant: Quant,
    fallback: Option<Fallback>,
    errors: Vec<(usize, f64)>,
    seconds: f64,
    base: Quantized,
    pair: Option<LowRank>,
}

/// What is kept of it besides its arrays.
#[derive(Serialize, Deserialize)]
struct Record {
    quant: Quant,
    fallback: Option<Fallback>,
    seconds: f64,
    ranks: Vec<usize>,
    /// Of the pair.
    rank: Option<usize>,
    n_code_bytes: usize,
    n_zeros: usize,
}

/// Arrays of a variant: the error of every rank, codes, scales, zeros, `B` and `A`.
const ARRAYS: usize = 6;

impl Made {
    /// Packed codes, scales and zeros.
    fn base_parts(&self) -> (Vec<u8>, &[f32], &[u8]) {
        match &self.base {
            Quantized::Grouped(m) => (bits::pack(&m.codes, m.cols, m.scheme.levels.bits(), 1), &m.scales, &m.zeros),
            Quantized::Block(b) => (b.bytes.clone(), &[], &[]),
        }
    }

    fn record(&self) -> Value {
        let (codes, _, zeros) = self.base_parts();
        json!(Record {
            quant: self.quant,
            fallback: self.fallback,
            seconds: self.seconds,
            ranks: self.errors.iter().map(|(rank, _)| *rank).collect(),
            rank: self.pair.as_ref().map(|pair| pair.rank),
            n_code_bytes: codes.len(),
            n_zeros: zeros.len(),
        })
    }

    fn into_arrays(self) -> [Vec<f32>; ARRAYS] {
        let errors: Vec<f64> = self.errors.iter().map(|(_, error)| *error).collect();
        let (codes, scales, zeros) = self.base_parts();
        let (codes, scales, zeros) = (words(&codes), scales.to_vec(), words(zeros));
        let (b, a) = self.pair.map_or_else(Default::default, |pair| (pair.b, pair.a));
        [Array::bits(&errors), codes, scales, zeros, b, a]
    }
}

impl Variant {
    fn keep(record: Record, shape: (usize, usize), arrays: Vec<Array>, spool: &mut Spool) -> Result<Self> {
        let [errors, codes, scales, zeros, b, a] =
            <[Array; ARRAYS]>::try_from(arrays).map_err(|_| anyhow::anyhow!("a piece has another number of arrays"))?;
        let base = KeptMatrix {
            storage: record.quant.storage(),
            shape,
            n_code_bytes: record.n_code_bytes,
            codes: spool.push_array(codes)?,
            scales: spool.push_array(scales)?,
            zeros: bytes_of(&zeros.values, record.n_zeros),
        };
        let pair = match record.rank {
            Some(rank) => Some((rank, spool.push_array(b)?, spool.push_array(a)?)),
            None => None,
        };
        let errors = record.ranks.into_iter().zip(errors.f64s()).collect();
        Ok(Self { quant: record.quant, fallback: record.fallback, errors, seconds: record.seconds, base, pair })
    }
}

/// The variants of every linear of the plan.
pub(super) struct Residuals {
    linears: Vec<Vec<Variant>>,
    /// Squared norm of every linear in the metric of the method.
    norms: Vec<f64>,
    /// Sides of the metrics of every linear that are plain because their form was all zeros.
    plain_sides: Vec<PlainSides>,
    spool: Mutex<Spool>,
    /// How often variants were added: the menu first, the control after it.
    rounds: usize,
}

/// What is quantised, and how.
pub(super) struct Quantise<'a> {
    pub checkpoint: &'a Checkpoint,
    pub plan: &'a Plan,
    /// The method's metric, in which errors are told.
    pub metrics: Metrics<'a>,
    pub compensate: Compensate,
    pub rank: CompensateRank,
    pub journal: &'a Journal,
}

/// Ranks that `auto` offers cost up to this share of the parameters of a linear: 4 bits a weight in 16-bit factors.
const LARGEST_SHARE: f64 = 0.25;

/// Largest rank of factors on top of a base that `auto` offers.
pub(super) fn largest_rank((m, n): (usize, usize)) -> usize {
    ((LARGEST_SHARE * (m * n) as f64 / (m + n) as f64) as usize).max(1)
}

impl Residuals {
    pub fn new(n_linears: usize, spool: Spool) -> Self {
        let linears = (0..n_linears).map(|_| Vec::new()).collect();
        let plain_sides = vec![PlainSides::default(); n_linears];
        Self { linears, norms: vec![0.0; n_linears], plain_sides, spool: Mutex::new(spool), rounds: 0 }
    }

    /// The variants of a linear, in the order of their numbers.
    pub fn of(&self, i: usize) -> &[Variant] {
        &self.linears[i]
    }

    /// Squared norm of a linear in the metric of the method.
    pub fn norm(&self, i: usize) -> f64 {
        self.norms[i]
    }

    /// Sides of the metrics of a linear that are plain because their form was all zeros.
    pub fn plain_sides(&self, i: usize) -> PlainSides {
        self.plain_sides[i]
    }

    /// Squared error of a choice in the metric of the method, as it was estimated.
    pub fn error(&self, i: usize, choice: Choice) -> f64 {
        let Choice::Coded { variant, rank } = choice else { return 0.0 };
        let errors = &self.linears[i][variant].errors;
        errors.iter().find(|(r, _)| *r == rank).expect("invariant: the rank is offered").1
    }

    /// What a linear may become, of its variants from `first` on; `cost` prices a choice.
    pub fn coded(&self, i: usize, first: usize, cost: impl Fn(Choice) -> u64) -> Vec<Coded> {
        let of = |(variant, kept): (usize, &Variant)| {
            let coded = |&(rank, error): &(usize, f64)| {
                let choice = Choice::Coded { variant, rank };
                Coded { choice, cost: cost(choice), error }
            };
            kept.errors.iter().map(coded).collect::<Vec<_>>()
        };
        self.linears[i].iter().enumerate().skip(first).flat_map(of).collect()
    }

    /// Base and pair of a variant, of at most `rank`.
    ///
    /// # Errors
    /// The work folder refuses.
    pub fn parts(&self, i: usize, variant: usize, rank: usize) -> Result<(Quantized, Option<LowRank>)> {
        let kept = &self.linears[i][variant];
        let mut spool = self.spool.lock().expect("invariant: no holder of the spool panics");
        let base = kept.base.get(&mut spool)?;
        let pair = match &kept.pair {
            Some((largest, b, a)) if rank > 0 => {
                let pair = LowRank { rank: *largest, b: spool.get(b)?, a: spool.get(a)? };
                Some(if rank == pair.rank { pair } else { pair.prefix(rank) })
            }
            _ => None,
        };
        Ok((base, pair))
    }
}

impl KeptMatrix {
    fn get(&self, spool: &mut Spool) -> Result<Quantized> {
        let (rows, cols) = self.shape;
        let bytes = spool.get_bytes(&self.codes, self.n_code_bytes)?;
        Ok(match self.storage {
            Storage::Grouped(scheme) => {
                let codes = bits::unpack(&bytes, rows, cols, scheme.levels.bits(), 1);
                let codes = codes.expect("invariant: what was packed is unpacked");
                let (scales, zeros) = (spool.get(&self.scales)?, self.zeros.clone());
                Quantized::Grouped(Grouped { rows, cols, scheme, codes, scales, zeros })
            }
            Storage::Block(block_type) => Quantized::Block(Blocks { rows, cols, block_type, bytes }),
        })
    }
}

impl Quantise<'_> {
    /// Adds the variants `quants(i)` of every linear, block after block, the linears of a block in parallel, one thread each.
    ///
    /// # Errors
    /// A weight or a statistic is broken, an eigenproblem fails, or the work folder refuses.
    pub fn run(
        &self,
        residuals: &mut Residuals,
        quants: &(dyn Fn(usize) -> Vec<Quant> + Sync),
        progress: &dyn Progress,
    ) -> Result<()> {
        let all: Vec<usize> = (0..self.plan.linears.len()).collect();
        let stage = progress.stage("quantise", all.len() as u64, "matrices");
        let is_one_block = |i: &usize, j: &usize| self.plan.linears[*i].block == self.plan.linears[*j].block;
        for group in all.chunk_by(is_one_block) {
            let infos: Vec<&LinearInfo> = group.iter().map(|&i| &self.plan.linears[i]).collect();
            // One set for each metric.
            let shared = [SharedInputs::new(&infos), SharedInputs::new(&infos)];
            let made: Vec<(f64, PlainSides, Vec<Variant>)> = group
                .par_iter()
                .map(|&i| {
                    let linear = &self.plan.linears[i];
                    stage.note(&linear.module);
                    let key = format!("quantise-{}-{i}", residuals.rounds);
                    let made = self.one(linear, &key, &quants(i), (&shared, &residuals.spool));
                    stage.advance(1);
                    made.with_context(|| format!("quantise `{}`", linear.module))
                })
                .collect::<Result<_>>()?;
            for (&i, (norm, plain, variants)) in group.iter().zip(made) {
                residuals.norms[i] = norm;
                residuals.plain_sides[i] = residuals.plain_sides[i].union(plain);
                residuals.linears[i].extend(variants);
            }
        }
        residuals.rounds += 1;
        Ok(())
    }

    /// Squared norm of a linear in the metric of the method, sides of its metrics that are plain, and its variants.
    fn one(
        &self,
        linear: &LinearInfo,
        key: &str,
        quants: &[Quant],
        (shared, spool): (&[SharedInputs; 2], &Mutex<Spool>),
    ) -> Result<(f64, PlainSides, Vec<Variant>)> {
        let piece = self.journal.piece(key, || {
            let (norm, plain, made) = self.make(linear, quants, shared)?;
            let records: Vec<Value> = made.iter().map(Made::record).collect();
            let arrays = made.into_iter().flat_map(Made::into_arrays);
            Ok((json!((plain, records)), std::iter::once(Array::bits(&[norm])).chain(arrays).collect()))
        })?;
        let (plain, records): (PlainSides, Vec<Record>) = serde_json::from_value(piece.fields)?;
        let mut arrays = piece.arrays.into_iter();
        let norm = arrays.next().and_then(|norm| norm.f64s().first().copied()).context("a piece has no norm")?;
        let mut spool = spool.lock().expect("invariant: no holder of the spool panics");
        let variants = records.into_iter().map(|record| {
            let own: Vec<Array> = arrays.by_ref().take(ARRAYS).collect();
            Variant::keep(record, linear.shape(), own, &mut spool)
        });
        Ok((norm, plain, variants.collect::<Result<_>>()?))
    }

    fn make(
        &self,
        linear: &LinearInfo,
        quants: &[Quant],
        [own, shared]: &[SharedInputs; 2],
    ) -> Result<(f64, PlainSides, Vec<Made>)> {
        let (m, n) = linear.shape();
        let values = inventory::weight(self.checkpoint, linear)?; // (out, in)
        let transposed = linalg::transposed_from_row_major(&values, m, n);
        let gram = quants.iter().any(|q| q.needs_gram()).then(|| self.metrics.input_gram(linear)).transpose()?;
        let compensating = self.metrics.with_preset(self.compensate.preset());
        let output = self.metrics.output(linear)?;
        let pair_output = compensating.output(linear)?;
        self.metrics.with_input(linear, own, |input| {
            let told = MetricPair { output: &output, input };
            compensating.with_input(linear, shared, |input| {
                let one = Attempt {
                    values: &values,
                    weight: &transposed,
                    shape: (m, n),
                    gram: gram.as_ref(),
                    told,
                    pair: MetricPair { output: &pair_output, input },
                    is_told_in_pair: self.metrics.preset == compensating.preset
                        && self.metrics.damping_input == compensating.damping_input
                        && self.metrics.damping_output == compensating.damping_output,
                };
                let fitting = quants.iter().filter(|quant| quant.storage().fits(n));
                check_range(fitting.clone(), &values)?;
                let mut variants = Vec::new();
                for &quant in fitting {
                    variants.extend(self.variants(&one, quant)?);
                }
                let mut plain = told.plain_sides().union(one.pair.plain_sides());
                plain.input |= gram.as_ref().is_some_and(|gram| gram.norm_max() == 0.0);
                Ok((told.squared_norm(transposed.transpose()), plain, variants))
            })
        })
    }

    /// One variant whose factors serve every rank; where base and factors take turns, one a rank.
    fn variants(&self, one: &Attempt<'_>, quant: Quant) -> Result<Vec<Made>> {
        let most = one.shape.0.min(one.shape.1);
        let (largest, offers_none) = match (self.compensate, self.rank) {
            (Compensate::None, _) => (0, true),
            (_, CompensateRank::Auto) => (largest_rank(one.shape).min(most), true),
            (_, CompensateRank::Fixed(rank)) => (rank.min(most), false),
        };
        let turns = self.compensate.turns();
        let started = Instant::now();
        let first = one.quantise(one.values, quant)?;
        if turns == 1 || largest == 0 {
            let ranks: Vec<usize> = if offers_none { (0..=largest).collect() } else { vec![largest] };
            return Ok(vec![one.variant(quant, first, &ranks, started)?]);
        }
        let ranks = if offers_none { vec![largest / 4, largest / 2, largest] } else { vec![largest] };
        let mut variants = Vec::new();
        if offers_none {
            variants.push(one.variant(quant, first.clone(), &[0], started)?);
        }
        for rank in ranks.into_iter().filter(|&rank| rank > 0) {
            let started = Instant::now();
            let best = one.alternate(quant, first.clone(), rank, turns)?;
            variants.push(one.variant(quant, best, &[rank], started)?);
        }
        Ok(variants)
    }
}

/// Refuses weights that no scale reaches: they would be clipped to next to nothing.
fn check_range<'a>(mut quants: impl Iterator<Item = &'a Quant>, values: &[f32]) -> Result<()> {
    let largest = values.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    match quants.find(|quant| quant.largest() < largest) {
        Some(quant) => Err(Failure::numeric(format!("a weight of {largest:e} is beyond the f16 scales of `{quant}`"))
            .hint("leave the linear as it is with `--exclude`, or give no `--quant`")
            .into()),
        None => Ok(()),
    }
}

/// One linear, and the metrics that its variants are made and told in.
struct Attempt<'a> {
    values: &'a [f32],
    /// The weight, (in, out).
    weight: &'a Mat<f64>,
    shape: (usize, usize),
    gram: Option<&'a Mat<f64>>,
    /// The metric of the method.
    told: MetricPair<'a>,
    /// That of the compensation.
    pair: MetricPair<'a>,
    is_told_in_pair: bool,
}

type Base = (Quantized, Option<Fallback>);

impl Attempt<'_> {
    fn quantise(&self, values: &[f32], quant: Quant) -> Result<Base> {
        quant.quantize(values, self.shape, self.gram)
    }

    /// `W − Q`, transposed: (in, out).
    fn residual(&self, base: &Quantized) -> Mat<f64> {
        let (m, n) = self.shape;
        let quantised = linalg::transposed_from_row_major(&base.dequantize(), m, n);
        self.weight - quantised
    }

    /// Base and factors by turns; the base whose factors leave the least error. The first turn is the one-shot method, so that
    /// the result is never worse.
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
                let next = self.quantise(&left, quant)?;
                best = Some((error, std::mem::replace(&mut current, next)));
            } else {
                return Ok(current);
            }
        }
        Ok(best.expect("invariant: the first turn is kept").1)
    }

    /// A base with factors of the largest of `ranks`, and the errors of all of them.
    fn variant(&self, quant: Quant, (base, fallback): Base, ranks: &[usize], started: Instant) -> Result<Made> {
        let residual = self.residual(&base);
        let alone = self.told.squared_norm(residual.transpose());
        let largest = ranks.iter().copied().max().unwrap_or(0);
        let decomposed =
            (largest > 0).then(|| low_rank::decompose(residual.transpose(), self.pair, largest)).transpose()?;
        let curve = decomposed.as_ref().map(|d| &d.curve);
        let errors = ranks.iter().map(|&rank| (rank, self.error(alone, curve, rank))).collect();
        let pair = decomposed.map(|d| d.truncate(residual.transpose(), largest));
        Ok(Made { quant, fallback, errors, seconds: started.elapsed().as_secs_f64(), base, pair })
    }

    /// Squared error in the metric of the method. Factors made in another metric are taken to save the same share of it as of
    /// their own; what is written is measured.
    fn error(&self, alone: f64, curve: Option<&ErrorCurve>, rank: usize) -> f64 {
        match curve {
            Some(curve) if rank > 0 && self.is_told_in_pair => curve.squared_error(rank),
            Some(curve) if rank > 0 => {
                let total = curve.squared_error(0);
                if total > 0.0 { alone * curve.squared_error(rank) / total } else { 0.0 }
            }
            _ => alone,
        }
    }
}
