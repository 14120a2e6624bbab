//! Reports that are beside a model.

use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::{CompressReport, REPORT_FILE, SCHEMA_VERSION};
use crate::checkpoint::{CheckpointError, read_file};
use crate::error::Failure;

/// The report of the compression that wrote the folder `root`; `hint` says what is needed where there is none.
///
/// # Errors
/// It is absent, or cannot be read, or is of a later version.
pub fn read_report(root: &Path, hint: &str) -> Result<CompressReport> {
    let path = root.join(REPORT_FILE);
    let unusable =
        |reason: String| Failure::unsupported(format!("`{}` cannot be read: {reason}", path.display())).hint(hint);
    let bytes = read_file(&path).map_err(|error| match error {
        CheckpointError::Io { source, .. } => unusable(source.to_string()).into(),
        error => anyhow::Error::from(error),
    })?;
    let report: Value = serde_json::from_slice(&bytes).map_err(|e| unusable(e.to_string()))?;
    if let Some(version) = report["schema_version"].as_u64().filter(|&version| version > SCHEMA_VERSION.into()) {
        let (found, known) = (version.to_string(), SCHEMA_VERSION.to_string());
        return Err(CheckpointError::Newer { path, entry: "schema_version".into(), found, known }.into());
    }
    // Other commands, such as `lrc export`, leave reports of their own, that have no recipe.
    if report.get("recipe").is_none() {
        let exported = "it is the report of `lrc export`: take the folder that was exported, and export the result";
        let is_export = report.get("compressed").is_some();
        let reason = if is_export { exported } else { "it is not the report of `lrc compress`" };
        return Err(unusable(reason.into()).into());
    }
    Ok(serde_json::from_value(report).map_err(|e| unusable(e.to_string()))?)
}
