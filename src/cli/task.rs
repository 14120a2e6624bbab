//! `lrc task`.

use anyhow::Result;
use clap::Args;

use super::plan::PlannedArgs;
use super::streams::print;
use super::terminal::Bars;
use crate::compress::tasks;

/// Run one task of a plan
///
/// A finished task exits at once, and a killed one resumes. A task that waits for
/// others which are not finished names them and exits with 6.
///
/// Examples:
///   lrc task PLAN --index 0
///   lrc task PLAN --index $SLURM_ARRAY_TASK_ID
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct TaskArgs {
    #[command(flatten)]
    planned: PlannedArgs,

    /// Index of the task, from 0
    #[arg(long, value_name = "K")]
    index: usize,
}

pub(super) fn run(args: &TaskArgs, quiet: bool, progress: &Bars) -> Result<()> {
    let folder = args.planned.folder();
    let plan = tasks::read(folder)?;
    let say = |what: &str| if quiet { Ok(()) } else { print(&format!("task {} {what}\n", args.index)) };
    if tasks::is_finished(&plan, folder, args.index)? {
        return say("was finished before");
    }
    tasks::check(&plan, folder, args.index)?;
    let planned = args.planned.open(&plan, progress)?;
    tasks::task(&plan, folder, args.index, &planned.job(&plan, folder)?, progress)?;
    say("is finished")
}
