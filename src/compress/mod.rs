//! Compression: every targeted linear becomes a matrix of low rank, in a metric, under a budget.
//!
//! [`compress`] is the whole algorithm on one screen. Methods are rows of [`presets`]; the mathematics is
//! [`low_rank`]; ranks come from [`allocate`].

pub mod allocate;
mod bases;
mod elastic;
pub mod low_rank;
pub mod metric;
mod metrics;
mod output;
mod pivot;
mod plan;
pub mod presets;
pub mod recipe;
mod record;
mod sensitivity;
mod sequential;
mod study;
mod sweep;
mod variants;

use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use crate::checkpoint::{Checkpoint, OutputFolder};
use crate::formats::Format;
use crate::progress::Progress;
use crate::report::{CompressReport, DryRunReport, REPORT_FILE};
pub use elastic::{TruncateJob, truncate};
use output::Output;
use plan::Plan;
use recipe::Recipe;
pub use sensitivity::{DepthWeight, Sensitivity};
use study::{Inputs, Study, known_choices};
pub use sweep::{SweepSettings, sweep};

/// What is compressed, and where to.
pub struct Job<'a> {
    pub checkpoint: &'a Checkpoint,
    /// The model as the user named it.
    pub source: &'a str,
    pub recipe: &'a Recipe,
    pub output: &'a Path,
    pub force: bool,
    pub memory_bytes: u64,
}

/// Runs a compression: measure, decompose, allocate, write.
///
/// # Errors
/// Anything wrong with the source, the recipe or the disk; the output folder then does not appear.
pub fn compress(job: &Job<'_>, progress: &dyn Progress) -> Result<CompressReport> {
    let started = Instant::now();
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    let plan = Plan::new(checkpoint, recipe)?;
    let inputs = Inputs::load(checkpoint, recipe, &plan)?;
    let calibration = inputs.record(recipe);
    let folder = OutputFolder::create(job.output, job.force, REPORT_FILE)?;
    // Full disks show before the work.
    let n_tokens = inputs.windows.as_ref().map_or(0, |w| w.part.tokens);
    let kept = plan.kept_bytes(checkpoint, recipe, n_tokens).saturating_sub(job.memory_bytes);
    folder.require_space(plan.least_output_bytes(checkpoint) + kept)?;
    let work = tempfile::tempdir_in(folder.path())?;
    let mut study = Study::run(checkpoint, recipe, &plan, inputs, job.memory_bytes, work.path(), progress)?;
    let allocating = Instant::now();
    let allocation = study.allocate(recipe.budget, progress)?;
    study.timings.allocate += allocating.elapsed().as_secs_f64();
    let choices = &allocation.choices;
    if let Some(mu) = recipe.anchor {
        let anchoring = Instant::now();
        sequential::anchor(&mut study, choices, mu, progress)?;
        study.timings.anchor = anchoring.elapsed().as_secs_f64();
    }

    let writing = Instant::now();
    let mut output = Output::create(&folder, checkpoint, recipe, &plan, choices)?;
    let written = output.put_all(&study, choices, progress)?;
    if recipe.format == Format::Factored {
        elastic::write_curves(&folder, &study, &allocation, &written)?;
    }
    study.timings.write = writing.elapsed().as_secs_f64();
    let sizes = record::sizes(checkpoint, recipe, &plan, choices);
    let mut report =
        record::report(job, record::linears(&study, &allocation, &written), sizes, calibration, study.timings)?;
    drop(study);
    drop(work);
    output.finish(folder, recipe, &mut report, started)?;
    Ok(report)
}

/// What a compression would do: ranks, parameters, bytes, memory. Measures and decomposes only where ranks depend on it.
///
/// # Errors
/// As [`compress`].
pub fn dry_run(job: &Job<'_>, progress: &dyn Progress) -> Result<DryRunReport> {
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    let plan = Plan::new(checkpoint, recipe)?;
    OutputFolder::check(job.output, job.force, REPORT_FILE)?;
    let inputs = Inputs::load(checkpoint, recipe, &plan)?;
    let memory = plan.expected_memory(checkpoint, recipe, job.memory_bytes, rayon::current_num_threads());
    let choices = match known_choices(recipe, &plan) {
        Some(choices) => choices,
        None => {
            let work = tempfile::tempdir()?;
            let study = Study::run(checkpoint, recipe, &plan, inputs, job.memory_bytes, work.path(), progress)?;
            study.allocate(recipe.budget, progress)?.choices
        }
    };
    let records = plan.linears.iter().zip(&choices).map(|(linear, &choice)| record::linear(recipe, linear, choice));
    let sizes = record::sizes(checkpoint, recipe, &plan, &choices);
    Ok(record::dry_run(job, records.collect(), sizes, memory))
}
