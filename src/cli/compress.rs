//! `lrc compress`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use bytesize::ByteSize;
use clap::Args;
use indicatif::HumanDuration;

use super::terminal::{Bars, fixed, grouped, table};
use super::{GateArgs, MemoryArgs, ModelArgs};
use crate::checkpoint::OutputFolder;
use crate::compress::recipe::{Recipe, RecipeOptions};
use crate::compress::{self, Job};
use crate::report::gate;
use crate::report::{CompressReport, ControlRecord, DryRunReport, LeftOutRecord, LinearRecord, REPORT_FILE, Sizes};

/// Compress a checkpoint
///
/// Replaces linears by low-rank factors, by quantised matrices, or by both, and writes safetensors with a report.
/// The output folder appears whole or not at all.
///
/// Examples:
///   lrc compress MODEL -o OUT --keep 0.8
///   lrc compress MODEL -o OUT --keep 0.8 --calibration text.txt
///   lrc compress MODEL -o OUT --target-size 350MiB --statistics stats.safetensors
///   lrc compress MODEL -o OUT --quant gptq-int4 --calibration text.txt --format gptq
///   lrc compress MODEL -o OUT --quant rtn-int2,rtn-int3,rtn-int4 --compensate eora --bits 3.25 --calibration text.txt
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

    /// Show ranks, sizes, expected memory and time, and write nothing
    #[arg(long)]
    dry_run: bool,

    /// Replace an output folder that an earlier run wrote
    #[arg(long)]
    force: bool,

    /// Throw away what an interrupted run left, and begin anew
    #[arg(long)]
    restart: bool,

    #[command(flatten)]
    gates: GateArgs,

    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &CompressArgs, quiet: bool, progress: &Bars) -> Result<()> {
    if args.dry_run {
        gate::expect_fields::<DryRunReport>(&args.gates.fail_if, &[])?;
    } else {
        gate::expect_fields::<CompressReport>(&args.gates.fail_if, &[])?;
    }
    let file = args.recipe.as_deref().map(RecipeOptions::read).transpose()?.unwrap_or_default();
    let recipe = Recipe::new(&args.options.clone().or(file))?;
    // Before a model is downloaded.
    OutputFolder::check(&args.output, args.force, REPORT_FILE)?;
    let checkpoint = compress::view(args.model.open(progress)?, &recipe)?;
    let job = Job {
        checkpoint: &checkpoint,
        source: &args.model.model,
        recipe: &recipe,
        output: &args.output,
        force: args.force,
        restart: args.restart,
        memory_bytes: args.memory.memory.as_u64(),
    };
    if args.dry_run {
        let report = compress::dry_run(&job, progress)?;
        return args.gates.conclude(&report, args.json, show_dry_run);
    }
    let report = compress::compress(&job, progress)?;
    let show = |report: &CompressReport| if quiet { String::new() } else { show(report, &args.output) };
    args.gates.conclude(&report, args.json, show)
}

fn show_dry_run(report: &DryRunReport) -> String {
    let memory = ByteSize(report.expected_memory_bytes);
    let time = HumanDuration(Duration::from_secs_f64(report.expected_seconds));
    format!(
        "{}{}{}expected memory: {memory}\nexpected time: about {time}\nnothing was written\n",
        tables(&report.linears, &report.sizes),
        passed_through(&report.passed_through),
        left_out(&report.left_out)
    )
}

pub(super) fn show(report: &CompressReport, output: &Path) -> String {
    let memory = report.peak_memory_bytes.map_or(String::new(), |b| format!(", peak memory {}", ByteSize(b)));
    let notes: String = report
        .linears
        .iter()
        .filter_map(|l| Some(format!("{}: {}\n", l.module, l.note.as_ref()?)))
        .chain(report.control.as_ref().map(control))
        .collect();
    format!(
        "{}{}{}{notes}wrote `{}` in {:.1} s{memory}\n",
        tables(&report.linears, &report.sizes),
        passed_through(&report.passed_through),
        left_out(&report.left_out),
        output.display(),
        report.elapsed_seconds
    )
}

/// What of the source is not in the output, by reason.
pub(super) fn left_out(records: &[LeftOutRecord]) -> String {
    let mut reasons: Vec<&str> = records.iter().map(|record| record.reason.as_str()).collect();
    reasons.sort_unstable();
    reasons.dedup();
    let line = |reason: &str| {
        let of_reason = records.iter().filter(|record| record.reason == reason).map(|record| record.path.as_str());
        format!("left out ({reason}): {}\n", of_reason.collect::<Vec<_>>().join(", "))
    };
    reasons.into_iter().map(line).collect()
}

/// Tensors that are copied, those of one name in many blocks together.
fn passed_through(names: &[String]) -> String {
    let mut counts: Vec<(String, usize)> = Vec::new();
    for name in names {
        let words = name.split('.').map(|word| if word.parse::<usize>().is_ok() { "*" } else { word });
        let pattern = words.collect::<Vec<_>>().join(".");
        match counts.iter_mut().find(|(known, _)| *known == pattern) {
            Some((_, count)) => *count += 1,
            None => counts.push((pattern, 1)),
        }
    }
    let told = |(pattern, count): &(String, usize)| match count {
        1 => pattern.clone(),
        count => format!("{pattern} ({count})"),
    };
    let told: Vec<String> = counts.iter().map(told).collect();
    format!("passed through: {}\n", if told.is_empty() { "nothing".into() } else { told.join(", ") })
}

/// What the bytes of the factors would have bought otherwise.
fn control(control: &ControlRecord) -> String {
    if !control.is_reachable {
        return "control without factors: nothing is as small\n".into();
    }
    let ratio = control.weighted_error_ratio.map_or("-".into(), |ratio| format!("{ratio:.3}"));
    let kl = match (control.kl, control.control_kl) {
        (Some(own), Some(other)) => {
            format!("; KL {}, without factors {}, on the calibration text", fixed(own, 5), fixed(other, 5))
        }
        _ => String::new(),
    };
    format!(
        "the same bytes without factors ({:.3} bits): the squared error here is {ratio} times as large{kl}\n",
        control.bits_per_weight
    )
}

fn tables(linears: &[LinearRecord], sizes: &Sizes) -> String {
    let rows = linears.iter().map(|l| {
        vec![
            l.module.clone(),
            format!("{}×{}", l.shape[0], l.shape[1]),
            l.quant.clone().unwrap_or_else(|| if l.rank.is_none() { "dense" } else { "-" }.into()),
            l.rank.map_or("-".into(), |r| r.to_string()),
            grouped(l.parameters_before),
            grouped(l.parameters_after),
            format!("{:.3}", l.bits_base + l.bits_factors),
            l.relative_error.map_or("-".into(), |e| format!("{e:.4}")),
            format!("{:.2}", l.seconds),
        ]
    });
    let linears = table(
        &["linear", "shape", "base", "rank", "parameters", "kept", "bits", "rel. error", "seconds"],
        rows.collect(),
    );
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
    let of = format!(
        "of these bits {:.3} are in bases and dense linears, {:.3} in low-rank parts\n",
        sizes.bits_per_weight_base, sizes.bits_per_weight_factors
    );
    format!("{linears}\n{totals}{of}")
}
