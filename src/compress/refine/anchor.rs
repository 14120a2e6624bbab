//! Anchored sequential compression: block after block, each linear is fitted to the inputs that the compressed
//! linears before it produce, and anchored to the outputs of the source.
//!
//! Two streams go through the model: the states of the source, and the states of the model compressed so far.
//! With inputs `x` of the first and `x̂` of the second, `C_xx̂ = Σ x x̂ᵀ / n_tokens` and `C_x̂x̂` likewise, a
//! linear's target is moved to
//!
//! `W̃ = W [(1 − μ) I + μ C_xx̂ (C_x̂x̂ + δ I)⁻¹]`, δ = 0.01 · mean diagonal,
//!
//! and approximated in the metric of `C_x̂x̂`. μ = 1 is AA-SVD's closed form, the best linear map from `x̂` to `W x`;
//! μ = 0 uses the shifted inputs alone. Within a block the order is qkv, o, gate and up, down.
//!
//! Of a quantized linear the codes are chosen anew, for `W̃` and `C_x̂x̂`, by the same quantizer.
//!
//! For linears whose bias takes up the mean (`center`) both moments are of inputs without their means, `m` and `m̂`,
//! and the bias keeps the mean output of the source: `b + W m − W' m̂`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use faer::Mat;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::moments::{Moments, Place, Stream};
use crate::approx::gram::{mean_diagonal, shifted};
use crate::approx::low_rank::{ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair, PlainSides};
use crate::compress::center::{Means, image};
use crate::compress::fits::{requantized, requantized_fit};
use crate::compress::plan::Choice;
use crate::compress::solution::{Refine, Refit, Solution};
use crate::linalg;
use crate::model::inventory;
use crate::model::{Block, Decoder, Hidden, InputSite, Overlay, Passes, Walk};
use crate::progress::{Silent, Stage};
use crate::quantize::Sides;
use crate::session::Session;
use crate::store::{Array, Piece, Values};

/// Damping of `C_x̂x̂` before it is inverted, as a share of its mean eigenvalue.
const DAMPING: f64 = 1e-2;

/// Refits every low-rank or quantized linear, in the same form, to the outputs of the compressed linears before it.
pub(super) struct Anchor {
    /// μ.
    pub mu: f64,
}

/// A refit of a linear.
struct Refitted<V> {
    values: V,
    /// Sides whose metric was plain because their inputs were zero.
    plain: PlainSides,
    /// The means that its bias follows from, if its linear is centered.
    means: Option<Means>,
}

/// The values of a refit.
enum Found {
    Pair(ErrorCurve, LowRank),
    /// The record and the arrays of codes.
    Codes(Value, Vec<Values>),
}

/// An anchored linear.
struct Anchored {
    /// Its index in the plan.
    i: usize,
    /// Its pair; codes are in the journal already.
    refit: Refitted<Option<(ErrorCurve, LowRank)>>,
}

impl Refine for Anchor {
    fn refine(&self, solution: &mut Solution<'_>) -> Result<()> {
        let session = solution.study.session;
        let decoder = session.decoder()?;
        let text = solution.study.inputs.windows.as_ref().context("invariant: a sequential recipe has a text")?;
        let mut walk = Walk::new(&decoder, &text.windows, &session.limits)?.of_text(&text.text);
        walk.reserve(moment_bytes(solution))?;
        let mut source = walk.embed(&decoder)?;
        let mut shifted = embedded(solution, &walk, &source)?;
        let stage = session.progress.stage("anchor", (walk.n_tokens() * decoder.n_blocks()) as u64, "tokens");
        let n_done = resume(solution, &walk, &mut source, &mut shifted)?;
        stage.advance((walk.n_tokens() * n_done) as u64);
        for block_idx in n_done..decoder.n_blocks() {
            stage.note(&format!("block {block_idx}"));
            let streams = Streams::begin(&decoder, &walk, block_idx, [source, shifted])?;
            let made;
            ([source, shifted], made) = self.refit_block(solution, streams, stage.as_ref())?;
            keep(session, solution, &walk, block_idx, &source, &shifted, made)?;
        }
        if let Some(last) = decoder.n_blocks().checked_sub(1) {
            session.journal.remove(&states_key(last));
        }
        Ok(())
    }
}

