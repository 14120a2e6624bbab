//! The plan of a compression that several processes make: `plan.json`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// `plan.json`, which `lrc plan` writes and `lrc task` and `lrc finish` read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskPlan {
    /// Version of the fields of this plan.
    pub schema_version: u32,
    /// Version of lrc that wrote the plan; tasks are run by the same.
    pub lrc_version: String,
    /// The model as the user named it.
    pub source: String,
    /// The folder of `--adapter`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// `--revision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `--dequantize`.
    #[serde(default)]
    pub dequantize: bool,
    /// `--device`.
    pub device: String,
    /// `--memory`, in bytes.
    pub memory_bytes: u64,
    /// What identifies the job: the recipe with all defaults, and SHA-256 of source, text and tokens. Tasks of another job
    /// are refused.
    pub job: Value,
    /// The stages, in order. The tasks of a stage depend on each other in nothing.
    pub stages: Vec<StageRecord>,
    /// All tasks, by index.
    pub tasks: Vec<TaskRecord>,
    /// Expected seconds of `lrc finish`.
    pub finish_seconds: f64,
    /// What `lrc finish` does by itself, and why some stage has fewer tasks.
    pub notes: Vec<String>,
}

/// The tasks of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StageRecord {
    /// `walk`, `statistics`, `fits` or `round`.
    pub name: StageName,
    /// The stages whose tasks must be finished before a task of this one begins.
    pub waits_for: Vec<StageName>,
    /// Index of its first task.
    pub first: usize,
    /// Number of its tasks, whose indices follow each other.
    pub tasks: usize,
}

/// What the tasks of a stage make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StageName {
    /// States, and gradients, before every block.
    Walk,
    /// Sums over all windows.
    Statistics,
    /// Decompositions and quantized bases.
    Fits,
    /// Factors of the ranks that were chosen, rounded.
    Round,
}

impl StageName {
    /// The name in plans and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Walk => "walk",
            Self::Statistics => "statistics",
            Self::Fits => "fits",
            Self::Round => "round",
        }
    }

    /// What a task has a range of.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Walk => "batches",
            Self::Statistics => "blocks",
            Self::Fits | Self::Round => "linears",
        }
    }
}

/// One task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskRecord {
    /// `--index` of `lrc task`.
    pub index: usize,
    /// Its stage.
    pub stage: StageName,
    /// Its batches of windows (walk), blocks (statistics) or linears (fits, round): the first, and the one behind the last.
    pub range: [usize; 2],
    /// Expected seconds on a machine like the one that planned.
    pub expected_seconds: f64,
    /// Bytes that it reads: weights, and pieces of other tasks.
    pub read_bytes: u64,
    /// Bytes of the pieces that it leaves.
    pub written_bytes: u64,
}
