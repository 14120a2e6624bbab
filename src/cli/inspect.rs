//! `lrc inspect`.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Arg, Args};

use super::arguments::{CsvArgs, DeviceArgs, ForceArgs, GateArgs, MemoryArgs, SourceArgs};
use super::options::{Options, Selection};
use super::streams::{print, print_json};
use super::terminal::{self, Bars, grouped, sparkline, table};
use crate::checkpoint::{Checkpoint, check_file, expect_apart, write_text};
use crate::compress::allocate::{FULL, Ranks};
use crate::compress::presets::Method;
use crate::compress::recipe::{Recipe, RecipeOptions};
use crate::compress::spectra::Observed;
use crate::device::Device;
use crate::error::Failure;
use crate::inspect::{self, InMetric};
use crate::model::coverage::missing;
use crate::report::columns::{self, COLUMNS, Cell, Chosen};
use crate::report::schema::fields_at;
use crate::report::{ImportanceRecord, InspectReport, SpectrumRecord, gate, notes, page};

/// Show the spectrum of every linear
///
/// Works on any safetensors checkpoint, of a known architecture or not:
/// matrices are found by name and shape, and fused matrices and stacked experts
/// are marked. With a text or statistics, columns `weighted.*` show spectra in
/// the calibration metric, and --importance shows what it costs to leave out
/// blocks, groups of heads, and channels of feed-forward layers.
///
/// Examples:
///   lrc inspect MODEL
///   lrc inspect MODEL --sort alpha --map stable_rank
///   lrc inspect MODEL --calibration text.txt --html spectra.html
///   lrc inspect MODEL --calibration text.txt --importance
///   lrc inspect MODEL --csv > spectra.csv
#[derive(Debug, Args)]
#[command(verbatim_doc_comment, after_long_help = definitions())]
pub(super) struct InspectArgs {
    #[command(flatten)]
    model: SourceArgs,

    #[command(flatten)]
    options: Options<Metric>,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    device: DeviceArgs,

    /// Show what leaving out blocks, heads or channels costs
    ///
    /// Squared errors in the metric of `--calibration` or `--statistics`, after what stays is refitted: those by which
    /// `lrc compress --structure narrow` and `--structure depth` choose.
    #[arg(long, conflicts_with = "csv", help_heading = "Output")]
    importance: bool,

    /// Sort by this column, largest first (`alpha`)
    #[arg(long, value_name = "COLUMN", value_parser = column, help_heading = "Output")]
    sort: Option<Chosen>,

    /// Sort smallest first
    #[arg(long, requires = "sort", help_heading = "Output")]
    reverse: bool,

    /// Column of the heat map
    #[arg(long, value_name = "COLUMN", value_parser = column, default_value = "break_even_error", conflicts_with_all = ["csv", "json"], help_heading = "Output")]
    map: Chosen,

    /// Write an HTML page with curves, maps and a table
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    html: Option<PathBuf>,

    /// Write all singular values, as `.safetensors`
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    spectra: Option<PathBuf>,

    #[command(flatten)]
    force: ForceArgs,

    #[command(flatten)]
    gates: GateArgs,

    #[command(flatten)]
    csv: CsvArgs,
}

/// The calibration metric.
#[derive(Debug)]
struct Metric;

impl Selection for Metric {
    fn takes(id: &str) -> bool {
        ["calibration", "statistics", "method", "field", "samples", "gradient_samples", "seq_len", "seed"].contains(&id)
    }

    fn adapt(flag: Arg) -> Arg {
        const METHOD: &str = "Method that defines the metric [default: kfac]";
        match flag.get_id().as_str() {
            "calibration" => flag,
            "method" => flag.help(METHOD).long_help(METHOD).help_heading("Calibration"),
            "statistics" => flag.conflicts_with("calibration"),
            _ => flag.requires("calibration"),
        }
    }
}

fn column(name: &str) -> Result<Chosen, String> {
    Chosen::find(name).ok_or_else(|| {
        let names: Vec<&str> = COLUMNS.iter().map(|column| column.name).collect();
        format!(
            "`{name}` is not a column; the columns are {}; `{}` before a column of spectra selects the calibration metric",
            names.join(", "),
            columns::WEIGHTED
        )
    })
}

