//! The page of `lrc inspect`.

use anyhow::Result;
use bytesize::ByteSize;
use serde_json::json;

use super::charts::{Chart, Line, cumulative, decay, families, rank_axes};
use super::grid::{Grid, Map, within_block};
use super::importance::importance;
use super::svg::Axes;
use super::template::{Head, Shown, Table, render, tile};
use crate::report::columns::{self, Chosen, grouped};
use crate::report::{ImportanceRecord, InspectReport, Spectrum, SpectrumRecord, notes};

/// Columns with a heat map each.
const MAPPED: [&str; 4] = ["break_even_error", "stable_rank", "alpha", "weighted.break_even_error"];

/// The page of `lrc inspect`.
///
/// # Errors
/// A template is broken.
pub fn inspect(report: &InspectReport, spectra: &[Spectrum]) -> Result<String> {
    let tiles = [
        tile("matrices", grouped(report.linears.len() as u64)),
        tile("parameters", grouped(report.parameters)),
        tile("bytes", ByteSize(report.size_bytes).to_string()),
        tile("calibration metric", report.metric.clone().unwrap_or_else(|| "none".into())),
    ];
    let notes = notes::lines(report.linears.iter().map(|r| (r.module.as_str(), r.note.as_deref())));
    let page = json!({
        "tiles": tiles,
        "notes": notes,
        "maps": maps(report),
        "spectra": charts(report, spectra, Scale::Decay),
        "energy": charts(report, spectra, Scale::Energy),
        "figures": figures(report),
        "others": report.other_tensors,
        "importance": report.importance.iter().flat_map(left_out).collect::<Vec<_>>(),
        "importance_notes": report.importance.iter().flat_map(|record| &record.notes).collect::<Vec<_>>(),
    });
    render("inspect.html", &report.model, report, page)
}

/// The maps of what is left out.
fn left_out(record: &ImportanceRecord) -> Vec<Map> {
    importance(record).into_iter().map(|(title, grid)| grid.map(title)).collect()
}

fn figures(report: &InspectReport) -> Table {
    let columns = columns::of(report);
    let heads = columns.iter().map(|c| Head {
        name: c.name(),
        title: c.title(),
        meaning: format!("{}{}", c.column.meaning, if c.is_weighted { ", in the calibration metric" } else { "" }),
    });
    let rows = report.linears.iter().map(|r| columns.iter().map(|c| Shown::of(&c.of(r))).collect());
    Table { columns: heads.collect(), rows: rows.collect() }
}

fn maps(report: &InspectReport) -> Vec<Map> {
    let chosen = MAPPED.iter().filter_map(|name| Chosen::find(name));
    let with_values = chosen.filter(|c| !c.is_weighted || report.metric.is_some());
    let map = |chosen: Chosen| {
        let cells = report.linears.iter();
        let cells = cells.filter_map(|r| Some((r.block?, within_block(&r.module, r.block?), chosen.of(r))));
        Grid::of(cells).map(&chosen.name())
    };
    with_values.map(map).collect()
}

/// The quantity that is drawn against the share of the rank.
#[derive(Clone, Copy)]
enum Scale {
    /// σ / σ₁, on a logarithmic axis.
    Decay,
    /// Share of Σσ².
    Energy,
}

/// Charts of the raw spectra, then of those in the calibration metric.
fn charts(report: &InspectReport, spectra: &[Spectrum], scale: Scale) -> Vec<Chart> {
    let axes = match scale {
        Scale::Decay => Axes { y_label: "σ / σ₁", has_log_y: true, y_range: Some((1e-4, 1.0)), ..rank_axes() },
        Scale::Energy => Axes { y_label: "share of energy", y_range: Some((0.0, 1.0)), ..rank_axes() },
    };
    let both = || report.linears.iter().zip(spectra);
    let raw = both().map(|(record, spectrum)| line(record, &spectrum.raw, scale));
    let weighted = both().filter_map(|(record, spectrum)| Some(line(record, spectrum.weighted.as_ref()?, scale)));
    [families(raw, &axes, ""), families(weighted, &axes, " (metric)")].concat()
}

fn line(record: &SpectrumRecord, sigma: &[f64], scale: Scale) -> Line {
    Line {
        module: record.module.clone(),
        block: record.block,
        points: match scale {
            Scale::Decay => decay(sigma),
            Scale::Energy => cumulative(sigma),
        },
        dots: vec![],
        mark: record.break_even_rank as f64 / sigma.len().max(1) as f64,
    }
}
