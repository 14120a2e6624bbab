//! `lrc compress`.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use bytesize::ByteSize;
use clap::Args;
use indicatif::HumanDuration;

use super::arguments::{DequantizeArgs, DeviceArgs, FolderArgs, GateArgs, MemoryArgs, RestartArgs, SourceArgs};
use super::heal;
use super::options::{All, Options, RecipeFile};
use super::terminal::{Bars, fixed, grouped, table};
use crate::compress::compensate::Compensate;
use crate::compress::recipe::Recipe;
use crate::compress::{self, DryRun, Job};
use crate::error::Failure;
use crate::report::schema::{Field, fields, fields_at};
use crate::report::{CompressReport, DryRunReport, EqualBytesBaseline, LeftOutRecord, LinearRecord, RankSource, Sizes};
use crate::report::{gate, notes};

/// Compress a checkpoint
///
/// Replaces linears with low-rank factors, quantized matrices, or both, and
/// writes the weights with a report. The output folder appears only when it is
/// complete. An interrupted run is resumed by the same command.
///
/// Examples:
///   lrc compress MODEL -o OUT --keep 0.8
///   lrc compress MODEL -o OUT --keep 0.8 --calibration text.txt
///   lrc compress MODEL -o OUT --target-size 350MiB --statistics stats.safetensors
///   lrc compress MODEL -o OUT --structure narrow --keep 0.8 --calibration text.txt
///   lrc compress MODEL -o OUT --quant gptq-int4 --calibration text.txt
///   lrc compress MODEL -o OUT --quant rtn-int3,rtn-int4 --bits 3.25
///   lrc compress MODEL -o OUT --recipe recipe.toml --dry-run
///   lrc compress MODEL -o OUT --recipe recipe.toml --dry-run=full
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct CompressArgs {
    #[command(flatten)]
    model: SourceArgs,

    #[command(flatten)]
    dequantize: DequantizeArgs,

    #[command(flatten)]
    options: Options<All>,

    #[command(flatten)]
    recipe: RecipeFile,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    device: DeviceArgs,

    /// Only show what a run would do: `plan` or `full`
    ///
    /// Without a value, `plan`. The same command without this flag resumes from what `full` measured.
    #[arg(long, help_heading = "Output", value_name = "DEPTH", num_args = 0..=1, require_equals = true, default_missing_value = "plan")]
    dry_run: Option<DryRun>,

    #[command(flatten)]
    folder: FolderArgs,

    #[command(flatten)]
    restart: RestartArgs,

    #[command(flatten)]
    gates: GateArgs,
}

pub(super) fn run(args: &CompressArgs, quiet: bool, progress: &Bars) -> Result<()> {
    if args.restart.restart && args.dry_run == Some(DryRun::Plan) {
        return Err(Failure::usage("`--restart` has no effect with `--dry-run`, which measures nothing")
            .hint("remove it; `--dry-run=full --restart` measures again")
            .into());
    }
    let options = args.recipe.complete(&args.options.values)?;
    let recipe = args.recipe.check(&args.options.values, &compress::with_any_share(&options)?)?;
    let gates = &args.gates.fail_if;
    match args.dry_run {
        None => gate::expect_fields::<CompressReport>(gates, &absent(&recipe))?,
        Some(depth) => gate::expect_fields::<DryRunReport>(gates, &absent_in_dry_run(&recipe, depth))?,
    }
    let device = args.device.open()?;
    args.folder.check()?;
    let checkpoint = compress::view(args.dequantize.apply(args.model.open(progress)?)?, &recipe)?;
    let recipe = compress::recipe_for(&options, recipe, &checkpoint)?;
    let job = Job {
        checkpoint: &checkpoint,
        model: None,
        source: args.model.model(),
        recipe: &recipe,
        output: args.folder.path(),
        existing: args.folder.existing(),
        earlier: args.restart.earlier(),
        memory_bytes: args.memory.bytes(),
        device,
        keep_statistics: None,
        tasks: &[],
    };
    let explain = |error| compress::explained(&options, error);
    if let Some(depth) = args.dry_run {
        let report = compress::dry_run(&job, depth, progress).map_err(explain)?;
        return args.gates.conclude(&report, show_dry_run);
    }
    let report = compress::compress(&job, progress).map_err(explain)?;
    let show = |report: &CompressReport| if quiet { String::new() } else { show(report, args.folder.path()) };
    args.gates.conclude(&report, show)
}

