//! What `lrc inspect --importance` measures.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Errors of leaving out parts of a model, in the calibration metric, with the damping of `--structure narrow`. They are
/// squared, and have one unit: those of parts that are left out together add up.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ImportanceRecord {
    /// Every block, left out alone.
    pub blocks: Vec<BlockImportance>,
    /// Every group of heads, left out alone: a head of keys and values with its heads of queries.
    pub groups: Vec<GroupImportance>,
    /// Every expert, left out alone.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub experts: Vec<ExpertImportance>,
    /// Shares of the channels of every feed-forward layer, the least important first.
    pub channels: Vec<ChannelImportance>,
    /// What cannot be left out, and why.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub notes: Vec<String>,
}

/// A block.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct BlockImportance {
    /// Index of the block.
    pub block: usize,
    /// Parameters of its linears.
    pub parameters: u64,
    /// Squared error of the linears that add to the states between blocks, if they add nothing.
    pub squared_error: f64,
}

/// A group of heads.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct GroupImportance {
    /// Index of the block.
    pub block: usize,
    /// Index of the head of keys and values.
    pub group: usize,
    /// Parameters of the linears of the group.
    pub parameters: u64,
    /// Squared error of the output of attention without the group, after the others are refitted.
    pub squared_error: f64,
}

/// An expert.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ExpertImportance {
    /// Index of the block.
    pub block: usize,
    /// Index of the expert.
    pub expert: usize,
    /// Parameters of its linears.
    pub parameters: u64,
    /// Squared error of its output, weighed by the router, if it adds nothing and the other weights stay.
    pub squared_error: f64,
}

/// A share of the channels of a feed-forward layer.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct ChannelImportance {
    /// Index of the block.
    pub block: usize,
    /// The share that is left out.
    pub share: f64,
    /// Number of channels that are left out.
    pub dropped: usize,
    /// Number of all channels of the layer.
    pub channels: usize,
    /// Parameters of the linears of these channels.
    pub parameters: u64,
    /// Squared error of the output of the layer without them, after the others are refitted.
    pub squared_error: f64,
}
