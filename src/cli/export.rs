//! `lrc export`.

use anyhow::Result;
use clap::{Arg, Args};

use super::arguments::{FolderArgs, JsonArgs, SourceArgs};
use super::compress::left_out;
use super::options::{Options, Selection};
use super::streams::{print, print_json};
use super::terminal::{Bars, grouped};
use crate::compress::recipe;
use crate::export::{ExportJob, export};

/// Convert a compressed checkpoint to another format, without recompressing
///
/// Codes and factors are kept as they are; a format that cannot store them is
/// refused. `--format dense` multiplies factors out and dequantizes.
///
/// Examples:
///   lrc export COMPRESSED --format dense -o OUT
///   lrc export COMPRESSED --format gguf -o OUT
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    model: SourceArgs,

    #[command(flatten)]
    options: Options<Target>,

    #[command(flatten)]
    folder: FolderArgs,

    #[command(flatten)]
    json: JsonArgs,
}

/// The format, which has to be given, and the size of its files.
#[derive(Debug)]
struct Target;

impl Selection for Target {
    fn takes(id: &str) -> bool {
        ["format", "max_shard_size"].contains(&id)
    }

    fn adapt(flag: Arg) -> Arg {
        if flag.get_id() == "format" { flag.required(true).help("Format of the output") } else { flag }
    }
}

pub(super) fn run(args: &ExportArgs, quiet: bool, progress: &Bars) -> Result<()> {
    let options = &args.options.values;
    let max_shard_bytes = recipe::max_shard_bytes(options)?;
    args.folder.check()?;
    let checkpoint = args.model.open(progress)?;
    let job = ExportJob {
        checkpoint: &checkpoint,
        source: args.model.model(),
        format: options.format.expect("invariant: `--format` is required"),
        output: args.folder.path(),
        existing: args.folder.existing(),
        max_shard_bytes,
    };
    let report = export(&job, progress)?;
    if args.json.json {
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
        args.folder.path().display(),
        report.elapsed_seconds
    ))
}
