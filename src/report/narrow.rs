//! What became narrower, in the report of `lrc compress --structure narrow`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The widths before and after.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct NarrowRecord {
    /// One entry per block and kind of unit, in the order of the model.
    pub blocks: Vec<NarrowedUnit>,
    /// What stays as it is, and why.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub notes: Vec<String>,
}

impl NarrowRecord {
    /// The widths of all blocks, and what stays as it is: a line each.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for unit in &self.blocks {
            let of_kind = self.blocks.iter().filter(|other| other.kind == unit.kind);
            let line =
                format!("{} in each of {} blocks: {} of {}", unit.kind, of_kind.count(), unit.after, unit.before);
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
        lines.into_iter().chain(self.notes.iter().cloned()).collect()
    }
}

/// A part of a block that may become narrower.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct NarrowedUnit {
    /// Index of the block.
    pub block: usize,
    /// `channels` of the feed-forward layer, or `groups` of heads: a head of keys and values with its heads of queries.
    pub kind: String,
    /// The linear that reads them, whose columns that stay are refitted.
    pub reader: String,
    /// Their number in the source.
    pub before: usize,
    /// Their number in the output.
    pub after: usize,
    /// Error of the reader over the norm of its weight, both in the metric of the method.
    pub relative_error: f64,
    /// Seconds in which their order was found.
    pub seconds: f64,
}
