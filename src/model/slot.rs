//! The linears of a block by their role, and the sites of their inputs.

use serde::{Deserialize, Serialize};

/// The role of a linear in its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// Queries, keys and values, fused.
    QkvProj,
    /// The output of attention.
    OProj,
    /// The gate of a gated feed-forward layer; its activation multiplies the output of `UpProj`.
    GateProj,
    /// From the hidden size up to the intermediate size.
    UpProj,
    /// Gate and up, fused.
    GateUpProj,
    /// From the intermediate size back to the hidden size.
    DownProj,
}

/// The slices of fused matrices: the role of each, and its name within the fused module.
const SLICES: &[(Role, &[(Role, &str)])] = &[
    (Role::QkvProj, &[(Role::QProj, "q"), (Role::KProj, "k"), (Role::VProj, "v")]),
    (Role::GateUpProj, &[(Role::GateProj, "gate"), (Role::UpProj, "up")]),
];

/// A place in a block whose activations are the input of one or more linears; Grams are keyed by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InputSite {
    /// The normalized hidden states, read by q, k and v.
    Qkv,
    /// The mixed values, read by o.
    O,
    /// The normalized hidden states, read by gate and up, or by the router of experts.
    GateUp,
    /// The gated activations, read by down.
    Down,
    /// The states of `GateUp` that are routed to an expert.
    ExpertGateUp(usize),
    /// The gated activations of an expert.
    ExpertDown(usize),
}

/// A linear within its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// Its role in the block.
    pub role: Role,
    /// The expert that it belongs to.
    pub expert: Option<usize>,
}

/// One linear of a decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinearId {
    /// Index of the block, from 0.
    pub block: usize,
    /// The linear in that block.
    pub slot: Slot,
}

impl InputSite {
    /// Its name in files and messages.
    pub fn name(self) -> String {
        match self {
            Self::Qkv => "qkv".into(),
            Self::O => "o".into(),
            Self::GateUp => "gate_up".into(),
            Self::Down => "down".into(),
            Self::ExpertGateUp(expert) => format!("experts.{expert}.gate_up"),
            Self::ExpertDown(expert) => format!("experts.{expert}.down"),
        }
    }

    /// The expert that it belongs to.
    pub fn expert(self) -> Option<usize> {
        match self {
            Self::ExpertGateUp(expert) | Self::ExpertDown(expert) => Some(expert),
            Self::Qkv | Self::O | Self::GateUp | Self::Down => None,
        }
    }
}

impl Slot {
    /// A linear that every token goes through.
    pub const fn shared(role: Role) -> Self {
        Self { role, expert: None }
    }

    /// Its name in files and messages.
    pub fn name(self) -> String {
        match self.expert {
            None => self.role.name().into(),
            Some(expert) => format!("experts.{expert}.{}", self.role.name()),
        }
    }

    /// The site of its input.
    pub fn site(self) -> InputSite {
        match (self.role.site(), self.expert) {
            (InputSite::GateUp, Some(expert)) => InputSite::ExpertGateUp(expert),
            (InputSite::Down, Some(expert)) => InputSite::ExpertDown(expert),
            (site, _) => site,
        }
    }
}

impl Role {
    /// The slices of a fused matrix, by role and name; empty for other roles.
    pub fn slices(self) -> &'static [(Self, &'static str)] {
        SLICES.iter().find(|(whole, _)| *whole == self).map_or(&[], |(_, slices)| slices)
    }

    /// Its name in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::QkvProj => "qkv_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::GateUpProj => "gate_up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The site of its input, outside experts.
    pub(super) fn site(self) -> InputSite {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::QkvProj => InputSite::Qkv,
            Self::OProj => InputSite::O,
            Self::GateProj | Self::UpProj | Self::GateUpProj => InputSite::GateUp,
            Self::DownProj => InputSite::Down,
        }
    }
}
