//! Dry runs: the outcome of a compression, before anything is measured or after all measurements.

use anyhow::Result;

use super::allocate::Ranks;
use super::budget::{choices_by_shape, known_choices, quantized_choice};
use super::job::Job;
use super::plan::{Choice, FitKind, Plan};
use super::recipe::{Budget, Recipe};
use super::run::{Run, stopped};
use super::study::Study;
use super::{estimate, output, record, sensitivity};
use crate::checkpoint::OutputFolder;
use crate::error::Failure;
use crate::formats;
use crate::model::inventory::LinearInfo;
use crate::operator::Forms;
use crate::progress::Progress;
use crate::quantize::Quant;
use crate::report::{DryRunReport, LinearRecord, RankSource};

/// How much of a compression a dry run does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum DryRun {
    /// Nothing is measured: targets, sizes, memory, disk and time
    Plan,
    /// Measures and decomposes: ranks and errors too. What was measured is kept for the run itself
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
            planned(&run)?
        }
        DryRun::Full => measured(run, progress)?,
    };
    formats::warn_of_growth(checkpoint.file_bytes(), report.sizes.file_bytes_after);
    (report.expected_memory_bytes, report.expected_disk_bytes, report.expected_seconds) = (memory, disk, seconds);
    let left_out = formats::side(checkpoint, job.output, &output::REPLACED)?.left_out;
    report.left_out = left_out.into_iter().map(Into::into).collect();
    Ok(report)
}

/// The outcome as far as it is known without measurements.
fn planned(run: &Run<'_>) -> Result<DryRunReport> {
    let (recipe, plan) = (run.job.recipe, &run.plan);
    let (forms, ranks) = match known_choices(recipe, plan) {
        Some(choices) => {
            let kind = recipe.quant().first().map_or(FitKind::Layout, |&quant| FitKind::Base(quant));
            (forms_of(recipe, plan, &choices, kind), RankSource::Exact)
        }
        None => (evenly(run)?, RankSource::Even),
    };
    let records = plan.linears.iter().zip(&forms).map(|(linear, &forms)| record::linear(linear, forms));
    let sizes = record::sizes(&run.source, recipe, plan, &forms);
    Ok(record::dry_run(run.job, records.collect(), sizes, ranks))
}

/// The outcome after all measurements and decompositions, which are kept.
fn measured(run: Run<'_>, progress: &dyn Progress) -> Result<DryRunReport> {
    let mut folder = run.folder()?;
    match outcome(run, &folder, progress) {
        Ok(mut report) => {
            report.kept_in = folder.keep().map(|path| path.display().to_string());
            Ok(report)
        }
        Err(error) => Err(stopped(&mut folder, error)),
    }
}

fn outcome(run: Run<'_>, folder: &OutputFolder, progress: &dyn Progress) -> Result<DryRunReport> {
    let session = run.session(folder, progress);
    let Run { job, plan, source, inputs, .. } = run;
    let study = Study::run(&session, job.recipe, &plan, inputs)?;
    let choices = sensitivity::allocate(&study, &sensitivity::of(&study)?, job.recipe.budget())?.choices;
    let forms: Vec<Option<Forms>> = choices.iter().enumerate().map(|(i, &choice)| study.planned(i, choice)).collect();
    let linear = |i: usize| -> LinearRecord {
        let mut record = record::linear(&plan.linears[i], forms[i]);
        let curve = study.fits.chosen(i, choices[i]).and_then(|fit| fit.fitted.curve());
        if let (Some(rank), Some(curve)) = (record.rank, curve) {
            record.relative_error = Some(curve.relative_error(rank));
        }
        record
    };
    let sizes = record::sizes(&source, job.recipe, &plan, &forms);
    Ok(record::dry_run(job, (0..forms.len()).map(linear).collect(), sizes, RankSource::Exact))
}