/// Fields of a report that this run does not fill, with what would fill them.
pub(super) fn absent(recipe: &Recipe) -> Vec<(Vec<Field>, &'static str)> {
    let later = [("truncated", "`lrc truncate` writes it"), ("healed_before", "`lrc heal` writes it")];
    let mut absent: Vec<_> = later.map(|(name, hint)| (fields_at::<CompressReport>(name), hint)).into();
    let mut add = |name: &str, hint: &'static str| absent.push((fields_at::<CompressReport>(name), hint));
    if recipe.narrow().is_none() {
        for name in ["narrow", "timings.forward_before", "timings.forward_after"] {
            add(name, "`--structure narrow` fills it");
        }
    }
    match recipe.calibration() {
        None if recipe.statistics().is_none() => {
            add("calibration", "`--calibration FILE` or `--statistics FILE` fills it")
        }
        Some(windows) if recipe.statistics().is_none() && windows.gradient_samples.is_none() => {
            add(
                "calibration.gradient_windows",
                "`--gradient-samples N` fills it; without it all windows have gradients",
            );
        }
        _ => {}
    }
    if !recipe.heals() {
        add("healed", "`--heal` fills it");
    }
    if recipe.sensitivity().is_none() {
        add(
            "linears.sensitivity",
            "a knapsack under a budget measures it: `--ranks knapsack`, or `--bits` with `--quant`",
        );
    }
    if recipe.compensate() == Compensate::None && recipe.quant_factors().is_none() {
        add("equal_bytes_baseline", "`--quant` with `--compensate` measures it");
    } else if !recipe.compares_at_equal_bytes() {
        add("equal_bytes_baseline", "`--equal-bytes-baseline=false` leaves it out");
    } else if recipe.calibration().is_none() {
        for name in ["equal_bytes_baseline.kl", "equal_bytes_baseline.baseline_kl"] {
            add(name, "`--calibration FILE` measures it");
        }
    }
    absent
}

/// The same for a dry run, with all that only the report of the run itself has.
fn absent_in_dry_run(recipe: &Recipe, depth: DryRun) -> Vec<(Vec<Field>, &'static str)> {
    let known = fields::<DryRunReport>();
    let mut of_run = fields::<CompressReport>();
    of_run.retain(|field| known.iter().all(|known| known.name() != field.name()));
    for name in ["expert_tokens", "storage_error", "sensitivity", "seconds"] {
        of_run.extend(fields_at::<DryRunReport>(&format!("linears.{name}")));
    }
    of_run.extend(fields_at::<DryRunReport>("narrow.blocks.seconds"));
    let of_widths = |name: &str| fields_at::<DryRunReport>(&format!("narrow.blocks.{name}"));
    let mut absent = absent(recipe);
    if depth == DryRun::Plan {
        let errors = fields_at::<DryRunReport>("linears.relative_error");
        for errors in [errors, of_widths("relative_error"), of_widths("squared_error")] {
            absent.push((errors, "`--dry-run=full`, or the run itself, measures it"));
        }
    }
    absent.push((of_run, "the run itself measures it: remove `--dry-run`"));
    absent
}

fn show_dry_run(report: &DryRunReport) -> String {
    let [memory, disk] = [report.expected_memory_bytes, report.expected_disk_bytes].map(ByteSize);
    let time = HumanDuration(Duration::from_secs_f64(report.expected_seconds));
    let what = match &report.narrow {
        Some(narrow) if !narrow.blocks.is_empty() => "widths",
        Some(narrow) if !narrow.dropped.is_empty() => "blocks",
        _ => "ranks",
    };
    let ranks = match report.ranks {
        RankSource::Exact => String::new(),
        RankSource::Even => {
            format!("{what}: the budget spread evenly; `--dry-run=full` measures, and shows the {what} of the run\n")
        }
        RankSource::Unknown => {
            "ranks: unknown, linears are shown as they are; `--dry-run=full` measures, and shows the ranks of the run\n"
                .into()
        }
    };
    let widths: String = report.narrow.iter().flat_map(|narrow| narrow.lines()).map(|line| line + "\n").collect();
    let end = match &report.kept_in {
        Some(folder) => {
            format!("measurements are kept in `{folder}`; the same command without `--dry-run` resumes from it")
        }
        None => "nothing was written".into(),
    };
    format!(
        "{}{}{}{widths}{ranks}expected memory: {memory}\nexpected disk: {disk}\nexpected time: about {time}\ndry run: {end}\n",
        tables(&report.linears, &report.sizes),
        passed_through(&report.passed_through),
        left_out(&report.left_out)
    )
}

