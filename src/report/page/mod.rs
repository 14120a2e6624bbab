//! Pages for people: one self-contained HTML file a report, without a network, light and dark, for screens and for paper.
//!
//! Plots are SVG made here, tables are sorted by a few lines of script in `base.html`. Nothing on a page tells of the time or the memory
//! that a run took, so that the same job gives the same bytes.

mod grid;
mod svg;

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result};
use bytesize::ByteSize;
use minijinja::Environment;
use minijinja::value::Serde;
use serde::Serialize;
use serde_json::json;

use super::columns::{self, Cell, Chosen, fixed, grouped};
use super::{CompressReport, InspectReport, LRC_VERSION, LinearRecord, Spectrum, SweepPoint, SweepReport};
pub use grid::{Grid, within_block};
use svg::{Axes, Series};

/// Name of the page in an output folder.
pub const PAGE_FILE: &str = "lrc-report.html";

/// Points of a line.
const POINTS: usize = 48;

/// How the error of a linear falls with its rank.
#[derive(Debug, Clone)]
pub struct ErrorLine {
    pub module: String,
    pub block: Option<usize>,
    /// Rank and relative error, from rank 0 to the full rank.
    pub points: Vec<(usize, f64)>,
    /// The rank that was taken, and its error; none where it stays dense.
    pub chosen: Option<(usize, f64)>,
    pub break_even_rank: usize,
}

impl ErrorLine {
    /// Ranks at which an error is drawn, of a matrix of `full_rank`.
    pub fn ranks(full_rank: usize) -> Vec<usize> {
        let mut ranks: Vec<usize> = (0..=POINTS).map(|i| i * full_rank / POINTS).collect();
        ranks.dedup();
        ranks
    }
}

/// A number above its name.
#[derive(Serialize)]
struct Tile {
    name: &'static str,
    value: String,
}

fn tile(name: &'static str, value: impl Into<String>) -> Tile {
    Tile { name, value: value.into() }
}

/// A table that can be sorted.
#[derive(Serialize)]
struct Table {
    columns: Vec<Head>,
    rows: Vec<Vec<Shown>>,
}

#[derive(Serialize)]
struct Head {
    name: String,
    title: String,
    meaning: String,
}

#[derive(Serialize)]
struct Shown {
    /// What is sorted by.
    value: String,
    text: String,
}

impl Shown {
    fn of(cell: &Cell) -> Self {
        Self { value: cell.exact(), text: cell.short() }
    }
}

/// A table from its titles and cells.
fn table(titles: &[&str], rows: Vec<Vec<Cell>>) -> Table {
    let head = |title: &&str| Head { name: (*title).into(), title: (*title).into(), meaning: String::new() };
    let rows = rows.iter().map(|row| row.iter().map(Shown::of).collect()).collect();
    Table { columns: titles.iter().map(head).collect(), rows }
}

/// A titled plot.
#[derive(Clone, Serialize)]
struct Chart {
    title: String,
    svg: String,
}