fn forms_of(recipe: &Recipe, plan: &Plan, choices: &[Choice], kind: FitKind) -> Vec<Option<Forms>> {
    let linears = plan.linears.iter().zip(choices);
    linears.map(|(linear, &choice)| Plan::forms(recipe, linear, choice, kind)).collect()
}

/// Forms for an even spread of the budget, where measurements decide: the same share of every linear, or the quantizer
/// with the most bits that is affordable for all.
///
/// # Errors
/// The budget cannot be met.
fn evenly(run: &Run<'_>) -> Result<Vec<Option<Forms>>> {
    let (recipe, plan) = (run.job.recipe, &run.plan);
    if recipe.quant().is_empty() {
        match recipe.budget() {
            Budget::Keep(_) => {
                let choices = choices_by_shape(recipe, plan, Ranks::Uniform, recipe.budget());
                return Ok(forms_of(recipe, plan, &choices, FitKind::Layout));
            }
            // Ranks are a matter of spectra alone; this is the largest output.
            Budget::None => return Ok(vec![None; plan.linears.len()]),
            Budget::Bytes(_) | Budget::Bits(_) => {}
        }
    }
    let mut candidates: Vec<(u64, Vec<Option<Forms>>)> =
        candidates(recipe, plan).into_iter().map(|forms| (spent(run, &forms), forms)).collect();
    candidates.sort_by_key(|(spent, _)| *spent);
    let limit = limit(run);
    let affordable = candidates.partition_point(|(spent, _)| *spent <= limit);
    if affordable == 0 {
        let least = candidates.first().map_or(0, |(spent, _)| *spent);
        return Err(Failure::usage(format!("the budget of {limit} bytes is not met by the minimum of about {least}"))
            .hint("target more linears, lower `--rank-floor`, or add a quantizer with fewer bits to `--quant`")
            .into());
    }
    Ok(candidates.swap_remove(affordable - 1).1)
}

/// Even choices, one per share of the parameters or one per quantizer, in ascending order of size.
fn candidates(recipe: &Recipe, plan: &Plan) -> Vec<Vec<Option<Forms>>> {
    const STEPS: usize = 128;
    if recipe.quant().is_empty() {
        let share = |step: usize| Budget::Keep(step as f64 / STEPS as f64);
        let choices = (1..=STEPS).map(|step| choices_by_shape(recipe, plan, Ranks::Uniform, share(step)));
        return choices.map(|choices| forms_of(recipe, plan, &choices, FitKind::Layout)).collect();
    }
    let of = |&quant: &Quant| {
        let choices: Vec<Choice> = plan.linears.iter().map(|linear| quantized_choice(recipe, linear, quant)).collect();
        forms_of(recipe, plan, &choices, FitKind::Base(quant))
    };
    recipe.quant().iter().map(of).collect()
}

/// Bytes that the budget limits: of the weight files, or of the linears.
fn spent(run: &Run<'_>, forms: &[Option<Forms>]) -> u64 {
    let (recipe, plan) = (run.job.recipe, &run.plan);
    if let Budget::Bytes(_) = recipe.budget() {
        return plan.files(&run.source, recipe, forms).file_bytes();
    }
    let bytes = |(linear, forms): (&LinearInfo, &Option<Forms>)| {
        forms.map_or(linear.n_bytes(), |forms| recipe.format.n_bytes(linear, &forms))
    };
    plan.linears.iter().zip(forms).map(bytes).sum()
}

/// The limit on [`spent`].
fn limit(run: &Run<'_>) -> u64 {
    let linears = &run.plan.linears;
    match run.job.recipe.budget() {
        Budget::Bytes(bytes) => bytes,
        Budget::Bits(bits) => {
            let n_weights: u64 = linears.iter().map(LinearInfo::n_parameters).sum();
            (bits * n_weights as f64 / 8.0 + 1e-6) as u64
        }
        Budget::Keep(keep) => {
            let dense: u64 = linears.iter().map(LinearInfo::n_bytes).sum();
            (keep * dense as f64 + 1e-6) as u64
        }
        Budget::None => u64::MAX,
    }
}
