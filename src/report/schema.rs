//! The fields of the reports, derived from their types: for checking gates, and for `docs/schema.md`.

use std::fmt::Write;

use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::Value;

use super::{
    AdapterReport, AllConventionsReport, CalibrateReport, CompressReport, DryRunReport, EncoderReport, ExportReport,
    GenerateReport, InspectReport, PerplexityReport, SCHEMA_VERSION, SweepReport, TaskPlan,
};

/// A field of a report that has a single value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Names from the outermost inwards; names of lists end in `[]`, names of maps in `{}`.
    pub path: Vec<String>,
    /// `number`, `integer`, `boolean`, `string`, or `any`.
    pub kind: String,
    /// Whether a report may lack it.
    pub is_optional: bool,
    /// The doc comment of the field in one line.
    pub description: String,
}

impl Field {
    /// Whether a gate can compare it.
    pub fn is_comparable(&self) -> bool {
        ["number", "integer", "boolean"].contains(&self.kind.as_str())
    }

    /// This field in a record that is nested under `name`.
    #[must_use]
    pub fn within(&self, name: &str) -> Self {
        Self { path: [vec![name.to_string()], self.path.clone()].concat(), ..self.clone() }
    }

    /// The name in gates: the path without the marks of lists and maps.
    pub fn name(&self) -> String {
        let bare = |part: &String| part.trim_end_matches("[]").trim_end_matches("{}").to_string();
        self.path.iter().map(bare).collect::<Vec<_>>().join(".")
    }
}

/// Every field of a report, in order.
pub fn fields<T: JsonSchema>() -> Vec<Field> {
    let settings = SchemaSettings::draft2020_12().for_serialize();
    let schema = SchemaGenerator::new(settings).into_root_schema_for::<T>();
    let root = serde_json::to_value(schema).expect("invariant: a schema is valid JSON");
    let mut fields = Vec::new();
    collect(
        &root,
        &root,
        &Field { path: vec![], kind: String::new(), is_optional: false, description: String::new() },
        &mut fields,
    );
    fields
}

/// The field `name` of a report, or all fields of the record with this name.
pub fn fields_at<T: JsonSchema>(name: &str) -> Vec<Field> {
    let mut found = fields::<T>();
    found.retain(|field| field.name().strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')));
    found
}

/// Adds the fields of `schema`, which is located at `at`.
fn collect(root: &Value, schema: &Value, at: &Field, fields: &mut Vec<Field>) {
    if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
        let found = root.pointer(target.trim_start_matches('#')).expect("invariant: references are to definitions");
        return collect(root, found, at, fields);
    }
    // An optional value is its schema or null.
    if let Some(choices) = schema.get("anyOf").and_then(Value::as_array) {
        let some = choices.iter().find(|choice| choice.get("type").is_none_or(|kind| kind != "null"));
        let at = Field { is_optional: true, ..at.clone() };
        return collect(root, some.expect("invariant: an optional field is of some type"), &at, fields);
    }
    let nested = |suffix: &str| {
        let mut at = at.clone();
        if let Some(last) = at.path.last_mut() {
            last.push_str(suffix);
        }
        at
    };
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        let required: Vec<&str> =
            schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        for (name, property) in properties {
            let description = property.get("description").and_then(Value::as_str).unwrap_or_default();
            let own = Field {
                path: [at.path.clone(), vec![name.clone()]].concat(),
                kind: String::new(),
                is_optional: at.is_optional || !required.contains(&name.as_str()),
                description: description.split_whitespace().collect::<Vec<_>>().join(" "),
            };
            collect(root, property, &own, fields);
        }
    } else if let Some(items) = schema.get("items") {
        collect(root, items, &nested("[]"), fields);
    } else if let Some(values) = schema.get("additionalProperties").filter(|values| values.is_object()) {
        collect(root, values, &nested("{}"), fields);
    } else {
        let (kind, is_optional) = match schema.get("type") {
            Some(Value::String(kind)) => (kind.as_str(), false),
            Some(Value::Array(kinds)) => {
                let some = kinds.iter().filter_map(Value::as_str).find(|kind| *kind != "null");
                (some.unwrap_or("any"), true)
            }
            // An enum of names.
            _ if schema.get("oneOf").is_some() => ("string", false),
            _ => ("any", false),
        };
        fields.push(Field { kind: kind.into(), is_optional: at.is_optional || is_optional, ..at.clone() });
    }
}

