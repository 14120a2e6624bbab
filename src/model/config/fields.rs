//! Reads a value from JSON fields, with an error that names the field.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::checkpoint::json;

/// Reads a value from its fields; the error is the name of the invalid field (`""` if one is absent) and the reason.
pub fn read<T: DeserializeOwned>(fields: &Map<String, Value>) -> Result<T, (String, String)> {
    let read = |fields: &Map<String, Value>| serde_json::from_value::<T>(Value::Object(fields.clone()));
    read(fields).map_err(|error| {
        let reason = error.to_string();
        // If a field is absent, the reason names it, and no field is invalid.
        let is_broken = |fields: &Map<String, Value>| read(fields).is_err_and(|error| error.to_string() == reason);
        let field = if is_broken(&Map::new()) { None } else { first_broken(fields, &is_broken) };
        (field.unwrap_or_default(), in_words(&reason))
    })
}

/// The first field that, with those before it, cannot be read: `rope_scaling.factor`.
fn first_broken(fields: &Map<String, Value>, is_broken: &dyn Fn(&Map<String, Value>) -> bool) -> Option<String> {
    let mut before = Map::new();
    for (name, value) in fields {
        let with = |value: Value| {
            let mut fields = before.clone();
            fields.insert(name.clone(), value);
            fields
        };
        if is_broken(&with(value.clone())) {
            let within = |inner: &Map<String, Value>| is_broken(&with(Value::Object(inner.clone())));
            let inner = value.as_object().and_then(|inner| first_broken(inner, &within));
            return Some(inner.map_or(name.clone(), |inner| format!("{name}.{inner}")));
        }
        before.insert(name.clone(), value.clone());
    }
    None
}

/// An error of serde in plain words; numbers that are not finite appear in it as marked strings.
fn in_words(reason: &str) -> String {
    let reason = json::unmarked(reason);
    [
        ("expected f64", "expected a finite number"),
        ("expected usize", "expected a whole number"),
        ("expected u8", "expected a whole number"),
    ]
    .iter()
    .fold(reason, |reason, (from, to)| reason.replace(from, to))
}
