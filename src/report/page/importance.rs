//! Heat maps of the errors of leaving out parts of a model.

use super::grid::Grid;
use crate::report::ImportanceRecord;
use crate::report::columns::{Cell, fixed};

/// The maps with their titles; those without a value are absent. Shades are of logarithms.
pub fn importance(record: &ImportanceRecord) -> Vec<(&'static str, Grid)> {
    let blocks = record.blocks.iter().map(|part| (part.block, "whole".to_string(), part.squared_error));
    let groups = record.groups.iter().map(|part| (part.block, format!("group {}", part.group), part.squared_error));
    let experts = record.experts.iter().map(|part| (part.block, format!("expert {}", part.expert), part.squared_error));
    let channels = record.channels.iter().map(|part| {
        let share = format!("{} %", fixed(100.0 * part.share, 0));
        (part.block, share, part.squared_error)
    });
    let maps = [
        ("squared error without a block", blocks.collect::<Vec<_>>()),
        ("squared error without a group of heads", groups.collect()),
        ("squared error without an expert", experts.collect()),
        ("squared error without a share of the channels", channels.collect()),
    ];
    let maps = maps.into_iter().filter(|(_, cells)| !cells.is_empty());
    let grid = |cells: Vec<(usize, String, f64)>| {
        Grid::of(cells.into_iter().map(|(block, name, error)| (block, name, Cell::Real(error)))).on_log_scale()
    };
    maps.map(|(title, cells)| (title, grid(cells))).collect()
}
