//! One document, before its text is rendered.

use serde_json::{Map, Value};

/// Default field of a document, as in `datasets`.
pub const DEFAULT_FIELD: &str = "text";

pub(super) const FIELD_HINT: &str = "give the field of the text with `--field`";

/// A document as stored.
#[derive(Debug, PartialEq)]
pub(super) enum Document {
    Text(String),
    /// The location of a record with `messages`, and its fields.
    Chat(String, Map<String, Value>),
}

impl Document {
    /// The location of a record; empty for texts.
    pub fn place(&self) -> &str {
        match self {
            Self::Text(_) => "",
            Self::Chat(place, _) => place,
        }
    }

    /// The length of a record as JSON; 0 for texts.
    pub fn record_bytes(&self) -> u64 {
        match self {
            Self::Text(_) => 0,
            Self::Chat(_, record) => serde_json::to_string(record).map_or(0, |text| text.len() as u64),
        }
    }

    /// The text; none for records.
    pub fn text(self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text),
            Self::Chat(..) => None,
        }
    }
}
