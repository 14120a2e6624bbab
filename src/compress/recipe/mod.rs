//! The settings of a compression: [`RecipeOptions`], checked against each other, with the defaults filled in.

mod allocation;
mod approach;
mod bases;
mod basics;
mod build;
mod embeddings;
mod file;
mod limit;
mod low_rank;
mod narrow;
mod patterns;
mod quantized;
mod settings;
mod storage;
#[cfg(test)]
mod tests;

pub use super::options::{ChannelSelection, Embeddings, FactorBits, Fused, Parameters, RecipeOptions, Structures};
pub use allocation::{KnapsackSettings, RankAllocation, RankSteps, Rule};
pub use approach::{Approach, Linears, LowRankApproach, MetricSettings, NarrowApproach, Replacement, WidthRule};
pub use bases::{BaseSensitivity, Bases, Compensator, Factors, Quantizers};
pub use basics::{DEFAULT_SAMPLES, max_shard_bytes, windows};
pub use limit::{Budget, Limit, Reduction};
pub(super) use narrow::default_damping;
pub use patterns::Patterns;
pub use settings::{DEFAULT_SHARD_BYTES, Recipe};
pub use storage::{FactorStorage, FloatStorage, Unordered};
