//! Anchored sequential compression: block after block, each linear made for the inputs that the compressed linears before
//! it give, without losing sight of the original's.
//!
//! Two streams go through the model: original states, and those of what is compressed so far. With inputs `x` of the
//! first and `x̂` of the second, `C_xx̂ = Σ x x̂ᵀ / n_tokens` and `C_x̂x̂` alike, a linear's target is moved to
//!
//! `W̃ = W [(1 − μ) I + μ C_xx̂ (C_x̂x̂ + δ I)⁻¹]`, δ = 0.01 · mean diagonal,
//!
//! and approximated in the metric of `C_x̂x̂`. μ = 1 is AA-SVD's closed form: the best linear map from `x̂` to `W x`; μ = 0 knows
//! the shifted inputs alone. Within a block the order is qkv, o, gate and up, down.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::Tensor;
use faer::Mat;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::allocate::Choice;
use super::low_rank::{self, ErrorCurve, LowRank};
use super::metric::{Metric, MetricPair, mean_diagonal, shifted};
use super::study::Study;
use crate::journal::{Array, Piece};
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::model::{Block, Decoder, Hidden, InputSite, Walk};
use crate::progress::{Progress, Silent};

/// Share of its mean eigenvalue that `C_x̂x̂` is damped with before it is inverted.
const DAMPING: f64 = 1e-2;

/// Replaces the pairs of a study by anchored ones, of the same ranks.
///
/// # Errors
/// The model cannot be run, an eigenproblem fails, or the work folder refuses.
pub(super) fn anchor(study: &mut Study<'_>, choices: &[Choice], mu: f64, progress: &dyn Progress) -> Result<()> {
    let decoder = Decoder::open(study.checkpoint)?;
    let windows = study.inputs.windows.as_ref().context("invariant: a sequential recipe has a text")?.windows.clone();
    let mut walk = Walk::new(&decoder, &windows, &study.limits.one_window())?;
    let mut original = walk.embed(&decoder)?;
    let mut shifted = walk.copy(&original)?;
    let stage = progress.stage("anchor", (walk.n_tokens() * decoder.n_blocks()) as u64, "tokens");
    let n_done = go_on(study, choices, &mut walk, (&mut original, &mut shifted))?;
    stage.advance((walk.n_tokens() * n_done) as u64);
    for block_idx in n_done..decoder.n_blocks() {
        stage.note(&format!("block {block_idx}"));
        let compressed = study.compressed_in(block_idx, choices);
        let dense = decoder.block(block_idx)?;
        let mut done: Vec<(usize, Choice)> = Vec::new();
        let mut made: BTreeMap<usize, (ErrorCurve, LowRank)> = BTreeMap::new();
        for site in [InputSite::Qkv, InputSite::O, InputSite::GateUp, InputSite::Down] {
            let reads = |&(i, _): &(usize, Choice)| {
                study.plan.linears[i].id.is_some_and(|id: crate::model::LinearId| id.role.site() == site)
            };
            let here: Vec<(usize, Choice)> = compressed.iter().copied().filter(reads).collect();
            let Some(&(first, _)) = here.first() else { continue };
            let n = study.plan.linears[first].in_features;
            let pairs = {
                let overlay = study.overlay(&done)?;
                let so_far = decoder.with_weights(&overlay).block(block_idx)?;
                let moments = Moments::observe(&mut walk, &decoder, (&dense, &original), (&so_far, &shifted), site, n)?;
                moments.approximate(study, &here, mu)?
            };
            for (&(i, _), (curve, pair)) in here.iter().zip(pairs) {
                let array = |values: &[f32]| Array { values: values.to_vec(), place: None };
                study.bases.replace(i, curve.clone(), pair.rank, (array(&pair.b), array(&pair.a)))?;
                made.insert(i, (curve, pair));
            }
            done.extend(here);
        }
        let overlay = study.overlay(&done)?;
        let block = decoder.with_weights(&overlay).block(block_idx)?;
        walk.advance(&mut original, &decoder, &dense, &mut |_, _| Ok(()), &Silent)?;
        walk.advance(&mut shifted, &decoder, &block, &mut |_, _| Ok(()), stage.as_ref())?;
        drop(overlay);
        if study.journal.keeps() {
            let batches = [walk.arrays(&original)?, walk.arrays(&shifted)?].concat();
            study.journal.put(&states_key(block_idx), Value::Null, batches)?;
            let arrays = made.values().flat_map(|(c, p)| [Array::bits(c.energies()), p.b.clone(), p.a.clone()]);
            let ranks: Vec<usize> = made.values().map(|(_, pair)| pair.rank).collect();
            let piece = study.journal.put(&pairs_key(block_idx), json!(ranks), arrays.collect())?;
            take(study, &compressed, piece)?;
            block_idx.checked_sub(1).into_iter().for_each(|before| study.journal.remove(&states_key(before)));
        }
    }
    Ok(())
}

/// Under which the journal has the pairs of a block, and the states of both streams behind it.
fn pairs_key(block_idx: usize) -> String {
    format!("anchor-{block_idx}")
}

fn states_key(block_idx: usize) -> String {
    format!("anchored-{block_idx}")
}

