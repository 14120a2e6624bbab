//! Gates: conditions on the fields of a report that make the command fail.
//!
//! A condition is `FIELD OP VALUE`, as in `ppl > 12`, `kl.mean >= 0.05` or `size_bytes > 4GiB`. In a list the condition
//! applies to every element, and one match is enough. A field without a value (a number that is not finite, a field
//! that this run lacks) fails the gate too, since it cannot be checked.

use std::fmt;
use std::str::FromStr;

use anyhow::Result;
use bytesize::ByteSize;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use strsim::levenshtein;

use super::schema::{Field, fields};
use crate::error::{ExitClass, Failure};

/// One `--fail-if`.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    text: String,
    field: String,
    comparison: Comparison,
    value: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Greater,
    AtLeast,
    Less,
    AtMost,
    Equal,
    NotEqual,
}

/// Longer operators first: `>` is a prefix of `>=`.
const COMPARISONS: [(&str, Comparison); 6] = [
    (">=", Comparison::AtLeast),
    ("<=", Comparison::AtMost),
    ("==", Comparison::Equal),
    ("!=", Comparison::NotEqual),
    (">", Comparison::Greater),
    ("<", Comparison::Less),
];

impl Comparison {
    fn holds(self, left: f64, right: f64) -> bool {
        match self {
            Self::Greater => left > right,
            Self::AtLeast => left >= right,
            Self::Less => left < right,
            Self::AtMost => left <= right,
            Self::Equal => left == right,
            Self::NotEqual => left != right,
        }
    }
}

impl FromStr for Gate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = COMPARISONS.iter().filter_map(|&(sign, comparison)| Some((text.find(sign)?, sign, comparison)));
        let (at, sign, comparison) = found
            .min_by_key(|&(at, sign, _)| (at, usize::MAX - sign.len()))
            .ok_or("expected FIELD OP VALUE with one of > >= < <= == !=, as in `sizes.bytes_after > 4GiB`")?;
        let (field, value) = (text[..at].trim(), text[at + sign.len()..].trim());
        let field = field.replace("[]", "").replace("{}", "");
        if field.is_empty() || field.contains(char::is_whitespace) {
            return Err(format!("`{field}` is not a field name"));
        }
        let number = match value {
            "true" => Some(1.0),
            "false" => Some(0.0),
            value => value.parse().ok().or_else(|| value.parse::<ByteSize>().ok().map(|size| size.as_u64() as f64)),
        };
        let value = number
            .filter(|n: &f64| n.is_finite())
            .ok_or_else(|| format!("`{value}` is neither a number, a size such as `4GiB`, `true` nor `false`"))?;
        Ok(Self { text: text.trim().into(), field, comparison, value })
    }
}

impl fmt::Display for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Checks before any work that reports of type `T` have the fields of the gates; `absent` lists fields that this run
/// will not fill, be they of `T` or of the report of a similar run, each list with a hint.
///
/// # Errors
/// A field is unknown, is not a number, or will be absent.
pub fn expect_fields<T: JsonSchema>(gates: &[Gate], absent: &[(Vec<Field>, &str)]) -> Result<()> {
    if gates.is_empty() {
        return Ok(());
    }
    let known = fields::<T>();
    for gate in gates {
        let refused = |reason: String| Failure::usage(format!("`--fail-if {gate}`: {reason}"));
        if let Some((_, needed)) = absent.iter().find(|(fields, _)| fields.iter().any(|f| f.name() == gate.field)) {
            return Err(refused(format!("this run does not measure `{}`", gate.field)).hint(*needed).into());
        }
        let Some(field) = known.iter().find(|field| field.name() == gate.field) else {
            let names: Vec<String> = known.iter().filter(|f| f.is_comparable()).map(Field::name).collect();
            return Err(refused(format!("the report has no field `{}`", gate.field))
                .hint(hint(&gate.field, &names))
                .into());
        };
        if !field.is_comparable() {
            return Err(refused(format!("`{}` is not a number", gate.field))
                .hint("choose a field with a number or a size")
                .into());
        }
    }
    Ok(())
}

/// Lists the known names closest to `unknown`.
fn hint(unknown: &str, names: &[String]) -> String {
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_string();
    let mut ranked: Vec<(usize, &String)> = names
        .iter()
        .map(|name| (levenshtein(unknown, name).min(1 + levenshtein(&last(unknown), &last(name))), name))
        .collect();
    ranked.sort();
    let nearest: Vec<String> = ranked.iter().take(3).map(|(_, name)| format!("`{name}`")).collect();
    format!("`docs/schema.md` lists all fields; the closest are {}", nearest.join(", "))
}

/// Checks a finished report.
///
/// # Errors
/// Class [`ExitClass::Gate`], with every condition that is met and the value.
pub fn check(gates: &[Gate], report: &impl Serialize) -> Result<()> {
    if gates.is_empty() {
        return Ok(());
    }
    let report = serde_json::to_value(report)?;
    let failed: Vec<String> = gates.iter().filter_map(|gate| gate.failure(&report)).collect();
    if failed.is_empty() { Ok(()) } else { Err(Failure::new(ExitClass::Gate, failed.join("; ")).into()) }
}

