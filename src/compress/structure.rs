//! What takes the place of linears, by its name on the command line.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What may take the place of linears: one or several, of which the budget chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Structures {
    /// Matrices of low rank, or codes with `--quant`.
    pub low_rank: bool,
    /// Narrower dense matrices.
    pub narrow: bool,
    /// Fewer blocks.
    pub depth: bool,
}

impl Default for Structures {
    fn default() -> Self {
        Self { low_rank: true, narrow: false, depth: false }
    }
}

const NAMES: [&str; 3] = ["low-rank", "narrow", "depth"];

impl Structures {
    fn are_in(self) -> [bool; 3] {
        [self.low_rank, self.narrow, self.depth]
    }
}

impl fmt::Display for Structures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = NAMES.iter().zip(self.are_in()).filter(|(_, is_in)| *is_in).map(|(n, _)| *n).collect();
        f.write_str(&if names.len() == NAMES.len() { "auto".into() } else { names.join(",") })
    }
}

impl FromStr for Structures {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = |name: &str| text == "auto" || text.split(',').any(|part| part == name);
        if let Some(unknown) = text.split(',').find(|part| text != "auto" && !NAMES.contains(part)) {
            return Err(format!("`{unknown}` is not one of low-rank, narrow, depth; auto is all of them"));
        }
        Ok(Self { low_rank: named("low-rank"), narrow: named("narrow"), depth: named("depth") })
    }
}

impl Serialize for Structures {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Structures {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// How channels and groups of heads are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum ChannelSelection {
    /// Drops the one that raises the error least, after the others are refitted (OBS; ZipLM, Kurtic et al. 2023)
    #[default]
    Backward,
    /// Adds the one that lowers the error most: pivoted Cholesky
    Forward,
    /// Largest ridge leverage scores (MoDeGPT, Lin et al. 2025)
    Leverage,
    /// Largest products of weight and input norms (Wanda-sp, An et al. 2024)
    WandaSp,
    /// The same over all matrices of a channel (LoRAP, Li et al. 2024)
    Lorap,
}
