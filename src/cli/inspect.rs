//! `lrc inspect`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::terminal::{self, Bars, grouped, sparkline, table};
use super::{GateArgs, MemoryArgs, ModelArgs, print, print_json};
use crate::checkpoint::{check_file, expect_apart, write_text};
use crate::compress::options::RecipeOptions;
use crate::compress::presets::Method;
use crate::compress::recipe::Recipe;
use crate::compress::spectra::weighted_curves;
use crate::error::Failure;
use crate::inspect;
use crate::model::coverage::missing;
use crate::report::columns::{self, COLUMNS, Cell, Chosen};
use crate::report::{InspectReport, SpectrumRecord, gate, page};

/// Show the spectrum of every linear
///
/// Works on any safetensors checkpoint, known architecture or not: matrices are found by their names and shapes, fused
/// ones and the experts of stacks are named as such. With a text or statistics, spectra of linears in the calibration metric
/// stand beside the raw ones, in columns `weighted.*`.
///
/// Examples:
///   lrc inspect MODEL
///   lrc inspect MODEL --sort alpha --map stable_rank
///   lrc inspect MODEL --calibration text.txt --html spectra.html
///   lrc inspect MODEL --csv > spectra.csv
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, after_long_help = definitions())]
pub(super) struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Text whose activations and gradients make the metric: prose in UTF-8, or documents in `.jsonl`, `.ndjson`, `.json` or `.parquet`; each also as `.gz` or `.zst`
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,

    /// Field that holds the text of a document [default: text]
    #[arg(long, value_name = "NAME", requires = "calibration")]
    field: Option<String>,

    /// Statistics of `lrc calibrate`, instead of measuring them
    #[arg(long, value_name = "FILE", conflicts_with = "calibration")]
    statistics: Option<PathBuf>,

    /// Method whose metric is taken [default: kfac]
    #[arg(long, value_enum)]
    method: Option<Method>,

    /// Calibration windows [default: 64]
    #[arg(long, value_name = "N", requires = "calibration")]
    samples: Option<usize>,

    #[command(flatten)]
    memory: MemoryArgs,

    /// Sort the table by this column, largest first (`alpha`, `weighted.effective_rank`)
    #[arg(long, value_name = "COLUMN", value_parser = column)]
    sort: Option<Chosen>,

    /// Smallest first
    #[arg(long, requires = "sort")]
    reverse: bool,

    /// Column of the heat map of blocks and modules
    #[arg(long, value_name = "COLUMN", value_parser = column, default_value = "break_even_error")]
    map: Chosen,

    /// Write a page with curves, heat map and a sortable table
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Write the singular values themselves
    #[arg(long, value_name = "FILE.safetensors")]
    spectra: Option<PathBuf>,

    /// Replace the files of `--html` and `--spectra`
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    gates: GateArgs,

    /// Print the report as JSON
    #[arg(long, conflicts_with = "csv")]
    json: bool,

    /// Print one line a matrix, comma-separated
    #[arg(long)]
    csv: bool,
}

fn column(name: &str) -> Result<Chosen, String> {
    Chosen::find(name).ok_or_else(|| {
        let names: Vec<&str> = COLUMNS.iter().map(|column| column.name).collect();
        format!("columns are {}, and those of spectra behind `{}`", names.join(", "), columns::WEIGHTED)
    })
}

/// Every column with what it means.
fn definitions() -> String {
    let width = COLUMNS.iter().map(|column| column.name.len()).max().unwrap_or(0);
    let line = |column: &columns::Column| format!("  {:width$}  {}\n", column.name, column.meaning);
    format!("Columns:\n{}", COLUMNS.iter().map(line).collect::<String>().trim_end())
}

pub(super) fn run(args: &InspectArgs, progress: &Bars) -> Result<()> {
    gate::expect_fields::<InspectReport>(&args.gates.fail_if, &[])?;
    let is_weighted = args.calibration.is_some() || args.statistics.is_some();
    if let Some(chosen) = args.sort.iter().chain([&args.map]).find(|chosen| chosen.is_weighted && !is_weighted) {
        let message = format!("there is no `{}` without a metric", chosen.name());
        return Err(Failure::usage(message).hint("give `--calibration` or `--statistics`").into());
    }
    if args.method.is_some() && !is_weighted {
        return Err(Failure::usage("`--method` is nothing without a text or statistics").into());
    }
    let outputs = || args.html.iter().chain(&args.spectra).map(PathBuf::as_path);
    for path in outputs() {
        check_file(path, args.force)?;
    }
    if args.html.is_some() && args.html == args.spectra {
        return Err(Failure::usage("`--html` and `--spectra` name the same file").into());
    }
    let checkpoint = args.model.open(progress)?;
    if let Some(missing) = missing(&checkpoint) {
        tracing::warn!("{missing}");
    }
    let read = checkpoint.read_files();
    for path in outputs() {
        let inputs = read.iter().chain(&args.calibration).chain(&args.statistics);
        expect_apart(path, inputs.map(PathBuf::as_path))?;
    }
    let weighted = if is_weighted {
        let method = args.method.unwrap_or(Method::Kfac);
        let options = RecipeOptions {
            keep: Some(1.0),
            method: Some(method),
            calibration: args.calibration.clone(),
            field: args.field.clone(),
            statistics: args.statistics.clone(),
            samples: args.samples,
            ..RecipeOptions::default()
        };
        let recipe = Recipe::new(&options)?;
        Some((
            method.to_possible_value().expect("invariant: no method is hidden").get_name().to_string(),
            weighted_curves(&checkpoint, &recipe, args.memory.memory.as_u64(), progress)?,
        ))
    } else {
        None
    };
    let (mut report, spectra) = inspect::inspect(&checkpoint, &args.model.model, weighted, progress)?;
    if let Some(path) = &args.spectra {
        inspect::write_spectra(path, &spectra)?;
    }
    if let Some(path) = &args.html {
        let page = page::inspect(&report, &spectra)?;
        write_text(path, &page)?;
    }
    let map = heat_map(&report, args.map);
    if let Some(chosen) = args.sort {
        let mut order: Vec<usize> = (0..report.linears.len()).collect();
        let key = |i: &usize| chosen.of(&report.linears[*i]);
        order.sort_by(|i, j| if args.reverse { ascending(&key(i), &key(j)) } else { descending(&key(i), &key(j)) });
        report.linears = order.iter().map(|&i| report.linears[i].clone()).collect();
    }
    if args.json {
        print_json(&report)?;
    } else if args.csv {
        print(&csv(&report))?;
    } else {
        print(&show(&report, &map))?;
    }
    gate::check(&args.gates.fail_if, &report)
}

