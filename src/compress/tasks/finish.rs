//! The end of a run in tasks.

use std::path::Path;

use anyhow::Result;

use super::super::compress;
use super::super::job::Job;
use super::super::run::Run;
use super::folder::{check_all, expect_same};
use crate::progress::Progress;
use crate::report::{CompressReport, TaskPlan};

/// Makes the output of a plan, all tasks of which are finished, as [`compress`] of `job` would. Resumes an interrupted
/// run.
///
/// # Errors
/// Some task is not finished, the job is another one, or as [`compress`].
pub fn finish(plan: &TaskPlan, folder: &Path, job: &Job<'_>, progress: &dyn Progress) -> Result<CompressReport> {
    let tasks = check_all(plan, folder)?;
    let job = Job { tasks: &tasks, ..job.clone() };
    expect_same(&Run::new(&job)?.description()?, &plan.job, "the source and the texts are of")?;
    compress(&job, progress)
}