/// Takes the blocks that an earlier run anchored, and the states behind the last of them; gives their number.
fn go_on(
    study: &mut Study<'_>,
    choices: &[Choice],
    walk: &mut Walk<'_>,
    (original, shifted): (&mut Hidden, &mut Hidden),
) -> Result<usize> {
    let mut done = Vec::new();
    while let Some(pairs) = study.journal.get(&pairs_key(done.len()))? {
        done.push(pairs);
    }
    let states = done.len().checked_sub(1).map(|last| study.journal.get(&states_key(last))).transpose()?.flatten();
    let Some(states) = states else { return Ok(0) };
    let n_done = done.len();
    for (block_idx, pairs) in done.into_iter().enumerate() {
        take(study, &study.compressed_in(block_idx, choices), pairs)?;
    }
    let mut first = states.arrays;
    let second = first.split_off(walk.n_batches());
    for (hidden, batches) in [(original, first), (shifted, second)] {
        let before = std::mem::replace(hidden, walk.restore(batches)?);
        walk.release(before);
    }
    Ok(n_done)
}

/// The pairs of a block's compressed linears, in their order.
fn take(study: &mut Study<'_>, compressed: &[(usize, Choice)], piece: Piece) -> Result<()> {
    let ranks: Vec<usize> = serde_json::from_value(piece.fields)?;
    let mut linears: Vec<usize> = compressed.iter().map(|(i, _)| *i).collect();
    linears.sort_unstable();
    let mut arrays = piece.arrays.into_iter();
    for (i, rank) in linears.into_iter().zip(ranks) {
        let mut next = || arrays.next().context("a piece has too few arrays");
        let (curve, b, a) = (next()?, next()?, next()?);
        study.bases.replace(i, ErrorCurve::new(curve.f64s()), rank, (b, a))?;
    }
    Ok(())
}

/// Second moments of the two streams at one place, as means over tokens.
struct Moments {
    /// `C_xx̂` (n, n).
    cross: Mat<f64>,
    /// `C_x̂x̂` (n, n).
    shifted: Mat<f64>,
}

impl Moments {
    fn observe(
        walk: &mut Walk<'_>,
        decoder: &Decoder<'_>,
        original: (&Block, &Hidden),
        shifted: (&Block, &Hidden),
        site: InputSite,
        n: usize,
    ) -> Result<Self> {
        let (mut cross, mut own) = (Mat::zeros(n, n), Mat::zeros(n, n));
        let rope = walk.rope().clone();
        for batch_idx in 0..walk.n_batches() {
            let mut inputs = |(block, hidden): (&Block, &Hidden)| {
                block.input_at(site, &walk.batch(hidden, batch_idx)?, &rope, decoder.kernels())
            };
            let (x, shifted_x) = (inputs(original)?, inputs(shifted)?);
            for window_idx in 0..x.dim(0)? {
                let rows = |x: &Tensor| x.get(window_idx)?.flatten_all()?.to_vec1::<f32>();
                let (x, shifted_x) = (rows(&x)?, rows(&shifted_x)?);
                linalg::add_product_f32(&mut cross, &x, &shifted_x, n);
                linalg::add_gram_f32(&mut own, &shifted_x, shifted_x.len() / n);
            }
        }
        linalg::mirror_lower(&mut own);
        let scale = faer::Scale(1.0 / walk.n_tokens().max(1) as f64);
        Ok(Self { cross: cross * scale, shifted: own * scale })
    }

    /// The pairs of the linears `here` (with their ranks), each with its error curve.
    fn approximate(&self, study: &Study<'_>, here: &[(usize, Choice)], mu: f64) -> Result<Vec<(ErrorCurve, LowRank)>> {
        let invertible = shifted(self.shifted.clone(), DAMPING * mean_diagonal(&self.shifted));
        let input = Metric::damped(self.shifted.clone(), study.recipe.damping_input);
        here.par_iter()
            .map(|&(i, choice)| {
                let rank = choice.rank().expect("invariant: the anchored mode is for low rank");
                let linear = &study.plan.linears[i];
                self.one(study, linear, rank, mu, &invertible, &input)
                    .with_context(|| format!("anchor `{}`", linear.module))
            })
            .collect()
    }

    fn one(
        &self,
        study: &Study<'_>,
        linear: &LinearInfo,
        rank: usize,
        mu: f64,
        invertible: &Mat<f64>,
        input: &Metric,
    ) -> Result<(ErrorCurve, LowRank)> {
        let values = inventory::weight(study.checkpoint, linear)?; // (out, in)
        let transposed = linalg::transposed_from_row_major(&values, linear.out_features, linear.in_features);
        let weight = transposed.transpose();
        let output = study.metrics().output(linear)?;
        let target = if mu > 0.0 {
            let mapped = linalg::product(weight, self.cross.as_ref()); // W C_xx̂ (m, n)
            let mapped = linalg::solve(invertible.as_ref(), mapped.transpose());
            let mapped = mapped.context("the second moment of the shifted inputs is singular")?;
            weight * faer::Scale(1.0 - mu) + mapped.transpose() * faer::Scale(mu)
        } else {
            weight.to_owned()
        };
        let metric = MetricPair { output: &output, input };
        let decomposition = low_rank::decompose(target.as_ref(), metric, rank)?;
        let pair = decomposition.truncate(target.as_ref(), rank);
        Ok((decomposition.curve, pair))
    }
}
