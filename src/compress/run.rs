//! A run of a job: what is known of it before any work, its folder, and how it stops.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde_json::Value;

use super::inputs::Inputs;
use super::job::Job;
use super::plan::Plan;
use super::record;
use crate::calibrate::Statistics;
use crate::checkpoint::{Fingerprint, OutputFolder};
use crate::error::Failure;
use crate::formats::Source;
use crate::heal::expect_enough;
use crate::model::fingerprint;
use crate::progress::Progress;
use crate::report::REPORT_FILE;
use crate::session::Session;
use crate::store::Journal;

/// A compression whose inputs have been checked.
pub(super) struct Run<'a> {
    pub job: &'a Job<'a>,
    pub plan: Plan,
    pub source: Source<'a>,
    pub inputs: Inputs,
    pub source_files: Fingerprint,
    pub started: Instant,
    /// What the keys of its pieces begin with.
    pieces: &'static str,
}

impl<'a> Run<'a> {
    pub fn new(job: &'a Job<'a>) -> Result<Self> {
        job.check_output()?;
        Self::checked(job, "", fingerprint(job.checkpoint)?)
    }

    /// The run on a model that another run made narrower, with its pieces in the same folder, and statistics of it.
    pub fn of_narrowed(job: &'a Job<'a>, statistics: Option<Statistics>) -> Result<Self> {
        let mut run = Self::checked(job, "narrowed-", Fingerprint::new())?;
        // Those that are kept are of the source.
        run.inputs.kept_in = None;
        run.inputs.statistics = run.inputs.statistics.or(statistics);
        Ok(run)
    }

    fn checked(job: &'a Job<'a>, pieces: &'static str, source_files: Fingerprint) -> Result<Self> {
        let started = Instant::now();
        let (checkpoint, recipe) = (job.checkpoint, job.recipe);
        if recipe.is_residual() != checkpoint.changes().is_some() {
            return Err(Failure::usage(
                "`format = \"adapter\"` is only valid in `lrc delta`, which compares two models",
            )
            .hint("`lrc delta BASE FINE-TUNED -o OUT --target-size 50MiB`; other formats store a model")
            .into());
        }
        let plan = Plan::new(checkpoint, recipe)?;
        let source = Source::new(checkpoint);
        plan.check_format(&source, recipe)?;
        let mut inputs = Inputs::load(job.model(), recipe, &plan)?;
        if let Some(windows) = inputs.windows.as_ref().filter(|_| recipe.heals()) {
            expect_enough(&format!("`{}`", windows.text), windows.windows.len())?;
        }
        inputs.kept_in = job.keep_statistics.map(Path::to_path_buf);
        Ok(Self { job, plan, source, inputs, source_files, started, pieces })
    }

    /// The run of a task, or of the plan of its tasks: its folder is no output.
    pub fn of_task(job: &'a Job<'a>, source_files: Fingerprint) -> Result<Self> {
        Self::checked(job, "", source_files)
    }

    /// What identifies the job.
    pub fn description(&self) -> Result<Value> {
        record::job(self.job, &self.source_files, &self.inputs)
    }

    /// The folder of its output, with what an earlier run of the same job has finished. A full disk is reported before
    /// any work.
    pub fn folder(&self) -> Result<OutputFolder> {
        let job = self.job;
        let folder = OutputFolder::resume(job.output, job.existing, REPORT_FILE, &self.description()?, job.earlier)?;
        folder.require_space(self.disk_bytes())?;
        Ok(folder)
    }

    /// Reports a full disk without beginning the folder.
    pub fn check_space(&self) -> Result<()> {
        Ok(OutputFolder::check_space(self.job.output, self.disk_bytes())?)
    }

    /// Bytes on disk while it runs, for pieces of its work and the least output.
    pub fn disk_bytes(&self) -> u64 {
        let (checkpoint, recipe) = (self.job.checkpoint, self.job.recipe);
        let part = self.inputs.windows.as_ref().map(|windows| &windows.part);
        let tokens = part.map_or((0, 0), |part| (part.tokens, part.with_gradients().tokens));
        let least = if recipe.is_residual() { 0 } else { self.plan.least_output_bytes(checkpoint) };
        least + self.plan.kept_bytes(checkpoint, recipe, tokens)
    }

    /// The session of a run in `folder`, with the pieces of finished tasks.
    ///
    /// # Errors
    /// The folder of a task cannot be read.
    pub fn session<'s>(&self, folder: &OutputFolder, progress: &'s dyn Progress) -> Result<Session<'s>>
    where
        'a: 's,
    {
        let job = self.job;
        let journal = Journal::new(folder.pieces()).within(self.pieces).with_pieces_of(job.tasks)?;
        let session = Session::new(job.checkpoint, &job.device, job.memory_bytes, folder.work(), journal, progress);
        Ok(session.running(job.model()))
    }
}
