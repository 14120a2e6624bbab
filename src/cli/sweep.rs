//! `lrc sweep`.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::{ArgAction, ArgMatches, Args, FromArgMatches};

use super::terminal::{Bars, fixed, grouped, table};
use super::{GateArgs, MemoryArgs, ModelArgs};
use crate::checkpoint::{OutputFolder, expect_apart};
use crate::compress::recipe::{Recipe, RecipeOptions};
use crate::compress::{SweepSettings, sweep};
use crate::error::Failure;
use crate::eval::EvalSettings;
use crate::eval::conventions::Convention;
use crate::report::page::{self, PAGE_FILE};
use crate::report::{REPORT_FILE, SweepReport, gate};
use crate::text::{Bos, DEFAULT_FIELD};

/// Evaluate one method at many budgets, from one decomposition
///
/// No model is written: the table shows what `lrc compress` and `lrc eval --reference` would give.
///
/// Examples:
///   lrc sweep MODEL --text held-out.txt --keep 0.9,0.8,0.6
///   lrc sweep MODEL --calibration text.txt --text held-out.txt --keep 0.9,0.8 --ranks welore --csv
///   lrc sweep MODEL --text held-out.txt --keep 0.9,0.8,0.6 -o REPORT
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct SweepArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Text to score: prose in UTF-8, or documents in `.jsonl`, `.ndjson`, `.json` or `.parquet`; each also as `.gz` or `.zst`
    #[arg(long, value_name = "FILE")]
    text: PathBuf,

    #[command(flatten)]
    options: SweptOptions,

    /// TOML file with these settings; flags win
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,

    /// How the text is cut and scored
    #[arg(long, value_enum, default_value_t)]
    convention: Convention,

    /// Tokens in a scored window [default: the convention's, at most the model's context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    eval_seq_len: Option<u32>,

    /// Score only the first windows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_windows: Option<u32>,

    #[command(flatten)]
    memory: MemoryArgs,

    /// Folder for `lrc-report.json` and `lrc-report.html`
    #[arg(short, long, value_name = "OUT")]
    output: Option<PathBuf>,

    /// Replace an output folder that an earlier run wrote
    #[arg(long, requires = "output")]
    force: bool,

    #[command(flatten)]
    gates: GateArgs,

    /// Print the report as JSON
    #[arg(long, conflicts_with = "csv")]
    json: bool,

    /// Print one line a budget as CSV
    #[arg(long)]
    csv: bool,
}

/// [`RecipeOptions`] whose `--keep` is a list.
#[derive(Debug)]
struct SweptOptions {
    keeps: Vec<f64>,
    options: RecipeOptions,
}

