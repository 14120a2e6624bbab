//! Healing: a compressed model is trained for a while to do what its source does.
//!
//! Stage `blocks` takes the model apart: the halves of a block (attention, feed-forward) learn, one after another, to
//! give the states that the source has there, from the states that the healed part before them gives (AA-SVD; by windows
//! with a non-linearity, arXiv 2510.14444). One half with its gradients is in memory at a time. Floats are trained: parts
//! of structures, dense weights, norms and biases, and the scales of codes; codes and the vocabulary stay.

mod closed;
mod halves;
mod held_out;
mod job;
mod likely;
mod metric;
mod model;
mod moves;
mod output;
mod rounding;
mod tensors;
mod texts;

use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;

use self::closed::Closed;
use self::halves::Halves;
pub(crate) use self::job::expect_stages;
pub use self::job::{Distance, HealJob, HealStage, SAVE_STEPS, Train};
use self::metric::Metrics;
use self::model::{KeptState, STATE_BYTES, WholeModel};
use self::tensors::{Healed, Selected};
use self::texts::Drawn;
pub use self::texts::WeightedText;
pub(crate) use self::texts::expect_enough;
use crate::calibrate::{Needs, Statistics};
use crate::checkpoint::{OutputFolder, expect_apart};
use crate::error::Failure;
use crate::formats::Format;
use crate::model::{Decoder, LinearId, Walk, WalkLimits, coverage, fingerprint};
use crate::progress::Progress;
use crate::report::earlier::read_report;
use crate::report::{CompressReport, HealRecord, HealedClosed, HealedModel, HealedPart, REPORT_FILE, concluded};
use crate::store::Journal;
use crate::train::Pieces;

/// Heals a compressed model. Resumes an interrupted run after the last half that it finished.
///
/// # Errors
/// The two models do not belong together, a text is too short, a loss is not finite, or the output cannot be written.
pub fn heal(job: &HealJob<'_>, progress: &dyn Progress) -> Result<CompressReport> {
    OutputFolder::check(job.output, job.existing, REPORT_FILE)?;
    expect_apart(job.output, job.inputs())?;
    let (run, report) = checked(job)?;
    let description = job.description(&run.drawn)?;
    let folder = OutputFolder::resume(job.output, job.existing, REPORT_FILE, &description, job.earlier)?;
    let done = run.fill(report, &folder, progress);
    concluded(folder, done)
}

/// The same as the last stage of the run of a recipe, in its folder.
///
/// # Errors
/// As [`heal`].
pub(crate) fn heal_into(
    job: &HealJob<'_>,
    folder: &OutputFolder,
    recipe: Value,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    let (run, report) = checked(job)?;
    run.fill(CompressReport { recipe, ..report }, folder, progress)
}

/// Checks all inputs of a job, the report of the compressed model among them.
fn checked<'a>(job: &'a HealJob<'a>) -> Result<(Run<'a>, CompressReport)> {
    let started = Instant::now();
    coverage::expect_whole(job.checkpoint)?;
    let report = read_report(job.checkpoint.root(), "`lrc heal` takes a folder written by `lrc compress`")?;
    let format = output::format_of(job.checkpoint, &report)?;
    output::expect_code(job.checkpoint, &report)?;
    let teacher = Decoder::open(job.teacher)?.on(&job.device);
    let student = Decoder::open(job.checkpoint)?.on(&job.device);
    job::expect_same_shape(job, &teacher, &student)?;
    for decoder in [&teacher, &student] {
        expect_stages(job.stages, decoder)?;
    }
    job::expect_labels(job, &student)?;
    job::warn_of_another_source(job, &report)?;
    let needing = match (job.stages.contains(&HealStage::Closed), job.distance()) {
        (true, _) => Some("the stage `closed` needs Grams of the inputs and gradients of the source"),
        (false, Distance::Fisher) => Some("`--loss fisher` needs Grams of the gradients of the source"),
        (false, Distance::Output) => None,
    };
    if let (Some(message), None) = (needing, job.statistics) {
        let failure = Failure::usage(message);
        let hint = "measure them with `lrc calibrate MODEL --method kfac`, and give the file to `--statistics`";
        return Err(failure.hint(hint).into());
    }
    let trained = Selected::of(job, &report)?;
    let drawn = Drawn::of(job.checkpoint, job.texts, job.held_out, &job.windows)?;
    job::expect_same_tokens(job, &drawn)?;
    let statistics = job.statistics.map(Statistics::open).transpose()?;
    if let (Some(statistics), Some(path)) = (&statistics, job.statistics) {
        let named = path.display().to_string();
        statistics.expect_model(&fingerprint(job.teacher)?, &named)?;
        let input_gram = job.stages.contains(&HealStage::Closed);
        statistics.expect_needs(Needs { input_gram, output_gram: true, ..Needs::default() }, &named)?;
    }
    Ok((Run { job, teacher, student, trained, drawn, statistics, format, started }, report))
}

/// What the stages did.
#[derive(Default)]
struct Trainings {
    parts: Vec<HealedPart>,
    model: Option<HealedModel>,
    closed: Option<HealedClosed>,
}

/// A healing whose inputs have been checked.
struct Run<'a> {
    job: &'a HealJob<'a>,
    teacher: Decoder<'a>,
    student: Decoder<'a>,
    trained: Selected,
    drawn: Drawn,
    statistics: Option<Statistics>,
    format: Format,
    started: Instant,
}

