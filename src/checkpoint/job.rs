//! Comparing the job of an unfinished output with the one to run.

use serde_json::Value;

/// The differences between two descriptions of a job, as a phrase for a message; `None` if there are none.
pub(crate) fn differences(was: &Value, is: &Value) -> Option<String> {
    let mut found = Vec::new();
    compare(was, is, "", &mut found);
    (!found.is_empty()).then(|| found.join(", "))
}

/// Adds the differences between two descriptions of a job, as phrases for a message.
pub(super) fn compare(was: &Value, is: &Value, at: &str, differences: &mut Vec<String>) {
    match (was, is) {
        (Value::Object(was), Value::Object(is)) => {
            let names = was.keys().chain(is.keys().filter(|name| !was.contains_key(*name)));
            for name in names {
                let at = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                let of = |fields: &serde_json::Map<String, Value>| fields.get(name).cloned().unwrap_or_default();
                compare(&of(was), &of(is), &at, differences);
            }
        }
        (was, is) if was == is => {}
        (was, is) => differences.push(format!("`{at}` was {was}, is {is}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn jobs_are_told_apart_by_name() {
        let mut differences = Vec::new();
        let was = json!({"keep": 0.8, "files": {"a": "1", "b": "2"}, "same": [1]});
        let is = json!({"keep": 0.7, "files": {"a": "1", "c": "3"}, "same": [1]});
        compare(&was, &is, "", &mut differences);
        let expected = ["`keep` was 0.8, is 0.7", "`files.b` was \"2\", is null", "`files.c` was null, is \"3\""];
        assert_eq!(differences, expected);
    }
}
