//! `lrc sweep`.

use std::fmt::Write;
use std::time::Instant;

use anyhow::Result;
use clap::{Arg, Args};

use super::arguments::{
    CsvArgs, DequantizeArgs, DeviceArgs, ForceArgs, GateArgs, MemoryArgs, OutputArgs, ScoredText, SourceArgs,
    at_least_2,
};
use super::options::{Options, RecipeFile, Repeated, Selection, repeated};
use super::terminal::{Bars, fixed, grouped, table};
use crate::checkpoint::{OutputFolder, expect_apart};
use crate::compress::recipe::{Budget, RecipeOptions};
use crate::compress::{self, SweepSettings, sweep};
use crate::error::Failure;
use crate::eval::EvalSettings;
use crate::eval::conventions::Convention;
use crate::report::page::{self, PAGE_FILE};
use crate::report::{REPORT_FILE, SweepReport, gate, publish};
use crate::text::{Bos, DEFAULT_FIELD};

/// Evaluate one method at several budgets, with a single decomposition
///
/// Writes no model: the table shows the results of `lrc compress` and
/// `lrc eval --reference` at every budget.
///
/// Examples:
///   lrc sweep MODEL --text held-out.txt --keep 0.9,0.8,0.6
///   lrc sweep MODEL --text held-out.txt --keep 0.9,0.8 --ranks welore --csv
///   lrc sweep MODEL --text held-out.txt --keep 0.9,0.8,0.6 -o REPORT
///   lrc sweep MODEL --text held-out.txt --quant int2,int3,int4 --bits 4,3,2.5
#[derive(Debug, Args)]
#[command(
    verbatim_doc_comment,
    mut_arg("output", |output| output.required(false).help("Folder for `lrc-report.json` and `lrc-report.html`")),
    mut_arg("force", |force| force.requires("output")),
)]
pub(super) struct SweepArgs {
    #[command(flatten)]
    model: SourceArgs,

    #[command(flatten)]
    dequantize: DequantizeArgs,

    #[command(flatten)]
    scored: ScoredText<Convention>,

    /// Tokens per scored window [default: set by the convention]
    ///
    /// It is at most the model's context.
    #[arg(long, value_name = "N", value_parser = at_least_2, help_heading = "Evaluation", hide_short_help = true)]
    eval_seq_len: Option<usize>,

    #[command(flatten)]
    options: Options<Swept>,

    #[command(flatten)]
    recipe: RecipeFile,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    output: Option<OutputArgs>,

    #[command(flatten)]
    force: ForceArgs,

    #[command(flatten)]
    gates: GateArgs,

    #[command(flatten)]
    csv: CsvArgs,
}

/// All options. Options of budgets, outputs and the sequential mode are hidden: a sweep writes no weights, `--keep` or
/// `--bits` are its budgets, and it decomposes once.
#[derive(Debug)]
struct Swept;

impl Selection for Swept {
    fn takes(_: &str) -> bool {
        true
    }

    fn adapt(flag: Arg) -> Arg {
        const BITS: &str = "Mean bits per weight of the targeted linears (`4,3,2.5`)";
        const KEEPS: &str = "Shares of the targeted parameters to keep (`0.9,0.8`)";
        match flag.get_id().as_str() {
            "keep" => {
                let flag = repeated(flag).value_delimiter(',').value_name("SHARES");
                flag.required_unless_present("bits").help(KEEPS).long_help(KEEPS)
            }
            "bits" => repeated(flag).value_delimiter(',').help(BITS).long_help(BITS),
            "compensate_rank" => flag.hide_short_help(true),
            "target_size" | "params" | "format" => flag.hide(true),
            "sequential" | "anchor" | "elastic" | "max_shard_size" | "equal_bytes_baseline" | "heal" => flag.hide(true),
            "structure" | "selection" | "width_multiple" | "uniform_width" => flag.hide(true),
            _ => flag,
        }
    }
}

pub(super) fn run(args: &SweepArgs, progress: &Bars) -> Result<()> {
    let started = Instant::now();
    gate::expect_fields::<SweepReport>(&args.gates.fail_if, &[])?;
    let budgets = budgets(&args.options.repeated)?;
    refuse_without_effect(&args.options.values)?;
    let mut options = args.recipe.complete(&args.options.values)?;
    (options.target_size, options.params) = (None, None);
    // Under a budget of everything nothing would be decomposed.
    match budgets.iter().find(|&&budget| budget != Budget::Keep(1.0)) {
        Some(&Budget::Bits(bits)) => (options.keep, options.bits) = (None, Some(bits)),
        Some(&Budget::Keep(keep)) => (options.keep, options.bits) = (Some(keep), None),
        _ => {}
    }
    // The sequential mode must redo the decomposition for each budget; a sweep decomposes once.
    options.sequential = options.sequential.or(Some(false));
    let recipe = args.recipe.check(&args.options.values, &options)?;
    let device = args.device.open()?;
    let output = args.output.as_ref().map(|args| args.output.as_path());
    if let Some(output) = output {
        OutputFolder::check(output, args.force.existing(), REPORT_FILE)?;
    }
    let checkpoint = crate::compress::view(args.dequantize.apply(args.model.open(progress)?)?, &recipe)?;
    // Created first, so that the work is not lost for lack of an output folder.
    let folder = output.map(|output| -> Result<OutputFolder> {
        expect_apart(output, recipe.inputs().chain([args.scored.file.text.as_path(), checkpoint.root()]))?;
        Ok(OutputFolder::create(output, args.force.existing(), REPORT_FILE)?)
    });
    let folder = folder.transpose()?;
    let eval = EvalSettings {
        model: args.model.model().into(),
        text: args.scored.file.text.clone(),
        field: options.field.clone().unwrap_or_else(|| DEFAULT_FIELD.into()),
        stride: None,
        convention: args.scored.convention.unwrap_or_default(),
        seq_len: args.eval_seq_len,
        max_windows: args.scored.max_windows,
        bos: Bos::Auto,
        memory_bytes: args.memory.bytes(),
        device,
    };
    let settings = SweepSettings { checkpoint: &checkpoint, recipe: &recipe, budgets: &budgets, eval };
    let mut report = sweep(&settings, progress)?;
    if let Some(folder) = folder {
        let page = page::sweep(&report)?;
        publish(&folder, &mut report, &[(PAGE_FILE, page)], started)?;
        folder.finish()?;
    }
    args.gates.conclude(&report, if args.csv.csv { csv } else { show })
}

