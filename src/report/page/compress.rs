//! The page of `lrc compress`.

use std::collections::BTreeMap;

use anyhow::Result;
use bytesize::ByteSize;
use serde_json::json;

use super::charts::{Chart, ErrorLine, Line, families, rank_axes};
use super::grid::{Grid, Map, within_block};
use super::heal;
use super::svg::{self, Axes};
use super::template::{Table, Tile, render, table, tile};
use crate::report::columns::{Cell, fixed};
use crate::report::{CompressReport, HealRecord, LinearRecord, NarrowRecord, NarrowedUnit, notes};

/// The page of `lrc compress`.
///
/// # Errors
/// A template is broken.
pub fn compress(report: &CompressReport, errors: &[ErrorLine]) -> Result<String> {
    let axes = Axes { y_label: "relative error", y_range: Some((0.0, 1.0)), ..rank_axes() };
    let titles = ["linear", "out", "in", "base", "rank", "parameters", "kept", "bits", "relative error", "sensitivity"];
    let page = json!({
        "tiles": tiles(report),
        "warnings": warnings(report),
        "notes": notes(report),
        "sizes": sizes(report),
        "bars": bars(report),
        "maps": maps(report),
        "healed": report.healings().flat_map(heal::charts).collect::<Vec<_>>(),
        "curves": families(errors.iter().map(line), &axes, ""),
        "units": report.narrow.as_ref().filter(|narrow| !narrow.blocks.is_empty()).map(units),
        "linears": table(&titles, report.linears.iter().map(row).collect()),
        "recipe": serde_json::to_string_pretty(&report.recipe)?,
    });
    render("compress.html", &report.source, report, page)
}

fn tiles(report: &CompressReport) -> Vec<Tile> {
    let s = &report.sizes;
    let mut tiles = vec![
        tile("bytes of tensors before", ByteSize(s.bytes_before).to_string()),
        tile("bytes of tensors after", ByteSize(s.bytes_after).to_string()),
        tile("parameters kept in the targeted linears", format!("{:.2} %", 100.0 * s.keep)),
        tile("bits per linear weight", format!("{:.3}", s.bits_per_weight_after)),
        tile(
            "largest relative error of a linear",
            report.linear.max_error.map_or("-".into(), |error| format!("{error:.4}")),
        ),
    ];
    if let Some((kl, baseline)) = report.equal_bytes_baseline.as_ref().and_then(|b| b.kl.zip(b.baseline_kl)) {
        tiles.push(tile("KL from the source (nats), on the calibration text", fixed(kl, 5)));
        tiles.push(tile("KL of the equal-bytes baseline without factors", fixed(baseline, 5)));
    }
    tiles
}

fn sizes(report: &CompressReport) -> Table {
    let s = &report.sizes;
    let (bits_before, bits_after) = (s.bits_per_weight_before, s.bits_per_weight_after);
    let share = |after: f64, before: f64| Cell::Text(format!("{:.2} %", 100.0 * after / before));
    let counted = |name: &str, before: u64, after: u64| {
        vec![Cell::Text(name.into()), Cell::Integer(before), Cell::Integer(after), share(after as f64, before as f64)]
    };
    let rows = vec![
        counted("parameters of the targeted linears", s.linear_parameters_before, s.linear_parameters_after),
        counted("all parameters", s.parameters_before, s.parameters_after),
        counted("bytes of tensors", s.bytes_before, s.bytes_after),
        vec![
            Cell::Text("bits per weight of the targeted linears".into()),
            Cell::Real(bits_before),
            Cell::Real(bits_after),
            share(bits_after, bits_before),
        ],
    ];
    table(&["total", "before", "after", "share"], rows)
}

fn maps(report: &CompressReport) -> Vec<Map> {
    type Figure = fn(&LinearRecord) -> Cell;
    let ranks: [(&str, Figure); 2] = [
        ("rank", |l| match (l.rank, &l.quant) {
            (None, None) => Cell::Text("dense".into()),
            (rank, _) => rank.into(),
        }),
        ("parameters kept", |l| Cell::Real(l.parameters_after as f64 / l.parameters_before as f64)),
    ];
    let others: [(&str, Figure); 2] = [
        ("bits per weight", |l| Cell::Real(l.bits_base + l.bits_factors)),
        ("relative error", |l| l.relative_error.into()),
    ];
    let widths = report.narrow.iter().flat_map(widths);
    let has_ranks = report.linears.iter().any(|l| l.rank.is_some());
    let map = |(title, figure): (&str, Figure)| {
        let cells = report.linears.iter();
        let grid = Grid::of(cells.filter_map(|l| Some((l.block?, within_block(&l.module, l.block?), figure(l)))));
        (!grid.columns.is_empty()).then(|| grid.map(title))
    };
    widths.chain(ranks.into_iter().filter(|_| has_ranks).chain(others).filter_map(map)).collect()
}

