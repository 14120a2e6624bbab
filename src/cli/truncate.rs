//! `lrc truncate`.

use std::path::Path;

use anyhow::Result;
use bytesize::ByteSize;
use clap::Args;

use super::arguments::{FolderArgs, JsonArgs, RevisionArgs, at_least_1};
use super::compress::show;
use super::options::{Options, Selection};
use super::streams::{print, print_json};
use super::terminal::{Bars, grouped, table};
use crate::compress::options::size;
use crate::compress::recipe;
use crate::error::Failure;
use crate::report::{AdapterReport, TruncatedModule};
use crate::truncate::{AdapterJob, AdapterSize, TruncateJob, is_adapter, truncate, truncate_adapter};

/// Reduce the ranks of a compressed checkpoint or of an adapter
///
/// It needs no source, and drops trailing ranks where the stored error curves
/// lose least. It is exact for the factors layout and for pivots compressed with
/// `--elastic`; other pivots are refactored in a diagonal approximation of their
/// metric. The factors of a LoRA adapter (a folder of PEFT, or a file of kohya
/// or diffusers) are decomposed again.
///
/// Examples:
///   lrc truncate COMPRESSED -o OUT --keep 0.7
///   lrc truncate ADAPTER -o OUT --rank 8
///   lrc truncate ADAPTER -o OUT --energy 0.9
///   lrc truncate lora.safetensors -o small.safetensors --target-size 20MiB
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct TruncateArgs {
    /// Compressed folder or hub id, or an adapter (folder or `.safetensors` file)
    model: String,

    #[command(flatten)]
    revision: RevisionArgs,

    #[command(flatten)]
    size: SizeArgs,

    #[command(flatten)]
    options: Options<Shards>,

    #[command(flatten)]
    folder: FolderArgs,

    #[command(flatten)]
    json: JsonArgs,
}

/// How small the output becomes.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SizeArgs {
    /// Share of the parameters to keep, in (0, 1)
    ///
    /// For a compressed checkpoint, a share of the targeted parameters of its source; for an adapter, a share of the
    /// parameters of its factors.
    #[arg(long, value_name = "SHARE", help_heading = "Budget")]
    keep: Option<f64>,

    /// Largest rank of an adapter's factors
    #[arg(long, value_name = "RANK", value_parser = at_least_1, help_heading = "Budget")]
    rank: Option<usize>,

    /// Share of the energy to keep, for adapters
    ///
    /// The energy is the sum of the squared singular values of `B·A`.
    #[arg(long, value_name = "SHARE", help_heading = "Budget")]
    energy: Option<f64>,

    /// Size of an adapter's file, never exceeded (`20MiB`)
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Budget")]
    target_size: Option<ByteSize>,
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
    let (keep, energy) = (args.size.keep, args.size.energy);
    if let Some(keep) = keep.filter(|&keep| !(keep > 0.0 && keep < 1.0)) {
        return Err(Failure::usage(format!("`--keep {keep}` is outside (0, 1)"))
            .hint("give a share, for example 0.7")
            .into());
    }
    if let Some(energy) = energy.filter(|&energy| !(energy > 0.0 && energy <= 1.0)) {
        return Err(Failure::usage(format!("`--energy {energy}` is outside (0, 1]"))
            .hint("give a share, for example 0.9")
            .into());
    }
    let path = Path::new(&args.model);
    if is_adapter(path) {
        return adapter(args, path, quiet, progress);
    }
    let Some(keep) = keep else {
        return Err(Failure::usage(format!(
            "`--rank`, `--energy` and `--target-size` only apply to adapters, and `{}` is not an adapter",
            args.model
        ))
        .hint("give `--keep`")
        .into());
    };
    let max_shard_bytes = recipe::max_shard_bytes(&args.options.values)?;
    args.folder.check()?;
    let checkpoint = args.revision.open(&args.model, progress)?;
    let job = TruncateJob {
        checkpoint: &checkpoint,
        keep,
        output: &args.folder.output,
        existing: args.folder.existing(),
        max_shard_bytes,
    };
    let report = truncate(&job, progress)?;
    match (args.json.json, quiet) {
        (true, _) => print_json(&report),
        (false, true) => Ok(()),
        (false, false) => print(&show(&report, &args.folder.output)),
    }
}

fn adapter(args: &TruncateArgs, path: &Path, quiet: bool, progress: &Bars) -> Result<()> {
    if args.options.values.max_shard_size.is_some() {
        return Err(Failure::usage("`--max-shard-size` has no effect on an adapter, which is one file")
            .hint("remove `--max-shard-size`")
            .into());
    }
    let given = &args.size;
    let size = match (given.rank, given.energy, given.keep, given.target_size) {
        (Some(rank), ..) => AdapterSize::OneRank(rank),
        (_, Some(share), ..) => AdapterSize::Energy(share),
        (_, _, Some(share), _) => AdapterSize::Keep(share),
        (.., size) => AdapterSize::Bytes(size.unwrap_or_default().as_u64()),
    };
    let (output, existing) = (args.folder.output.as_path(), args.folder.existing());
    let report = truncate_adapter(&AdapterJob { adapter: path, size, output, existing }, progress)?;
    match (args.json.json, quiet) {
        (true, _) => print_json(&report),
        (false, true) => Ok(()),
        (false, false) => print(&show_adapter(&report, output)),
    }
}

fn show_adapter(report: &AdapterReport, output: &Path) -> String {
    let row = |module: &TruncatedModule| {
        vec![
            module.module.clone(),
            format!("{}×{}", module.shape[0], module.shape[1]),
            module.rank_before.to_string(),
            module.rank.to_string(),
            format!("{:.4}", module.relative_error),
        ]
    };
    format!(
        "{}relative error of all: {:.4}\nbytes: {} before, {} after\nwrote `{}` in {:.1} s\n",
        table(&["module", "shape", "rank before", "rank", "rel. error"], report.modules.iter().map(row).collect()),
        report.relative_error,
        grouped(report.size_bytes_before),
        grouped(report.size_bytes),
        output.display(),
        report.elapsed_seconds
    )
}
