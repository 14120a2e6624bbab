//! Charts with a line per block, one chart per kind of module.

use serde::Serialize;

use super::grid::within_block;
use super::svg::{self, Axes, Series};

/// Points of a line.
const POINTS: usize = 48;

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

/// A titled plot.
#[derive(Clone, Serialize)]
pub(super) struct Chart {
    pub title: String,
    pub svg: String,
}

/// The line of one module.
pub(super) struct Line {
    pub module: String,
    pub block: Option<usize>,
    pub points: Vec<(f64, f64)>,
    pub dots: Vec<(f64, f64)>,
    /// The break-even rank as a share of the full rank.
    pub mark: f64,
}

/// Axes of a chart over ranks.
pub(super) fn rank_axes() -> Axes {
    Axes { x_label: "share of the rank", x_range: Some((0.0, 1.0)), ..Axes::default() }
}

/// One chart per module of a block, with a line per block.
pub(super) fn families(lines: impl Iterator<Item = Line>, axes: &Axes, suffix: &str) -> Vec<Chart> {
    let mut families: Vec<(String, Vec<Line>)> = Vec::new();
    for line in lines {
        let name = line.block.map_or(line.module.clone(), |block| within_block(&line.module, block));
        match families.iter_mut().find(|(other, _)| *other == name) {
            Some((_, members)) => members.push(line),
            None => families.push((name, vec![line])),
        }
    }
    families.into_iter().map(|(name, lines)| family(format!("{name}{suffix}"), lines, axes)).collect()
}

fn family(title: String, mut members: Vec<Line>, axes: &Axes) -> Chart {
    members.sort_by_key(|line| line.block);
    let last = (members.len() - 1).max(1) as f64;
    let mark = members.first().map(|line| line.mark);
    let series = members.into_iter().enumerate().map(|(i, line)| Series {
        points: line.points,
        strength: i as f64 / last,
        dots: line.dots,
    });
    Chart { title, svg: svg::lines(&series.collect::<Vec<_>>(), &Axes { mark, ..axes.clone() }) }
}

/// σ / σ₁ over the share of the rank.
pub(super) fn decay(sigma: &[f64]) -> Vec<(f64, f64)> {
    let first = sigma.first().copied().filter(|&s| s > 0.0).unwrap_or(1.0);
    let last = sigma.len().saturating_sub(1);
    let n = POINTS.min(last.max(1));
    let place = |i: usize| i * last / n;
    (0..=n).map(|i| (place(i) as f64 / last.max(1) as f64, sigma.get(place(i)).map_or(0.0, |s| s / first))).collect()
}

/// Share of Σσ² over the share of the rank.
pub(super) fn cumulative(sigma: &[f64]) -> Vec<(f64, f64)> {
    let total: f64 = sigma.iter().map(|s| s * s).sum();
    let mut sum = 0.0;
    let mut all = vec![(0.0, 0.0)];
    for (i, s) in sigma.iter().enumerate() {
        sum += s * s;
        all.push(((i + 1) as f64 / sigma.len() as f64, if total > 0.0 { sum / total } else { 0.0 }));
    }
    ErrorLine::ranks(sigma.len()).into_iter().map(|rank| all[rank]).collect()
}