/// The budgets, in the order in which they were given.
fn budgets(given: &Repeated) -> Result<Vec<Budget>> {
    if let Some(keep) = given.keeps.iter().find(|&&keep| !(keep > 0.0 && keep <= 1.0)) {
        return Err(Failure::usage(format!("`--keep {keep}` is outside (0, 1]"))
            .hint("give shares, for example `--keep 0.9,0.8,0.6`")
            .into());
    }
    if let Some(bits) = given.bits.iter().find(|&&bits| !(bits > 0.0 && bits.is_finite())) {
        return Err(Failure::usage(format!("`--bits {bits}` is not a number of bits"))
            .hint("give bits per weight, for example `--bits 4,3,2.5`")
            .into());
    }
    let keeps = given.keeps.iter().copied().map(Budget::Keep);
    let budgets: Vec<Budget> = keeps.chain(given.bits.iter().copied().map(Budget::Bits)).collect();
    if budgets.is_empty() {
        return Err(Failure::usage("a sweep needs budgets").hint("for example `--keep 0.9,0.8,0.6`").into());
    }
    Ok(budgets)
}

/// Refuses flags that determine what a compression writes, or how it does so for one budget.
/// Recipe files may have them.
fn refuse_without_effect(flags: &RecipeOptions) -> Result<()> {
    let of_outputs = [
        ("--elastic", flags.elastic == Some(true)),
        ("--heal", !flags.heal.is_empty()),
        ("--equal-bytes-baseline", flags.equal_bytes_baseline.is_some()),
        ("--max-shard-size", flags.max_shard_size.is_some()),
    ];
    if let Some((flag, _)) = of_outputs.iter().find(|(_, is_given)| *is_given) {
        return Err(Failure::usage(format!("`{flag}` has no effect in a sweep, which writes no model"))
            .hint(format!("remove `{flag}`"))
            .into());
    }
    let of_sequential = [("--sequential", flags.sequential == Some(true)), ("--anchor", flags.anchor.is_some())];
    match of_sequential.iter().find(|(_, is_given)| *is_given) {
        Some((flag, _)) => Err(compress::not_in_a_sweep(flag).into()),
        None => Ok(()),
    }
}

fn csv(report: &SweepReport) -> String {
    let mut text = String::from(
        "keep,ppl,ppl_ratio,ppl_ratio_standard_error,kl_mean,same_top_1,linear_keep,parameters,bytes,bits_per_weight,bits,is_knee\n",
    );
    let optional = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
    for (at, p) in report.points.iter().enumerate() {
        let (d, s) = (&p.divergence, &p.sizes);
        let _ = writeln!(
            text,
            "{},{},{},{},{},{},{},{},{},{},{},{}",
            optional(p.keep),
            p.ppl,
            d.ppl_ratio,
            d.ppl_ratio_standard_error,
            d.kl.mean,
            d.same_top_1,
            s.keep,
            s.parameters_after,
            s.bytes_after,
            s.bits_per_weight_after,
            optional(p.bits),
            report.knee == Some(at)
        );
    }
    text
}

fn show(report: &SweepReport) -> String {
    let rows = report.points.iter().map(|p| {
        let (d, s) = (&p.divergence, &p.sizes);
        vec![
            p.budget().1.to_string(),
            format!("{:.4}", p.ppl),
            format!("{:.4} ± {:.4}", d.ppl_ratio, d.ppl_ratio_standard_error),
            fixed(d.kl.mean, 5),
            format!("{:.2} %", 100.0 * d.same_top_1),
            format!("{:.4}", s.keep),
            grouped(s.parameters_after),
            grouped(s.bytes_after),
        ]
    });
    let budget = report.points.first().map_or("keep", |p| p.budget().0);
    let knee = report.knee.and_then(|at| report.points.get(at)).map_or_else(String::new, |p| {
        let (name, value) = p.budget();
        format!("the knee is at {name} {value}: further bytes buy less\n")
    });
    let header = [budget, "perplexity", "ratio", "KL", "same top 1", "kept", "parameters", "bytes"];
    let t = &report.timings;
    format!(
        "{}{knee}perplexity of the source: {:.5} (convention {}, windows of {} tokens)\n\
         seconds: calibrate {:.1} forward and {:.1} backward, decompose {:.1}, allocate {:.1}, evaluate {:.1}\n",
        table(&header, rows.collect()),
        report.dense_ppl.unwrap_or(f64::NAN),
        report.convention,
        report.seq_len,
        t.calibrate_forward,
        t.calibrate_backward,
        t.decompose,
        t.allocate,
        report.evaluate_seconds,
    )
}
