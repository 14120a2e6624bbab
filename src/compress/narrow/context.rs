//! What the steps of narrowing share.

use super::super::metrics::Metrics;
use super::super::recipe::{ChannelSelection, NarrowApproach, Recipe};
use crate::approx::narrow::Narrowing;
use crate::checkpoint::Checkpoint;
use crate::model::ModelConfig;
use crate::model::architectures::Architecture;
use crate::model::narrow::NarrowUnit;
use crate::session::Session;

/// What errors are measured with.
#[derive(Clone, Copy)]
pub(in crate::compress) struct Measure<'a> {
    pub session: &'a Session<'a>,
    pub metrics: Metrics<'a>,
    pub selection: ChannelSelection,
}

/// A model, and how it becomes narrower.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub checkpoint: &'a Checkpoint,
    pub approach: &'a NarrowApproach,
    /// The recipe of the narrower model.
    pub then: &'a Recipe,
    pub config: &'a ModelConfig,
    pub architecture: &'static Architecture,
    pub units: &'a [NarrowUnit],
}

/// The order of a unit.
pub(super) struct Curve {
    pub narrowing: Narrowing,
    pub seconds: f64,
}

/// The widths that were chosen.
pub(super) struct Widths<'a> {
    pub units: &'a [NarrowUnit],
    pub chosen: &'a Chosen,
    /// The channels or groups of each unit that stay, in the order that they get.
    pub kept: &'a [Vec<usize>],
    /// The errors of each unit at every width, if they were measured.
    pub curves: Option<&'a [Curve]>,
    /// What stays as it is, and why.
    pub notes: Vec<String>,
}

/// What a model becomes.
pub(super) struct Chosen {
    /// The number of channels or groups of each unit; whole in blocks that are left out.
    pub widths: Vec<usize>,
    /// The blocks that are left out, ascending.
    pub dropped: Vec<usize>,
}