/// The states of the second stream before the first block: those of the source, or those of a compressed table.
fn embedded(solution: &Solution<'_>, walk: &Walk<'_>, source: &Hidden) -> Result<Hidden> {
    let linears = &solution.study.plan.linears;
    let tables: Vec<usize> = solution.compressed().into_iter().filter(|&i| linears[i].vocabulary.is_some()).collect();
    if tables.is_empty() {
        return walk.copy(source);
    }
    solution.settle(&tables, &Silent)?;
    let overlay = solution.overlay(&tables)?;
    walk.embed(&solution.study.session.decoder()?.with_weights(&overlay))
}

/// Bytes of the products of one window at the places of one group.
fn moment_bytes(solution: &Solution<'_>) -> usize {
    let linears = &solution.study.plan.linears;
    let widest = linears.iter().map(|linear| linear.in_features).max().unwrap_or(0);
    let has_experts = linears.iter().any(|linear| linear.id.is_some_and(|id| id.slot.expert.is_some()));
    // The moments of a group of experts, which are in f64, fill the memory for activations.
    if has_experts { solution.study.session.limits.activation_bytes / 2 } else { 8 * widest * widest }
}

/// Both streams on their way through a block.
struct Streams<'b> {
    decoder: &'b Decoder<'b>,
    walk: &'b Walk<'b>,
    block_idx: usize,
    /// The block of the source.
    dense: Block,
    source: Passes<'b>,
    shifted: Passes<'b>,
}

impl<'b> Streams<'b> {
    fn begin(decoder: &'b Decoder<'b>, walk: &'b Walk<'b>, block_idx: usize, states: [Hidden; 2]) -> Result<Self> {
        let dense = decoder.block(block_idx)?;
        let [source, shifted] = states.map(|states| Passes::begin(walk, states, &dense));
        let (source, shifted) = (source?, shifted?);
        Ok(Self { decoder, walk, block_idx, dense, source, shifted })
    }

    /// The block with the compressed weights of `overlay`.
    fn compressed(&self, overlay: &Overlay<'_>) -> Result<Block> {
        self.decoder.with_weights(overlay).block(self.block_idx)
    }

    /// The moments at one group of sites, all linears before which are in `compressed`, or in the source's block.
    fn observe(&mut self, compressed: Option<&Block>, group: &[Place]) -> Result<Vec<Moments>> {
        let block = compressed.unwrap_or(&self.dense);
        // The last linears of the source run as soon as their inputs are known. The last linears of the compressed
        // model are not fitted yet, and experts are not a pause: their inputs follow from the inputs of gate and up.
        let [source, shifted] = match group[0].site {
            site @ (InputSite::Qkv | InputSite::O) => [site, site],
            InputSite::Down => [InputSite::Down, InputSite::GateUp],
            _ => [InputSite::GateUp, InputSite::GateUp],
        };
        self.source.resume_to(source, self.decoder, &self.dense)?;
        self.shifted.resume_to(shifted, self.decoder, block)?;
        let source = Stream { block: &self.dense, passes: &self.source };
        Moments::observe(self.walk, source, Stream { block, passes: &self.shifted }, group)
    }

    /// The states after the block; `block` has all of its compressed weights.
    fn end(self, block: &Block, progress: &dyn Stage) -> Result<[Hidden; 2]> {
        let source = self.source.end(self.decoder, &self.dense, &Silent)?;
        Ok([source, self.shifted.end(self.decoder, block, progress)?])
    }
}