impl Run<'_> {
    fn fill(
        &self,
        mut report: CompressReport,
        folder: &OutputFolder,
        progress: &dyn Progress,
    ) -> Result<CompressReport> {
        let Self { job, teacher, student, drawn, .. } = self;
        let n_kept = match job.stages.contains(&HealStage::Model) {
            // The last state, and the one that is written before it takes its place.
            true => 2 * STATE_BYTES * self.trained.n_floats(student, job.checkpoint),
            false => 0,
        };
        folder.require_space(job.checkpoint.file_bytes() + n_kept)?;
        let limits = WalkLimits::new(job.memory_bytes, folder.work());
        let walk = Walk::new(teacher, &drawn.windows, &limits)?.of_text(&drawn.names());
        let pieces = drawn.pieces();
        let journal = Journal::new(folder.pieces());
        let (mut healed, mut trained) = (Healed::new(), Trainings::default());
        for stage in job.stages {
            self.stage(*stage, (&walk, &pieces), (&mut healed, &mut trained), &journal, progress)?;
        }
        let windows: Vec<Vec<u32>> = pieces.held_out.iter().map(|&i| drawn.windows[i].clone()).collect();
        let perplexity =
            held_out::perplexities([teacher, student], job.checkpoint, &healed, &windows, &limits, progress)?;
        let per_epoch = pieces.trained.len().div_ceil(job.batch);
        let of_parts = trained.parts.iter().map(|part| part.trained.len());
        let epochs: usize = of_parts.chain(trained.model.iter().map(|model| model.trained.len())).sum();
        let in_closed_form = trained.closed.as_ref().map_or(0, |closed| closed.steps.len());
        let record = HealRecord {
            teacher: job.teacher_name.into(),
            flags: job.flags(),
            stages: job.stages.iter().map(|stage| stage.name().into()).collect(),
            steps: (epochs * per_epoch + in_closed_form) as u64,
            seconds: self.started.elapsed().as_secs_f64(),
            teacher_files: fingerprint(job.teacher)?,
            source_files: fingerprint(job.checkpoint)?,
            texts: drawn.records(),
            trained_windows: pieces.trained.len(),
            held_out_windows: pieces.held_out.len(),
            held_out_text: drawn.held_out_record(),
            trained: job.train.name().into(),
            distance: job.distance().name().into(),
            epochs: job.epochs,
            batch: job.batch,
            labels: job.labels,
            learning_rate: job.learning_rate,
            seed: job.windows.seed,
            parameters: healed.values().map(|values| values.len() as u64).sum(),
            parts: trained.parts,
            model: trained.model,
            closed: trained.closed,
            perplexity,
        };
        if record.parameters == 0 {
            tracing::warn!(
                "healing changed nothing: no stage lowered its loss on the held-out windows, or there is nothing that it trains (`closed` takes no steps over codes); a smaller `--learning-rate` or more `--samples` may help"
            );
        }
        let before = report.healed.replace(record);
        report.healed_before.extend(before);
        output::write(job, &healed, self.format, &mut report, folder, self.started)?;
        Ok(report)
    }

    /// One stage, beginning with what was `healed` so far.
    fn stage(
        &self,
        stage: HealStage,
        (walk, pieces): (&Walk<'_>, &Pieces),
        (healed, done): (&mut Healed, &mut Trainings),
        journal: &Journal,
        progress: &dyn Progress,
    ) -> Result<()> {
        let Self { job, teacher, student, trained, .. } = self;
        if stage == HealStage::Blocks {
            done.parts = self.blocks(walk, pieces, healed, journal, progress)?;
            return Ok(());
        }
        let whole = WholeModel::new(teacher, (student, trained), job.checkpoint, walk, progress)?;
        if stage == HealStage::Model {
            let kept = KeptState { journal, every: job.save_steps };
            let whole = whole.with_labels(job.labels);
            done.model = Some(whole.run(healed, pieces, job, &kept, progress)?);
            return Ok(());
        }
        let statistics = self.statistics.as_ref().context("invariant: the stage `closed` has statistics")?;
        let of_block = |block| {
            teacher.linears(block).into_iter().map(move |(slot, shape)| (LinearId { block, slot }, shape.into()))
        };
        let shapes = (0..teacher.n_blocks()).flat_map(of_block).collect();
        let closed = Closed { whole: &whole, trained, statistics, shapes, journal };
        done.closed = Some(closed.run(healed, pieces, job.epochs, progress)?);
        Ok(())
    }

    fn blocks(
        &self,
        walk: &Walk<'_>,
        pieces: &Pieces,
        healed: &mut Healed,
        journal: &Journal,
        progress: &dyn Progress,
    ) -> Result<Vec<HealedPart>> {
        let Self { job, teacher, student, .. } = self;
        let metrics = match &self.statistics {
            Some(statistics) if job.distance() == Distance::Fisher => Metrics::of(statistics, teacher, &job.device)?,
            _ => Metrics::default(),
        };
        let halves = Halves {
            teacher,
            student,
            trained: &self.trained,
            checkpoint: job.checkpoint,
            walk,
            pieces,
            settings: &job.settings(),
            metrics: &metrics,
            journal,
        };
        halves.run(healed, progress)
    }
}
