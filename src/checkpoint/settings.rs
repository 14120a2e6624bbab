//! The settings of quantized checkpoints of other tools: in `config.json`, or in a file beside it.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::{CheckpointError, Result};
use super::files::read_config;
use super::paths::SETTINGS_FILES;

/// Suffixes of names that only quantized weights have.
const PACKED: [&str; 11] = [
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".q_weight",
    ".SCB",
    ".weight.absmax",
    ".weight.quant_map",
    ".weight.nested_absmax",
    "_proj_blocks",
];

/// The settings of quantized weights, under the names of `quantization_config`; `None` if all weights are floats.
///
/// # Errors
/// A file of settings cannot be read, or weights are packed and no file says how.
pub(super) fn find(
    root: &Path,
    config: Option<&Map<String, Value>>,
    tensors: &[String],
) -> Result<Option<Map<String, Value>>> {
    if let Some(settings) = config.and_then(|config| config.get("quantization_config")?.as_object()) {
        return Ok(Some(settings.clone()));
    }
    let Some(packed) = tensors.iter().find(|name| PACKED.iter().any(|end| name.ends_with(end))) else {
        return Ok(None);
    };
    for (name, method) in SETTINGS_FILES {
        if let Some(mut settings) = read_config(&root.join(name))? {
            settings.entry("quant_method").or_insert_with(|| method.into());
            return Ok(Some(settings));
        }
    }
    Err(CheckpointError::Packed { path: root.into(), tensor: packed.clone() })
}
