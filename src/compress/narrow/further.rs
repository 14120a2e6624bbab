//! An elastic output narrowed further, without its source: a prefix of its channels and groups, refitted with the input
//! forms that it keeps.

use std::time::Instant;

use anyhow::Result;

use super::super::job::Job;
use super::super::plan::Plan;
use super::context::{Context, Curve, Widths};
use super::elastic::{self, Kept};
use super::narrowed::Narrowed;
use super::outline::Outline;
use super::widths::{self, Found, Least};
use super::{refit, shown};
use crate::approx::narrow::Narrowing;
use crate::checkpoint::OutputFolder;
use crate::error::Failure;
use crate::model::ModelConfig;
use crate::model::narrow::{self, NarrowUnit};
use crate::progress::Progress;
use crate::report::{CompressReport, Timings, TruncationRecord};
use crate::session::Session;
use crate::store::Journal;

/// Chooses the widths under the budget of the recipe, a share of the parameters that the output of `earlier` has, and
/// refits what is kept.
///
/// # Errors
/// The output keeps nothing of its source's statistics, or cannot become so small; or the work folder cannot be written.
pub(in crate::compress) fn further(
    job: &Job<'_>,
    earlier: &CompressReport,
    keep: f64,
    folder: &OutputFolder,
    progress: &dyn Progress,
) -> Result<Narrowed> {
    let started = Instant::now();
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    let approach = recipe.narrow().expect("invariant: the recipe is one of narrower modules");
    let then = recipe.then().expect("invariant: the recipe is one of narrower modules");
    let plan = Plan::of_shapes(checkpoint, recipe)?;
    let kept = Kept::open(checkpoint.root())?;
    let (config, architecture) = ModelConfig::of(checkpoint)?;
    let mut units = narrow::units(&plan.linears, &config, architecture);
    units.retain(|unit| kept.has(unit));
    units.sort_by_key(|unit| (unit.block, unit.kind));
    let curves = units.iter().map(|unit| Ok(curve(kept.errors(unit)?))).collect::<Result<Vec<_>>>()?;
    let context = Context { checkpoint, approach, then: &then, config: &config, architecture, units: &units };
    // What an earlier step lost is lost at any width.
    let found = Found { curves: curves.iter().map(since).collect(), losses: Vec::new(), ranks: None };
    let chosen = widths::best(&context, &plan, recipe, &found)?.map_err(|least| unreachable(keep, &least, earlier))?;
    let prefixes: Vec<Vec<usize>> = chosen.widths.iter().map(|&width| (0..width).collect()).collect();
    let session = Session::new(checkpoint, &job.device, job.memory_bytes, folder.work(), Journal::default(), progress);
    let form = |unit: &NarrowUnit| kept.form(unit);
    let files = refit::all(&session, &units, &prefixes, &form, folder)?;
    let mut narrowed = shown::selected(&context, &prefixes)?;
    files.iter().try_for_each(|file| narrowed.replace_by(file))?;
    let widths = Widths { units: &units, chosen: &chosen, kept: &prefixes, curves: Some(&curves), notes: Vec::new() };
    elastic::write(&widths, &shown::Names::new(), &form, folder)?;
    Ok(Narrowed {
        checkpoint: narrowed,
        statistics: None,
        outline: Outline::of_earlier(earlier, &widths),
        source_files: earlier.source_files.clone(),
        calibration: earlier.calibration.clone(),
        truncated: Some(TruncationRecord { keep, source_files: checkpoint.fingerprint()? }),
        then,
        timings: Timings::default(),
        started,
    })
}

/// The curve of a unit in order of importance.
fn curve(errors: Vec<f64>) -> Curve {
    Curve { narrowing: Narrowing { order: (0..errors.len() - 1).collect(), errors }, seconds: 0.0 }
}

/// The curve of what is lost beyond the whole width.
fn since(curve: &Curve) -> Curve {
    let Narrowing { order, errors } = &curve.narrowing;
    let lost = errors.last().copied().unwrap_or(0.0);
    let errors = errors.iter().map(|error| error - lost).collect();
    Curve { narrowing: Narrowing { order: order.clone(), errors }, seconds: 0.0 }
}

fn unreachable(keep: f64, Least(least): &Least, earlier: &CompressReport) -> Failure {
    let least = *least as f64 / earlier.sizes.linear_parameters_before as f64;
    let rounded = (least * 1e4).ceil() / 1e4;
    Failure::usage(format!("`--keep {keep}` cannot be reached: the minimum is {rounded:.4}"))
        .hint("compress the source again, with fewer blocks or low rank too: `--structure auto`")
}
