//! Documents of a file, by its extension: `.jsonl` and `.parquet` hold many, each in a field; any other file is one document.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::Type;
use serde_json::Value;

use crate::error::{ExitClass, Failure};

/// Field of a document where the user names none, as `datasets` names it.
pub const DEFAULT_FIELD: &str = "text";

const FIELD_HINT: &str = "name the field that holds the text with `--field`";

/// Reads the documents of `path`, in order; empty ones are left out.
///
/// # Errors
/// The file cannot be read, is not what its extension says, or has no such field.
pub(super) fn read(path: &Path, field: &str) -> Result<Vec<String>> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let mut documents = match extension {
        "jsonl" | "ndjson" => from_jsonl(path, &utf8(path)?, field)?,
        "parquet" => from_parquet(path, field)?,
        _ => vec![utf8(path)?],
    };
    documents.retain(|document| !document.is_empty());
    Ok(documents)
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    let class = if error.kind() == std::io::ErrorKind::NotFound { ExitClass::Usage } else { ExitClass::Resources };
    Failure::new(class, format!("cannot read text file `{}`: {error}", path.display()))
}

fn utf8(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| unreadable(path, &e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        Failure::unsupported(format!("`{}` is not UTF-8 (byte {})", path.display(), e.utf8_error().valid_up_to()))
            .hint("give a plain text file, or one that ends in `.jsonl` or `.parquet`")
    })?;
    Ok(text)
}

fn from_jsonl(path: &Path, text: &str, field: &str) -> Result<Vec<String>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let document = |(i, line): (usize, &str)| -> Result<String> {
        let place = format!("line {} of `{}`", i + 1, path.display());
        let value: Value =
            serde_json::from_str(line).map_err(|e| Failure::unsupported(format!("{place} is not JSON: {e}")))?;
        match value.get(field) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Null) => Ok(String::new()),
            _ => Err(Failure::unsupported(format!("{place} has no string `{field}`")).hint(FIELD_HINT).into()),
        }
    };
    lines.map(document).collect()
}

fn from_parquet(path: &Path, field: &str) -> Result<Vec<String>> {
    let broken = |e: &dyn std::fmt::Display| Failure::unsupported(format!("`{}` cannot be read: {e}", path.display()));
    let file = File::open(path).map_err(|e| unreadable(path, &e))?;
    let reader = SerializedFileReader::new(file).map_err(|e| broken(&e))?;
    let schema = reader.metadata().file_metadata().schema();
    let Some(column) = schema.get_fields().iter().find(|column| column.name() == field) else {
        let names: Vec<&str> = schema.get_fields().iter().map(|column| column.name()).collect();
        let message = format!("`{}` has no column `{field}`, but {}", path.display(), names.join(", "));
        return Err(Failure::unsupported(message).hint(FIELD_HINT).into());
    };
    let projection = Type::group_type_builder(schema.name()).with_fields(vec![Arc::clone(column)]).build();
    let rows = reader.get_row_iter(Some(projection.map_err(|e| broken(&e))?)).map_err(|e| broken(&e))?;
    let document = |row: parquet::errors::Result<parquet::record::Row>| -> Result<String> {
        let row = row.map_err(|e| broken(&e))?;
        match row.get_column_iter().next() {
            Some((_, parquet::record::Field::Str(text))) => Ok(text.clone()),
            Some((_, parquet::record::Field::Null)) | None => Ok(String::new()),
            Some(_) => {
                let message = format!("column `{field}` of `{}` holds no text", path.display());
                Err(Failure::unsupported(message).hint(FIELD_HINT).into())
            }
        }
    };
    rows.map(document).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jsonl_gives_a_document_a_line_and_names_the_line_that_is_broken() {
        let path = Path::new("x.jsonl");
        let read = |text: &str| from_jsonl(path, text, "text");
        assert_eq!(read("{\"text\": \"a\\nb\"}\n\n{\"text\": \"c\", \"n\": 1}\n").unwrap(), ["a\nb", "c"]);
        for (text, expected) in
            [("{\"text\": \"a\"}\n{\"body\": 1}", "line 2 of `x.jsonl` has no string `text`"), ("a", "line 1 of")]
        {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
