//! `lrc truncate`.

use std::path::PathBuf;

use anyhow::Result;
use bytesize::ByteSize;
use clap::Args;

use super::compress::show;
use super::terminal::Bars;
use super::{ModelArgs, print, print_json};
use crate::checkpoint::{Existing, OutputFolder};
use crate::compress::recipe::DEFAULT_SHARD_BYTES;
use crate::error::Failure;
use crate::report::REPORT_FILE;
use crate::truncate::{TruncateJob, truncate};

/// Reduce the ranks of a compressed checkpoint, without its source
///
/// Drops trailing ranks where the stored error curves lose least. Exact for the factors layout and for pivots compressed
/// with `--elastic`; other pivots are refactored in a diagonal approximation of their metric.
///
/// Examples:
///   lrc truncate COMPRESSED -o OUT --keep 0.7
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct TruncateArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Share of the targeted parameters of the source to keep, in (0, 1)
    #[arg(long, value_name = "SHARE", help_heading = "Budget")]
    keep: f64,

    /// Output folder
    #[arg(short, long, value_name = "OUT", help_heading = "Output")]
    output: PathBuf,

    /// Largest size of an output file (`500MB`, `2GiB`) [default: 4GB]
    #[arg(long, value_name = "SIZE", help_heading = "Output")]
    max_shard_size: Option<ByteSize>,

    /// Replace an output folder written by an earlier run
    #[arg(long, help_heading = "Output")]
    force: bool,

    /// Print the report as JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
}

pub(super) fn run(args: &TruncateArgs, quiet: bool, progress: &Bars) -> Result<()> {
    if !(args.keep > 0.0 && args.keep < 1.0) {
        return Err(Failure::usage(format!("`--keep {}` is outside (0, 1)", args.keep)).into());
    }
    // Before a model is downloaded.
    OutputFolder::check(&args.output, Existing::of(args.force), REPORT_FILE)?;
    let checkpoint = args.model.open(progress)?;
    let job = TruncateJob {
        checkpoint: &checkpoint,
        keep: args.keep,
        output: &args.output,
        force: args.force,
        max_shard_bytes: args.max_shard_size.map_or(DEFAULT_SHARD_BYTES, |s| s.as_u64().max(1)),
    };
    let report = truncate(&job, progress)?;
    match (args.json, quiet) {
        (true, _) => print_json(&report),
        (false, true) => Ok(()),
        (false, false) => print(&show(&report, &args.output)),
    }
}
