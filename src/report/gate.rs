//! Gates: conditions on the fields of a report under which a script should fail.
//!
//! `FIELD OP VALUE`, as in `ppl > 12`, `kl.mean >= 0.05` or `size_bytes > 4GiB`. A field inside of a list stands for every
//! element, and one that holds is enough. What has no value (a number that is not finite, a field that this run lacks)
//! cannot be known to be good, and fails too.

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

/// Longer signs first: `>` begins `>=`.
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
            .ok_or("write FIELD OP VALUE with one of > >= < <= == !=, as in `ppl > 12`")?;
        let (field, value) = (text[..at].trim(), text[at + sign.len()..].trim());
        let field = field.replace("[]", "").replace("{}", "");
        if field.is_empty() || field.contains(char::is_whitespace) {
            return Err(format!("`{field}` is no name of a field"));
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

/// Checks that reports of type `T` have the fields that `gates` name, before any work; `absent` are fields that this run will
/// lack, with what would give them.
///
/// # Errors
/// A field is unknown, holds no number, or will be absent.
pub fn expect_fields<T: JsonSchema>(gates: &[Gate], absent: &[(Vec<Field>, &str)]) -> Result<()> {
    if gates.is_empty() {
        return Ok(());
    }
    let known = fields::<T>();
    for gate in gates {
        let refused = |reason: String| Failure::usage(format!("--fail-if `{gate}`: {reason}"));
        let Some(field) = known.iter().find(|field| field.name() == gate.field) else {
            let names: Vec<String> = known.iter().filter(|f| f.is_comparable()).map(Field::name).collect();
            return Err(refused(format!("the report has no field `{}`", gate.field))
                .hint(hint(&gate.field, &names))
                .into());
        };
        if !field.is_comparable() {
            return Err(refused(format!("`{}` is no number", gate.field)).hint("compare a number or a size").into());
        }
        if let Some((_, needed)) = absent.iter().find(|(fields, _)| fields.iter().any(|f| f.name() == gate.field)) {
            return Err(refused(format!("this run measures no `{}`", gate.field)).hint(*needed).into());
        }
    }
    Ok(())
}

/// The known names that are most like one that is not.
fn hint(unknown: &str, names: &[String]) -> String {
    let last = |name: &str| name.rsplit('.').next().unwrap_or(name).to_string();
    let mut ranked: Vec<(usize, &String)> = names
        .iter()
        .map(|name| (levenshtein(unknown, name).min(1 + levenshtein(&last(unknown), &last(name))), name))
        .collect();
    ranked.sort();
    let nearest: Vec<String> = ranked.iter().take(3).map(|(_, name)| format!("`{name}`")).collect();
    format!("`docs/schema.md` lists all fields; the nearest are {}", nearest.join(", "))
}

/// Checks a finished report.
///
/// # Errors
/// Class [`ExitClass::Gate`], with every condition that was met and the value that met it.
pub fn check(gates: &[Gate], report: &impl Serialize) -> Result<()> {
    if gates.is_empty() {
        return Ok(());
    }
    let report = serde_json::to_value(report)?;
    let failed: Vec<String> = gates.iter().filter_map(|gate| gate.failure(&report)).collect();
    if failed.is_empty() { Ok(()) } else { Err(Failure::new(ExitClass::Gate, failed.join("; ")).into()) }
}

impl Gate {
    /// What a person should read, where the condition is met.
    fn failure(&self, report: &Value) -> Option<String> {
        let parts: Vec<&str> = self.field.split('.').collect();
        let mut values = Vec::new();
        leaves(report, &parts, String::new(), None, &mut values);
        if values.is_empty() {
            return Some(format!("--fail-if `{self}`: there is no `{}` in this report", self.field));
        }
        let number = |value: &Value| value.as_f64().or_else(|| value.as_bool().map(|b| f64::from(u8::from(b))));
        // In a list an element without the figure (a dense linear has no rank) is none to judge; alone it is.
        let is_judged = values.iter().any(|(_, _, value)| number(value).is_some());
        let is_bad = |value: &Value| match number(value) {
            Some(number) => self.comparison.holds(number, self.value),
            None => !is_judged,
        };
        let bad: Vec<&(String, Option<String>, &Value)> = values.iter().filter(|(_, _, value)| is_bad(value)).collect();
        let (path, owner, value) = bad.first()?;
        let of = owner.as_ref().map_or(String::new(), |owner| format!(" of `{owner}`"));
        let more = if bad.len() > 1 { format!(" (and {} more)", bad.len() - 1) } else { String::new() };
        Some(format!("--fail-if `{self}`: `{path}`{of} is {value}{more}"))
    }
}

/// The values at a path; elements of lists are named by their `module`, if they have one.
fn leaves<'a>(
    value: &'a Value,
    parts: &[&str],
    path: String,
    owner: Option<String>,
    found: &mut Vec<(String, Option<String>, &'a Value)>,
) {
    match value {
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                let owner = item.get("module").and_then(Value::as_str).map(String::from).or_else(|| owner.clone());
                leaves(item, parts, format!("{path}[{i}]"), owner, found);
            }
        }
        Value::Object(fields) => match parts.split_first() {
            Some((first, rest)) => {
                if let Some(inner) = fields.get(*first) {
                    let path = if path.is_empty() { (*first).to_string() } else { format!("{path}.{first}") };
                    leaves(inner, rest, path, owner, found);
                }
            }
            None => {
                for (key, inner) in fields {
                    leaves(inner, parts, format!("{path}.{key}"), owner.clone(), found);
                }
            }
        },
        value if parts.is_empty() => found.push((path, owner, value)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::PerplexityReport;

    fn gate(text: &str) -> Gate {
        text.parse().unwrap()
    }

    #[test]
    fn gates_are_read_with_units_and_refused_without_sense() {
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
    fn a_gate_names_what_it_met() {
        let report = json!({"ppl": 12.5, "nan": null, "kl": {"mean": 0.5}, "is": false, "linears": [
            {"module": "a", "rank": 3, "error": 0.1, "unknown": null}, {"module": "b", "rank": null, "error": 0.3, "unknown": null}]});
        let failure = |text: &str| gate(text).failure(&report);
        for (text, expected) in [
            ("ppl > 12", Some("--fail-if `ppl > 12`: `ppl` is 12.5")),
            ("ppl > 12.5", None),
            ("ppl >= 12.5", Some("--fail-if `ppl >= 12.5`: `ppl` is 12.5")),
            ("kl.mean < 0.6", Some("--fail-if `kl.mean < 0.6`: `kl.mean` is 0.5")),
            ("is == false", Some("--fail-if `is == false`: `is` is false")),
            ("is != false", None),
            ("linears.error > 0.2", Some("--fail-if `linears.error > 0.2`: `linears[1].error` of `b` is 0.3")),
            ("linears.error > 0", Some("--fail-if `linears.error > 0`: `linears[0].error` of `a` is 0.1 (and 1 more)")),
            ("linears.rank < 4", Some("--fail-if `linears.rank < 4`: `linears[0].rank` of `a` is 3")),
            ("linears.rank > 4", None),
            (
                "linears.unknown > 4",
                Some("--fail-if `linears.unknown > 4`: `linears[0].unknown` of `a` is null (and 1 more)"),
            ),
            // A number that is not finite is null in JSON.
            ("nan > 1", Some("--fail-if `nan > 1`: `nan` is null")),
            ("absent > 1", Some("--fail-if `absent > 1`: there is no `absent` in this report")),
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
        assert!(check("convention > 1").unwrap_err().to_string().contains("no number"));
    }
}
