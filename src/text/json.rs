//! JSON as Python's `json` reads it: with `NaN`, `Infinity` and `-Infinity`, and a byte order mark in front.

use std::borrow::Cow;

use serde_json::Value;

/// A value; numbers that JSON has no word for are null, for no text is one.
///
/// # Errors
/// It is not JSON.
pub(super) fn parse(text: &str) -> serde_json::Result<Value> {
    let text = text.trim_start_matches('\u{feff}');
    serde_json::from_str(text).or_else(|error| match without_non_finite(text) {
        Cow::Owned(text) => serde_json::from_str(&text),
        Cow::Borrowed(_) => Err(error),
    })
}

/// Writes null for `NaN` and infinities, outside of strings.
fn without_non_finite(text: &str) -> Cow<'_, str> {
    const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    let mut out = String::new();
    let (mut done, mut at, mut is_in_string) = (0, 0, false);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        match bytes[at] {
            b'"' => is_in_string = !is_in_string,
            b'\\' if is_in_string => at += 1,
            b'-' | b'I' | b'N' if !is_in_string => {
                if let Some(word) = WORDS.iter().find(|word| text[at..].starts_with(**word)) {
                    out.push_str(&text[done..at]);
                    out.push_str("null");
                    at += word.len();
                    done = at;
                    continue;
                }
            }
            _ => {}
        }
        at += 1;
    }
    if done == 0 {
        return Cow::Borrowed(text);
    }
    out.push_str(&text[done..]);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_python_writes_is_read() {
        for (text, expected) in [
            ("{\"a\": NaN, \"b\": [-Infinity, Infinity]}", json!({"a": null, "b": [null, null]})),
            (
                "\u{feff}{\"text\": \"NaN, \\\"Infinity\\\" \\\\\", \"n\": NaN}",
                json!({"text": "NaN, \"Infinity\" \\", "n": null}),
            ),
            ("{\"é\": -1.5, \"x\": NaN}", json!({"é": -1.5, "x": null})),
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
        for text in ["{\"a\": nan}", "{\"a\": NaNs}", "NaN NaN", "{\"a\": +Infinity}"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
