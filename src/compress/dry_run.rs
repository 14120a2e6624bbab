//! Dry runs: the outcome of a compression, before anything is measured or after all measurements.

use anyhow::Result;

use super::allocation::choose_by_shape;
use super::budget::{forms_by_shape, known_choices};
use super::healing::Before;
use super::job::Job;
use super::limit::expect_share;
use super::narrow::{self, Parts};
use super::plan::{Choice, Plan};
use super::recipe::Budget;
use super::run::Run;
use super::study::Study;
use super::{estimate, output, record, sensitivity};
use crate::checkpoint::OutputFolder;
use crate::formats::{self, Source};
use crate::operator::Forms;
use crate::progress::Progress;
use crate::report::{AdapterRecord, DryRunReport, LinearRecord, RankSource, stopped};

/// How much of a compression a dry run does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum DryRun {
    /// Measures nothing, and shows targets, sizes, memory, disk and time
    Plan,
    /// Measures and decomposes, and shows ranks and errors too. Measurements are kept for the run itself
    Full,
}

/// Reports the outcome that a compression would have.
///
/// A plan follows from headers, recipe, and short trials of the machine's speed. A full dry run does all work that
/// precedes the output, and keeps it: [`super::compress`] of the same job resumes from there.
///
/// # Errors
/// As [`super::compress`].
pub fn dry_run(job: &Job<'_>, depth: DryRun, progress: &dyn Progress) -> Result<DryRunReport> {
    let run = Run::new(job)?;
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    let memory = run.plan.expected_memory(checkpoint, recipe, job.memory_bytes, rayon::current_num_threads());
    let disk = run.disk_bytes();
    let seconds = estimate::seconds(job, &run.plan, run.inputs.windows.as_ref())?;
    let mut report = match depth {
        DryRun::Plan => {
            run.check_space()?;
            match recipe.then() {
                None => planned(job, &run.plan, &run.source)?,
                Some(_) => planned_narrower(&run)?,
            }
        }
        DryRun::Full => measured(run, progress)?,
    };
    formats::warn_of_growth(checkpoint.file_bytes(), report.sizes.file_bytes_after);
    (report.expected_memory_bytes, report.expected_disk_bytes, report.expected_seconds) = (memory, disk, seconds);
    let left_out = formats::side(checkpoint, job.output, &output::REPLACED)?.left_out;
    report.left_out = left_out.into_iter().map(Into::into).collect();
    report.adapter = AdapterRecord::of(checkpoint)?;
    Ok(report)
}

/// The outcome as far as it is known without measurements.
fn planned(job: &Job<'_>, plan: &Plan, source: &Source<'_>) -> Result<DryRunReport> {
    let recipe = job.recipe;
    let (choices, ranks) = match (known_choices(recipe, plan), recipe.budget()) {
        (Some(choices), _) => (choices, RankSource::Exact),
        // Spectra alone decide; no output is larger than the source.
        (None, Budget::None) => (vec![Choice::Dense; plan.linears.len()], RankSource::Unknown),
        (None, _) => (choose_by_shape(recipe, plan, source)?, RankSource::Even),
    };
    let forms = plan.linears.iter().zip(choices).map(|(linear, choice)| forms_by_shape(recipe, linear, choice));
    let forms: Vec<Option<Forms>> = forms.collect();
    let records = forms.iter().enumerate().map(|(i, &forms)| record::linear(plan, i, forms));
    let sizes = record::sizes(source, recipe, plan, &forms);
    if let (Budget::Keep(keep), []) = (recipe.budget(), recipe.quant()) {
        expect_share(recipe, keep, sizes.linear_parameters_after, sizes.linear_parameters_before)?;
    }
    Ok(record::dry_run(job, records.collect(), sizes, ranks))
}

/// The same of a model that becomes narrower.
fn planned_narrower(run: &Run<'_>) -> Result<DryRunReport> {
    let narrower = narrow::planned(run)?;
    let (checkpoint, recipe) = (&narrower.checkpoint, &narrower.then);
    let (plan, source) = (Plan::of_shapes(checkpoint, recipe)?, Source::new(checkpoint));
    plan.check_format(&source, recipe)?;
    let mut report = planned(&Job { checkpoint, recipe, ..run.job.clone() }, &plan, &source)?;
    narrower.outline.complete(Parts::of_dry_run(&mut report));
    Ok(DryRunReport { ranks: RankSource::Even, ..report })
}

/// The outcome after all measurements and decompositions, which are kept.
fn measured(run: Run<'_>, progress: &dyn Progress) -> Result<DryRunReport> {
    let mut folder = run.folder()?;
    let job = run.job;
    let done = match (Before::of(job.recipe, &folder), job.recipe.then()) {
        (Some(before), _) => Run::new(&before.job(job))
            .and_then(|run| measured(run, progress))
            .map(|report| DryRunReport { recipe: record::recipe(job.recipe), ..report }),
        (None, None) => outcome(run, &folder, progress),
        (None, Some(_)) => outcome_of_narrower(run, &folder, progress),
    };
    match done {
        Ok(mut report) => {
            report.kept_in = folder.keep().map(|path| path.display().to_string());
            Ok(report)
        }
        Err(error) => Err(stopped(&mut folder, error)),
    }
}

/// The outcome of a model that becomes narrower, after the refit of what is kept.
fn outcome_of_narrower(run: Run<'_>, folder: &OutputFolder, progress: &dyn Progress) -> Result<DryRunReport> {
    let job = run.job;
    let mut narrowed = narrow::narrowed(run, folder, progress)?;
    let statistics = narrowed.statistics.take();
    let of_narrower = Job { checkpoint: &narrowed.checkpoint, recipe: &narrowed.then, ..job.clone() };
    let mut report = outcome(Run::of_narrowed(&of_narrower, statistics)?, folder, progress)?;
    narrowed.outline.complete(Parts::of_dry_run(&mut report));
    Ok(report)
}

fn outcome(run: Run<'_>, folder: &OutputFolder, progress: &dyn Progress) -> Result<DryRunReport> {
    let session = run.session(folder, progress)?;
    let Run { job, plan, source, inputs, .. } = run;
    let study = Study::run(&session, job.recipe, &plan, inputs)?;
    let choices = sensitivity::allocate(&study, &sensitivity::of(&study)?, job.recipe.budget())?.choices;
    let forms: Vec<Option<Forms>> = choices.iter().enumerate().map(|(i, &choice)| study.planned(i, choice)).collect();
    let linear = |i: usize| -> LinearRecord {
        let mut record = record::linear(&plan, i, forms[i]);
        let curve = study.fits.chosen(i, choices[i]).and_then(|fit| fit.fitted.curve());
        if let (Some(rank), Some(curve)) = (record.rank, curve) {
            record.relative_error = Some(curve.relative_error(rank));
        }
        record
    };
    let sizes = record::sizes(&source, job.recipe, &plan, &forms);
    Ok(record::dry_run(job, (0..forms.len()).map(linear).collect(), sizes, RankSource::Exact))
}
