//! `lrc delta`.

use anyhow::Result;
use clap::{Arg, Args};

use super::arguments::{DeviceArgs, FolderArgs, GateArgs, MemoryArgs, RestartArgs, RevisionArgs, open};
use super::compress::show;
use super::options::{Options, RecipeFile, Selection};
use super::terminal::Bars;
use crate::compress::delta::{self, Others};
use crate::compress::{Job, compress};
use crate::report::{CompressReport, DeltaRecord, gate};

/// Extract a fine-tune as a PEFT adapter of its base
///
/// Approximates the difference of two models by low-rank factors, with ranks
/// chosen for each matrix. With a text or statistics of the fine-tuned model,
/// directions that its inputs use count more. Changed tensors that are not
/// linears are stored whole.
///
/// Examples:
///   lrc delta BASE FINE-TUNED -o ADAPTER --target-size 50MiB
///   lrc delta BASE FINE-TUNED -o ADAPTER --keep 0.05 --calibration text.txt
///   lrc delta BASE FINE-TUNED -o ADAPTER --ranks fixed:16
///   lrc eval BASE --adapter ADAPTER --reference FINE-TUNED --text text.txt
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct DeltaArgs {
    /// The model that was fine-tuned: a folder, a file, or a hub id
    base: String,

    /// The fine-tuned model
    #[arg(value_name = "FINE-TUNED")]
    fine_tuned: String,

    /// Changed norms, embeddings and biases
    #[arg(long, value_enum, default_value_t, value_name = "WHAT", help_heading = "Model")]
    others: Others,

    #[command(flatten)]
    revision: RevisionArgs,

    #[command(flatten)]
    options: Options<Residual>,

    #[command(flatten)]
    recipe: RecipeFile,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    folder: FolderArgs,

    #[command(flatten)]
    restart: RestartArgs,

    #[command(flatten)]
    gates: GateArgs,
}

/// The options that have a meaning for a difference.
#[derive(Debug)]
struct Residual;

impl Selection for Residual {
    fn takes(id: &str) -> bool {
        const TAKEN: [&str; 21] = [
            "keep",
            "target_size",
            "method",
            "quant_factors",
            "ranks",
            "sensitivity",
            "depth_weight",
            "rank_floor",
            "rank_multiple",
            "targets",
            "exclude",
            "calibration",
            "field",
            "statistics",
            "damping_input",
            "damping_output",
            "clip_gradients",
            "samples",
            "gradient_samples",
            "seq_len",
            "seed",
        ];
        TAKEN.contains(&id)
    }

    /// With the defaults for a difference.
    fn adapt(flag: Arg) -> Arg {
        match flag.get_id().as_str() {
            "method" => flag.long_help(
                "Approximation method [default: kfac or svd]\n\nIt also defines the metric in which errors are reported. The \
                 default is kfac with `--calibration` or `--statistics`, and svd without.",
            ),
            "ranks" => flag.help("How ranks are chosen [default: knapsack or energy]").long_help(
                "How ranks are chosen [default: knapsack or energy]\n\nThe choices are uniform, welore, energy, energy:SHARE, \
                 effective-rank, knapsack, full, fixed:RANK. The default is knapsack for kfac, else energy.",
            ),
            "sensitivity" => flag.long_help(
                "How the knapsack weighs errors of different matrices\n\nThe default is second-order: errors of the matrices of one \
                 difference compare as they are.",
            ),
            "quant_factors" => flag.help("Store factors as 8-bit floats (`float8`)").long_help(
                "Store factors as 8-bit floats (`float8`)\n\nThe budget then holds twice the rank of 16 bits. PEFT widens \
                 them as it loads; their scale is in `lora_alpha`. Integers are not possible: no reader of adapters takes them.",
            ),
            _ => flag,
        }
    }
}

pub(super) fn run(args: &DeltaArgs, quiet: bool, progress: &Bars) -> Result<()> {
    gate::expect_fields::<CompressReport>(&args.gates.fail_if, &[])?;
    let options = delta::options(args.recipe.complete(&args.options.values)?)?;
    let recipe = args.recipe.check(&args.options.values, &options)?;
    let device = args.device.open()?;
    args.folder.check()?;
    let revision = args.revision.revision.as_deref();
    let base = open(&args.base, revision, progress)?;
    // One copy is shown as a difference, and the other is run.
    let [model, fine_tuned] = [(); 2].map(|()| open(&args.fine_tuned, None, progress));
    let (model, fine_tuned) = (model?, fine_tuned?);
    let difference = delta::difference(fine_tuned, base, &args.base, &recipe, args.others)?;
    let job = Job {
        checkpoint: &difference,
        model: Some(&model),
        source: &args.fine_tuned,
        recipe: &recipe,
        output: args.folder.path(),
        existing: args.folder.existing(),
        earlier: args.restart.earlier(),
        memory_bytes: args.memory.bytes(),
        device,
        keep_statistics: None,
        tasks: &[],
    };
    let report = compress(&job, progress)?;
    let show = |report: &CompressReport| match (quiet, &report.delta) {
        (false, Some(delta)) => format!("{}{}", show_changes(delta), show(report, args.folder.path())),
        _ => String::new(),
    };
    args.gates.conclude(&report, show)
}

/// The tensors that are stored besides factors, and those that are left out.
fn show_changes(delta: &DeltaRecord) -> String {
    let mut lines = String::new();
    if delta.unchanged > 0 {
        lines += &format!("unchanged linears: {}\n", delta.unchanged);
    }
    if !delta.stored.is_empty() {
        lines += &format!("stored whole: {} tensors, {} bytes\n", delta.stored.len(), delta.stored_bytes);
    }
    for (tensor, reason) in &delta.left_out {
        lines += &format!("left out: {tensor} ({reason})\n");
    }
    lines
}