/// The page of `lrc inspect`.
///
/// # Errors
/// A template is broken.
pub fn inspect(report: &InspectReport, spectra: &[Spectrum]) -> Result<String> {
    let columns = columns::of(report);
    let heads = columns.iter().map(|c| Head {
        name: c.name(),
        title: c.title(),
        meaning: format!("{}{}", c.column.meaning, if c.is_weighted { ", in the calibration metric" } else { "" }),
    });
    let rows = report.linears.iter().map(|r| columns.iter().map(|c| Shown::of(&c.of(r))).collect());
    let figures = Table { columns: heads.collect(), rows: rows.collect() };
    let mapped = ["break_even_error", "stable_rank", "alpha", "weighted.break_even_error"];
    let maps =
        mapped.iter().filter_map(|name| Chosen::find(name)).filter(|c| !c.is_weighted || report.metric.is_some());
    let maps = maps.map(|chosen| {
        let cells = report.linears.iter();
        Grid::of(cells.filter_map(|r| Some((r.block?, within_block(&r.module, r.block?), chosen.of(r)))))
            .map(&chosen.name())
    });
    let both = report.linears.iter().zip(spectra);
    let lines = |pick: fn(&Spectrum) -> Option<&Vec<f64>>, log: bool, suffix: &str| -> Vec<Chart> {
        let of = |(record, spectrum): (&super::SpectrumRecord, &Spectrum)| {
            let sigma = pick(spectrum)?;
            let mark = record.break_even_rank as f64 / sigma.len().max(1) as f64;
            let points = if log { decay(sigma) } else { cumulative(sigma) };
            Some((record.module.clone(), record.block, points, vec![], mark))
        };
        let axes = if log {
            Axes { y_label: "σ / σ₁", has_log_y: true, y_range: Some((1e-4, 1.0)), ..rank_axes() }
        } else {
            Axes { y_label: "share of energy", y_range: Some((0.0, 1.0)), ..rank_axes() }
        };
        families(both.clone().filter_map(of), &axes, suffix)
    };
    let both_of =
        |log: bool| [lines(|s| Some(&s.raw), log, ""), lines(|s| s.weighted.as_ref(), log, " (metric)")].concat();
    let tiles = [
        tile("matrices", grouped(report.linears.len() as u64)),
        tile("parameters", grouped(report.parameters)),
        tile("bytes", ByteSize(report.size_bytes).to_string()),
        tile("calibration metric", report.metric.clone().unwrap_or_else(|| "none".into())),
    ];
    let notes = report.linears.iter().filter_map(|r| Some(format!("{}: {}", r.module, r.note.as_ref()?)));
    let page = json!({
        "tiles": tiles,
        "notes": notes.collect::<Vec<_>>(),
        "maps": maps.collect::<Vec<_>>(),
        "spectra": both_of(true),
        "energy": both_of(false),
        "figures": figures,
        "others": report.other_tensors,
    });
    render("inspect.html", &report.model, report, page)
}

/// The page of `lrc compress`.
///
/// # Errors
/// A template is broken.
pub fn compress(report: &CompressReport, errors: &[ErrorLine]) -> Result<String> {
    let s = &report.sizes;
    let share = |after: f64, before: f64| Cell::Text(format!("{:.2} %", 100.0 * after / before));
    let sized = |name: &str, before: u64, after: u64| {
        vec![Cell::Text(name.into()), Cell::Integer(before), Cell::Integer(after), share(after as f64, before as f64)]
    };
    let bits = (s.bits_per_weight_before, s.bits_per_weight_after);
    let sizes = vec![
        sized("parameters of the targeted linears", s.linear_parameters_before, s.linear_parameters_after),
        sized("all parameters", s.parameters_before, s.parameters_after),
        sized("bytes of tensors", s.bytes_before, s.bytes_after),
        vec![
            Cell::Text("bits per weight of the targeted linears".into()),
            Cell::Real(bits.0),
            Cell::Real(bits.1),
            share(bits.1, bits.0),
        ],
    ];
    let mut tiles = vec![
        tile("bytes of tensors before", ByteSize(s.bytes_before).to_string()),
        tile("after", ByteSize(s.bytes_after).to_string()),
        tile("of the linears' parameters kept", format!("{:.2} %", 100.0 * s.keep)),
        tile("bits per linear weight", format!("{:.3}", s.bits_per_weight_after)),
        tile("largest relative error of a linear", format!("{:.4}", report.linear.max_error)),
    ];
    if let Some((kl, control)) = report.control.as_ref().and_then(|c| c.kl.zip(c.control_kl)) {
        tiles.push(tile("KL from the original (nats), on the calibration text", fixed(kl, 5)));
        tiles.push(tile("KL of the same bytes without factors", fixed(control, 5)));
    }
    let mut maps = Vec::new();
    let mut map = |title: &str, of: &dyn Fn(&LinearRecord) -> Cell| {
        let cells = report.linears.iter();
        let grid = Grid::of(cells.filter_map(|l| Some((l.block?, within_block(&l.module, l.block?), of(l)))));
        if !grid.columns.is_empty() {
            maps.push(grid.map(title));
        }
    };
    if report.linears.iter().any(|l| l.rank.is_some()) {
        map("rank", &|l| match (l.rank, &l.quant) {
            (None, None) => Cell::Text("dense".into()),
            (rank, _) => rank.into(),
        });
        map("parameters kept", &|l| Cell::Real(l.parameters_after as f64 / l.parameters_before as f64));
    }
    map("bits per weight", &|l| Cell::Real(l.bits_base + l.bits_factors));
    map("relative error", &|l| l.relative_error.into());
    let lines = errors.iter().map(|line| {
        let full = line.points.last().map_or(1, |p| p.0).max(1) as f64;
        let at = |&(rank, error): &(usize, f64)| (rank as f64 / full, error);
        let points = line.points.iter().map(at).collect();
        let dots = line.chosen.iter().map(at).collect();
        (line.module.clone(), line.block, points, dots, line.break_even_rank as f64 / full)
    });
    let axes = Axes { y_label: "relative error", y_range: Some((0.0, 1.0)), ..rank_axes() };
    let rows = report.linears.iter().map(linear_row).collect();
    let titles = ["linear", "out", "in", "base", "rank", "parameters", "kept", "bits", "relative error", "sensitivity"];
    let page = json!({
        "tiles": tiles,
        "warnings": warnings(report),
        "sizes": table(&["total", "before", "after", "share"], sizes),
        "bars": bars(report),
        "maps": maps,
        "curves": families(lines, &axes, ""),
        "linears": table(&titles, rows),
        "recipe": serde_json::to_string_pretty(&report.recipe)?,
    });
    render("compress.html", &report.source, report, page)
}

