//! Compression: every targeted linear is replaced by a low-rank or quantized operator, fitted in a metric, under a
//! budget.
//!
//! [`compress`] is the whole algorithm on one screen. Methods are rows of [`presets`]; the mathematics is
//! [`crate::approx::low_rank`]; ranks come from [`allocate`].

pub mod allocate;
mod allocation;
mod bias;
mod budget;
mod center;
pub mod compensate;
mod curves;
pub mod delta;
mod dry_run;
mod equal_bytes;
mod estimate;
mod fits;
mod forward;
mod healing;
mod inputs;
mod job;
mod knee;
mod limit;
mod metrics;
mod narrow;
pub mod options;
mod output;
mod parameters;
mod pieces;
mod plan;
pub mod presets;
pub mod recipe;
mod record;
mod refine;
mod requirements;
mod run;
mod scale;
mod sensitivity;
mod sizes;
mod solution;
pub mod spectra;
mod storing;
mod structure;
mod study;
mod sweep;
pub mod tasks;
mod trials;
mod vocabulary;

use std::time::Instant;

use anyhow::Result;

use crate::checkpoint::{Checkpoint, OutputFolder};
use crate::formats::{self, Output};
use crate::model::inventory;
use crate::operator::Forms;
use crate::progress::Progress;
use crate::report::{AdapterRecord, CompressReport, REPORT_FILE, concluded};
pub(crate) use curves::{KeptCurve, write as write_curves};
pub use dry_run::{DryRun, dry_run};
pub use job::{DEFAULT_MEMORY_BYTES, Job};
use narrow::Narrowed;
pub use parameters::{explained, recipe_for, with_any_share};
use recipe::{Fused, Recipe};
pub(crate) use record::summary as linear_summary;
use run::Run;
pub use scale::{DepthWeight, Sensitivity};
#[cfg(feature = "cli")]
pub(crate) use sizes::size;
use solution::Solution;
use study::Study;
#[cfg(feature = "cli")]
pub(crate) use sweep::not_in_a_sweep;
pub use sweep::{SweepSettings, sweep};

/// The checkpoint as a recipe sees it: with `--fused split`, fused matrices are split into parts, and expert stacks
/// into experts if the format can store them.
///
/// # Errors
/// The family is unknown, so the parts of a matrix are too.
pub fn view(checkpoint: Checkpoint, recipe: &Recipe) -> Result<Checkpoint> {
    let checkpoint =
        if recipe.format().stores_all_structures() { inventory::split_stacks(checkpoint)? } else { checkpoint };
    match recipe.fused {
        Fused::Joint => Ok(checkpoint),
        Fused::Split => inventory::split_fused(checkpoint),
    }
}

/// Runs a compression: measure, decompose, allocate, write. Resumes an interrupted run.
///
/// There is an example at the top of the crate's documentation.
///
/// # Errors
/// Anything wrong with the source, the recipe or the disk; the output folder is not created then. If a resource is at
/// fault, finished work is kept next to it for the next run of the same job.
pub fn compress(job: &Job<'_>, progress: &dyn Progress) -> Result<CompressReport> {
    if job.recipe.heals() {
        return healing::run(job, &|first| compress(first, progress), progress);
    }
    let run = Run::new(job)?;
    let folder = run.folder()?;
    let done = match job.recipe.then() {
        None => into_folder(run, &folder, None, progress),
        Some(_) => narrow::narrowed(run, &folder, progress).and_then(|mut narrowed| {
            narrowed.time_forward(job);
            let statistics = narrowed.statistics.take();
            let job = Job { checkpoint: &narrowed.checkpoint, recipe: &narrowed.then, ..job.clone() };
            into_folder(Run::of_narrowed(&job, statistics)?, &folder, Some(&narrowed), progress)
        }),
    };
    concluded(folder, done)
}

/// Makes the output of `earlier`, an elastic one of narrower modules, narrower still: to the share `keep` of the targeted
/// parameters of its source. The recipe has the same budget as a share of what the output has.
///
/// # Errors
/// As [`compress`]; or the output lacks what it needs to become narrower.
pub(crate) fn narrow_further(
    job: &Job<'_>,
    earlier: &CompressReport,
    keep: f64,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    let folder = OutputFolder::create(job.output, job.existing, REPORT_FILE)?;
    let narrowed = narrow::further(job, earlier, keep, &folder, progress)?;
    let job = Job { checkpoint: &narrowed.checkpoint, recipe: &narrowed.then, ..job.clone() };
    let report = into_folder(Run::of_narrowed(&job, None)?, &folder, Some(&narrowed), progress)?;
    folder.finish()?;
    Ok(report)
}

/// All steps but the last, which publishes the folder.
fn into_folder(
    run: Run<'_>,
    folder: &OutputFolder,
    narrowed: Option<&Narrowed>,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    let session = run.session(folder, progress)?;
    let Run { job, plan, source, inputs, source_files, started, .. } = run;
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    let calibration = inputs.record(recipe);
    let mut study = Study::run(&session, recipe, &plan, inputs)?;
    let mut timings = study.timings;

    let allocating = Instant::now();
    let sensitivities = sensitivity::of(&study)?;
    let allocation = sensitivity::allocate(&study, &sensitivities, recipe.budget())?;
    delta::expect_factors(recipe, &allocation.choices)?;
    timings.allocate = allocating.elapsed().as_secs_f64();
    let planned: Vec<Option<Forms>> =
        allocation.choices.iter().enumerate().map(|(i, &choice)| study.planned(i, choice)).collect();
    let quantizing = Instant::now();
    let menus = equal_bytes::menus(&study, &planned);
    let first = menus.map(|menus| equal_bytes::quantize(&mut study, &menus)).transpose()?;
    timings.equal_bytes_baseline = quantizing.elapsed().as_secs_f64();

    let refining = Instant::now();
    let mut solution = Solution::new(&study, allocation.choices.clone(), &refine::of(recipe));
    solution.refine()?;
    timings.anchor = if recipe.anchor().is_some() { refining.elapsed().as_secs_f64() } else { 0.0 };

    let writing = Instant::now();
    solution.settle(&solution.compressed(), progress)?;
    let forms = solution.all_forms();
    let mut output = Output::create(folder, plan.files(&source, recipe, &forms))?;
    let written = output::put_all(&mut output, &solution)?;
    if recipe.format().is_truncatable() {
        curves::write_of(folder, &solution, &allocation.sensitivities, &written)?;
    }
    timings.write = writing.elapsed().as_secs_f64();

    let comparing = Instant::now();
    let squared = |i: usize| written.get(&i).and_then(|w| w.relative_error).map_or(0.0, |error| error * error);
    let baseline = first.map(|first| equal_bytes::compare(&solution, &allocation, &first, &squared)).transpose()?;
    timings.equal_bytes_baseline += comparing.elapsed().as_secs_f64();
    let sizes = record::sizes(&source, recipe, &plan, &forms);
    formats::warn_of_growth(checkpoint.file_bytes(), sizes.file_bytes_after);
    let linears = record::linears(&solution, &allocation.sensitivities, &written)?;
    let mut report = record::report(job, source_files, linears, sizes, calibration, timings);
    report.equal_bytes_baseline = baseline;
    report.delta = record::delta(job, &plan);
    report.adapter = AdapterRecord::of(checkpoint)?;
    let lines = record::error_lines(&solution);
    if let Some(narrowed) = narrowed {
        narrowed.complete(&mut report);
    }
    drop(solution);
    let started = narrowed.map_or(started, Narrowed::started);
    output::finish(output, folder, job, &lines, &mut report, started)?;
    Ok(report)
}