impl Anchor {
    /// Refits the linears of a block, in the order of the forward pass; returns both streams after it, and the fits.
    fn refit_block(
        &self,
        solution: &mut Solution<'_>,
        mut streams: Streams<'_>,
        progress: &dyn Stage,
    ) -> Result<([Hidden; 2], Vec<Anchored>)> {
        let block_idx = streams.block_idx;
        let mut done: Vec<usize> = Vec::new();
        let mut made: Vec<Anchored> = Vec::new();
        let places = places(solution, &solution.compressed_in(block_idx))?;
        for group in groups(&places, solution.study.session.limits.activation_bytes) {
            let is_changed = !done.is_empty();
            let block = is_changed.then(|| streams.compressed(&solution.overlay(&done)?)).transpose()?;
            let moments = streams.observe(block.as_ref(), group)?;
            for (place, moments) in group.iter().zip(moments) {
                // An expert that sees too few tokens keeps its fit.
                let is_enough = place.site.expert().is_none() || moments.n_seen >= place.n;
                let refits =
                    if is_enough { moments.approximate(solution, &place.anchored, self.mu)? } else { Vec::new() };
                for (&i, refit) in place.anchored.iter().zip(refits) {
                    made.push(Anchored { i, refit: put(solution, i, refit)? });
                }
                solution.settle(&place.readers, &Silent)?;
                done.extend(&place.readers);
            }
        }
        made.sort_by_key(|anchored| anchored.i);
        let block = streams.compressed(&solution.overlay(&solution.compressed_in(block_idx))?)?;
        Ok((streams.end(&block, progress)?, made))
    }
}

/// Puts a refit in the place of the fit of the `i`-th linear.
fn put(
    solution: &mut Solution<'_>,
    i: usize,
    Refitted { values, plain, means }: Refitted<Found>,
) -> Result<Refitted<Option<(ErrorCurve, LowRank)>>> {
    let (refit, values) = match values {
        Found::Pair(curve, pair) => {
            let kept = [pair.b.clone().into(), pair.a.clone().into()];
            (Refit::Pair { curve: curve.clone(), rank: pair.rank, pair: Some(kept) }, Some((curve, pair)))
        }
        Found::Codes(record, arrays) => {
            let piece = solution.study.session.journal.put(&codes_key(i), json!((plain, record)), arrays)?;
            (codes(solution, i, piece)?, None)
        }
    };
    solution.refit(i, refit, plain, means.clone())?;
    Ok(Refitted { values, plain, means })
}

/// The codes of the `i`-th linear that were kept.
fn codes(solution: &Solution<'_>, i: usize, mut piece: Piece) -> Result<Refit<Array>> {
    let (plain, record) = serde_json::from_value(piece.fields.take())?;
    let mut spool = solution.study.fits.spool.lock().expect("invariant: no holder of the spool panics");
    let shape = solution.study.plan.linears[i].shape();
    Ok(Refit::Base(requantized_fit(record, plain, shape, &mut piece, &mut spool)?))
}

/// Keeps the fits of a block, and the states of both streams after it.
fn keep(
    session: &Session<'_>,
    solution: &mut Solution<'_>,
    walk: &Walk<'_>,
    block_idx: usize,
    source: &Hidden,
    shifted: &Hidden,
    made: Vec<Anchored>,
) -> Result<()> {
    if !session.journal.keeps() {
        return Ok(());
    }
    let batches = [walk.arrays(source)?, walk.arrays(shifted)?].concat();
    session.journal.put(&states_key(block_idx), Value::Null, batches)?;
    // A settled linear is read from its layout, unless the order of its ranks is kept.
    let is_spent = |i: usize| solution.is_settled(i) && !solution.study.recipe.elastic();
    let field = |Anchored { i, refit }: &Anchored| -> Field {
        let rank = refit.values.as_ref().map(|(_, pair)| pair.rank);
        (*i, rank, refit.plain, !is_spent(*i), refit.means.is_some())
    };
    let fields: Vec<Field> = made.iter().map(field).collect();
    let arrays = made.into_iter().flat_map(|Anchored { i, refit: Refitted { values, means, .. } }| {
        let pair = values.into_iter().flat_map(|(curve, pair)| {
            let pair = if is_spent(i) { Vec::new() } else { vec![Values::from(pair.b), pair.a.into()] };
            std::iter::once(Values::from(curve.energies().to_vec())).chain(pair)
        });
        let means = means.into_iter().flat_map(|means| [means.output.into(), means.input.into()]);
        pair.chain(means).collect::<Vec<_>>()
    });
    let arrays: Vec<Values> = arrays.collect();
    let piece = session.journal.put(&fits_key(block_idx), json!(fields), arrays)?;
    take(solution, piece)?;
    block_idx.checked_sub(1).into_iter().for_each(|before| session.journal.remove(&states_key(before)));
    Ok(())
}

