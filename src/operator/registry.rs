//! Every structure, one line each, and how it is found by its name or by the parts of a stored module.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::structure::{Fitting, Kind, Structure};
use super::{blast, dense, factors, monarch, pivot};

/// Every structure: the dense weight, then low-rank structures in the order in which messages list them.
static REGISTRY: &[&dyn Structure] =
    &[&dense::Dense, &factors::Factors, &pivot::Pivot, &monarch::Monarch, &blast::Blast];

/// Indices of structures that are known beforehand.
impl Kind {
    /// The weight itself, or a base below another term.
    pub(crate) const DENSE: Self = Self(0);
    /// `B·A`: supported by every runtime with low rank.
    pub const FACTORS: Self = Self(1);
}

impl Default for Kind {
    /// The pivot layout, which has fewer parameters than factors at every rank.
    fn default() -> Self {
        Self(2)
    }
}

impl Kind {
    /// The structures that may approximate a weight, as `--layout` names them.
    pub fn layouts() -> impl Iterator<Item = Self> {
        (1..REGISTRY.len()).map(|at| Self(at as u8))
    }

    /// The structure.
    pub fn structure(self) -> &'static dyn Structure {
        REGISTRY[self.0 as usize]
    }

    /// How the structure is fitted.
    ///
    /// # Panics
    /// If it is the dense weight.
    pub fn fitting(self) -> &'static dyn Fitting {
        self.structure().fitting().expect("invariant: only layouts are fitted")
    }

    /// The name in recipes, reports and configs.
    pub fn name(self) -> &'static str {
        self.structure().name()
    }

    /// The structure of a stored module, identified by the first part that `has` finds.
    pub fn stored(has: impl Fn(&str) -> bool) -> Option<Self> {
        Self::layouts().find(|kind| has(&kind.weight_of_first_part()))
    }

    /// The tensor by which a stored module is known, without the name of the module.
    pub(crate) fn weight_of_first_part(self) -> String {
        format!("{}.weight", self.structure().suffixes()[0].0)
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = || Self::layouts().map(Self::name).collect::<Vec<_>>().join(", ");
        Self::layouts().find(|kind| kind.name() == text).ok_or_else(|| format!("`{text}` is not one of {}", known()))
    }
}

impl Serialize for Kind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