impl Gate {
    /// The message, if the condition is met.
    fn failure(&self, report: &Value) -> Option<String> {
        let names: Vec<&str> = self.field.split('.').collect();
        let mut values = Vec::new();
        leaves(report, &names, String::new(), None, &mut values);
        if values.is_empty() {
            return Some(format!("`--fail-if {self}`: this report has no `{}`", self.field));
        }
        let number = |value: &Value| value.as_f64().or_else(|| value.as_bool().map(|b| f64::from(u8::from(b))));
        // Elements of a list without a value (a dense linear has no rank) are skipped, unless no element has one.
        let has_values = values.iter().any(|(_, _, value)| number(value).is_some());
        let is_bad = |value: &Value| match number(value) {
            Some(number) => self.comparison.holds(number, self.value),
            None => !has_values,
        };
        let bad: Vec<&(String, Option<String>, &Value)> = values.iter().filter(|(_, _, value)| is_bad(value)).collect();
        let (path, owner, value) = bad.first()?;
        let of = owner.as_ref().map_or(String::new(), |owner| format!(" of `{owner}`"));
        let more = if bad.len() > 1 { format!(" (and {} more)", bad.len() - 1) } else { String::new() };
        Some(format!("`--fail-if {self}`: `{path}`{of} is {value}{more}"))
    }
}

/// Collects the values at a path, with the `module` of the innermost list element that has one.
fn leaves<'a>(
    value: &'a Value,
    names: &[&str],
    path: String,
    owner: Option<String>,
    found: &mut Vec<(String, Option<String>, &'a Value)>,
) {
    match value {
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                let owner = item.get("module").and_then(Value::as_str).map(String::from).or_else(|| owner.clone());
                leaves(item, names, format!("{path}[{i}]"), owner, found);
            }
        }
        Value::Object(fields) => match names.split_first() {
            Some((first, rest)) => {
                if let Some(inner) = fields.get(*first) {
                    let path = if path.is_empty() { (*first).to_string() } else { format!("{path}.{first}") };
                    leaves(inner, rest, path, owner, found);
                }
            }
            None => {
                for (key, inner) in fields {
                    leaves(inner, names, format!("{path}.{key}"), owner.clone(), found);
                }
            }
        },
        value if names.is_empty() => found.push((path, owner, value)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::schema::fields_at;
    use crate::report::{InspectReport, PerplexityReport};

    fn gate(text: &str) -> Gate {
        text.parse().unwrap()
    }

    #[test]
    fn gates_are_parsed_with_units() {
        for (text, field, value) in [
            ("ppl > 12", "ppl", 12.0),
            ("kl.mean>=5e-2", "kl.mean", 0.05),
            ("size_bytes > 4GiB", "size_bytes", 4294967296.0),
        ] {
            let gate = gate(text);
            assert_eq!((gate.field.as_str(), gate.value), (field, value), "{text}");
        }
        assert_eq!(gate("linears[].rank <= 3").field, "linears.rank");
        for text in ["ppl", "> 3", "ppl > many", "ppl > nan", "a b > 1"] {
            assert!(text.parse::<Gate>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_gate_names_the_value_that_met_it() {
        let report = json!({"ppl": 12.5, "nan": null, "kl": {"mean": 0.5}, "is": false, "linears": [
            {"module": "a", "rank": 3, "error": 0.1, "unknown": null}, {"module": "b", "rank": null, "error": 0.3, "unknown": null}]});
        let failure = |text: &str| gate(text).failure(&report);
        for (text, expected) in [
            ("ppl > 12", Some("`--fail-if ppl > 12`: `ppl` is 12.5")),
            ("ppl > 12.5", None),
            ("ppl >= 12.5", Some("`--fail-if ppl >= 12.5`: `ppl` is 12.5")),
            ("kl.mean < 0.6", Some("`--fail-if kl.mean < 0.6`: `kl.mean` is 0.5")),
            ("is == false", Some("`--fail-if is == false`: `is` is false")),
            ("is != false", None),
            ("linears.error > 0.2", Some("`--fail-if linears.error > 0.2`: `linears[1].error` of `b` is 0.3")),
            ("linears.error > 0", Some("`--fail-if linears.error > 0`: `linears[0].error` of `a` is 0.1 (and 1 more)")),
            ("linears.rank < 4", Some("`--fail-if linears.rank < 4`: `linears[0].rank` of `a` is 3")),
            ("linears.rank > 4", None),
            (
                "linears.unknown > 4",
                Some("`--fail-if linears.unknown > 4`: `linears[0].unknown` of `a` is null (and 1 more)"),
            ),
            // A number that is not finite is null in JSON.
            ("nan > 1", Some("`--fail-if nan > 1`: `nan` is null")),
            ("absent > 1", Some("`--fail-if absent > 1`: this report has no `absent`")),
        ] {
            assert_eq!(failure(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn unknown_fields_are_refused_before_any_work() {
        let check = |text: &str| expect_fields::<PerplexityReport>(&[gate(text)], &[]);
        assert!(check("ppl > 1").is_ok() && check("kl.mean > 1").is_ok());
        let error = check("kl.men > 1").unwrap_err();
        assert_eq!(crate::error::exit_class(&error), ExitClass::Usage);
        assert!(crate::error::hint(&error).unwrap().contains("`kl.mean`"));
        assert!(check("convention > 1").unwrap_err().to_string().contains("is not a number"));
        // Fields that the run does not fill, also fields of another report.
        let absent =
            [(fields_at::<PerplexityReport>("kl"), "compare"), (fields_at::<InspectReport>("linears"), "look")];
        for (text, hint) in [("kl.mean > 1", "compare"), ("linears.rank > 1", "look")] {
            let error = expect_fields::<PerplexityReport>(&[gate(text)], &absent).unwrap_err();
            assert!(error.to_string().contains("this run does not measure"), "{error}");
            assert_eq!(crate::error::hint(&error).as_deref(), Some(hint));
        }
        assert!(expect_fields::<PerplexityReport>(&[gate("ppl > 1")], &absent).is_ok());
    }
}
