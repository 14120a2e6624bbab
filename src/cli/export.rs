//! `lrc export`.

use std::path::PathBuf;

use anyhow::Result;
use bytesize::ByteSize;
use clap::Args;

use super::compress::left_out;
use super::terminal::{Bars, grouped};
use super::{ModelArgs, print, print_json};
use crate::checkpoint::{Existing, OutputFolder};
use crate::export::{ExportJob, export};
use crate::formats::Format;
use crate::report::REPORT_FILE;

/// Convert a compressed checkpoint to another format, without recompressing
///
/// Codes and factors are kept as they are; a format that cannot store them is refused.
/// `--format dense` multiplies factors out and dequantizes.
///
/// Examples:
///   lrc export COMPRESSED --format dense -o OUT
///   lrc export COMPRESSED --format gguf -o OUT
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Output folder
    #[arg(short, long, value_name = "OUT", help_heading = "Output")]
    output: PathBuf,

    /// Format of the output
    #[arg(long, value_enum, help_heading = "Output")]
    format: Format,

    /// Largest size of an output file (`500MB`, `2GiB`)
    #[arg(long, value_name = "SIZE", default_value = "4GB", help_heading = "Output")]
    max_shard_size: ByteSize,

    /// Replace an output folder written by an earlier run
    #[arg(long, help_heading = "Output")]
    force: bool,

    /// Print the report as JSON
    #[arg(long, help_heading = "Output")]
    json: bool,
}

pub(super) fn run(args: &ExportArgs, quiet: bool, progress: &Bars) -> Result<()> {
    // Before a model is downloaded.
    OutputFolder::check(&args.output, Existing::of(args.force), REPORT_FILE)?;
    let checkpoint = args.model.open(progress)?;
    let job = ExportJob {
        checkpoint: &checkpoint,
        source: &args.model.model,
        format: args.format,
        output: &args.output,
        force: args.force,
        max_shard_bytes: args.max_shard_size.as_u64().max(1),
    };
    let report = export(&job, progress)?;
    if args.json {
        return print_json(&report);
    }
    if quiet {
        return Ok(());
    }
    print(&format!(
        "{} linears stored as {}; bytes of tensors: {} before, {} after\n{}wrote `{}` in {:.1} s\n",
        report.linears.len(),
        report.format,
        grouped(report.bytes_before),
        grouped(report.bytes_after),
        left_out(&report.left_out),
        args.output.display(),
        report.elapsed_seconds
    ))
}