/// The record of a fit in the journal: its linear, its rank unless it has codes, plain sides, and whether there are a pair
/// and means.
type Field = (usize, Option<usize>, PlainSides, bool, bool);

/// The input sites of a block, in the order of the forward pass.
fn places(solution: &Solution<'_>, compressed: &[usize]) -> Result<Vec<Place>> {
    let study = solution.study;
    let mut places: BTreeMap<(u8, InputSite), Place> = BTreeMap::new();
    for &i in compressed {
        let linear = &study.plan.linears[i];
        let Some(id) = linear.id else { continue };
        let site = id.slot.site();
        // First the first linears of all experts, then the last linears of all experts.
        let stage = match site {
            InputSite::Qkv => 0,
            InputSite::O => 1,
            InputSite::GateUp | InputSite::ExpertGateUp(_) => 2,
            InputSite::Down | InputSite::ExpertDown(_) => 3,
        };
        let place = Place { site, n: linear.in_features, readers: Vec::new(), anchored: Vec::new() };
        let place = places.entry((stage, site)).or_insert(place);
        place.readers.push(i);
        if solution.choices[i] != Choice::Zeros && study.metrics().too_few_tokens(linear)?.is_none() {
            place.anchored.push(i);
        }
    }
    Ok(places.into_values().collect())
}

/// Splits sites into groups whose moments are taken in one pass: a single site, or as many experts of one kind as fit
/// in `bytes`.
fn groups(places: &[Place], bytes: usize) -> impl Iterator<Item = &[Place]> {
    let is_alike = |a: &Place, b: &Place| {
        a.site.expert().is_some() && std::mem::discriminant(&a.site) == std::mem::discriminant(&b.site)
    };
    let at_once = move |run: &[Place]| (bytes / run.first().map_or(1, |place| 16 * place.n * place.n)).max(1);
    places.chunk_by(is_alike).flat_map(move |run| run.chunks(at_once(run)))
}

/// The journal key of the codes of a linear.
fn codes_key(i: usize) -> String {
    format!("anchored-codes-{i}")
}

/// The journal key of the fits of a block, and of the states of both streams after it.
fn fits_key(block_idx: usize) -> String {
    format!("anchor-{block_idx}")
}

fn states_key(block_idx: usize) -> String {
    format!("anchored-{block_idx}")
}

/// Restores the blocks that an earlier run anchored, and the states after the last of them; returns their number.
fn resume(solution: &mut Solution<'_>, walk: &Walk<'_>, source: &mut Hidden, shifted: &mut Hidden) -> Result<usize> {
    let journal = &solution.study.session.journal;
    let mut done = Vec::new();
    while let Some(fits) = journal.get(&fits_key(done.len()))? {
        done.push(fits);
    }
    let states = done.len().checked_sub(1).map(|last| journal.get(&states_key(last))).transpose()?.flatten();
    let Some(states) = states else { return Ok(0) };
    let n_done = done.len();
    for fits in done {
        take(solution, fits)?;
    }
    let mut first = states.rest();
    let second = first.split_off(walk.n_batches());
    for (hidden, batches) in [(source, first), (shifted, second)] {
        let before = std::mem::replace(hidden, walk.restore(batches)?);
        walk.release(before);
    }
    Ok(n_done)
}

/// Restores the fits of a block's anchored linears.
fn take(solution: &mut Solution<'_>, mut piece: Piece) -> Result<()> {
    let fields: Vec<Field> = serde_json::from_value(piece.fields.take())?;
    for (i, rank, plain, has_pair, has_means) in fields {
        let refit = match rank {
            Some(rank) => {
                let curve = ErrorCurve::new(piece.take()?.read()?.f64s()?);
                let pair = if has_pair { Some([piece.take()?, piece.take()?]) } else { None };
                Refit::Pair { curve, rank, pair }
            }
            None => {
                let kept = solution.study.session.journal.get(&codes_key(i))?;
                codes(solution, i, kept.context("invariant: codes are kept before the fits of their block")?)?
            }
        };
        let mut means = || Ok(Means { output: piece.take()?.read()?.f64s()?, input: piece.take()?.read()?.f64s()? });
        let means: Option<Result<Means>> = has_means.then(&mut means);
        solution.refit(i, refit, plain, means.transpose()?)?;
    }
    Ok(())
}

