//! The file of statistics, as it is written.

use std::path::Path;

use anyhow::Result;

use super::header::Header;
use crate::checkpoint::{Dtype, Existing, TensorSpec, cast, check_file, write_file};
use crate::error::Failure;

/// The name of the header among the arrays.
pub(super) const HEADER: &str = "header";

/// Checks before any work that [`Statistics::write`](super::Statistics::write) can write `path`.
///
/// # Errors
/// The file exists and is not to be replaced, or its name does not end in `.safetensors`.
pub fn check_output(path: &Path, existing: Existing) -> Result<()> {
    if path.extension().is_none_or(|e| e != "safetensors") {
        return Err(Failure::usage(format!(
            "the name of a statistics file must end in `.safetensors`, not `{}`",
            path.display()
        ))
        .hint("for example `-o stats.safetensors`")
        .into());
    }
    Ok(check_file(path, existing)?)
}

/// Writes a file with these arrays.
///
/// # Errors
/// As [`check_output`], or an array cannot be read, or the disk cannot be written.
pub(super) fn write(
    path: &Path,
    existing: Existing,
    header: &Header,
    names: &[String],
    lengths: &[usize],
    values: impl Fn(&str) -> Result<Vec<f32>>,
) -> Result<()> {
    check_output(path, existing)?;
    let header = serde_json::to_vec(header)?;
    let arrays = names.iter().zip(lengths);
    let mut specs: Vec<TensorSpec> =
        arrays.map(|(name, &n)| TensorSpec { name: name.clone(), dtype: Dtype::F32, shape: vec![n] }).collect();
    specs.push(TensorSpec { name: HEADER.into(), dtype: Dtype::U8, shape: vec![header.len()] });
    write_file(path, &specs, |spec| match spec.name.as_str() {
        HEADER => Ok(header.clone()),
        name => Ok(cast::encode(Dtype::F32, &values(name)?).expect("invariant: f32 holds every f32")),
    })
}
