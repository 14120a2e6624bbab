//! Compression: every targeted linear becomes a matrix of low rank, in a metric, under a budget.
//!
//! [`compress`] is the whole algorithm on one screen. Methods are rows of [`presets`]; the mathematics is
//! [`low_rank`]; ranks come from [`allocate`].

pub mod allocate;
mod bases;
pub mod compensate;
mod control;
mod elastic;
mod estimate;
mod factors;
mod layouts;
pub mod low_rank;
pub mod metric;
mod metrics;
mod offers;
pub mod options;
mod output;
mod pivot;
mod plan;
pub mod presets;
pub mod recipe;
mod record;
mod residual;
mod rounding;
mod sensitivity;
mod sequential;
pub mod spectra;
mod study;
mod sweep;
mod variants;

use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use crate::checkpoint::{Checkpoint, Fingerprint, OutputFolder, expect_apart};
use crate::error::{self, ExitClass, Failure, exit_class};
use crate::formats::{self, Entry, Format, Output, Source};
use crate::journal::Journal;
use crate::model::{fingerprint, inventory};
use crate::progress::Progress;
use crate::report::{CompressReport, DryRunReport, REPORT_FILE};
use allocate::Choice;
pub use elastic::{TruncateJob, truncate};
use plan::Plan;
use recipe::{Fused, Recipe};
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
    /// Whether what an interrupted run left is thrown away, and not gone on from.
    pub restart: bool,
    pub memory_bytes: u64,
}

impl Job<'_> {
    /// Refuses an output that may not be written, or that holds what is read.
    fn check_output(&self) -> Result<()> {
        OutputFolder::check(self.output, self.force, REPORT_FILE)?;
        Ok(expect_apart(self.output, self.recipe.inputs().chain([self.checkpoint.root()]))?)
    }
}

/// The checkpoint as a recipe sees it: with `--fused split` parts stand for what is several in one, and experts for their stacks
/// where the format has a place for them.
///
/// # Errors
/// The family is not known, and so not what a matrix is made of.
pub fn view(checkpoint: Checkpoint, recipe: &Recipe) -> Result<Checkpoint> {
    let holds_experts = matches!(recipe.format, Format::Factored | Format::Dense);
    let checkpoint = if holds_experts { inventory::split_stacks(checkpoint)? } else { checkpoint };
    match recipe.fused {
        Fused::Joint => Ok(checkpoint),
        Fused::Split => inventory::split_fused(checkpoint),
    }
}

/// Runs a compression: measure, decompose, allocate, write. What a run that was killed has finished is not done again.
///
/// There is an example at the top of the crate's documentation.
///
/// # Errors
/// Anything wrong with the source, the recipe or the disk; the output folder then does not appear. Where a resource is at
/// fault, what is finished stays beside it, for the next run of the same job.
pub fn compress(job: &Job<'_>, progress: &dyn Progress) -> Result<CompressReport> {
    let started = Instant::now();
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    job.check_output()?;
    let plan = Plan::new(checkpoint, recipe)?;
    let source = Source::new(checkpoint);
    plan.check_format(&source, recipe)?;
    let inputs = Inputs::load(checkpoint, recipe, &plan)?;
    let source_files = fingerprint(checkpoint)?;
    let description = record::job(job, &source_files, &inputs)?;
    let mut folder = OutputFolder::resume(job.output, job.force, REPORT_FILE, &description, job.restart)?;
    let run = Run { job, plan, source, source_files, started };
    match run.into_folder(&folder, inputs, progress) {
        Ok(report) => {
            folder.finish()?;
            Ok(report)
        }
        Err(error) => {
            if exit_class(&error) == ExitClass::Resources
                && let Some(kept) = folder.keep()
            {
                let mend = error::hint(&error).map_or(String::new(), |mend| format!("{mend}; "));
                let kept = kept.display();
                let hint = format!("{mend}what is finished is kept in `{kept}`: run the same command again to go on");
                return Err(error.context(Failure::new(ExitClass::Resources, "stopped").hint(hint)));
            }
            Err(error)
        }
    }
}

/// A compression whose inputs were checked.
struct Run<'a> {
    job: &'a Job<'a>,
    plan: Plan,
    source: Source<'a>,
    source_files: Fingerprint,
    started: Instant,
}

