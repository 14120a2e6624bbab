//! The description of an output of `lrc`: the entry `lrc` of its `config.json`.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::{CheckpointError, Result};
use super::paths::CONFIG_FILE;
use super::stack::Stack;
use super::tensor::is_sane;
use super::view::View;

/// `lrc.version`, the version of all entries of `lrc`.
pub const FORMAT_VERSION: u64 = 1;

/// Refuses the output of a newer `lrc`, whose entries may have another meaning.
pub(super) fn expect_known_version(config: &Map<String, Value>, root: &Path) -> Result<()> {
    // An entry that is not an object is refused where it is read.
    let Some(described) = config.get("lrc").and_then(Value::as_object) else { return Ok(()) };
    let version = described.get("version");
    if version.and_then(Value::as_u64) == Some(FORMAT_VERSION) {
        return Ok(());
    }
    let (path, entry) = (root.join(CONFIG_FILE), "lrc.version".to_string());
    Err(match version {
        Some(Value::Number(version)) => {
            let (found, known) = (version.to_string(), FORMAT_VERSION.to_string());
            CheckpointError::Newer { path, entry, found, known }
        }
        _ => CheckpointError::ConfigEntry { path, entry, reason: "is not a number".into() },
    })
}

/// Tensors that an output of `lrc` stores under another name, shared by several modules: `lrc.shared` of
/// its config, name by name.
///
/// # Errors
/// A name is taken, or there is no tensor of the other name.
pub(super) fn shared(config: Option<&Map<String, Value>>, view: &View, root: &Path) -> Result<Vec<[String; 2]>> {
    let Some(listed) = config.and_then(|config| config.get("lrc")?.get("shared")) else { return Ok(Vec::new()) };
    let refuse = |entry: String, reason: &str| {
        Err(CheckpointError::ConfigEntry { path: root.join(CONFIG_FILE), entry, reason: reason.into() })
    };
    let Some(listed) = listed.as_object() else { return refuse("lrc.shared".into(), "is not an object") };
    let mut shared = Vec::new();
    for (name, of) in listed {
        let entry = format!("lrc.shared.{name}");
        match of.as_str() {
            Some(_) if view.tensors.contains_key(name) => return refuse(entry, "is stored as well"),
            Some(of) if view.tensors.contains_key(of) => shared.push([name.clone(), of.to_string()]),
            _ => return refuse(entry, "names no tensor of the weight files"),
        }
    }
    Ok(shared)
}

/// The stacks that an output of `lrc` stores as separate matrices: `lrc.stacks` of its config.
///
/// # Errors
/// A stack has an invalid shape, or more matrices than there are tensors.
pub(super) fn stored_stacks(config: Option<&Map<String, Value>>, n_tensors: usize, path: &Path) -> Result<Vec<Stack>> {
    let Some(listed) = config.and_then(|config| config.get("lrc")?.get("stacks")) else { return Ok(Vec::new()) };
    let refuse = |entry: String, reason: &str| {
        Err(CheckpointError::ConfigEntry { path: path.join(CONFIG_FILE), entry, reason: reason.into() })
    };
    let Some(listed) = listed.as_object() else { return refuse("lrc.stacks".into(), "is not an object") };
    let mut stacks = Vec::new();
    for (tensor, shape) in listed {
        let entry = format!("lrc.stacks.{tensor}");
        let Ok(shape) = serde_json::from_value::<[usize; 3]>(shape.clone()) else {
            return refuse(entry, "is not a shape of three dimensions");
        };
        if shape.contains(&0) || shape[0] > n_tensors || !is_sane(&shape) {
            return refuse(entry, &format!("is {shape:?}, and the files hold {n_tensors} tensors"));
        }
        stacks.push(Stack { tensor: tensor.clone(), shape });
    }
    Ok(stacks)
}
