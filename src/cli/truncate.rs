//! `lrc truncate`.

use anyhow::Result;
use clap::Args;

use super::arguments::{FolderArgs, JsonArgs, ModelArgs};
use super::compress::show;
use super::options::{Options, Selection};
use super::streams::{print, print_json};
use super::terminal::Bars;
use crate::compress::recipe;
use crate::error::Failure;
use crate::truncate::{TruncateJob, truncate};

/// Reduce the ranks of a compressed checkpoint, without its source
///
/// Drops trailing ranks where the stored error curves lose least. Exact for the
/// factors layout and for pivots compressed with `--elastic`; other pivots are
/// refactored in a diagonal approximation of their metric.
///
/// Examples:
///   lrc truncate COMPRESSED -o OUT --keep 0.7
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct TruncateArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Share of the targeted parameters to keep, in (0, 1)
    ///
    /// A share of the parameters of the source.
    #[arg(long, value_name = "SHARE", help_heading = "Budget")]
    keep: f64,

    #[command(flatten)]
    options: Options<Shards>,

    #[command(flatten)]
    folder: FolderArgs,

    #[command(flatten)]
    json: JsonArgs,
}

/// The size of the output's files.
#[derive(Debug)]
struct Shards;

impl Selection for Shards {
    fn takes(id: &str) -> bool {
        id == "max_shard_size"
    }
}

pub(super) fn run(args: &TruncateArgs, quiet: bool, progress: &Bars) -> Result<()> {
    if !(args.keep > 0.0 && args.keep < 1.0) {
        return Err(Failure::usage(format!("`--keep {}` is outside (0, 1)", args.keep))
            .hint("give a share, for example 0.7")
            .into());
    }
    let max_shard_bytes = recipe::max_shard_bytes(&args.options.values)?;
    args.folder.check()?;
    let checkpoint = args.model.open(progress)?;
    let job = TruncateJob {
        checkpoint: &checkpoint,
        keep: args.keep,
        output: &args.folder.output,
        force: args.folder.force,
        max_shard_bytes,
    };
    let report = truncate(&job, progress)?;
    match (args.json.json, quiet) {
        (true, _) => print_json(&report),
        (false, true) => Ok(()),
        (false, false) => print(&show(&report, &args.folder.output)),
    }
}
