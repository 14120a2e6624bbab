//! Narrower modules: fewer channels of feed-forward layers and of experts, fewer groups of heads, and fewer experts, chosen
//! in the metric of the method (`approx/narrow.rs`), in every block the same number, or as many as its errors deserve; and
//! fewer blocks.
//!
//! The result is a checkpoint: rows and columns of the source, refitted columns from files of the work folder, and a
//! config with the new widths. Everything after that, formats and quantizers included, sees a model like any other.

mod context;
mod curves;
mod elastic;
mod further;
mod importance;
mod losses;
mod narrowed;
mod needs;
mod outline;
mod part;
mod ranks;
mod refit;
mod shown;
mod units;
mod widths;

use std::time::Instant;

use anyhow::Result;

use self::context::{Chosen, Context, Curve, Widths};
use self::outline::Outline;
use self::ranks::RankCurves;
use self::widths::Found;
use super::plan::Plan;
use super::recipe::{Budget, NarrowApproach, Recipe};
use super::run::Run;
use crate::checkpoint::{Checkpoint, OutputFolder};
use crate::model::ModelConfig;
use crate::model::inventory::LinearInfo;
use crate::model::narrow::NarrowUnit;
use crate::progress::Progress;
use crate::report::Timings;

pub(super) use self::context::Measure;
pub(super) use self::further::further;
pub(super) use self::importance::importance;
pub(super) use self::narrowed::Narrowed;
pub(super) use self::needs::Needs;
pub(super) use self::outline::Parts;

/// A model with the shapes of a narrower one, of which nothing is measured.
pub(super) struct Planned {
    /// The model; its values are any rows and columns of the source.
    pub checkpoint: Checkpoint,
    /// The recipe for its linears.
    pub then: Recipe,
    /// What a report says of the source.
    pub outline: Outline,
}

/// Measures, chooses the widths, and refits what is kept.
///
/// # Errors
/// The model has nothing that can become narrower, the budget cannot be met, or the work folder cannot be written.
pub(super) fn narrowed(run: Run<'_>, folder: &OutputFolder, progress: &dyn Progress) -> Result<Narrowed> {
    let session = run.session(folder, progress)?;
    let (units, notes) = units_of(&run)?;
    let Run { job, plan, source, mut inputs, source_files, started: begun, .. } = run;
    let (recipe, checkpoint) = (job.recipe, job.checkpoint);
    let (config, architecture) = ModelConfig::of(checkpoint)?;
    let then = recipe.then().expect(OF_NARROW);
    let approach = recipe.narrow().expect(OF_NARROW);
    let calibration = inputs.record(recipe);
    let mut timings = Timings::default();
    let seconds = inputs.measure(&session, recipe)?;
    (timings.calibrate_forward, timings.calibrate_backward) = (seconds.forward, seconds.backward);
    let metrics = inputs.metrics(recipe);
    let context = Context { checkpoint, approach, then: &then, config: &config, architecture, units: &units };
    let measure = Measure { session: &session, metrics, selection: approach.selection };

    let started = Instant::now();
    let curves = curves::all(&measure, &units)?;
    let losses = match approach.drops_blocks {
        true => losses::all(&measure, &plan.linears, config.num_hidden_layers)?,
        false => Vec::new(),
    };
    let ranks = approach.then_low_rank().then(|| RankCurves::measure(&measure, &plan, &then)).transpose()?;
    timings.decompose = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let found = Found { curves, losses, ranks };
    let chosen = widths::choose(&context, &plan, recipe, &found)?;
    timings.allocate = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let kept = kept(approach, &chosen, &found);
    let form = |unit: &NarrowUnit| curves::form(&measure, unit);
    let files = refit::all(&session, &units, &kept, &form, folder)?;
    timings.decompose += started.elapsed().as_secs_f64();

    let mut narrowed = shown::selected(&context, &kept)?;
    files.iter().try_for_each(|file| narrowed.replace_by(file))?;
    let (narrowed, names) = shown::fewer(&context, narrowed, &chosen, &kept);
    let of_part = approach.then_low_rank().then(|| part::selected(&context, &plan.linears, &chosen, &kept));
    let curves = Some(found.curves.as_slice());
    let widths = Widths { units: &units, chosen: &chosen, kept: &kept, curves, notes };
    if approach.is_elastic {
        elastic::write(&widths, &names, &form, folder)?;
    }
    let (rest, outline) = (rest(&then, &narrowed, &plan, recipe)?, Outline::new(job, &plan, &source, names, widths)?);
    Ok(Narrowed {
        checkpoint: narrowed,
        statistics: of_part.and_then(|selected| Some(inputs.statistics.take()?.of_part(selected))),
        then: rest,
        outline,
        source_files,
        calibration,
        truncated: None,
        timings,
        started: begun,
    })
}