fn linear_row(l: &LinearRecord) -> Vec<Cell> {
    let base = l.quant.clone().unwrap_or_else(|| if l.rank.is_none() { "dense" } else { "-" }.into());
    vec![
        Cell::Text(l.module.clone()),
        l.shape[0].into(),
        l.shape[1].into(),
        Cell::Text(base),
        l.rank.into(),
        Cell::Integer(l.parameters_before),
        Cell::Integer(l.parameters_after),
        Cell::Real(l.bits_base + l.bits_factors),
        l.relative_error.into(),
        l.sensitivity.into(),
    ]
}

/// What a reader should not miss.
fn warnings(report: &CompressReport) -> Vec<String> {
    let mut warnings: Vec<String> =
        report.linears.iter().filter_map(|l| Some(format!("{}: {}", l.module, l.note.as_ref()?))).collect();
    let broken = report.non_finite.iter();
    warnings.extend(broken.map(|name| format!("{name}: holds NaN or infinite values, as the source does")));
    if let Some(control) = &report.control
        && control.weighted_error_ratio.is_some_and(|ratio| ratio > 1.0)
    {
        warnings.push(
            "the same bytes spent on bits instead of factors would err less (see `control` in the report)".into(),
        );
    }
    warnings
}

/// Parameters and bits by module of a block, and of what was not targeted.
fn bars(report: &CompressReport) -> Vec<Chart> {
    let mut parameters: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    let mut bytes: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for l in &report.linears {
        let name = l.block.map_or(l.module.clone(), |block| within_block(&l.module, block));
        let name = name.rsplit('.').next().unwrap_or(&name).to_string();
        let weights = l.parameters_before as f64;
        let before = weights * report.sizes.bits_per_weight_before / 8.0;
        let add = |map: &mut BTreeMap<String, (f64, f64)>, before: f64, after: f64| {
            let sum = map.entry(name.clone()).or_default();
            (sum.0, sum.1) = (sum.0 + before, sum.1 + after);
        };
        add(&mut parameters, weights, l.parameters_after as f64);
        add(&mut bytes, before, weights * (l.bits_base + l.bits_factors) / 8.0);
    }
    let s = &report.sizes;
    let rest = |map: &BTreeMap<String, (f64, f64)>, before: u64, after: u64| {
        let (own_before, own_after) = map.values().fold((0.0, 0.0), |sum, v| (sum.0 + v.0, sum.1 + v.1));
        let mut rows: Vec<(String, f64, f64)> = map.iter().map(|(name, v)| (name.clone(), v.0, v.1)).collect();
        rows.push(("not targeted".into(), (before as f64 - own_before).max(0.0), (after as f64 - own_after).max(0.0)));
        rows
    };
    let chart = |title: &str, rows: &[(String, f64, f64)], text: &dyn Fn(f64) -> String| Chart {
        title: title.into(),
        svg: svg::bars(rows, text),
    };
    vec![
        chart("parameters", &rest(&parameters, s.parameters_before, s.parameters_after), &|v| short_count(v)),
        chart("bytes", &rest(&bytes, s.bytes_before, s.bytes_after), &|v| ByteSize(v as u64).to_string()),
    ]
}

