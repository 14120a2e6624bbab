//! Memory and time that narrowing needs, from shapes alone.

use super::super::recipe::NarrowApproach;
use super::{curves, losses, ranks, units};
use crate::checkpoint::Checkpoint;
use crate::model::ModelConfig;
use crate::model::inventory::LinearInfo;
use crate::model::narrow::NarrowUnit;

/// What narrowing takes besides statistics.
pub(in crate::compress) struct Needs {
    /// Bytes of each piece of work that runs beside others.
    pub at_once: Vec<u64>,
    /// Bytes of the refitted readers, and of what an elastic output keeps beside its weights.
    pub kept: u64,
    /// Multiplications with additions, in f64.
    pub operations: f64,
}

impl Needs {
    /// The needs of a model with these linears; none if its config cannot be read.
    pub fn of(checkpoint: &Checkpoint, approach: &NarrowApproach, linears: &[LinearInfo]) -> Self {
        let units = ModelConfig::of(checkpoint)
            .map(|(config, architecture)| units::possible(linears, &config, architecture).0)
            .unwrap_or_default();
        let of_units = units.iter().map(curves::bytes);
        let of_blocks = linears.iter().filter(|_| approach.drops_blocks).map(losses::bytes);
        let of_ranks = linears.iter().filter(|_| approach.then_low_rank()).map(ranks::bytes);
        Self {
            at_once: of_units.chain(of_blocks).chain(of_ranks).collect(),
            kept: units
                .iter()
                .map(|unit| unit.reader.n_bytes() + if approach.is_elastic { form(unit) } else { 0 })
                .sum(),
            operations: units.iter().map(operations).sum(),
        }
    }
}

/// Bytes of the input form of a reader that is kept: a triangle in f32.
fn form(unit: &NarrowUnit) -> u64 {
    let n = unit.reader.in_features as u64;
    2 * n * (n + 1)
}

/// The inverse of the input form, the image of the output form, the elimination, and the refit at most.
fn operations(unit: &NarrowUnit) -> f64 {
    let (m, n) = unit.reader.shape();
    let (m, n) = (m as f64, n as f64);
    3.5 * n.powi(3) + m * n * (m + 4.0 * n)
}