/// Renders `docs/schema.md`.
pub fn markdown() -> String {
    let mut text = format!(
        "# Fields of the JSON reports\n\n\
         Schema version {SCHEMA_VERSION}. The version is incremented when a field changes its meaning or is removed, but not for new fields. `[]` marks \
         lists, `{{}}` maps, and `?` fields that may be absent or null. `--fail-if` takes the path of a field without these marks, such as \
         `linears.rank`; in a list, one element that meets the condition is enough. This page is generated from the types by \
         `LRC_OVERWRITE=1 cargo test --release --test suite reports`.\n"
    );
    let tables = [
        ("lrc compress --json, and `lrc-report.json`", fields::<CompressReport>()),
        ("lrc compress --dry-run --json", fields::<DryRunReport>()),
        ("lrc eval --json", fields::<PerplexityReport>()),
        ("lrc eval --json, for encoders", fields::<EncoderReport>()),
        ("lrc eval --convention all --json", fields::<AllConventionsReport>()),
        ("lrc sweep --json", fields::<SweepReport>()),
        ("lrc inspect --json", fields::<InspectReport>()),
        ("lrc export: `lrc-report.json`", fields::<ExportReport>()),
        ("lrc truncate of an adapter: `lrc-report.json`", fields::<AdapterReport>()),
        ("lrc calibrate --json", fields::<CalibrateReport>()),
        ("lrc generate --json", fields::<GenerateReport>()),
        ("lrc plan --json, and `plan.json`", fields::<TaskPlan>()),
    ];
    for (name, fields) in tables {
        let _ = writeln!(text, "\n## {name}\n");
        if name.contains("all") {
            text.push_str(
                "The fields of `lrc eval --json`, under each of `gptq`, `hf-strided`, `llamacpp` and `lm-eval`.\n",
            );
            continue;
        }
        text.push_str("| field | type | meaning |\n|---|---|---|\n");
        for field in fields {
            let mark = if field.is_optional { "?" } else { "" };
            let meaning = field.description.replace('|', "\\|");
            let _ = writeln!(text, "| `{}`{mark} | {} | {meaning} |", field.path.join("."), field.kind);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_in_records_lists_maps_and_options() {
        let find = |fields: Vec<Field>, name: &str| fields.into_iter().find(|f| f.name() == name);
        let kl = find(fields::<PerplexityReport>(), "kl.mean").unwrap();
        assert!(kl.is_comparable() && kl.is_optional);
        let rank = find(fields::<CompressReport>(), "linears.rank").unwrap();
        assert_eq!((rank.path.as_slice(), rank.is_optional), (&["linears[]".to_string(), "rank".into()][..], true));
        assert_eq!(
            find(fields::<CompressReport>(), "equal_bytes_baseline.quant").unwrap().path,
            ["equal_bytes_baseline", "quant{}"]
        );
        assert!(find(fields::<AllConventionsReport>(), "lm-eval.ppl").is_some());
        assert!(find(fields::<PerplexityReport>(), "perplexity").is_none());
        let names = |name: &str| fields_at::<CompressReport>(name).iter().map(Field::name).collect::<Vec<_>>();
        assert_eq!(names("truncated"), ["truncated.keep", "truncated.source_files"]);
        assert_eq!(names("keep"), ["keep"]);
        assert_eq!(names("trunc"), [""; 0]);
    }
}