/// The page of `lrc sweep`.
///
/// # Errors
/// A template is broken.
pub fn sweep(report: &SweepReport) -> Result<String> {
    let mut ordered: Vec<&SweepPoint> = report.points.iter().collect();
    ordered.sort_by_key(|a| a.sizes.bytes_after);
    let chart = |title: &str, axes: &Axes, of: &dyn Fn(&SweepPoint) -> (f64, f64)| {
        let points: Vec<(f64, f64)> = ordered.iter().map(|p| of(p)).collect();
        let series = Series { dots: points.clone(), points, strength: 1.0 };
        Chart { title: title.into(), svg: svg::lines(&[series], axes) }
    };
    let mib = |p: &SweepPoint| p.sizes.bytes_after as f64 / f64::from(1 << 20);
    let axes = |x_label, y_label, has_log_y| Axes { x_label, y_label, has_log_y, ..Axes::default() };
    let charts = [
        chart("perplexity", &axes("kept share of the linears' parameters", "perplexity", false), &|p| {
            (p.sizes.keep, p.ppl)
        }),
        chart("KL from the original (nats)", &axes("MiB of tensors", "KL", true), &|p| (mib(p), p.divergence.kl.mean)),
        chart("same top 1", &axes("kept share of the linears' parameters", "share", false), &|p| {
            (p.sizes.keep, p.divergence.same_top_1)
        }),
    ];
    let row = |p: &SweepPoint| {
        vec![
            Cell::Real(p.keep),
            Cell::Real(p.ppl),
            Cell::Real(p.divergence.ppl_ratio),
            Cell::Real(p.divergence.kl.mean),
            Cell::Real(p.divergence.same_top_1),
            Cell::Real(p.sizes.keep),
            Cell::Integer(p.sizes.parameters_after),
            Cell::Integer(p.sizes.bytes_after),
        ]
    };
    let titles = ["keep", "perplexity", "ratio", "KL", "same top 1", "kept", "parameters", "bytes"];
    let maps = report.points.iter().filter_map(|p| {
        let cells = p.ranks.iter().filter_map(|(module, rank)| {
            let block = module.split('.').find_map(|part| part.parse().ok())?;
            Some((block, within_block(module, block), rank.map_or(Cell::Text("dense".into()), Cell::from)))
        });
        let grid = Grid::of(cells);
        (!grid.columns.is_empty()).then(|| grid.map(&format!("ranks at keep {}", p.keep)))
    });
    let tiles = [
        tile("perplexity of the original", report.dense_ppl.map_or("-".into(), |ppl| format!("{ppl:.5}"))),
        tile("convention", report.convention.clone()),
        tile("window", report.seq_len.to_string()),
        tile("budgets", report.points.len().to_string()),
    ];
    let page = json!({
        "tiles": tiles,
        "charts": charts,
        "points": table(&titles, report.points.iter().map(row).collect()),
        "maps": maps.collect::<Vec<_>>(),
        "recipe": serde_json::to_string_pretty(&report.recipe)?,
    });
    render("sweep.html", &report.model, report, page)
}

/// What the same line of several blocks is: module, block, points, dots, and where the break-even rank is.
type Line = (String, Option<usize>, Vec<(f64, f64)>, Vec<(f64, f64)>, f64);

fn rank_axes() -> Axes {
    Axes { x_label: "share of the rank", x_range: Some((0.0, 1.0)), ..Axes::default() }
}

