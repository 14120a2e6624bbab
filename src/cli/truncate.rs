//! `lrc truncate`.

use std::path::Path;

use anyhow::Result;
use clap::{Arg, Args};

use super::arguments::{FolderArgs, JsonArgs, ModelArgs, RevisionArgs, at_least_1};
use super::compress::show;
use super::options::{Options, Selection};
use super::streams::{print, print_json};
use super::terminal::{Bars, grouped, table};
use crate::compress::recipe;
use crate::error::Failure;
use crate::report::{AdapterReport, TruncatedModule};
use crate::truncate::{AdapterJob, AdapterSize, TruncateJob, is_adapter, truncate, truncate_adapter};

/// Make a compressed model or an adapter smaller, without its source
///
/// Trailing ranks go where the stored error curves lose least. It is exact for
/// the factors layout and for pivots compressed with `--elastic`; other pivots
/// are refactored in a diagonal approximation of their metric. Over codes the
/// factors get smaller ranks, and the codes stay. Outputs of
/// `--structure narrow --elastic` become narrower, and are what their source
/// gives at that size, but for rounding. The factors of a LoRA adapter (a folder
/// of PEFT, or a file of kohya or diffusers) are decomposed again.
///
/// Examples:
///   lrc truncate COMPRESSED -o OUT --keep 0.7
///   lrc truncate ADAPTER -o OUT --rank 8
///   lrc truncate ADAPTER -o OUT --energy 0.9
///   lrc truncate lora.safetensors -o small.safetensors --target-size 20MiB
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, mut_arg("model", |model| model.help(MODEL)))]
pub(super) struct TruncateArgs {
    #[command(flatten)]
    source: ModelArgs,

    #[command(flatten)]
    revision: RevisionArgs,

    #[command(flatten)]
    options: Options<Sizes>,

    #[command(flatten)]
    adapter: AdapterSizeArgs,

    #[command(flatten)]
    folder: FolderArgs,

    #[command(flatten)]
    json: JsonArgs,
}

const MODEL: &str = "Compressed folder or hub id, or an adapter (folder or `.safetensors` file)";

/// How small an adapter becomes. One size is given, of these or of those that recipes have.
#[derive(Debug, Args)]
#[group(required = true, multiple = false, args = ["keep", "target_size"])]
struct AdapterSizeArgs {
    /// Largest rank of an adapter's factors
    #[arg(long, value_name = "RANK", value_parser = at_least_1, help_heading = "Budget")]
    rank: Option<usize>,

    /// Share of the energy to keep, for adapters
    ///
    /// The energy is the sum of the squared singular values of `B·A`.
    #[arg(long, value_name = "SHARE", help_heading = "Budget")]
    energy: Option<f64>,
}

/// The size of the output, and of its files.
#[derive(Debug)]
struct Sizes;

impl Selection for Sizes {
    fn takes(id: &str) -> bool {
        ["keep", "target_size", "max_shard_size"].contains(&id)
    }

    fn adapt(flag: Arg) -> Arg {
        match flag.get_id().as_str() {
            "keep" => flag.help("Share of the parameters to keep, in (0, 1)").long_help(
                "Share of the parameters to keep, in (0, 1)\n\nFor a compressed checkpoint, a share of the targeted \
                 parameters of its source, of their bytes if it has codes; for an adapter, a share of the parameters of its factors.",
            ),
            "target_size" => flag.help("Size of an adapter's file, never exceeded (`20MiB`)"),
            _ => flag,
        }
    }
}

pub(super) fn run(args: &TruncateArgs, quiet: bool, progress: &Bars) -> Result<()> {
    let (keep, energy) = (args.options.values.keep, args.adapter.energy);
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
    let path = Path::new(&args.source.model);
    if is_adapter(path) {
        return adapter(args, path, quiet, progress);
    }
    let Some(keep) = keep else {
        return Err(Failure::usage(format!(
            "`--rank`, `--energy` and `--target-size` only apply to adapters, and `{}` is not an adapter",
            args.source.model
        ))
        .hint("give `--keep`")
        .into());
    };
    let max_shard_bytes = recipe::max_shard_bytes(&args.options.values)?;
    args.folder.check()?;
    let checkpoint = args.revision.open(&args.source.model, progress)?;
    let job = TruncateJob {
        checkpoint: &checkpoint,
        keep,
        output: args.folder.path(),
        existing: args.folder.existing(),
        max_shard_bytes,
    };
    let report = truncate(&job, progress)?;
    match (args.json.json, quiet) {
        (true, _) => print_json(&report),
        (false, true) => Ok(()),
        (false, false) => print(&show(&report, args.folder.path())),
    }
}

fn adapter(args: &TruncateArgs, path: &Path, quiet: bool, progress: &Bars) -> Result<()> {
    if args.options.values.max_shard_size.is_some() {
        return Err(Failure::usage("`--max-shard-size` has no effect on an adapter, which is one file")
            .hint("remove `--max-shard-size`")
            .into());
    }
    let (factors, sizes) = (&args.adapter, &args.options.values);
    let size = match (factors.rank, factors.energy, sizes.keep, sizes.target_size) {
        (Some(rank), ..) => AdapterSize::OneRank(rank),
        (_, Some(share), ..) => AdapterSize::Energy(share),
        (_, _, Some(share), _) => AdapterSize::Keep(share),
        (.., size) => AdapterSize::Bytes(size.unwrap_or_default().as_u64()),
    };
    let (output, existing) = (args.folder.path(), args.folder.existing());
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
