//! Healing: a compressed model is trained for a while to do what its source does.
//!
//! Stage `blocks` takes the model apart: the halves of a block (attention, feed-forward) learn, one after another, to
//! give the states that the source has there, from the states that the healed part before them gives (AA-SVD; by windows
//! with a non-linearity, arXiv 2510.14444). One half with its gradients is in memory at a time. Floats are trained: parts
//! of structures, dense weights, norms and biases; codes and the vocabulary stay.

mod halves;
mod held_out;
mod job;
mod metric;
mod model;
mod output;
mod tensors;
mod texts;

use std::time::Instant;

use anyhow::Result;
use serde_json::Value;

use self::halves::Halves;
pub use self::job::{Distance, HealJob, HealStage, Train};
use self::metric::Metrics;
use self::model::WholeModel;
pub(crate) use self::output::takes;
use self::tensors::{Healed, Selected};
use self::texts::Drawn;
pub use self::texts::WeightedText;
use crate::calibrate::{Needs, Statistics};
use crate::checkpoint::{OutputFolder, expect_apart};
use crate::formats::Format;
use crate::model::{Decoder, Walk, WalkLimits, coverage, fingerprint};
use crate::progress::Progress;
use crate::report::earlier::read_report;
use crate::report::{CompressReport, HealRecord, HealedPart, REPORT_FILE, concluded};
use crate::store::Journal;
use crate::train::{Pieces, Settings};

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
    let teacher = Decoder::open(job.teacher)?.on(&job.device);
    let student = Decoder::open(job.checkpoint)?.on(&job.device);
    job::expect_same_shape(job, &teacher, &student)?;
    let trained = Selected::of(job, &report)?;
    let drawn = Drawn::of(job.checkpoint, job.texts, job.held_out, &job.windows)?;
    let statistics = job.statistics.map(Statistics::open).transpose()?;
    if let (Some(statistics), Some(path)) = (&statistics, job.statistics) {
        let named = path.display().to_string();
        statistics.expect_model(&fingerprint(job.teacher)?, &named)?;
        statistics.expect_needs(Needs { output_gram: true, ..Needs::default() }, &named)?;
    }
    Ok((Run { job, teacher, student, trained, drawn, statistics, format, started }, report))
}

/// The stage `model` moves all blocks at once, and takes smaller steps.
fn of_model(settings: &Settings) -> Settings {
    Settings { learning_rate: settings.learning_rate / 4.0, ..*settings }
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
        folder.require_space(job.checkpoint.file_bytes())?;
        let limits = WalkLimits::new(job.memory_bytes, folder.work());
        let walk = Walk::new(teacher, &drawn.windows, &limits)?.of_text(&drawn.names());
        let pieces = drawn.pieces();
        let journal = Journal::new(folder.pieces());
        let (mut healed, mut parts, mut whole) = (Healed::new(), Vec::new(), None);
        for stage in job.stages {
            match stage {
                HealStage::Blocks => parts = self.blocks(&walk, &pieces, &mut healed, &journal, progress)?,
                HealStage::Model => {
                    let model = WholeModel::new(teacher, (student, &self.trained), job.checkpoint, &walk, progress)?;
                    whole = Some(model.run(&mut healed, &pieces, &of_model(&job.settings), &journal, progress)?);
                }
            }
        }
        let windows: Vec<Vec<u32>> = pieces.held_out.iter().map(|&i| drawn.windows[i].clone()).collect();
        let perplexity =
            held_out::perplexities([teacher, student], job.checkpoint, &healed, &windows, &limits, progress)?;
        let record = HealRecord {
            teacher: job.teacher_name.into(),
            teacher_files: fingerprint(job.teacher)?,
            source_files: fingerprint(job.checkpoint)?,
            texts: drawn.records(),
            trained_windows: pieces.trained.len(),
            held_out_windows: pieces.held_out.len(),
            held_out_text: drawn.held_out_record(),
            trained: job.train.name().into(),
            distance: job.distance().name().into(),
            epochs: job.settings.epochs,
            batch: job.settings.batch,
            learning_rate: job.settings.learning_rate,
            seed: job.settings.seed,
            parameters: healed.values().map(|values| values.len() as u64).sum(),
            parts,
            model: whole,
            perplexity,
        };
        report.healed = Some(record);
        output::write(job, &healed, self.format, &mut report, folder, self.started)?;
        Ok(report)
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
            Some(statistics) => Metrics::of(statistics, teacher, &job.device)?,
            None => Metrics::default(),
        };
        let halves = Halves {
            teacher,
            student,
            trained: &self.trained,
            checkpoint: job.checkpoint,
            walk,
            pieces,
            settings: &job.settings,
            metrics: &metrics,
            journal,
        };
        halves.run(healed, progress)
    }
}