/// One chart a module of a block, in which every block has a line.
fn families(lines: impl Iterator<Item = Line>, axes: &Axes, suffix: &str) -> Vec<Chart> {
    let mut families: Vec<(String, Vec<Line>)> = Vec::new();
    for line in lines {
        let name = line.1.map_or(line.0.clone(), |block| within_block(&line.0, block));
        match families.iter_mut().find(|(other, _)| *other == name) {
            Some((_, members)) => members.push(line),
            None => families.push((name, vec![line])),
        }
    }
    let chart = |(name, mut members): (String, Vec<Line>)| {
        members.sort_by_key(|line| line.1);
        let last = (members.len() - 1).max(1) as f64;
        let mark = members.first().map(|line| line.4);
        let series = members.into_iter().enumerate().map(|(i, line)| Series {
            points: line.2,
            strength: if last > 0.0 { i as f64 / last } else { 1.0 },
            dots: line.3,
        });
        let svg = svg::lines(&series.collect::<Vec<_>>(), &Axes { mark, ..axes.clone() });
        Chart { title: format!("{name}{suffix}"), svg }
    };
    families.into_iter().map(chart).collect()
}

/// σ / σ₁ over the share of the rank.
fn decay(sigma: &[f64]) -> Vec<(f64, f64)> {
    let first = sigma.first().copied().filter(|&s| s > 0.0).unwrap_or(1.0);
    let last = sigma.len().saturating_sub(1);
    let n = POINTS.min(last.max(1));
    let place = |i: usize| i * last / n;
    (0..=n).map(|i| (place(i) as f64 / last.max(1) as f64, sigma.get(place(i)).map_or(0.0, |s| s / first))).collect()
}

/// Share of Σσ² over the share of the rank.
fn cumulative(sigma: &[f64]) -> Vec<(f64, f64)> {
    let total: f64 = sigma.iter().map(|s| s * s).sum();
    let mut sum = 0.0;
    let mut all = vec![(0.0, 0.0)];
    for (i, s) in sigma.iter().enumerate() {
        sum += s * s;
        all.push(((i + 1) as f64 / sigma.len() as f64, if total > 0.0 { sum / total } else { 0.0 }));
    }
    ErrorLine::ranks(sigma.len()).into_iter().map(|rank| all[rank]).collect()
}

/// A count with a letter for its thousands.
fn short_count(value: f64) -> String {
    let units = [(1e9, " G"), (1e6, " M"), (1e3, " k")];
    let unit = units.into_iter().find(|(size, _)| value >= *size);
    unit.map_or(format!("{value:.0}"), |(size, name)| format!("{:.1}{name}", value / size))
}

fn render(template: &str, source: &str, report: &impl Serialize, mut page: serde_json::Value) -> Result<String> {
    let mut environment = Environment::new();
    let templates = [
        ("base.html", include_str!("base.html")),
        ("inspect.html", include_str!("inspect.html")),
        ("compress.html", include_str!("compress.html")),
        ("sweep.html", include_str!("sweep.html")),
    ];
    for (name, text) in templates {
        environment.add_template(name, text).with_context(|| format!("template `{name}`"))?;
    }
    // Times are no part of a page, and nothing in a string may end the element.
    let mut json = serde_json::to_value(report)?;
    without_times(&mut json);
    let mut inline = String::new();
    write!(inline, "{json}")?;
    let json = inline.replace('<', "\\u003c");
    let title = super::card::title(source);
    let fields = page.as_object_mut().expect("invariant: a page is a record");
    fields.extend([("version", LRC_VERSION), ("title", title), ("json", &json)].map(|(k, v)| (k.into(), v.into())));
    let template = environment.get_template(template)?;
    template.render(Serde(&page)).context("render a page")
}

/// Removes what differs from run to run.
fn without_times(value: &mut serde_json::Value) {
    const TIMES: [&str; 6] =
        ["timings", "elapsed_seconds", "peak_memory_bytes", "seconds", "evaluate_seconds", "output_files"];
    match value {
        serde_json::Value::Object(fields) => {
            TIMES.iter().for_each(|name| drop(fields.shift_remove(*name)));
            fields.values_mut().for_each(without_times);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(without_times),
        _ => {}
    }
}
