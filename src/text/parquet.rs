//! Documents of a `.parquet` file: a column of strings, or of conversations. Needs the feature `parquet`.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use serde_json::{Map, Value};

use super::chat;
use super::document::{DEFAULT_FIELD, Document, FIELD_HINT};
use crate::error::Failure;

/// Reads the documents of `path`, whose content is `bytes`, from the column `field`.
///
/// # Errors
/// The file is broken, has no such column, or the column holds no text.
pub(super) fn read(path: &Path, bytes: Vec<u8>, field: &str) -> Result<Vec<Document>> {
    let broken = |e: &dyn std::fmt::Display| Failure::unsupported(format!("`{}` cannot be read: {e}", path.display()));
    let reader = SerializedFileReader::new(Bytes::from(bytes)).map_err(|e| broken(&e))?;
    let schema = reader.metadata().file_metadata().schema();
    let column = find(schema, path, field)?;
    let projection = Type::group_type_builder(schema.name()).with_fields(vec![Arc::clone(column)]).build();
    let rows = reader.get_row_iter(Some(projection.map_err(|e| broken(&e))?)).map_err(|e| broken(&e))?;
    let numbered = rows.enumerate();
    numbered.map(|(i, row)| document(&row.map_err(|e| broken(&e))?, i, path, column.name())).collect()
}

/// The column `field`, or the conversations of a file that has no column of the default name.
fn find<'a>(schema: &'a Type, path: &Path, field: &str) -> Result<&'a TypePtr> {
    let column = |name: &str| schema.get_fields().iter().find(|column| column.name() == name);
    let with_messages = || column(chat::MESSAGES).filter(|_| field == DEFAULT_FIELD);
    column(field).or_else(with_messages).ok_or_else(|| {
        let names: Vec<&str> = schema.get_fields().iter().map(|column| column.name()).collect();
        let message = format!("`{}` has no column `{field}`; its columns are {}", path.display(), names.join(", "));
        Failure::unsupported(message).hint(FIELD_HINT).into()
    })
}

/// Row `i`, projected to the column `name`.
fn document(row: &Row, i: usize, path: &Path, name: &str) -> Result<Document> {
    match row.get_column_iter().next() {
        Some((_, Field::Str(text))) => Ok(Document::Text(text.clone())),
        Some((_, Field::Null)) | None => Ok(Document::Text(String::new())),
        Some((_, messages @ Field::ListInternal(_))) if name == chat::MESSAGES => {
            let fields = Map::from_iter([(name.to_string(), value_of(messages))]);
            Ok(Document::Chat(format!("row {i} of `{}`", path.display()), fields))
        }
        Some(_) => {
            let message = format!("column `{name}` of `{}` is not text", path.display());
            Err(Failure::unsupported(message).hint(FIELD_HINT).into())
        }
    }
}

/// A message, or a part of one, as JSON.
fn value_of(field: &Field) -> Value {
    match field {
        Field::Str(text) => Value::from(text.as_str()),
        Field::Bool(flag) => Value::from(*flag),
        Field::Int(n) => Value::from(*n),
        Field::Long(n) => Value::from(*n),
        Field::Double(x) => Value::from(*x),
        Field::ListInternal(list) => list.elements().iter().map(value_of).collect(),
        Field::Group(row) => row.get_column_iter().map(|(name, field)| (name.clone(), value_of(field))).collect(),
        _ => Value::Null,
    }
}
