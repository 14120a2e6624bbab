//! Templates of the pages, and the tiles and tables that they show.

use std::fmt::Write;

use anyhow::{Context, Result};
use minijinja::Environment;
use minijinja::value::Serde;
use serde::Serialize;

use crate::report::columns::Cell;
use crate::report::{LRC_VERSION, card};

/// A figure with its name.
#[derive(Serialize)]
pub(super) struct Tile {
    pub name: &'static str,
    pub value: String,
}

pub(super) fn tile(name: &'static str, value: impl Into<String>) -> Tile {
    Tile { name, value: value.into() }
}

/// A sortable table.
#[derive(Serialize)]
pub(super) struct Table {
    pub columns: Vec<Head>,
    pub rows: Vec<Vec<Shown>>,
}

#[derive(Serialize)]
pub(super) struct Head {
    pub name: String,
    pub title: String,
    pub meaning: String,
}

#[derive(Serialize)]
pub(super) struct Shown {
    /// The sort key.
    pub value: String,
    pub text: String,
}

impl Shown {
    pub fn of(cell: &Cell) -> Self {
        Self { value: cell.exact(), text: cell.short() }
    }
}

/// A table from its titles and cells.
pub(super) fn table(titles: &[&str], rows: Vec<Vec<Cell>>) -> Table {
    let head = |title: &&str| Head { name: (*title).into(), title: (*title).into(), meaning: String::new() };
    let rows = rows.iter().map(|row| row.iter().map(Shown::of).collect()).collect();
    Table { columns: titles.iter().map(head).collect(), rows }
}

pub(super) fn render(
    template: &str,
    source: &str,
    report: &impl Serialize,
    mut page: serde_json::Value,
) -> Result<String> {
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
    let title = card::title(source);
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
