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
                "`{text}` is not a quantizer: expected [rtn|gptq|cd]-int8|int4|int3|int2 or nf4, then any of -g32, -g64, -g128, \
                 -channel, -sym, -asym, -absmax, -mse, -2of4; or [cd-|imatrix-] and one of {}",
                blocks.join(", ")
            )
        };
        let (mut method, mut bits, mut is_nf4, mut group, mut symmetric, mut is_sparse, mut scale) =
            (None, None, false, None, true, false, None);
        for (at, word) in text.split('-').enumerate() {
            match word {
                "rtn" | "gptq" | "cd" if at == 0 => method = Some(word),
                "nf4" => is_nf4 = true,
                "int8" | "int4" | "int3" | "int2" => bits = word[3..].parse().ok(),
                "channel" => group = Some(None),
                "sym" => symmetric = true,
                "asym" => symmetric = false,
                "2of4" => is_sparse = true,
                "absmax" => scale = Some(Scale::Absmax),
                "mse" => scale = Some(Scale::Mse),
                _ => {
                    let size = word.strip_prefix('g').and_then(|n| n.parse::<usize>().ok());
                    group = Some(Some(size.filter(|&n| n >= 8 && n.is_power_of_two()).ok_or_else(error)?));
                }
            }
        }
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
        ] {
            assert!(wrong.parse::<Quant>().is_err(), "{wrong}");
        }
    }
}
