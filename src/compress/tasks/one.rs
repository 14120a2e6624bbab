//! One task: its share of the pieces of a run.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::super::inputs::observation;
use super::super::job::Job;
use super::super::record;
use super::super::refine;
use super::super::run::Run;
use super::super::sensitivity;
use super::super::solution::Solution;
use super::super::study::Study;
use super::folder::{TASK_FILE, check, expect_same, folder_of, of_index};
use crate::calibrate::Parts;
use crate::checkpoint::{Earlier, Existing, Fingerprint, OutputFolder};
use crate::model::{Decoder, fingerprint, fingerprint_of};
use crate::progress::Progress;
use crate::report::{StageName, TaskPlan, TaskRecord, concluded};

/// Runs a task of the plan in `folder` that is not finished; `job` is the one that was planned. Resumes it where it was
/// killed.
///
/// # Errors
/// There is no such task, a task that it waits for is not finished, the job is another one, or as
/// [`super::super::compress`].
pub fn task(plan: &TaskPlan, folder: &Path, index: usize, job: &Job<'_>, progress: &dyn Progress) -> Result<()> {
    let (task, stage) = of_index(plan, folder, index)?;
    let before = check(plan, folder, index)?;
    let recipe = job.recipe.unhealed();
    let place = folder_of(folder, index);
    let own = Job { recipe: &recipe, output: &place, tasks: &before, ..job.clone() };
    let mut run = Run::of_task(&own, Fingerprint::new())?;
    run.source_files = source_files(plan, task, &run)?;
    expect_same(&record::job(job, &run.source_files, &run.inputs)?, &plan.job, "the source and the texts are of")?;
    let identity = json!({"job": plan.job, "task": task});
    let output = OutputFolder::resume(&place, Existing::Refuse, TASK_FILE, &identity, Earlier::Resumed)?;
    output.require_space(task.written_bytes)?;
    let started = Instant::now();
    let parts = plan.stages.iter().find(|stage| stage.name == StageName::Walk).map_or(0, |stage| stage.tasks);
    let done = work(run, task, index - stage.first, parts, &output, progress).and_then(|()| {
        output.publish_pieces()?;
        sealed(&output, identity, started.elapsed().as_secs_f64())
    });
    concluded(output, done)
}

/// The hashes of the source as they were planned, but for those of the files that the task reads, which are made anew: a
/// large model has many files, and a task reads few blocks.
fn source_files(plan: &TaskPlan, task: &TaskRecord, run: &Run<'_>) -> Result<Fingerprint> {
    let job = run.job;
    let mut files: Fingerprint = serde_json::from_value(plan.job["source_files"].clone()).unwrap_or_default();
    let blocks = match (task.stage, Decoder::open(job.model())) {
        (StageName::Walk, _) | (_, Err(_)) => None,
        (StageName::Statistics, Ok(decoder)) => Some((decoder, task.range[0]..task.range[1])),
        (StageName::Fits | StageName::Round, Ok(decoder)) => {
            let own = run.plan.linears.get(task.range[0]..task.range[1]).unwrap_or_default();
            let all = 0..decoder.n_blocks();
            // Matrices outside of the blocks are anywhere.
            let of_blocks = own.first().zip(own.last()).and_then(|(first, last)| Some(first.block?..last.block? + 1));
            Some((decoder, of_blocks.unwrap_or(all)))
        }
    };
    let Some((decoder, own)) = blocks else {
        files.extend(fingerprint(job.checkpoint)?);
        return Ok(files);
    };
    let others: Vec<String> =
        (0..decoder.n_blocks()).filter(|i| !own.contains(i)).map(|i| decoder.block_name(i) + ".").collect();
    let is_read = |tensor: &str| !others.iter().any(|block| tensor.starts_with(block));
    files.extend(fingerprint_of(job.checkpoint, &is_read)?);
    Ok(files)
}

/// Makes the pieces.
fn work(
    run: Run<'_>,
    task: &TaskRecord,
    part: usize,
    n_parts: usize,
    output: &OutputFolder,
    progress: &dyn Progress,
) -> Result<()> {
    let mut session = run.session(output, progress)?;
    // A run that was killed at its end has moved some of its pieces.
    session.journal = session.journal.with_pieces_of(&[output.path()])?;
    let Run { job, plan, mut inputs, .. } = run;
    let (recipe, [begin, end]) = (job.recipe, task.range);
    if task.stage == StageName::Fits {
        inputs.measure(&session, recipe)?;
        Study::fit(&session, recipe, &plan, inputs, Some(begin..end))?;
        return Ok(());
    }
    if task.stage == StageName::Round {
        inputs.measure(&session, recipe)?;
        let study = Study::fit(&session, recipe, &plan, inputs, Some(0..plan.linears.len()))?;
        let choices = sensitivity::allocate(&study, &sensitivity::of(&study)?, recipe.budget())?.choices;
        let solution = Solution::new(&study, choices, &refine::of(recipe));
        let own: Vec<usize> = solution.compressed().into_iter().filter(|i| (begin..end).contains(i)).collect();
        return solution.settle(&own, progress);
    }
    let decoder = session.decoder()?;
    let windows = inputs.drawn();
    let parts = Parts {
        decoder: &decoder,
        windows: windows.targeted(),
        observation: observation(recipe),
        limits: &session.limits,
        journal: &session.journal,
        progress,
    };
    let made = match task.stage {
        StageName::Walk => parts.walk(part, begin..end),
        _ => (begin..end).try_for_each(|block_idx| parts.sums(block_idx, n_parts)).and_then(|()| {
            // The head and the embeddings go with the last block.
            if end == decoder.n_blocks() { parts.sums_of_vocabulary(n_parts) } else { Ok(()) }
        }),
    };
    made.with_context(|| format!("calibrating on `{}`", windows.text))
}

/// Writes the record of a finished task.
fn sealed(output: &OutputFolder, mut identity: Value, seconds: f64) -> Result<()> {
    identity["seconds"] = json!(seconds);
    output.write(TASK_FILE, (serde_json::to_string_pretty(&identity)? + "\n").as_bytes())?;
    Ok(())
}