/// Maps of the shares of channels and groups that stay, and of their errors, by the blocks of the source.
fn widths(narrow: &NarrowRecord) -> Vec<Map> {
    type Figure = fn(&NarrowedUnit) -> Cell;
    let figures: [(&str, Figure); 2] = [
        ("share of channels and groups kept", |unit| Cell::Real(unit.after as f64 / unit.before.max(1) as f64)),
        ("relative error of narrowing", |unit| unit.relative_error.into()),
    ];
    let map = |(title, figure): (&str, Figure)| {
        Grid::of(narrow.blocks.iter().map(|unit| (unit.block, unit.name(), figure(unit)))).map(title)
    };
    figures.into_iter().filter(|_| !narrow.blocks.is_empty()).map(map).collect()
}

/// The widths of all blocks that stay.
fn units(narrow: &NarrowRecord) -> Table {
    let row = |unit: &NarrowedUnit| {
        let counts = [unit.block, unit.before, unit.after].map(Cell::from);
        let errors = [unit.relative_error, unit.squared_error].map(Cell::from);
        let [block, before, after] = counts;
        [vec![block, Cell::Text(unit.name()), before, after], errors.to_vec()].concat()
    };
    let titles = ["block of the source", "kind", "before", "after", "relative error", "squared error"];
    table(&titles, narrow.blocks.iter().map(row).collect())
}

fn line(error: &ErrorLine) -> Line {
    let full = error.full_rank.max(1) as f64;
    let at = |&(rank, error): &(usize, f64)| (rank as f64 / full, error);
    Line {
        module: error.module.clone(),
        block: error.block,
        points: error.points.iter().map(at).collect(),
        dots: error.chosen.iter().map(at).collect(),
        mark: error.break_even_rank as f64 / full,
    }
}

fn row(l: &LinearRecord) -> Vec<Cell> {
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

/// Deviations of single linears from the recipe.
fn notes(report: &CompressReport) -> Vec<String> {
    let widths = report.narrow.iter().flat_map(NarrowRecord::lines);
    let healed = report.healings().flat_map(HealRecord::lines);
    widths
        .chain(healed)
        .chain(notes::lines(report.linears.iter().map(|l| (l.module.as_str(), l.note.as_deref()))))
        .collect()
}

fn warnings(report: &CompressReport) -> Vec<String> {
    let broken = report.non_finite.iter();
    let mut warnings: Vec<String> =
        broken.map(|name| format!("{name}: contains NaN or infinite values, as in the source")).collect();
    if let Some(baseline) = &report.equal_bytes_baseline
        && baseline.weighted_error_ratio.is_some_and(|ratio| ratio > 1.0)
    {
        warnings.push(
            "spending the bytes of the factors on higher bit widths would give a lower error (see `equal_bytes_baseline` in the report)"
                .into(),
        );
    }
    warnings
}

/// Values before and after, by the last name of a module.
type Totals = BTreeMap<String, (f64, f64)>;

/// Parameters and bytes by kind of module, and of everything that was not targeted.
fn bars(report: &CompressReport) -> Vec<Chart> {
    let (mut parameters, mut bytes) = (Totals::new(), Totals::new());
    for l in &report.linears {
        let name = l.block.map_or(l.module.clone(), |block| within_block(&l.module, block));
        let name = name.rsplit('.').next().unwrap_or(&name);
        let weights = l.parameters_before as f64;
        let bytes_before = weights * report.sizes.bits_per_weight_before / 8.0;
        add(&mut parameters, name, (weights, l.parameters_after as f64));
        add(&mut bytes, name, (bytes_before, weights * (l.bits_base + l.bits_factors) / 8.0));
    }
    let s = &report.sizes;
    let parameters = with_rest(parameters, (s.parameters_before, s.parameters_after));
    let bytes = with_rest(bytes, (s.bytes_before, s.bytes_after));
    vec![
        Chart { title: "parameters".into(), svg: svg::bars(&parameters, short_count) },
        Chart { title: "bytes".into(), svg: svg::bars(&bytes, |v| ByteSize(v as u64).to_string()) },
    ]
}

fn add(totals: &mut Totals, name: &str, (before, after): (f64, f64)) {
    let sum = totals.entry(name.into()).or_default();
    *sum = (sum.0 + before, sum.1 + after);
}

/// Rows of bars; the last is the rest of the totals (before, after) of the model.
fn with_rest(totals: Totals, (before, after): (u64, u64)) -> Vec<(String, f64, f64)> {
    let (own_before, own_after) = totals.values().fold((0.0, 0.0), |sum, v| (sum.0 + v.0, sum.1 + v.1));
    let mut rows: Vec<(String, f64, f64)> = totals.into_iter().map(|(name, v)| (name, v.0, v.1)).collect();
    rows.push(("not targeted".into(), (before as f64 - own_before).max(0.0), (after as f64 - own_after).max(0.0)));
    rows
}

/// A count with a unit prefix.
fn short_count(value: f64) -> String {
    let units = [(1e9, " G"), (1e6, " M"), (1e3, " k")];
    let unit = units.into_iter().find(|(size, _)| value >= *size);
    unit.map_or(format!("{value:.0}"), |(size, name)| format!("{:.1}{name}", value / size))
}
