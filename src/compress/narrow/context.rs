//! What the steps of narrowing share.

use super::super::metrics::Metrics;
use super::super::recipe::{NarrowApproach, Recipe};
use crate::checkpoint::OutputFolder;
use crate::model::ModelConfig;
use crate::model::architectures::Architecture;
use crate::model::narrow::{NarrowUnit, UnitKind};
use crate::session::Session;

/// What the steps share.
pub(super) struct Context<'a> {
    pub session: &'a Session<'a>,
    pub metrics: Metrics<'a>,
    pub approach: &'a NarrowApproach,
    /// The recipe of the narrower model.
    pub then: &'a Recipe,
    pub config: &'a ModelConfig,
    pub architecture: &'static Architecture,
    pub units: &'a [NarrowUnit],
    pub folder: &'a OutputFolder,
}

/// The widths of all blocks; `None` for what stays as it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Width {
    pub channels: Option<usize>,
    pub groups: Option<usize>,
}

impl Width {
    /// The width of a unit.
    pub fn of(self, unit: &NarrowUnit) -> usize {
        let own = match unit.kind {
            UnitKind::Channels => self.channels,
            UnitKind::Groups => self.groups,
        };
        own.unwrap_or(unit.width())
    }
}