/// The columns with their definitions.
fn definitions() -> String {
    let width = COLUMNS.iter().map(|column| column.name.len()).max().unwrap_or(0);
    let line = |column: &columns::Column| format!("  {:width$}  {}\n", column.name, column.meaning);
    format!("Columns:\n{}", COLUMNS.iter().map(line).collect::<String>().trim_end())
}

pub(super) fn run(args: &InspectArgs, progress: &Bars) -> Result<()> {
    check(args)?;
    let device = args.device.open()?;
    let checkpoint = args.model.open(progress)?;
    if let Some(missing) = missing(&checkpoint) {
        tracing::warn!("{missing}");
    }
    let read = checkpoint.read_files();
    for path in args.outputs() {
        let inputs = read.iter().chain(&args.options.values.calibration).chain(&args.options.values.statistics);
        expect_apart(path, inputs.map(PathBuf::as_path))?;
    }
    let weighted = if args.has_metric() { Some(weighted(args, &checkpoint, &device, progress)?) } else { None };
    let (mut report, spectra) = inspect::inspect(&checkpoint, args.model.model(), weighted, progress)?;
    if let Some(path) = &args.spectra {
        inspect::write_spectra(path, &spectra)?;
    }
    if let Some(path) = &args.html {
        write_text(path, &page::inspect(&report, &spectra)?)?;
    }
    let map = heat_map(&report, args.map);
    if let Some(chosen) = args.sort {
        sort(&mut report.linears, chosen, if args.reverse { ascending } else { descending });
    }
    if args.gates.json.json {
        print_json(&report)?;
    } else if args.csv.csv {
        print(&csv(&report))?;
    } else {
        print(&show(&report, &map))?;
    }
    gate::check(&args.gates.fail_if, &report)
}

impl InspectArgs {
    /// Whether spectra in the calibration metric are asked for.
    fn has_metric(&self) -> bool {
        self.options.values.calibration.is_some() || self.options.values.statistics.is_some()
    }

    fn outputs(&self) -> impl Iterator<Item = &Path> {
        self.html.iter().chain(&self.spectra).map(PathBuf::as_path)
    }
}

const ADD_METRIC: &str = "add `--calibration` or `--statistics`";

/// Everything that can be checked before the model is opened.
fn check(args: &InspectArgs) -> Result<()> {
    let has_metric = args.has_metric();
    let of_metric = if has_metric { Vec::new() } else { fields_at::<InspectReport>("linears.weighted") };
    let of_importance = if args.importance { Vec::new() } else { fields_at::<InspectReport>("importance") };
    let absent = [(of_metric, ADD_METRIC), (of_importance, "add `--importance`")];
    gate::expect_fields::<InspectReport>(&args.gates.fail_if, &absent)?;
    if args.importance && !has_metric {
        let message = "`--importance` needs a calibration metric: errors are measured on a text";
        return Err(Failure::usage(message).hint(ADD_METRIC).into());
    }
    if let Some(chosen) = args.sort.iter().chain([&args.map]).find(|chosen| chosen.is_weighted && !has_metric) {
        let message = format!("column `{}` needs a calibration metric", chosen.name());
        return Err(Failure::usage(message).hint(ADD_METRIC).into());
    }
    if args.options.values.method.is_some() && !has_metric {
        let message = "`--method` has no effect without `--calibration` or `--statistics`";
        return Err(Failure::usage(message).hint("add one of them, or remove `--method`").into());
    }
    if args.memory.is_given() && args.options.values.calibration.is_none() {
        return Err(Failure::usage("`--memory` has no effect without `--calibration`")
            .hint("remove it: it limits what grows with a text")
            .into());
    }
    if args.force.force && args.outputs().next().is_none() {
        return Err(Failure::usage("`--force` has no effect without `--html` or `--spectra`")
            .hint("remove it: no file is written")
            .into());
    }
    for path in args.outputs() {
        check_file(path, args.force.existing())?;
    }
    if args.html.is_some() && args.html == args.spectra {
        return Err(Failure::usage("`--html` and `--spectra` name the same file")
            .hint("give each a name of its own")
            .into());
    }
    Ok(())
}