/// Numbers from the largest, texts by the alphabet; what has no value comes last.
fn descending(a: &Cell, b: &Cell) -> std::cmp::Ordering {
    match (a.number(), b.number()) {
        (Some(a), Some(b)) => b.total_cmp(&a),
        (Some(_), None) => std::cmp::Ordering::Less,
        (None, Some(_)) => std::cmp::Ordering::Greater,
        (None, None) => a.exact().cmp(&b.exact()),
    }
}

/// The other way round; what has no value comes last all the same.
fn ascending(a: &Cell, b: &Cell) -> std::cmp::Ordering {
    match (a.number(), b.number()) {
        (Some(_), Some(_)) => descending(b, a),
        (None, None) => b.exact().cmp(&a.exact()),
        _ => descending(a, b),
    }
}

/// Columns of the table, in their order.
const SHOWN: [&str; 10] = [
    "rank",
    "stable_rank",
    "effective_rank",
    "energy_rank_0.9",
    "energy_rank_0.99",
    "alpha",
    "alpha_farms",
    "mp_spikes",
    "break_even_rank",
    "break_even_error",
];
/// The same in the calibration metric, where there is one.
const SHOWN_WEIGHTED: [&str; 2] = ["weighted.effective_rank", "weighted.break_even_error"];

fn show(report: &InspectReport, map: &str) -> String {
    let weighted = SHOWN_WEIGHTED.iter().filter(|_| report.metric.is_some());
    let chosen: Vec<Chosen> =
        SHOWN.iter().chain(weighted).map(|name| Chosen::find(name).expect("invariant: shown columns exist")).collect();
    let row = |r: &SpectrumRecord| {
        let kind = if r.kind == "linear" { String::new() } else { format!(" ({})", r.kind) };
        let mut cells = vec![format!("{}{kind}", r.module), format!("{}×{}", r.shape[0], r.shape[1])];
        cells.extend(chosen.iter().map(|c| c.of(r).short()));
        cells.push(sparkline(&r.figures.sketch));
        cells
    };
    let titles: Vec<String> = chosen.iter().map(Chosen::title).collect();
    let header: Vec<&str> =
        ["linear", "shape"].into_iter().chain(titles.iter().map(String::as_str)).chain(["spectrum"]).collect();
    let metric = report.metric.as_ref().map_or(String::new(), |metric| format!("metric: {metric}\n"));
    let notes = report.linears.iter().filter_map(|r| Some(format!("{}: {}\n", r.module, r.note.as_ref()?)));
    let metric = metric + &notes.collect::<String>();
    format!(
        "{}\n{map}{metric}{} matrices, {} other tensors, {} parameters, {} bytes\n",
        table(&header, report.linears.iter().map(row).collect()),
        report.linears.len(),
        report.other_tensors.len(),
        grouped(report.parameters),
        grouped(report.size_bytes)
    )
}

/// Blocks down, modules of a block across; empty where no matrix is in a block.
fn heat_map(report: &InspectReport, chosen: Chosen) -> String {
    let grid = page::Grid::of(
        report.linears.iter().filter_map(|r| Some((r.block?, page::within_block(&r.module, r.block?), chosen.of(r)))),
    );
    if grid.columns.is_empty() {
        return String::new();
    }
    let header: Vec<&str> = std::iter::once("block").chain(grid.columns.iter().map(String::as_str)).collect();
    let rows = grid.rows.iter().map(|(block, cells)| {
        let shaded = cells.iter().map(|cell| match cell {
            Some(cell) => terminal::shaded(&cell.short(), grid.share(cell)),
            None => String::new(),
        });
        std::iter::once(block.to_string()).chain(shaded).collect()
    });
    format!("{} by block and module\n{}\n", chosen.name(), table(&header, rows.collect()))
}

fn csv(report: &InspectReport) -> String {
    let columns = columns::of(report);
    let names: Vec<String> = columns.iter().map(Chosen::name).collect();
    let line = |r: &SpectrumRecord| -> String {
        let fields: Vec<String> = columns.iter().map(|c| quoted(&c.of(r).exact())).collect();
        fields.join(",") + "\n"
    };
    names.join(",") + "\n" + &report.linears.iter().map(line).collect::<String>()
}

/// A field that a comma, a quote or a line break cannot split.
fn quoted(field: &str) -> String {
    if field.contains(['"', ',', '\n']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.to_string() }
}
