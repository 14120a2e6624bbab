//! `lrc compress`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use bytesize::ByteSize;
use clap::Args;

use super::terminal::{Bars, grouped, table};
use super::{MemoryArgs, ModelArgs, print, print_json};
use crate::compress::recipe::{Recipe, RecipeOptions};
use crate::compress::{self, Job};
use crate::report::{CompressReport, LinearRecord, Sizes};

/// Compress a checkpoint
///
/// Replaces linears by low-rank factors and writes safetensors with a report.
/// The output folder appears whole or not at all.
///
/// Examples:
///   lrc compress MODEL -o OUT --keep 0.8
///   lrc compress MODEL -o OUT --keep 0.8 --calibration text.txt
///   lrc compress MODEL -o OUT --target-size 350MiB --statistics stats.safetensors
///   lrc compress MODEL -o OUT --recipe recipe.toml --dry-run
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct CompressArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Output folder
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,

    #[command(flatten)]
    options: RecipeOptions,

    /// TOML file with these settings; flags win
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,

    #[command(flatten)]
    memory: MemoryArgs,

    /// Show ranks, sizes and expected memory, and write nothing
    #[arg(long)]
    dry_run: bool,

    /// Replace an output folder that an earlier run wrote
    #[arg(long)]
    force: bool,

    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &CompressArgs, quiet: bool, progress: &Bars) -> Result<()> {
    let file = args.recipe.as_deref().map(RecipeOptions::read).transpose()?.unwrap_or_default();
    let recipe = Recipe::new(&args.options.clone().or(file))?;
    let checkpoint = args.model.open(progress)?;
    let job = Job {
        checkpoint: &checkpoint,
        source: &args.model.model,
        recipe: &recipe,
        output: &args.output,
        force: args.force,
        memory_bytes: args.memory.memory.as_u64(),
    };
    if args.dry_run {
        let report = compress::dry_run(&job, progress)?;
        if args.json {
            return print_json(&report);
        }
        let memory = ByteSize(report.expected_memory_bytes);
        return print(&format!(
            "{}expected memory: {memory}\nnothing was written\n",
            tables(&report.linears, &report.sizes)
        ));
    }
    let report = compress::compress(&job, progress)?;
    match (args.json, quiet) {
        (true, _) => print_json(&report),
        (false, true) => Ok(()),
        (false, false) => print(&show(&report, &args.output)),
    }
}

pub(super) fn show(report: &CompressReport, output: &Path) -> String {
    let memory = report.peak_memory_bytes.map_or(String::new(), |b| format!(", peak memory {}", ByteSize(b)));
    format!(
        "{}wrote `{}` in {:.1} s{memory}\n",
        tables(&report.linears, &report.sizes),
        output.display(),
        report.elapsed_seconds
    )
}

fn tables(linears: &[LinearRecord], sizes: &Sizes) -> String {
    let rows = linears.iter().map(|l| {
        vec![
            l.module.clone(),
            format!("{}×{}", l.shape[0], l.shape[1]),
            l.rank.map_or("dense".into(), |r| r.to_string()),
            grouped(l.parameters_before),
            grouped(l.parameters_after),
            l.relative_error.map_or("-".into(), |e| format!("{e:.4}")),
            format!("{:.2}", l.seconds),
        ]
    });
    let linears = table(&["linear", "shape", "rank", "parameters", "kept", "rel. error", "seconds"], rows.collect());
    let share = |after: u64, before: u64| format!("{:.2} %", 100.0 * after as f64 / before as f64);
    let row = |name: &str, before: u64, after: u64| {
        vec![name.to_string(), grouped(before), grouped(after), share(after, before)]
    };
    let totals = table(
        &["total", "before", "after", "share"],
        vec![
            row("linear parameters", sizes.linear_parameters_before, sizes.linear_parameters_after),
            row("all parameters", sizes.parameters_before, sizes.parameters_after),
            row("bytes of tensors", sizes.bytes_before, sizes.bytes_after),
            vec![
                "bits per linear weight".into(),
                format!("{:.3}", sizes.bits_per_weight_before),
                format!("{:.3}", sizes.bits_per_weight_after),
                format!("{:.2} %", 100.0 * sizes.bits_per_weight_after / sizes.bits_per_weight_before),
            ],
        ],
    );
    format!("{linears}\n{totals}")
}
