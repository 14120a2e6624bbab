//! Reads the documents of a text file. `.jsonl`, `.ndjson`, `.json` and `.parquet` contain several, each in a field or as a
//! conversation; any other file is one document.

use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::chat;
use super::document::{DEFAULT_FIELD, Document, FIELD_HINT};
use super::kind::{self, Kind};
#[cfg(feature = "parquet")]
use super::parquet::read as from_parquet;
use super::shape;
use super::source::{Source, unpacked};
use crate::checkpoint::json::parse_as_null;
use crate::error::Failure;

/// Reads the documents of `path` in order, and the SHA-256 of its bytes.
///
/// # Errors
/// The file cannot be read, its content does not match its name, or a document lacks the field.
pub(super) fn read(path: &Path, field: &str) -> Result<(Vec<Document>, String)> {
    let Source { bytes, sha256, is_pipe } = Source::read(path, "text file")?;
    let named = if is_pipe { None } else { Some(kind::of_name(path)?) };
    let packing = named.map_or_else(|| kind::of_bytes(&bytes), |(packing, _)| packing);
    packing.expect(path, &bytes)?;
    let bytes = unpacked(path, bytes, packing)?;
    let kind = named.map_or_else(|| kind::of_content(&bytes), |(_, kind)| kind);
    tracing::debug!("`{}` is read as {kind:?}, {packing:?}", path.display());
    kind.expect(path, &bytes)?;
    let documents = match kind {
        Kind::Json => from_json(path, &utf8(path, bytes)?, field)?,
        Kind::Parquet => from_parquet(path, bytes, field)?,
        Kind::Plain => {
            let text = utf8(path, bytes)?;
            shape::expect_prose(path, &text)?;
            Some(text).filter(|text| !text.is_empty()).map(Document::Text).into_iter().collect()
        }
    };
    Ok((documents, sha256))
}

fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String> {
    let text = String::from_utf8(bytes).map_err(|e| {
        Failure::unsupported(format!("`{}` is not UTF-8 (byte {})", path.display(), e.utf8_error().valid_up_to()))
            .hint("give plain text in UTF-8, or documents in `.jsonl`, `.json` or `.parquet`")
    })?;
    Ok(text)
}

/// An array of documents, or one document per line.
fn from_json(path: &Path, text: &str, field: &str) -> Result<Vec<Document>> {
    let line = |i: usize| format!("line {} of `{}`", i + 1, path.display());
    match parse_as_null(text.as_bytes()) {
        Ok(Value::Array(values)) => {
            let element = |(i, value)| document(value, field, || format!("element {i} of `{}`", path.display()));
            values.into_iter().enumerate().map(element).collect()
        }
        Ok(value) => Ok(vec![document(value, field, || line(0))?]),
        Err(_) => {
            let lines = text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty());
            let documents = lines.map(|(i, text)| match parse_as_null(text.as_bytes()) {
                Ok(value) => document(value, field, || line(i)),
                Err(e) => Err(Failure::unsupported(format!("{} is not JSON: {e}", line(i))).into()),
            });
            documents.collect()
        }
    }
}

/// A document is a string, an object with the field, or an object with `messages`.
fn document(value: Value, field: &str, place: impl Fn() -> String) -> Result<Document> {
    let absent = || Failure::unsupported(format!("{} has no string `{field}`", place())).hint(FIELD_HINT);
    let fields = match value {
        Value::String(text) if field == DEFAULT_FIELD => return Ok(Document::Text(text)),
        Value::Object(fields) => fields,
        _ => return Err(absent().into()),
    };
    if let Some(Value::String(text)) = fields.get(field) {
        return Ok(Document::Text(text.clone()));
    }
    if (field == DEFAULT_FIELD || field == chat::MESSAGES) && fields.get(chat::MESSAGES).is_some_and(Value::is_array) {
        return Ok(Document::Chat(place(), fields));
    }
    if fields.get(field).is_some_and(Value::is_null) {
        return Ok(Document::Text(String::new()));
    }
    Err(absent().into())
}

#[cfg(not(feature = "parquet"))]
fn from_parquet(path: &Path, _: Vec<u8>, _: &str) -> Result<Vec<Document>> {
    let message =
        format!("`{}` is a Parquet file, and this `lrc` was built without the feature `parquet`", path.display());
    Err(Failure::unsupported(message).hint("build with `--features parquet`, or convert the text to `.jsonl`").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Document>> {
        from_json(Path::new("x.jsonl"), text, "text")
    }

    #[test]
    fn json_has_a_document_per_line_or_element() {
        let texts = |texts: &[&str]| texts.iter().map(|t| Document::Text((*t).into())).collect::<Vec<_>>();
        for (json, expected) in [
            ("{\"text\": \"a\\nb\"}\n\n{\"text\": \"c\", \"n\": 1}\n", &["a\nb", "c"][..]),
            ("\u{feff}{\"text\": \"a\", \"n\": NaN}\r\n\"b\"", &["a", "b"]),
            ("[{\"text\": \"a\"},\n  \"b\",\n {\"text\": null, \"n\": Infinity}]", &["a", "b", ""]),
            ("[\n]", &[]),
            ("", &[]),
            ("{\n \"text\": \"a\"\n}", &["a"]),
        ] {
            assert_eq!(read(json).unwrap(), texts(expected), "{json}");
        }
    }

    #[test]
    fn errors_in_json_name_the_line() {
        for (text, expected) in [
            ("{\"text\": \"a\"}\n{\"body\": 1}", "line 2 of `x.jsonl` has no string `text`"),
            ("a", "line 1 of `x.jsonl` is not JSON"),
            ("[{\"text\": \"a\"}, 1]", "element 1 of `x.jsonl` has no string `text`"),
            ("{\n \"data\": []\n}", "line 1 of `x.jsonl` has no string `text`"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn messages_are_read_if_there_is_no_text() {
        let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}";
        assert!(matches!(&read(chat).unwrap()[..], [Document::Chat(place, _)] if place == "line 1 of `x.jsonl`"));
        assert_eq!(read("{\"messages\": [], \"text\": \"a\"}").unwrap(), [Document::Text("a".into())]);
        let null = chat.replacen('{', "{\"text\": null, ", 1);
        assert!(matches!(read(&null).unwrap()[..], [Document::Chat(..)]));
        assert!(from_json(Path::new("x"), chat, "body").is_err());
    }
}
