//! Recipe files: the options of a compression in TOML.

use std::path::Path;

use anyhow::Result;

use crate::compress::options::RecipeOptions;
use crate::error::{ExitClass, Failure};
use crate::text::read_recipe;

impl RecipeOptions {
    /// Reads a recipe file.
    ///
    /// # Errors
    /// It cannot be read, is not TOML, has a key that is not an option, or a value that the option does not take.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_recipe(path).map_err(|failure| Failure { class: ExitClass::Usage, ..failure })?;
        toml::from_str(&text).map_err(|error| refusal(path, &text, &error).into())
    }
}

/// The error for a recipe that cannot be read as options, with its line and its key.
fn refusal(path: &Path, text: &str, error: &toml::de::Error) -> Failure {
    let before = error.span().and_then(|span| text.get(..span.start));
    let line = before.map(|before| 1 + before.matches('\n').count());
    let place = line.map_or(String::new(), |line| format!(", line {line}"));
    let refused = |reason: String| Failure::usage(format!("recipe `{}`{place}: {reason}", path.display()));
    let message = error.message().lines().collect::<Vec<_>>().join(" ");
    if let Some(key) = message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next()) {
        return refused(format!("there is no option `{key}`"))
            .hint("the keys are the long flags of `lrc compress`, without the leading dashes");
    }
    let table: toml::Table = text.parse().unwrap_or_default();
    let written = text.lines().take(line.unwrap_or(0)).filter_map(|line| entry(&table, line)).last();
    match written {
        Some((key, value)) => refused(value_error(&format!("{key} = {value}"), value, &message))
            .hint(format!("`lrc compress --help` explains `--{key}`")),
        None => refused(message).hint("a recipe has lines such as `keep = 0.8` or `method = \"kfac\"`"),
    }
}

/// The entry of a table that begins in this line of its file.
fn entry<'t>(table: &'t toml::Table, line: &str) -> Option<(&'t String, &'t toml::Value)> {
    table.get_key_value(line.split('=').next()?.trim().trim_matches(['[', ']', '"', '\'']))
}

/// The error for a value, in the words of the command line instead of serde's.
fn value_error(written: &str, value: &toml::Value, message: &str) -> String {
    // Messages about names begin with the name.
    if let Some(reason) = value.as_str().and_then(|text| message.strip_prefix(&format!("`{text}` "))) {
        return format!("`{written}` {reason}");
    }
    let of_serde =
        ["invalid type: ", "invalid value: ", "unknown variant "].iter().any(|start| message.starts_with(start));
    let expected = message.split_once(", expected ").filter(|_| of_serde).map(|(_, expected)| match expected {
        "f64" => "a number".into(),
        "usize" | "u64" => "a whole number, at least 0".into(),
        "a boolean" => "true or false".into(),
        "a sequence" => "a list, such as `[\"…\"]`".into(),
        names => names.replace('`', ""),
    });
    match expected {
        Some(expected) => format!("`{written}`: expected {expected}"),
        None => format!("`{written}`: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_line_and_the_key_and_what_is_allowed() {
        for (text, expected, hint) in [
            ("keep = \"a\"", "line 1: `keep = \"a\"`: expected a number", "`--keep`"),
            ("seed = 1\nkeep = \"a\"", "line 2: `keep = \"a\"`: expected a number", "`--keep`"),
            ("samples = -3", "line 1: `samples = -3`: expected a whole number, at least 0", "`--samples`"),
            ("elastic = 1", "line 1: `elastic = 1`: expected true or false", "`--elastic`"),
            ("quant = \"nf4\"", "line 1: `quant = \"nf4\"`: expected a list, such as", "`--quant`"),
            (
                "quant = [\n  \"nf4\",\n  \"x\",\n]",
                "line 1: `quant = [\"nf4\", \"x\"]`: `x` is not a quantizer",
                "`--quant`",
            ),
            ("method = \"foo\"", "line 1: `method = \"foo\"`: expected one of svd, fwsvd", "`--method`"),
            ("ranks = \"foo\"", "line 1: `ranks = \"foo\"` is not one of uniform", "`--ranks`"),
            (
                "target-size = \"10XB\"",
                "line 1: `target-size = \"10XB\"`: expected a size, such as 350MiB",
                "`--target-size`",
            ),
            ("params = \"90X\"", "line 1: `params = \"90X\"`: expected a number of parameters", "`--params`"),
            ("params = \"-1M\"", "line 1: `params = \"-1M\"`: expected a number of parameters", "`--params`"),
            ("target-size = true", "line 1: `target-size = true`: expected a size, such as 350MiB", "`--target-size`"),
            ("keep = 0.5\nkep = 1", "line 2: there is no option `kep`", "long flags"),
            ("[keep]\nx = 1", "line 1: `keep = { x = 1 }`: expected a number", "`--keep`"),
            ("keep = ", "line 1", "lines such as"),
            ("keep = 0.5\nkeep = 0.4", "line 2: duplicate key", "lines such as"),
        ] {
            let error = toml::from_str::<RecipeOptions>(text).unwrap_err();
            let failure = refusal(Path::new("r.toml"), text, &error);
            let found = format!("{}\nhint: {}", failure.message, failure.hint.unwrap());
            assert!(found.starts_with("recipe `r.toml`, line ") && found.contains(expected), "{found}");
            assert!(found.contains(hint) && found.lines().count() == 2, "{found}");
        }
    }

    #[test]
    fn sizes_are_strings_or_bytes() {
        for text in ["target-size = \"1 KiB\"", "target-size = 1024", "target-size = \"1024\""] {
            let options: RecipeOptions = toml::from_str(text).unwrap();
            assert_eq!(options.target_size.map(|size| size.as_u64()), Some(1024), "{text}");
        }
    }
}
