//! Names of quantizers: words joined by dashes, `int4-g64`, `rtn-int4-g128`, `gptq-int3-channel-asym`, `cd-nf4-g64`,
//! `cd-q4_k`, `imatrix-q4_k`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{BLOCK_TYPES, BlockType, Levels, Quant, Scale, Scheme};

/// The default number of columns that share a scale; for `nf4` as well.
const DEFAULT_GROUP: usize = 128;
const DEFAULT_NF4_GROUP: usize = 64;

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.levels {
            Levels::Int { bits, .. } | Levels::Sparse { bits } => write!(f, "int{bits}")?,
            Levels::Nf4 => f.write_str("nf4")?,
            Levels::E4m3 => return f.write_str("float8"),
        }
        match self.group {
            Some(group) => write!(f, "-g{group}")?,
            None => f.write_str("-channel")?,
        }
        match self.levels {
            Levels::Int { symmetric: false, .. } => f.write_str("-asym"),
            Levels::Sparse { .. } => f.write_str("-2of4"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Quant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (method, scheme, scale) = match self {
            Self::Cd(scheme, scale) => ("cd-", scheme, scale),
            Self::CdBlock(block_type) => return write!(f, "cd-{}", block_type.name),
            Self::Imatrix(block_type) => return write!(f, "imatrix-{}", block_type.name),
            Self::Bare(scheme, scale) => ("", scheme, scale),
            Self::Rtn(scheme, scale) if scheme.levels == Levels::Nf4 => ("", scheme, scale),
            Self::Rtn(scheme, scale) => ("rtn-", scheme, scale),
            Self::Gptq(scheme, scale) => ("gptq-", scheme, scale),
            Self::Block(block_type) => return f.write_str(block_type.name),
        };
        let clip = if *scale == Scale::Absmax && scheme.levels != Levels::Nf4 { "-absmax" } else { "" };
        write!(f, "{method}{scheme}{clip}")
    }
}

impl FromStr for Quant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(block_type) = BlockType::named(text) {
            return Ok(Self::Block(block_type));
        }
        let block_after = |prefix: &str| text.strip_prefix(prefix).and_then(BlockType::named);
        if let Some(block_type) = block_after("cd-") {
            return Ok(Self::CdBlock(block_type));
        }
        if let Some(block_type) = block_after("imatrix-") {
            return Ok(Self::Imatrix(block_type));
        }
        let error = || {
            let blocks: Vec<&str> = BLOCK_TYPES.iter().map(|t| t.name).collect();
            format!(
                "`{text}` is not a quantizer: expected [rtn|gptq|cd]-int8|int4|int3|int2 or nf4, then one each of -g32|-g64|-g128|-channel, \
                 -sym|-asym, -absmax|-mse, -2of4; or [cd-|imatrix-] and one of {}",
                blocks.join(", ")
            )
        };
        let (mut method, mut bits, mut group, mut symmetric, mut sparse, mut scale) =
            (None, None, None, None, None, None);
        for (at, word) in text.split('-').enumerate() {
            let is_first_of_its_kind = match word {
                "rtn" | "gptq" | "cd" if at == 0 => set(&mut method, word),
                "nf4" => set(&mut bits, None),
                "int8" | "int4" | "int3" | "int2" => set(&mut bits, word[3..].parse().ok()),
                "channel" => set(&mut group, None),
                "sym" | "asym" => set(&mut symmetric, word == "sym"),
                "2of4" => set(&mut sparse, ()),
                "absmax" => set(&mut scale, Scale::Absmax),
                "mse" => set(&mut scale, Scale::Mse),
                _ => {
                    let size = word.strip_prefix('g').and_then(|n| n.parse::<usize>().ok());
                    let size = size.filter(|&n| n >= 8 && n.is_power_of_two());
                    size.is_some() && set(&mut group, size)
                }
            };
            if !is_first_of_its_kind {
                return Err(error());
            }
        }
        let (is_nf4, bits) = (bits == Some(None), bits.flatten());
        let (symmetric, is_sparse) = (symmetric.unwrap_or(true), sparse.is_some());
        let levels = match (is_nf4, bits) {
            (true, None) if method != Some("gptq") && symmetric && !is_sparse => Levels::Nf4,
            (true, _) => return Err(error()),
            (false, _) if is_sparse && !symmetric => return Err(error()),
            (false, bits) if is_sparse => Levels::Sparse { bits: bits.unwrap_or(4) },
            (false, bits) => Levels::Int { bits: bits.unwrap_or(4), symmetric },
        };
        if bits.is_none() && !is_nf4 && method.is_none() {
            return Err(error());
        }
        let default_group = if is_nf4 { DEFAULT_NF4_GROUP } else { DEFAULT_GROUP };
        let scheme = Scheme { levels, group: group.unwrap_or(Some(default_group)) };
        // NF4 is made for the whole range.
        let scale = scale.unwrap_or(if is_nf4 { Scale::Absmax } else { Scale::Mse });
        Ok(match method {
            Some("gptq") => Self::Gptq(scheme, scale),
            Some("cd") => Self::Cd(scheme, scale),
            // A bare `nf4` is rounded, as everywhere.
            None if !is_nf4 => Self::Bare(scheme, scale),
            _ => Self::Rtn(scheme, scale),
        })
    }
}

/// Sets what no word before has set; false if one has.
fn set<T>(slot: &mut Option<T>, value: T) -> bool {
    slot.replace(value).is_none()
}

impl Serialize for Quant {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Quant {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (text, name) in [
            ("rtn", "rtn-int4-g128"),
            ("int8-channel", "int8-channel"),
            ("rtn-int8-channel", "rtn-int8-channel"),
            ("gptq-int3-g32-asym-absmax", "gptq-int3-g32-asym-absmax"),
            ("gptq", "gptq-int4-g128"),
            ("nf4", "nf4-g64"),
            ("nf4-g32", "nf4-g32"),
            ("q4_k", "q4_k"),
            ("cd", "cd-int4-g128"),
            ("cd-int3-g64-asym", "cd-int3-g64-asym"),
            ("cd-nf4", "cd-nf4-g64"),
            ("cd-iq4_nl", "cd-iq4_nl"),
            ("gptq-int4-2of4-g64", "gptq-int4-g64-2of4"),
            ("2of4-int8-channel", "int8-channel-2of4"),
            ("imatrix-q2_k", "imatrix-q2_k"),
            ("rtn-int2-sym-mse-g64", "rtn-int2-g64"),
        ] {
            let quant: Quant = text.parse().unwrap();
            assert_eq!(quant.to_string(), name);
            assert_eq!(name.parse(), Ok(quant));
        }
        for wrong in [
            "",
            "int5",
            "g32",
            "gptq-nf4",
            "rtn-g33",
            "q4_9",
            "nf4-asym",
            "rtn-",
            "int4-gptq",
            "cd-rtn-int4",
            "gptq-q4_k",
            "nf4-2of4",
            "rtn-int4-asym-2of4",
            "2of4",
            "imatrix-int4",
            "int4-g64-g32",
            "int4-g64-channel",
            "cd-int4-sym-asym",
            "int4-int3",
            "int4-nf4",
            "int4-2of4-2of4",
            "int4-mse-absmax",
        ] {
            assert!(wrong.parse::<Quant>().is_err(), "{wrong}");
        }
    }
}
