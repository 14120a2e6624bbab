//! What an output of `lrc` says of itself: `lrc` in its `config.json`.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::{CheckpointError, Result};
use super::paths::CONFIG_FILE;
use super::stack::Stack;
use super::tensor::is_sane;

/// `lrc.version`: that of all that stands beside it.
pub const FORMAT_VERSION: u64 = 1;

/// Refuses what a later `lrc` wrote: its entries may mean something else.
pub(super) fn expect_known_version(config: &Map<String, Value>, root: &Path) -> Result<()> {
    // An entry that is no object is refused where it is read.
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
        _ => CheckpointError::ConfigEntry { path, entry, reason: "is no number".into() },
    })
}

/// The stacks whose matrices an output of `lrc` stores apart: `lrc.stacks` of its config.
///
/// # Errors
/// One is no stack of as many matrices as there could be among `n_tensors` tensors.
pub(super) fn stored_stacks(config: Option<&Map<String, Value>>, n_tensors: usize, path: &Path) -> Result<Vec<Stack>> {
    let Some(listed) = config.and_then(|config| config.get("lrc")?.get("stacks")) else { return Ok(Vec::new()) };
    let refuse = |entry: String, reason: &str| {
        Err(CheckpointError::ConfigEntry { path: path.join(CONFIG_FILE), entry, reason: reason.into() })
    };
    let Some(listed) = listed.as_object() else { return refuse("lrc.stacks".into(), "is no object") };
    let mut stacks = Vec::new();
    for (tensor, shape) in listed {
        let entry = format!("lrc.stacks.{tensor}");
        let Ok(shape) = serde_json::from_value::<[usize; 3]>(shape.clone()) else {
            return refuse(entry, "is no shape of three dimensions");
        };
        if shape.contains(&0) || shape[0] > n_tensors || !is_sane(&shape) {
            return refuse(entry, &format!("is {shape:?}, and the files hold {n_tensors} tensors"));
        }
        stacks.push(Stack { tensor: tensor.clone(), shape });
    }
    Ok(stacks)
}
