//! Healing as the last stage of a compression: the compressed model, whole in the work folder, is the student.

use std::path::PathBuf;

use anyhow::Result;

use super::job::Job;
use super::recipe::Recipe;
use super::record;
use super::run::Run;
use crate::checkpoint::{Earlier, Existing, OutputFolder};
use crate::heal::{HealJob, SAVE_STEPS, Train, WeightedText, heal_into};
use crate::model;
use crate::progress::Progress;
use crate::report::{CompressReport, REPORT_FILE, concluded};
use crate::train::Settings;

/// A compression without healing.
type Compress<'a> = &'a dyn Fn(&Job<'_>) -> Result<CompressReport>;

/// The compression that precedes a healing, with its output among the pieces of the whole.
pub(super) struct Before {
    recipe: Recipe,
    output: PathBuf,
    statistics: PathBuf,
}

impl Before {
    /// The compression that precedes a healing in `folder`; `None` if the recipe has none.
    pub fn of(recipe: &Recipe, folder: &OutputFolder) -> Option<Self> {
        let path = |name: &str| folder.pieces().join(name);
        let (output, statistics) = (path("compressed"), path("statistics.safetensors"));
        recipe.heals().then(|| Self { recipe: recipe.unhealed(), output, statistics })
    }

    /// It as a job. It keeps its statistics, if it measures what healing uses.
    pub fn job<'a>(&'a self, whole: &Job<'a>) -> Job<'a> {
        let is_kept = self.recipe.measures_statistics() && self.recipe.needs().output_gram;
        Job {
            recipe: &self.recipe,
            output: &self.output,
            existing: Existing::Refuse,
            earlier: Earlier::Resumed,
            keep_statistics: is_kept.then_some(&self.statistics),
            ..whole.clone()
        }
    }
}

/// Compresses with `compress`, and heals. Resumes an interrupted run in either.
///
/// # Errors
/// As `compress` and [`crate::heal::heal`].
pub(super) fn run(job: &Job<'_>, compress: Compress<'_>, progress: &dyn Progress) -> Result<CompressReport> {
    let folder = Run::new(job)?.folder()?;
    let done = into_folder(job, compress, &folder, progress);
    concluded(folder, done)
}

fn into_folder(
    job: &Job<'_>,
    compress: Compress<'_>,
    folder: &OutputFolder,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    let before = Before::of(job.recipe, folder).expect("invariant: the recipe heals");
    let first = before.job(job);
    if !first.output.join(REPORT_FILE).is_file() {
        compress(&first)?;
    }
    let Settings { epochs, batch, .. } = Settings::default();
    let windows = job.recipe.calibration().expect("invariant: a recipe that heals has a text").clone();
    let student = model::open(first.output)?;
    let statistics = first.keep_statistics.or(job.recipe.statistics());
    let healing = HealJob {
        checkpoint: &student,
        teacher: job.model(),
        teacher_name: job.source,
        stages: job.recipe.heal_stages(),
        texts: &[WeightedText { path: windows.text.clone(), weight: 1.0 }],
        held_out: None,
        train: Train::All,
        labels: 0.0,
        epochs,
        batch,
        learning_rate: None,
        windows,
        loss: None,
        statistics: statistics.filter(|_| job.recipe.needs().output_gram),
        save_steps: SAVE_STEPS,
        output: job.output,
        existing: job.existing,
        earlier: job.earlier,
        memory_bytes: job.memory_bytes,
        device: job.device.clone(),
    };
    heal_into(&healing, folder, record::recipe(job.recipe), progress)
}
