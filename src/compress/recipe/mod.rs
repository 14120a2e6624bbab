//! The settings of a compression: [`RecipeOptions`], checked against each other, with the defaults filled in.

mod approach;
mod basics;
mod build;
mod embeddings;
mod file;
mod low_rank;
mod patterns;
mod quantized;
mod settings;
#[cfg(test)]
mod tests;

pub use super::options::{Embeddings, FactorBits, Fused, RecipeOptions};
pub use approach::{
    Approach, BaseSensitivity, Bases, Budget, Compensator, FactorStorage, Factors, FloatStorage, KnapsackSettings,
    Limit, LowRankApproach, Quantizers, RankAllocation, RankSteps, Rule, Unordered,
};
pub use basics::{DEFAULT_SAMPLES, max_shard_bytes, windows};
pub use patterns::Patterns;
pub use settings::{DEFAULT_SHARD_BYTES, Recipe};