impl Moments {
    /// The fits of the linears `here`.
    fn approximate(&self, solution: &Solution<'_>, here: &[usize], mu: f64) -> Result<Vec<Refitted<Found>>> {
        let (metrics, linears) = (solution.study.metrics(), &solution.study.plan.linears);
        let is_centered = |&i: &usize| metrics.is_centered(&linears[i]);
        let has_plain = here.iter().any(|i| !is_centered(i));
        let without_means = here.iter().any(is_centered).then(|| self.centered());
        let plain = has_plain.then(|| Regression::new(self, solution, None));
        let centered = without_means.as_ref().map(|moments| Regression::new(moments, solution, Some(self.means())));
        let one = |i: &usize| {
            let regression = if is_centered(i) { &centered } else { &plain };
            let regression = regression.as_ref().expect("invariant: there is a regression for every linear");
            let refit = regression.fit(solution, *i, mu);
            refit.with_context(|| format!("refitting `{}`", linears[*i].module))
        };
        here.par_iter().map(one).collect()
    }
}

/// The regression of the outputs of the source on the shifted inputs at a place.
struct Regression<'m> {
    /// `C_xx̂` and `C_x̂x̂`.
    moments: &'m Moments,
    /// `C_x̂x̂ + δ I` (n, n).
    invertible: Mat<f64>,
    /// The metric of `C_x̂x̂`.
    input: Metric,
    /// The means of the inputs in both streams, if the moments are without them.
    means: Option<[Vec<f64>; 2]>,
}

impl<'m> Regression<'m> {
    fn new(moments: &'m Moments, solution: &Solution<'_>, means: Option<[Vec<f64>; 2]>) -> Self {
        let moment = &moments.shifted;
        Self {
            moments,
            invertible: shifted(moment.clone(), DAMPING * mean_diagonal(moment)),
            input: Metric::damped(moment.clone(), solution.study.recipe.damping_input()),
            means,
        }
    }

    fn fit(&self, solution: &Solution<'_>, i: usize, mu: f64) -> Result<Refitted<Found>> {
        let Self { invertible, input, .. } = self;
        let (study, choice) = (solution.study, solution.choices[i]);
        let linear = &study.plan.linears[i];
        let weights = inventory::weight(study.session.checkpoint, linear)?; // (out, in)
        let transposed = linalg::transposed_from_row_major(&weights, linear.out_features, linear.in_features);
        let weight = transposed.transpose();
        let output = study.metrics().output(linear)?;
        // If all inputs are zero, the target is not moved.
        let target = if mu > 0.0 && !matches!(input, Metric::Plain { .. }) {
            let mapped = linalg::product(weight, self.moments.cross.as_ref()); // W C_xx̂ (m, n)
            let mapped = linalg::solve(invertible.as_ref(), mapped.transpose());
            let mapped = mapped.context("the second moment of the shifted inputs is singular")?;
            weight * faer::Scale(1.0 - mu) + mapped.transpose() * faer::Scale(mu)
        } else {
            weight.to_owned()
        };
        let metric = MetricPair { output: &output, input };
        let values = match (study.fits.chosen(i, choice).and_then(|fit| fit.fitted.quant()), choice) {
            (Some(quant), _) => {
                let outputs = if quant.descends() { output.to_dense() } else { None };
                let sides = Sides { inputs: self.moments.shifted.as_ref(), outputs: outputs.as_ref().map(Mat::as_ref) };
                let target = linalg::to_row_major(target.as_ref());
                let (record, arrays) = requantized(&target, linear.shape(), quant, sides, metric)?;
                Found::Codes(record, arrays)
            }
            (None, Choice::Fitted { rank, .. }) => {
                let layout = study.recipe.layout();
                let fit = layout.fitting().fit(target.as_ref(), metric, rank)?;
                let pair = fit.pair(layout, target.as_ref(), rank);
                Found::Pair(fit.curve, pair)
            }
            (None, _) => unreachable!("invariant: what is anchored is fitted"),
        };
        let means = self.means.as_ref();
        let means = means.map(|[source, here]| Means { output: image(&weights, source), input: here.clone() });
        Ok(Refitted { values, plain: metric.plain_sides(), means })
    }
}
