//! `lrc finish`.

use anyhow::Result;
use clap::Args;

use super::arguments::{FolderArgs, GateArgs, RestartArgs};
use super::compress::{absent, show};
use super::plan::PlannedArgs;
use super::terminal::Bars;
use crate::checkpoint::expect_apart;
use crate::compress::Job;
use crate::compress::tasks;
use crate::report::{CompressReport, gate};

/// Make the output of a plan, after all of its tasks
///
/// Allocates ranks and bits, and writes: the same bytes as `lrc compress` with the
/// arguments of the plan. PLAN is not needed any more after that.
///
/// Examples:
///   lrc finish PLAN -o OUT
///   lrc finish PLAN -o OUT --fail-if 'linear.max_error > 0.5'
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct FinishArgs {
    #[command(flatten)]
    planned: PlannedArgs,

    #[command(flatten)]
    folder: FolderArgs,

    #[command(flatten)]
    restart: RestartArgs,

    #[command(flatten)]
    gates: GateArgs,
}

pub(super) fn run(args: &FinishArgs, quiet: bool, progress: &Bars) -> Result<()> {
    let folder = args.planned.folder();
    let plan = tasks::read(folder)?;
    tasks::check_all(&plan, folder)?;
    args.folder.check()?;
    expect_apart(args.folder.path(), [folder])?;
    let planned = args.planned.open(&plan, progress)?;
    gate::expect_fields::<CompressReport>(&args.gates.fail_if, &absent(&planned.recipe))?;
    let job = planned.job(&plan, args.folder.path())?;
    let job = Job { existing: args.folder.existing(), earlier: args.restart.earlier(), ..job };
    let report = tasks::finish(&plan, folder, &job, progress)?;
    let show = |report: &CompressReport| if quiet { String::new() } else { show(report, args.folder.path()) };
    args.gates.conclude(&report, show)
}
