//! What became narrower, in the reports of `lrc compress --structure narrow`.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The widths before and after.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct NarrowRecord {
    /// One entry per block and kind of unit, or expert, in the order of the model.
    pub blocks: Vec<NarrowedUnit>,
    /// Blocks of the source that were left out.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub dropped: Vec<usize>,
    /// What stays as it is, and why.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub notes: Vec<String>,
}

impl NarrowRecord {
    /// The widths of all blocks, and what stays as it is: a line each.
    pub fn lines(&self) -> Vec<String> {
        let mut by_kind: Vec<(&str, Vec<&NarrowedUnit>)> = Vec::new();
        for unit in &self.blocks {
            match by_kind.iter_mut().find(|(kind, _)| *kind == unit.kind) {
                Some((_, units)) => units.push(unit),
                None => by_kind.push((&unit.kind, vec![unit])),
            }
        }
        let lines = by_kind.into_iter().map(|(kind, units)| line(kind, &units));
        let dropped: Vec<String> = self.dropped.iter().map(usize::to_string).collect();
        let dropped = (!dropped.is_empty()).then(|| format!("blocks left out: {}", dropped.join(", ")));
        dropped.into_iter().chain(lines).chain(self.notes.iter().cloned()).collect()
    }
}

impl NarrowRecord {
    /// The width of every block, where they differ: a line for each kind.
    pub fn by_block(&self) -> Vec<String> {
        let line = |kind: &str| {
            let own: Vec<&NarrowedUnit> = self.blocks.iter().filter(|unit| unit.kind == kind).collect();
            let is_uniform = own.windows(2).all(|pair| pair[0].after == pair[1].after);
            let widths: Vec<String> = own.iter().map(|unit| format!("{}: {}", unit.block, unit.after)).collect();
            (!is_uniform).then(|| format!("{kind} by block of the source: {}", widths.join(", ")))
        };
        ["channels", "groups"].into_iter().filter_map(line).collect()
    }
}

impl NarrowedUnit {
    /// Its name within its block.
    pub fn name(&self) -> String {
        match self.expert {
            None => self.kind.clone(),
            Some(expert) => format!("expert {expert}"),
        }
    }
}

/// The experts that stay, and their channels.
fn line_of_experts(units: &[&NarrowedUnit]) -> String {
    let blocks: BTreeSet<usize> = units.iter().map(|unit| unit.block).collect();
    let stay: Vec<&&NarrowedUnit> = units.iter().filter(|unit| unit.after > 0).collect();
    let (before, after) = stay.first().map_or((0, 0), |unit| (unit.before, unit.after));
    let (n, all, n_blocks) = (stay.len(), units.len(), blocks.len());
    format!("experts in {n_blocks} blocks: {n} of {all}, channels of each that stays: {after} of {before}")
}

/// The widths of all units of a kind.
fn line(kind: &str, units: &[&NarrowedUnit]) -> String {
    let (n, first) = (units.len(), units[0]);
    if first.expert.is_some() {
        return line_of_experts(units);
    }
    if units.iter().all(|unit| (unit.before, unit.after) == (first.before, first.after)) {
        return format!("{kind} in each of {n} blocks: {} of {}", first.after, first.before);
    }
    let sum = |of: fn(&NarrowedUnit) -> usize| units.iter().map(|unit| of(unit)).sum::<usize>();
    let after = units.iter().map(|unit| unit.after);
    let (least, most) = (after.clone().min().unwrap_or(0), after.max().unwrap_or(0));
    let (before, after) = (sum(|unit| unit.before), sum(|unit| unit.after));
    format!("{kind} in {n} blocks: {least} to {most}, in all {after} of {before}")
}

/// A part of a block that may become narrower.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct NarrowedUnit {
    /// Index of the block.
    pub block: usize,
    /// `channels` of the feed-forward layer; `groups` of heads, a head of keys and values with its heads of queries; or
    /// `experts`, of whose channels some stay.
    pub kind: String,
    /// Index of the expert, in the source.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expert: Option<usize>,
    /// The linear that reads them, whose columns that stay are refitted.
    pub reader: String,
    /// Their number in the source.
    pub before: usize,
    /// Their number in the output; 0 for an expert that was left out.
    pub after: usize,
    /// Error of the reader over the norm of its weight, both in the metric of the method; none in a dry run that
    /// measures nothing.
    pub relative_error: Option<f64>,
    /// The square of that error, as the method measures it; sums over units compare.
    #[serde(default)]
    pub squared_error: Option<f64>,
    /// Seconds in which their order was found.
    pub seconds: f64,
}
