//! JSON as Python reads and writes it: with `NaN`, `Infinity` and `-Infinity`, numbers that no f64 holds, and perhaps a
//! byte-order mark in front. Configs are made by Python, and read by it again.
//!
//! serde has no value for such numbers: they become strings that begin with [`MARK`], and are written back as the
//! same numbers.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A prefix that no string of a config has.
pub const MARK: char = '\0';

/// The mark in a JSON string.
const ESCAPED: &str = "\\u0000";
const NAMES: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// Reads what Python reads.
///
/// # Errors
/// It is not JSON, or not of the type.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(&with_non_finite_as(bytes, |name| format!("\"{ESCAPED}{name}\"")))
}

/// The same for data that is never written back: numbers that no f64 holds become null.
///
/// # Errors
/// It is not JSON, or not of the type.
pub fn parse_as_null<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(&with_non_finite_as(bytes, |_| "null".into()))
}

/// The text of a config, with indents and a line end, as Python writes it.
///
/// # Errors
/// The value cannot be serialized.
pub fn text(value: &impl Serialize) -> serde_json::Result<String> {
    let mut text = serde_json::to_string_pretty(value)? + "\n";
    for name in NAMES {
        text = text.replace(&format!("\"{ESCAPED}{name}\""), name);
    }
    Ok(text)
}

/// A message of serde about a value of a config, with numbers that are not finite as Python names them.
pub fn unmarked(message: &str) -> String {
    let mark = MARK.escape_debug().to_string();
    let mut message = message.to_string();
    for name in NAMES {
        message = message.replace(&format!("string \"{mark}{name}\""), &format!("number `{name}`"));
    }
    message.replace(&mark, "").replace(MARK, "")
}

/// The bytes without a byte-order mark, and with the word of `spelling` for every number that serde does not know.
fn with_non_finite_as(bytes: &[u8], spelling: impl Fn(&str) -> String) -> Vec<u8> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(&first) = rest.first() {
        let len = match first {
            b'"' => string(rest),
            b'N' | b'I' | b'-' | b'0'..=b'9' => rest.iter().take_while(|b| is_of_number(**b)).count().max(1),
            _ => 1,
        };
        let (token, behind) = rest.split_at(len);
        // A key is not a number.
        let is_key = || behind.trim_ascii_start().starts_with(b":");
        match non_finite(token).filter(|_| !is_key()) {
            Some(name) => out.extend(spelling(name).into_bytes()),
            None => out.extend(token),
        }
        rest = behind;
    }
    out
}

fn is_of_number(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.')
}

/// The length of the string that `bytes` begin with, quotes included.
fn string(bytes: &[u8]) -> usize {
    let mut at = 1;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Python's name of a number that is not finite.
fn non_finite(token: &[u8]) -> Option<&'static str> {
    let token = std::str::from_utf8(token).ok()?;
    if let Some(name) = NAMES.iter().find(|name| **name == token) {
        return Some(name);
    }
    let is_number = token.trim_start_matches('-').starts_with(|c: char| c.is_ascii_digit());
    match token.parse::<f64>().ok().filter(|value| is_number && value.is_infinite())? {
        value if value > 0.0 => Some("Infinity"),
        _ => Some("-Infinity"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value};

    use super::*;

    #[test]
    fn what_python_writes_is_read_and_written_again() {
        let source = "\u{feff}{\"a\": Infinity, \"b\": [-Infinity, NaN, 1e999, -1e999], \"c\": \"NaN, Infinity \\\" -Infinity\", \"d\": 1.5e-3}";
        let config: Map<String, Value> = parse(source.as_bytes()).unwrap();
        assert_eq!(config["d"], 1.5e-3);
        assert_eq!(config["c"], "NaN, Infinity \" -Infinity");
        let written: String = text(&config).unwrap().split_whitespace().collect();
        let expected =
            r#"{"a":Infinity,"b":[-Infinity,NaN,Infinity,-Infinity],"c":"NaN,Infinity\"-Infinity","d":0.0015}"#;
        assert_eq!(written, expected);
        assert_eq!(parse::<Value>(text(&config).unwrap().as_bytes()).unwrap(), Value::Object(config));
    }

    #[test]
    fn data_has_null_for_numbers_that_are_not_finite() {
        let source = "\u{feff}{\"text\": \"NaN, \\\"Infinity\\\" \\\\\", \"n\": NaN, \"b\": [-Infinity, 1e999]}";
        let expected = serde_json::json!({"text": "NaN, \"Infinity\" \\", "n": null, "b": [null, null]});
        assert_eq!(parse_as_null::<Value>(source.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for text in [
            "{\"a\": Infinit}",
            "{\"a\": NaNs}",
            "{\"a\": +Infinity}",
            "{\"a\": \"NaN}",
            "{NaN: 1}",
            "",
            "{\"a\": - 1}",
        ] {
            assert!(parse::<Map<String, Value>>(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        /// Finite JSON is read as serde reads it.
        #[test]
        fn other_json_is_untouched(text in "[ -~\u{e9}\n]{0,40}", number in proptest::prelude::any::<f64>()) {
            let value = serde_json::json!({text.clone(): [text, number, {"deeper": number}]});
            let bytes = serde_json::to_vec(&value).unwrap();
            proptest::prop_assert_eq!(parse::<Value>(&bytes).unwrap(), serde_json::from_slice::<Value>(&bytes).unwrap());
        }
    }
}
