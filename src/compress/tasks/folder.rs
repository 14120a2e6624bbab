//! The folder of a plan: `plan.json`, and a folder for each task, which appears when the task is finished.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::checkpoint::differences;
use crate::error::{ExitClass, Failure};
use crate::report::{LRC_VERSION, StageName, StageRecord, TaskPlan, TaskRecord};

/// The plan.
pub const PLAN_FILE: &str = "plan.json";
/// The record of a task; it marks a finished one.
pub(super) const TASK_FILE: &str = "task.json";

/// The folder of a task.
pub(super) fn folder_of(plan: &Path, index: usize) -> PathBuf {
    plan.join(format!("task-{index:04}"))
}

/// Reads the plan in a folder.
///
/// # Errors
/// There is none, or another version of lrc wrote it.
pub fn read(folder: &Path) -> Result<TaskPlan> {
    let path = folder.join(PLAN_FILE);
    let shown = path.display();
    let remake = "`lrc plan MODEL ... -o PLAN` writes one";
    if !path.is_file() {
        return Err(Failure::usage(format!("`{}` has no plan: there is no `{shown}`", folder.display()))
            .hint(remake)
            .into());
    }
    let bytes = std::fs::read(&path).with_context(|| format!("reading `{shown}`"))?;
    let fault = |reason: String| {
        Failure::unsupported(format!("`{shown}` is not a plan of this version: {reason}")).hint(remake)
    };
    let plan: TaskPlan = serde_json::from_slice(&bytes).map_err(|error| fault(error.to_string()))?;
    if plan.lrc_version != LRC_VERSION {
        return Err(fault(format!("lrc {} wrote it, and this is {LRC_VERSION}", plan.lrc_version)).into());
    }
    Ok(plan)
}

/// Whether a task is finished.
///
/// # Errors
/// Its folder belongs to another job.
pub fn is_finished(plan: &TaskPlan, folder: &Path, index: usize) -> Result<bool> {
    let path = folder_of(folder, index).join(TASK_FILE);
    if !path.is_file() {
        return Ok(false);
    }
    let bytes = std::fs::read(&path).with_context(|| format!("reading `{}`", path.display()))?;
    let record: Value = serde_json::from_slice(&bytes).with_context(|| format!("reading `{}`", path.display()))?;
    expect_same(&record["job"], &plan.job, &format!("task {index} was run for"))?;
    Ok(true)
}

/// Refuses a job other than the one of a plan.
///
/// # Errors
/// They differ; the error names the fields.
pub(super) fn expect_same(found: &Value, expected: &Value, what: &str) -> Result<()> {
    match differences(expected, found) {
        None => Ok(()),
        Some(differences) => Err(Failure::unsupported(format!("{what} another job than the plan's: {differences}"))
            .hint("give the source and the text that were planned, or plan again in another folder")
            .into()),
    }
}

/// The folders of the tasks of some stages.
///
/// # Errors
/// Some are not finished; `what` is what needs them.
fn expect_finished(plan: &TaskPlan, folder: &Path, stages: &[StageName], what: &str) -> Result<Vec<PathBuf>> {
    let (mut folders, mut missing) = (Vec::new(), Vec::new());
    for task in plan.tasks.iter().filter(|task| stages.contains(&task.stage)) {
        match is_finished(plan, folder, task.index)? {
            true => folders.push(folder_of(folder, task.index)),
            false => missing.push(task.index),
        }
    }
    let Some(first) = missing.first() else { return Ok(folders) };
    let n = missing.len();
    let tasks = if n == 1 { "a task that is not finished".into() } else { format!("{n} tasks that are not finished") };
    let hint = format!("run them first: `lrc task {} --index {first}`", folder.display());
    Err(Failure::new(ExitClass::Resources, format!("{what} waits for {tasks}: {}", listed(&missing))).hint(hint).into())
}

/// Checks that a task exists and that those that it waits for are finished, and returns their folders.
///
/// # Errors
/// There is no such task, or some are not finished.
pub fn check(plan: &TaskPlan, folder: &Path, index: usize) -> Result<Vec<PathBuf>> {
    let (_, stage) = of_index(plan, folder, index)?;
    expect_finished(plan, folder, &stage.waits_for, &format!("task {index} of stage `{}`", stage.name.name()))
}

/// Checks that all tasks are finished whose pieces the end reads, and returns their folders.
///
/// # Errors
/// Some are not.
pub fn check_all(plan: &TaskPlan, folder: &Path) -> Result<Vec<PathBuf>> {
    // Nothing of the first stage is read once there are sums.
    let read = [StageName::Statistics, StageName::Fits, StageName::Round];
    expect_finished(plan, folder, &read, "the end")
}

/// A task and its stage.
///
/// # Errors
/// There is no such task.
pub(super) fn of_index<'p>(
    plan: &'p TaskPlan,
    folder: &Path,
    index: usize,
) -> Result<(&'p TaskRecord, &'p StageRecord)> {
    let task = plan.tasks.get(index);
    let stage = task.and_then(|task| plan.stages.iter().find(|stage| stage.name == task.stage));
    if let Some(found) = task.zip(stage) {
        return Ok(found);
    }
    let last = plan.tasks.len().saturating_sub(1);
    Err(Failure::usage(format!("`--index {index}` is no task of the plan in `{}`", folder.display()))
        .hint(format!("its tasks are 0 to {last}; `lrc finish` is the last step"))
        .into())
}

/// Indices as `0, 2-5`.
fn listed(indices: &[usize]) -> String {
    let runs = indices.chunk_by(|a, b| a + 1 == *b);
    let shown = |run: &[usize]| match run {
        [first, .., last] => format!("{first}-{last}"),
        one => one.iter().map(usize::to_string).collect(),
    };
    runs.map(shown).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_listed_as_schedulers_take_them() {
        assert_eq!(listed(&[0, 2, 3, 4, 5, 9]), "0, 2-5, 9");
        assert_eq!(listed(&[7]), "7");
    }
}
