//! The values of a heat map: a row per block, a column per module of a block.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::report::columns::Cell;

/// A heat map.
#[derive(Debug, Clone)]
pub struct Grid {
    /// Modules, in order of appearance.
    pub columns: Vec<String>,
    /// Block, and one cell per column.
    pub rows: Vec<(usize, Vec<Option<Cell>>)>,
    scale: Scale,
    range: Option<(f64, f64)>,
}

/// How values become shades.
#[derive(Debug, Clone, Copy)]
enum Scale {
    Linear,
    /// By the logarithms of positive values; others are as the smallest.
    Log,
}

impl Scale {
    fn of(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log => value.ln(),
        }
    }
}

/// The form that templates read.
#[derive(Debug, Serialize)]
pub(super) struct Map {
    title: String,
    columns: Vec<String>,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    block: usize,
    cells: Vec<Option<Shade>>,
}

#[derive(Debug, Serialize)]
struct Shade {
    /// In [0, 1], as text.
    share: String,
    text: String,
}

/// The name of a module within its block, the same in all blocks and for all experts of a stack.
pub fn within_block(module: &str, block: usize) -> String {
    let number = format!(".{block}.");
    let rest = module.split_once(&number).map_or(module, |(_, rest)| rest);
    let rest = rest.split_once('[').map_or(rest, |(stack, _)| stack);
    let names = rest.split('.').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
    names.collect::<Vec<_>>().join(".")
}

impl Grid {
    /// Makes a grid of cells, each with its block and the name of its module there. Cells at the same
    /// place (experts) are averaged.
    pub fn of(cells: impl Iterator<Item = (usize, String, Cell)>) -> Self {
        let mut columns: Vec<String> = Vec::new();
        let mut places: BTreeMap<usize, BTreeMap<usize, Vec<Cell>>> = BTreeMap::new();
        for (block, module, cell) in cells {
            let column = columns.iter().position(|name| *name == module).unwrap_or_else(|| {
                columns.push(module);
                columns.len() - 1
            });
            places.entry(block).or_default().entry(column).or_default().push(cell);
        }
        let row = |cells: &BTreeMap<usize, Vec<Cell>>| (0..columns.len()).map(|i| Some(mean(cells.get(&i)?))).collect();
        let rows: Vec<(usize, Vec<Option<Cell>>)> = places.iter().map(|(block, cells)| (*block, row(cells))).collect();
        Self { columns, rows, scale: Scale::Linear, range: None }.ranged()
    }

    /// The same grid with shades of logarithms.
    #[must_use]
    pub fn on_log_scale(self) -> Self {
        Self { scale: Scale::Log, ..self }.ranged()
    }

    fn ranged(self) -> Self {
        let numbers = self.rows.iter().flat_map(|(_, cells)| cells.iter().flatten().filter_map(Cell::number));
        let scaled = numbers.map(|value| self.scale.of(value)).filter(|value| value.is_finite());
        let (low, high) = scaled.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (f64::min(low, value), f64::max(high, value))
        });
        Self { range: (low < high).then_some((low, high)), ..self }
    }

    /// The position of a cell between the smallest and the largest value, in [0, 1].
    pub fn share(&self, cell: &Cell) -> f64 {
        match (cell.number(), self.range) {
            // The logarithm of 0 is below all others.
            (Some(value), Some((low, high))) => (self.scale.of(value).max(low) - low) / (high - low),
            _ => 0.0,
        }
    }

    pub(super) fn map(&self, title: &str) -> Map {
        let shade = |cell: &Cell| Shade { share: format!("{:.3}", self.share(cell)), text: cell.short() };
        let row = |(block, cells): &(usize, Vec<Option<Cell>>)| Row {
            block: *block,
            cells: cells.iter().map(|cell| cell.as_ref().map(shade)).collect(),
        };
        Map { title: title.into(), columns: self.columns.clone(), rows: self.rows.iter().map(row).collect() }
    }
}

fn mean(cells: &[Cell]) -> Cell {
    match cells {
        [one] => one.clone(),
        many => {
            let numbers: Vec<f64> = many.iter().filter_map(Cell::number).collect();
            let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
            if numbers.is_empty() { many[0].clone() } else { Cell::Real(mean) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_of_a_block_have_one_name_in_all_blocks() {
        for (module, block, expected) in [
            ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
            ("model.layers.0.moe.experts.7.w1", 0, "moe.experts.*.w1"),
            ("model.layers.1.mlp.experts.down_proj[5]", 1, "mlp.experts.down_proj"),
        ] {
            assert_eq!(within_block(module, block), expected);
        }
    }

    #[test]
    fn experts_share_a_cell_and_shades_span_the_values() {
        let cells = [(0, "a", 1.0), (0, "b", 2.0), (0, "b", 4.0), (2, "a", 5.0)];
        let grid = Grid::of(cells.into_iter().map(|(block, module, x)| (block, module.into(), Cell::Real(x))));
        assert_eq!(grid.columns, ["a", "b"]);
        let expected =
            [(0, vec![Some(Cell::Real(1.0)), Some(Cell::Real(3.0))]), (2, vec![Some(Cell::Real(5.0)), None])];
        assert_eq!(grid.rows, expected);
        assert_eq!([1.0, 3.0, 5.0].map(|x| grid.share(&Cell::Real(x))), [0.0, 0.5, 1.0]);
    }

    #[test]
    fn shades_of_logarithms_span_the_positive_values() {
        let cells = [(0, 0.0), (1, 1e-4), (2, 1e-2), (3, 1.0)];
        let grid = Grid::of(cells.into_iter().map(|(block, x)| (block, "a".into(), Cell::Real(x)))).on_log_scale();
        let shares = cells.map(|(_, x)| grid.share(&Cell::Real(x)));
        let expected = [0.0, 0.0, 0.5, 1.0];
        assert!(shares.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-12), "{shares:?}");
    }
}