/// What is shown in the metric.
fn weighted(args: &InspectArgs, checkpoint: &Checkpoint, device: &Device, progress: &Bars) -> Result<InMetric> {
    let method = args.options.values.method.unwrap_or(Method::Kfac);
    // Whole spectra: nothing is truncated.
    let ranks = Some(Ranks::Fixed(FULL));
    let options = RecipeOptions { ranks, method: Some(method), ..args.options.values.clone() };
    let (recipe, memory_bytes) = (Recipe::new(&options)?, args.memory.bytes());
    let observed = Observed::measure(checkpoint, &recipe, device, memory_bytes, progress)?;
    let importance = args.importance.then(|| observed.importance()).transpose()?;
    Ok(InMetric { name: method.name().into(), curves: observed.curves()?, importance })
}

/// Sorts records by a column.
fn sort(records: &mut Vec<SpectrumRecord>, by: Chosen, compare: fn(&Cell, &Cell) -> Ordering) {
    let mut keyed: Vec<(Cell, SpectrumRecord)> = records.drain(..).map(|record| (by.of(&record), record)).collect();
    keyed.sort_by(|(a, _), (b, _)| compare(a, b));
    records.extend(keyed.into_iter().map(|(_, record)| record));
}

/// Numbers from the largest, texts in alphabetical order, absent values last.
fn descending(a: &Cell, b: &Cell) -> Ordering {
    match (a.number(), b.number()) {
        (Some(a), Some(b)) => b.total_cmp(&a),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => a.exact().cmp(&b.exact()),
    }
}

/// The reverse, with absent values still last.
fn ascending(a: &Cell, b: &Cell) -> Ordering {
    match (a.number(), b.number()) {
        (Some(_), Some(_)) => descending(b, a),
        (None, None) => b.exact().cmp(&a.exact()),
        _ => descending(a, b),
    }
}

/// Columns of the table, in order.
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
/// Further columns if there is a calibration metric.
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
    let lines = notes::lines(report.linears.iter().map(|r| (r.module.as_str(), r.note.as_deref())));
    let metric = metric + &lines.into_iter().map(|line| line + "\n").collect::<String>();
    let importance = report.importance.as_ref().map_or(String::new(), show_importance);
    format!(
        "{}\n{map}{importance}{metric}{} matrices, {} other tensors, {} parameters, {} bytes\n",
        table(&header, report.linears.iter().map(row).collect()),
        report.linears.len(),
        report.other_tensors.len(),
        grouped(report.parameters),
        grouped(report.size_bytes)
    )
}

/// Rows are blocks, columns the modules of a block. Empty if no matrix belongs to a block.
fn heat_map(report: &InspectReport, chosen: Chosen) -> String {
    let grid = page::Grid::of(
        report.linears.iter().filter_map(|r| Some((r.block?, page::within_block(&r.module, r.block?), chosen.of(r)))),
    );
    if grid.columns.is_empty() {
        String::new()
    } else {
        shaded(&format!("{} by block and module", chosen.name()), &grid)
    }
}

/// The errors of leaving out parts of the model, and what cannot be left out.
fn show_importance(record: &ImportanceRecord) -> String {
    let maps = page::importance(record).into_iter().map(|(title, grid)| shaded(title, &grid));
    maps.chain(record.notes.iter().map(|note| format!("{note}\n"))).collect()
}

/// A table with shaded cells, a row per block.
fn shaded(title: &str, grid: &page::Grid) -> String {
    let header: Vec<&str> = std::iter::once("block").chain(grid.columns.iter().map(String::as_str)).collect();
    let rows = grid.rows.iter().map(|(block, cells)| {
        let shaded = cells.iter().map(|cell| match cell {
            Some(cell) => terminal::shaded(&cell.short(), grid.share(cell)),
            None => String::new(),
        });
        std::iter::once(block.to_string()).chain(shaded).collect()
    });
    format!("{title}\n{}\n", table(&header, rows.collect()))
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

/// A CSV field, quoted if it contains a comma, a quote or a line break.
fn quoted(field: &str) -> String {
    if field.contains(['"', ',', '\n']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.to_string() }
}