impl Run<'_> {
    /// Everything but the last step, which makes an output of the folder.
    fn into_folder(self, folder: &OutputFolder, inputs: Inputs, progress: &dyn Progress) -> Result<CompressReport> {
        let Self { job, plan, source, source_files, started } = self;
        let (checkpoint, recipe) = (job.checkpoint, job.recipe);
        let calibration = inputs.record(recipe);
        // Full disks show before the work.
        let n_tokens = inputs.windows.as_ref().map_or(0, |w| w.part.tokens);
        folder.require_space(plan.least_output_bytes(checkpoint) + plan.kept_bytes(checkpoint, recipe, n_tokens))?;
        let kept = (folder.work(), Journal::new(folder.pieces()));
        let mut study = Study::run(checkpoint, recipe, &plan, inputs, job.memory_bytes, kept, progress)?;
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
        let compressed: Vec<(usize, Choice)> = choices.iter().copied().enumerate().collect();
        study.settle(&compressed, progress)?;
        let entries = study.stored_entries(choices);
        let mut output = Output::create(folder, plan.files(&source, recipe, &entries))?;
        let written = output::put_all(&mut output, &study, choices, progress)?;
        if recipe.format == Format::Factored && recipe.quant.is_empty() && recipe.quant_factors.is_none() {
            elastic::write_curves(folder, &study, &allocation, &written)?;
        }
        study.timings.write = writing.elapsed().as_secs_f64();
        let controlling = Instant::now();
        let squared = |i: usize| written.get(&i).and_then(|w| w.relative_error).map_or(0.0, |error| error * error);
        let control = control::at_equal_bytes(&mut study, &allocation, &squared, progress)?;
        study.timings.control = controlling.elapsed().as_secs_f64();
        let sizes = record::sizes(&source, recipe, &plan, &entries);
        formats::warn_of_growth(checkpoint.file_bytes(), sizes.file_bytes_after);
        let linears = record::linears(&study, &allocation, &written)?;
        let mut report = record::report(job, source_files, linears, sizes, calibration, study.timings);
        report.control = control;
        let lines = record::error_lines(&study, choices);
        drop(study);
        output::finish(output, folder, job, &lines, &mut report, started)?;
        Ok(report)
    }
}

/// What a compression would do: ranks, parameters, bytes, memory. Measures and decomposes only where ranks depend on it.
///
/// # Errors
/// As [`compress`].
pub fn dry_run(job: &Job<'_>, progress: &dyn Progress) -> Result<DryRunReport> {
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    job.check_output()?;
    let plan = Plan::new(checkpoint, recipe)?;
    let source = Source::new(checkpoint);
    plan.check_format(&source, recipe)?;
    let inputs = Inputs::load(checkpoint, recipe, &plan)?;
    let memory = plan.expected_memory(checkpoint, recipe, job.memory_bytes, rayon::current_num_threads());
    let seconds = estimate::seconds(checkpoint, recipe, &plan, inputs.windows.as_ref())?;
    let entries: Vec<Option<Entry>> = match known_choices(recipe, &plan) {
        Some(choices) => {
            choices.into_iter().map(|choice| Plan::entry(recipe, choice, recipe.quant.first().copied())).collect()
        }
        None => {
            let work = tempfile::tempdir()?;
            let study = Study::run(
                checkpoint,
                recipe,
                &plan,
                inputs,
                job.memory_bytes,
                (work.path().into(), Journal::default()),
                progress,
            )?;
            study.entries(&study.allocate(recipe.budget, progress)?.choices)
        }
    };
    let records = plan.linears.iter().zip(&entries).map(|(linear, &entry)| record::linear(linear, entry));
    let sizes = record::sizes(&source, recipe, &plan, &entries);
    formats::warn_of_growth(checkpoint.file_bytes(), sizes.file_bytes_after);
    let mut report = record::dry_run(job, records.collect(), sizes, (memory, seconds));
    let left_out = formats::side(checkpoint, job.output, &output::REPLACED)?.left_out;
    report.left_out = left_out.into_iter().map(Into::into).collect();
    Ok(report)
}