impl Args for SweptOptions {
    fn augment_args(command: clap::Command) -> clap::Command {
        RecipeOptions::augment_args(command)
            .mut_arg("keep", |keep| {
                keep.action(ArgAction::Append)
                    .value_delimiter(',')
                    .value_name("SHARES")
                    .required(true)
                    .help("Shares of the parameters of the targeted linears to keep, separated by commas")
            })
            // What is written is not swept.
            .mut_args(|arg| {
                let is_of_output = ["target_size", "format", "max_shard_size"].contains(&arg.get_id().as_str());
                if is_of_output { arg.hide(true) } else { arg }
            })
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SweptOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let keeps = matches.get_many("keep").into_iter().flatten().copied().collect();
        Ok(Self { keeps, options: RecipeOptions::from_arg_matches(matches)? })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

pub(super) fn run(args: &SweepArgs, progress: &Bars) -> Result<()> {
    gate::expect_fields::<SweepReport>(&args.gates.fail_if, &[])?;
    let file = args.recipe.as_deref().map(RecipeOptions::read).transpose()?.unwrap_or_default();
    if args.options.keeps.is_empty() {
        return Err(Failure::usage("a sweep needs shares").hint("`--keep 0.9,0.8,0.6`, say").into());
    }
    if let Some(keep) = args.options.keeps.iter().find(|&&keep| !(keep > 0.0 && keep <= 1.0)) {
        return Err(Failure::usage(format!("`--keep {keep}` is outside of (0, 1]")).into());
    }
    let mut options = args.options.options.clone().or(file);
    options.target_size = None;
    // A sequential run decomposes anew for every budget; a sweep does it once for all.
    options.sequential = options.sequential.or(Some(false));
    let recipe = Recipe::new(&options)?;
    if let Some(output) = &args.output {
        OutputFolder::check(output, args.force, REPORT_FILE)?;
    }
    let checkpoint = crate::compress::view(args.model.open(progress)?, &recipe)?;
    // Begun before the work, which is not to be lost where there is no place for it.
    let folder = args.output.as_deref().map(|output| -> Result<OutputFolder> {
        expect_apart(output, recipe.inputs().chain([args.text.as_path(), checkpoint.root()]))?;
        Ok(OutputFolder::create(output, args.force, REPORT_FILE)?)
    });
    let folder = folder.transpose()?;
    let eval = EvalSettings {
        model: args.model.model.clone(),
        text: args.text.clone(),
        field: options.field.clone().unwrap_or_else(|| DEFAULT_FIELD.into()),
        stride: None,
        convention: args.convention,
        seq_len: args.eval_seq_len.map(|n| n as usize),
        max_windows: args.max_windows.map(|n| n as usize),
        bos: Bos::Auto,
        memory_bytes: args.memory.memory.as_u64(),
    };
    let settings = SweepSettings { checkpoint: &checkpoint, recipe: &recipe, keeps: &args.options.keeps, eval };
    let report = sweep(&settings, progress)?;
    if let Some(folder) = folder {
        write_folder(folder, &report)?;
    }
    args.gates.conclude(&report, args.json, if args.csv { csv } else { show })
}

fn write_folder(folder: OutputFolder, report: &SweepReport) -> Result<()> {
    folder.write(REPORT_FILE, (serde_json::to_string_pretty(report)? + "\n").as_bytes())?;
    folder.write(PAGE_FILE, page::sweep(report)?.as_bytes())?;
    Ok(folder.finish()?)
}

fn csv(report: &SweepReport) -> String {
    let mut text = String::from(
        "keep,ppl,ppl_ratio,ppl_ratio_standard_error,kl_mean,same_top_1,linear_keep,parameters,bytes,bits_per_weight\n",
    );
    for p in &report.points {
        let (d, s) = (&p.divergence, &p.sizes);
        let _ = writeln!(
            text,
            "{},{},{},{},{},{},{},{},{},{}",
            p.keep,
            p.ppl,
            d.ppl_ratio,
            d.ppl_ratio_standard_error,
            d.kl.mean,
            d.same_top_1,
            s.keep,
            s.parameters_after,
            s.bytes_after,
            s.bits_per_weight_after
        );
    }
    text
}

fn show(report: &SweepReport) -> String {
    let rows = report.points.iter().map(|p| {
        let (d, s) = (&p.divergence, &p.sizes);
        vec![
            p.keep.to_string(),
            format!("{:.4}", p.ppl),
            format!("{:.4} ± {:.4}", d.ppl_ratio, d.ppl_ratio_standard_error),
            fixed(d.kl.mean, 5),
            format!("{:.2} %", 100.0 * d.same_top_1),
            format!("{:.4}", s.keep),
            grouped(s.parameters_after),
            grouped(s.bytes_after),
        ]
    });
    let header = ["keep", "perplexity", "ratio", "KL", "same top 1", "kept", "parameters", "bytes"];
    let t = &report.timings;
    format!(
        "{}dense perplexity {:.5}, convention {}, windows of {}\n\
         calibrated in {:.1} + {:.1} s, decomposed in {:.1} s, allocated in {:.1} s, evaluated in {:.1} s\n",
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
