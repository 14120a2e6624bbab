//! Sizes of files and numbers of parameters, as options and recipe files write them.

use std::fmt;
use std::str::FromStr;

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The forms of a size.
const SIZES: &str = "expected a size, such as 350MiB, 1.5GB, or a number of bytes";

/// Parses a size.
///
/// # Errors
/// It is not a number with or without a unit of bytes.
pub(crate) fn size(text: &str) -> Result<ByteSize, String> {
    text.parse().map_err(|_| SIZES.into())
}

/// A value of a recipe file that may be a string or a whole number.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

impl Written {
    fn read<'de, D: Deserializer<'de>>(deserializer: D, expected: &str) -> Result<Self, D::Error> {
        Self::deserialize(deserializer).map_err(|_| serde::de::Error::custom(expected))
    }
}

/// Deserializes a size, which may be a string or a number of bytes.
pub(super) fn size_in_recipe<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ByteSize>, D::Error> {
    match Written::read(deserializer, SIZES)? {
        Written::Number(bytes) => Ok(Some(ByteSize(bytes))),
        Written::Text(text) => size(&text).map(Some).map_err(serde::de::Error::custom),
    }
}

/// Serializes a size so that it is read back as the same number of bytes.
pub(super) fn bytes_exactly<S: Serializer>(size: &Option<ByteSize>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{} B", size.unwrap_or_default().as_u64()))
}

/// A number of parameters: `1.1B`, `90M`, `250K`, or in full.
///
/// ```
/// use lrc::compress::recipe::Parameters;
///
/// let parsed: Parameters = "1.1B".parse()?;
/// assert_eq!((parsed.0, parsed.to_string()), (1_100_000_000, "1100000000".into()));
/// assert!("1.1G".parse::<Parameters>().is_err() && "-1M".parse::<Parameters>().is_err());
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters(pub u64);

/// The forms of a number of parameters.
const COUNTS: &str = "expected a number of parameters, such as 1.1B, 90M or 250K";

/// The letters after a number, with what they multiply it by.
const UNITS: [(char, f64); 4] = [('K', 1e3), ('M', 1e6), ('B', 1e9), ('T', 1e12)];

impl FromStr for Parameters {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse() {
            return Ok(Self(number));
        }
        let unit = UNITS.iter().find(|(letter, _)| text.ends_with([*letter, letter.to_ascii_lowercase()]));
        let digits = text.chars().all(|c| c.is_ascii_alphanumeric() || c == '.').then_some(text);
        let number =
            unit.zip(digits).and_then(|((_, size), text)| Some(text[..text.len() - 1].parse::<f64>().ok()? * size));
        match number {
            Some(number) if number.is_finite() && number < u64::MAX as f64 => Ok(Self(number.round() as u64)),
            _ => Err(COUNTS.into()),
        }
    }
}

impl fmt::Display for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Parameters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Parameters {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Written::read(deserializer, COUNTS)? {
            Written::Number(number) => Ok(Self(number)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}