pub(super) fn show(report: &CompressReport, output: &Path) -> String {
    let memory = report.peak_memory_bytes.map_or(String::new(), |b| format!(", peak memory {}", ByteSize(b)));
    let lines = notes::lines(report.linears.iter().map(|l| (l.module.as_str(), l.note.as_deref())));
    let baseline = report.equal_bytes_baseline.as_ref().map(equal_bytes_baseline);
    let widths = report.narrow.iter().flat_map(|narrow| narrow.lines());
    let healed = report.healed.as_ref().map(heal::healing);
    let forward = report.timings.forward_before.zip(report.timings.forward_after).map(|(before, after)| {
        let share = 100.0 * after / before;
        format!("blocks run in {:.2} ms before, {:.2} ms after ({share:.0} %)", 1e3 * before, 1e3 * after)
    });
    let lines = widths.chain(forward).chain(lines).map(|line| line + "\n");
    let notes: String = lines.chain(baseline).chain(healed).collect();
    format!(
        "{}{}{}{notes}wrote `{}` in {:.1} s{memory}\n",
        tables(&report.linears, &report.sizes),
        passed_through(&report.passed_through),
        left_out(&report.left_out),
        output.display(),
        report.elapsed_seconds
    )
}

/// Files of the source that are not in the output, by reason.
pub(super) fn left_out(records: &[LeftOutRecord]) -> String {
    let mut reasons: Vec<&str> = records.iter().map(|record| record.reason.as_str()).collect();
    reasons.sort_unstable();
    reasons.dedup();
    let line = |reason: &str| {
        let paths = records.iter().filter(|record| record.reason == reason).map(|record| record.path.as_str());
        format!("left out ({reason}): {}\n", paths.collect::<Vec<_>>().join(", "))
    };
    reasons.into_iter().map(line).collect()
}

/// The tensors that are passed through; those that differ only in their block are listed once.
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
    let listed = |(pattern, count): &(String, usize)| match count {
        1 => pattern.clone(),
        count => format!("{pattern} ({count})"),
    };
    let listed: Vec<String> = counts.iter().map(listed).collect();
    format!("passed through: {}\n", if listed.is_empty() { "nothing".into() } else { listed.join(", ") })
}

/// The comparison with a model of the same size without factors.
fn equal_bytes_baseline(baseline: &EqualBytesBaseline) -> String {
    if !baseline.is_reachable {
        return "equal-bytes baseline without factors: none, the quantizers cannot make the model this small\n".into();
    }
    let error = baseline.weighted_error_ratio.map_or("no squared error in the baseline".into(), |ratio| {
        format!("squared error {ratio:.3} times the baseline's")
    });
    let kl = match (baseline.kl, baseline.baseline_kl) {
        (Some(own), Some(other)) => {
            format!("; KL on the calibration text {}, baseline {}", fixed(own, 5), fixed(other, 5))
        }
        _ => String::new(),
    };
    format!("equal-bytes baseline without factors ({:.3} bits per weight): {error}{kl}\n", baseline.bits_per_weight)
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
    let bits = format!(
        "{:.3} of these bits are in bases and dense linears, {:.3} in low-rank parts\n",
        sizes.bits_per_weight_base, sizes.bits_per_weight_factors
    );
    format!("{linears}\n{totals}{bits}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_baseline_without_an_error_has_no_ratio() {
        let baseline = EqualBytesBaseline {
            bits_per_weight: 32.0,
            is_reachable: true,
            weighted_error_ratio: None,
            kl: None,
            baseline_kl: None,
            quant: Default::default(),
        };
        let start = "equal-bytes baseline without factors (32.000 bits per weight): ";
        assert_eq!(equal_bytes_baseline(&baseline), format!("{start}no squared error in the baseline\n"));
        let baseline = EqualBytesBaseline { weighted_error_ratio: Some(0.5), ..baseline };
        assert_eq!(equal_bytes_baseline(&baseline), format!("{start}squared error 0.500 times the baseline's\n"));
    }
}