/// The narrower model as far as shapes alone give it: the budget spread evenly over widths and blocks, or left to what
/// follows if that is of low rank, which is chosen together with them.
///
/// # Errors
/// As [`narrowed`], before it measures.
pub(super) fn planned(run: &Run<'_>) -> Result<Planned> {
    let (job, plan) = (run.job, &run.plan);
    let (units, mut notes) = units_of(run)?;
    let (config, architecture) = ModelConfig::of(job.checkpoint)?;
    let (approach, then) = (job.recipe.narrow().expect(OF_NARROW), job.recipe.then().expect(OF_NARROW));
    let units = if approach.then_low_rank() { Vec::new() } else { units };
    let checkpoint = job.checkpoint;
    let context = Context { checkpoint, approach, then: &then, config: &config, architecture, units: &units };
    let (chosen, kept) = if approach.then_low_rank() {
        notes.push("widths, blocks and ranks are chosen together, from measurements".into());
        (Chosen { widths: Vec::new(), dropped: Vec::new() }, Vec::new())
    } else {
        let found = Found::even(&context, plan);
        let chosen = widths::choose(&context, plan, job.recipe, &found)?;
        let kept = kept(approach, &chosen, &found);
        (chosen, kept)
    };
    let (checkpoint, names) = shown::fewer(&context, shown::selected(&context, &kept)?, &chosen, &kept);
    let widths = Widths { units: &units, chosen: &chosen, kept: &kept, curves: None, notes };
    let (rest, outline) =
        (rest(&then, &checkpoint, plan, job.recipe)?, Outline::new(job, plan, &run.source, names, widths)?);
    Ok(Planned { checkpoint, then: rest, outline })
}

const OF_NARROW: &str = "invariant: the recipe is one of narrower modules";

/// The units of a run, and why others stay as they are.
fn units_of(run: &Run<'_>) -> Result<(Vec<NarrowUnit>, Vec<String>)> {
    let checkpoint = run.job.checkpoint;
    let approach = run.job.recipe.narrow().expect(OF_NARROW);
    let (config, architecture) = ModelConfig::of(checkpoint)?;
    units::check_depth(checkpoint, approach)?;
    units::of(&run.plan, &config, architecture, approach)
}

/// The channels or groups of each unit that stay, ascending or by importance.
fn kept(approach: &NarrowApproach, chosen: &Chosen, found: &Found<'_>) -> Vec<Vec<usize>> {
    let of = |(&width, curve): (&usize, &Curve)| match approach.is_elastic {
        true => curve.narrowing.leading(width),
        false => curve.narrowing.first(width),
    };
    chosen.widths.iter().zip(&found.curves).map(of).collect()
}

/// The recipe of the narrower model under what its own parameters leave of the budget.
fn rest(then: &Recipe, narrowed: &Checkpoint, plan: &Plan, recipe: &Recipe) -> Result<Recipe> {
    let is_low_rank = recipe.narrow().is_some_and(|approach| approach.then_low_rank());
    let Budget::Keep(keep) = recipe.budget() else { return Ok(then.clone()) };
    if !is_low_rank {
        return Ok(then.clone());
    }
    let sum = |linears: &[LinearInfo]| linears.iter().map(LinearInfo::n_parameters).sum::<u64>();
    let most = (keep * sum(&plan.linears) as f64 + 1e-6).floor();
    Ok(then.clone().with_keep(most / sum(&Plan::of_shapes(narrowed, then)?.linears) as f64))
}
