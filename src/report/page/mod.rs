//! Pages for people: one self-contained HTML file per report, which needs no network, and has styles for light and dark screens and for
//! paper. One report a file.
//!
//! Plots are SVG, written here; tables are sorted by a few lines of script in `base.html`. A page has no times and no memory figures, so
//! that the same job gives the same bytes.

mod charts;
mod compress;
mod grid;
mod inspect;
mod svg;
mod sweep;

use std::fmt::Write;

use anyhow::{Context, Result};
use minijinja::Environment;
use minijinja::value::Serde;
use serde::Serialize;

use super::LRC_VERSION;
use super::columns::Cell;
use charts::POINTS;
pub use compress::compress;
pub use grid::{Grid, within_block};
pub use inspect::inspect;
pub use sweep::sweep;

/// Name of the page in an output folder.
pub const PAGE_FILE: &str = "lrc-report.html";

/// The error of a linear by rank.
#[derive(Debug, Clone)]
pub struct ErrorLine {
    /// Name of the module.
    pub module: String,
    /// Index of the block, if the name has one.
    pub block: Option<usize>,
    /// Rank and relative error, from rank 0 to the largest that was fitted.
    pub points: Vec<(usize, f64)>,
    /// The smaller side of the weight.
    pub full_rank: usize,
    /// The chosen rank and its error; none if the linear stays dense.
    pub chosen: Option<(usize, f64)>,
    /// Largest rank that saves parameters.
    pub break_even_rank: usize,
}

impl ErrorLine {
    /// Ranks up to the largest at which an error is drawn.
    pub fn ranks(largest: usize) -> Vec<usize> {
        let mut ranks: Vec<usize> = (0..=POINTS).map(|i| i * largest / POINTS).collect();
        ranks.dedup();
        ranks
    }
}

/// A figure with its name.
#[derive(Serialize)]
struct Tile {
    name: &'static str,
    value: String,
}

fn tile(name: &'static str, value: impl Into<String>) -> Tile {
    Tile { name, value: value.into() }
}

/// A sortable table.
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
    /// The sort key.
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
    // `<` is escaped, because a string must not close the script element.
    let mut json = serde_json::to_value(report)?;
    without_times(&mut json);
    let mut inline = String::new();
    write!(inline, "{json}")?;
    let json = inline.replace('<', "\\u003c");
    let title = super::card::title(source);
    let fields = page.as_object_mut().expect("invariant: a page is a record");
    fields.extend([("version", LRC_VERSION), ("title", title), ("json", &json)].map(|(k, v)| (k.into(), v.into())));
    let template = environment.get_template(template)?;
    template.render(Serde(&page)).context("rendering a page")
}

/// Removes the fields that differ from run to run.
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
