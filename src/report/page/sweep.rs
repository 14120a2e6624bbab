//! The page of `lrc sweep`.

use anyhow::Result;
use serde_json::json;

use super::charts::Chart;
use super::grid::{Grid, Map, within_block};
use super::svg::{self, Axes, Series};
use super::template::{render, table, tile};
use crate::report::columns::Cell;
use crate::report::{SweepPoint, SweepReport};

/// The page of `lrc sweep`.
///
/// # Errors
/// A template is broken.
pub fn sweep(report: &SweepReport) -> Result<String> {
    let budget = report.points.first().map_or("keep", |p| p.budget().0);
    let titles = [budget, "perplexity", "ratio", "KL", "same top 1", "kept", "parameters", "bytes"];
    let tiles = [
        tile("perplexity of the source", report.dense_ppl.map_or("-".into(), |ppl| format!("{ppl:.5}"))),
        tile("convention", report.convention.clone()),
        tile("tokens per window", report.seq_len.to_string()),
        tile("budgets", report.points.len().to_string()),
        tile("knee", knee(report).map_or("-".into(), |p| format!("{} {}", p.budget().0, p.budget().1))),
    ];
    let page = json!({
        "tiles": tiles,
        "charts": charts(report),
        "points": table(&titles, report.points.iter().map(row).collect()),
        "maps": report.points.iter().filter_map(ranks).collect::<Vec<_>>(),
        "recipe": serde_json::to_string_pretty(&report.recipe)?,
    });
    render("sweep.html", &report.model, report, page)
}

fn charts(report: &SweepReport) -> Vec<Chart> {
    let mut ordered: Vec<&SweepPoint> = report.points.iter().collect();
    ordered.sort_by_key(|a| a.sizes.bytes_after);
    // The line through the knee.
    let sizes = Axes { x_label: "MiB of tensors", mark: knee(report).map(mebibytes), ..Axes::default() };
    let perplexity = Axes { y_label: "perplexity", has_log_y: true, ..sizes.clone() };
    let kl = Axes { y_label: "KL", has_log_y: true, ..sizes.clone() };
    let same = Axes { y_label: "share", ..sizes };
    vec![
        chart("perplexity", &perplexity, &ordered, |p| (mebibytes(p), p.ppl)),
        chart("KL from the source (nats)", &kl, &ordered, |p| (mebibytes(p), p.divergence.kl.mean)),
        chart("same top 1", &same, &ordered, |p| (mebibytes(p), p.divergence.same_top_1)),
    ]
}

fn knee(report: &SweepReport) -> Option<&SweepPoint> {
    report.points.get(report.knee?)
}

fn mebibytes(p: &SweepPoint) -> f64 {
    p.sizes.bytes_after as f64 / f64::from(1 << 20)
}

fn chart(title: &str, axes: &Axes, points: &[&SweepPoint], at: fn(&SweepPoint) -> (f64, f64)) -> Chart {
    let points: Vec<(f64, f64)> = points.iter().map(|p| at(p)).collect();
    let series = Series { dots: points.clone(), points, strength: 1.0 };
    Chart { title: title.into(), svg: svg::lines(&[series], axes) }
}

fn row(p: &SweepPoint) -> Vec<Cell> {
    vec![
        Cell::Real(p.budget().1),
        Cell::Real(p.ppl),
        Cell::Real(p.divergence.ppl_ratio),
        Cell::Real(p.divergence.kl.mean),
        Cell::Real(p.divergence.same_top_1),
        Cell::Real(p.sizes.keep),
        Cell::Integer(p.sizes.parameters_after),
        Cell::Integer(p.sizes.bytes_after),
    ]
}

fn ranks(p: &SweepPoint) -> Option<Map> {
    let cells = p.ranks.iter().filter_map(|(module, rank)| {
        let block = module.split('.').find_map(|part| part.parse().ok())?;
        Some((block, within_block(module, block), rank.map_or(Cell::Text("dense".into()), Cell::from)))
    });
    let grid = Grid::of(cells);
    (!grid.columns.is_empty()).then(|| grid.map(&format!("ranks at {} {}", p.budget().0, p.budget().1)))
}
