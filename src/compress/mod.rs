//! Compression: every targeted linear is replaced by a low-rank or quantized operator, fitted in a metric, under a
//! budget.
//!
//! [`compress`] is the whole algorithm on one screen. Methods are rows of [`presets`]; the mathematics is
//! [`crate::approx::low_rank`]; ranks come from [`allocate`].

pub mod allocate;
mod allocation;
mod budget;
pub mod compensate;
mod curves;
mod dry_run;
mod equal_bytes;
mod estimate;
mod fits;
mod inputs;
mod metrics;
pub mod options;
mod output;
mod pieces;
mod plan;
pub mod presets;
pub mod recipe;
mod record;
mod refine;
mod requirements;
mod scale;
mod sensitivity;
mod solution;
pub mod spectra;
mod study;
mod sweep;
mod trials;

use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use crate::checkpoint::{Checkpoint, Earlier, Existing, Fingerprint, OutputFolder, expect_apart};
use crate::device::Device;
use crate::error::{self, ExitClass, Failure, exit_class};
use crate::formats::{self, Format, Output, Source};
use crate::model::{fingerprint, inventory};
use crate::operator::Forms;
use crate::progress::Progress;
use crate::report::{CompressReport, REPORT_FILE};
use crate::session::Session;
use crate::store::Journal;
pub(crate) use curves::{KeptCurve, write as write_curves};
pub use dry_run::{DryRun, dry_run};
use inputs::Inputs;
use plan::Plan;
use recipe::{Fused, Recipe};
pub(crate) use record::summary as linear_summary;
pub use scale::{DepthWeight, Sensitivity};
use solution::Solution;
use study::Study;
pub use sweep::{SweepSettings, sweep};

/// The source and the output of a compression.
pub struct Job<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// The model as the user names it.
    pub source: &'a str,
    /// All settings that determine the bytes of the output.
    pub recipe: &'a Recipe,
    /// The output folder, which appears whole or not at all.
    pub output: &'a Path,
    /// Whether an output of an earlier run is replaced.
    pub force: bool,
    /// Whether to discard the progress of an interrupted run instead of resuming it.
    pub restart: bool,
    /// Memory for hidden states and activations; the rest goes to files in the work folder.
    pub memory_bytes: u64,
    /// The device that runs the model.
    pub device: Device,
}

impl Job<'_> {
    /// Refuses an output that may not be overwritten, or that contains an input.
    fn check_output(&self) -> Result<()> {
        OutputFolder::check(self.output, Existing::of(self.force), REPORT_FILE)?;
        Ok(expect_apart(self.output, self.recipe.inputs().chain([self.checkpoint.root()]))?)
    }
}

/// The checkpoint as a recipe sees it: with `--fused split`, fused matrices are split into parts, and expert stacks
/// into experts if the format can store them.
///
/// # Errors
/// The family is unknown, so the parts of a matrix are too.
pub fn view(checkpoint: Checkpoint, recipe: &Recipe) -> Result<Checkpoint> {
    let holds_experts = matches!(recipe.format, Format::Factored | Format::Dense);
    let checkpoint = if holds_experts { inventory::split_stacks(checkpoint)? } else { checkpoint };
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
    let run = Run::new(job)?;
    let mut folder = run.folder()?;
    match run.into_folder(&folder, progress) {
        Ok(report) => {
            folder.finish()?;
            Ok(report)
        }
        Err(error) => Err(stopped(&mut folder, error)),
    }
}

/// The error of a run that stopped; if a resource is at fault, finished work is kept.
fn stopped(folder: &mut OutputFolder, error: anyhow::Error) -> anyhow::Error {
    if exit_class(&error) == ExitClass::Resources
        && let Some(kept) = folder.keep()
    {
        let mend = error::hint(&error).map_or(String::new(), |mend| format!("{mend}; "));
        let kept = kept.display();
        let hint = format!("{mend}finished work is kept in `{kept}`; run the same command again to resume");
        return error.context(Failure::new(ExitClass::Resources, "stopped").hint(hint));
    }
    error
}

/// A compression whose inputs have been checked.
struct Run<'a> {
    job: &'a Job<'a>,
    plan: Plan,
    source: Source<'a>,
    inputs: Inputs,
    source_files: Fingerprint,
    started: Instant,
}

impl<'a> Run<'a> {
    fn new(job: &'a Job<'a>) -> Result<Self> {
        let started = Instant::now();
        let (checkpoint, recipe) = (job.checkpoint, job.recipe);
        job.check_output()?;
        let plan = Plan::new(checkpoint, recipe)?;
        let source = Source::new(checkpoint);
        plan.check_format(&source, recipe)?;
        let inputs = Inputs::load(checkpoint, recipe, &plan)?;
        Ok(Self { job, plan, source, inputs, source_files: fingerprint(checkpoint)?, started })
    }

    /// The folder of its output, with what an earlier run of the same job has finished. A full disk is reported before
    /// any work.
    fn folder(&self) -> Result<OutputFolder> {
        let job = self.job;
        let description = record::job(job, &self.source_files, &self.inputs)?;
        let earlier = if job.restart { Earlier::Discarded } else { Earlier::Resumed };
        let folder = OutputFolder::resume(job.output, Existing::of(job.force), REPORT_FILE, &description, earlier)?;
        folder.require_space(self.disk_bytes())?;
        Ok(folder)
    }

    /// Bytes on disk while it runs, for pieces of its work and the least output.
    fn disk_bytes(&self) -> u64 {
        let (checkpoint, recipe) = (self.job.checkpoint, self.job.recipe);
        let part = self.inputs.windows.as_ref().map(|windows| &windows.part);
        let tokens = part.map_or((0, 0), |part| (part.tokens, part.with_gradients().tokens));
        self.plan.least_output_bytes(checkpoint) + self.plan.kept_bytes(checkpoint, recipe, tokens)
    }

    fn session<'s>(&self, folder: &OutputFolder, progress: &'s dyn Progress) -> Session<'s>
    where
        'a: 's,
    {
        let journal = Journal::new(folder.pieces());
        let job = self.job;
        Session::new(job.checkpoint, &job.device, job.memory_bytes, folder.work(), journal, progress)
    }

    /// All steps but the last, which publishes the folder.
    fn into_folder(self, folder: &OutputFolder, progress: &dyn Progress) -> Result<CompressReport> {
        let session = self.session(folder, progress);
        let Self { job, plan, source, inputs, source_files, started } = self;
        let (checkpoint, recipe) = (job.checkpoint, job.recipe);
        let calibration = inputs.record(recipe);
        let mut study = Study::run(&session, recipe, &plan, inputs)?;
        let mut timings = study.timings;

        let allocating = Instant::now();
        let sensitivities = sensitivity::of(&study)?;
        let allocation = sensitivity::allocate(&study, &sensitivities, recipe.budget())?;
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
        if recipe.format == Format::Factored && recipe.quant().is_empty() && recipe.quant_factors().is_none() {
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
        let lines = record::error_lines(&solution);
        drop(solution);
        output::finish(output, folder, job, &lines, &mut report, started)?;
        Ok(report)
    }
}
