//! How checkpoints of others say that they are quantised: in `config.json`, or in a file beside it.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::{CheckpointError, Result};
use super::{encoded::View, read_config};

/// Files of settings that some tools write instead of `quantization_config`, with the method that each is of.
pub(super) const FILES: [(&str, &str); 3] =
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")];

/// Ends of names that only quantised weights have.
const PACKED: [&str; 10] = [
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
];

/// The settings of quantised weights, under the names of `quantization_config`; none where all weights are floats.
///
/// # Errors
/// A file of settings cannot be read, or weights are packed and nothing says how.
pub(super) fn find(
    root: &Path,
    config: Option<&Map<String, Value>>,
    view: &View,
) -> Result<Option<Map<String, Value>>> {
    if let Some(settings) = config.and_then(|config| config.get("quantization_config")?.as_object()) {
        return Ok(Some(settings.clone()));
    }
    let Some(packed) = view.order.iter().find(|name| PACKED.iter().any(|end| name.ends_with(end))) else {
        return Ok(None);
    };
    for (name, method) in FILES {
        if let Some(mut settings) = read_config(&root.join(name))? {
            settings.entry("quant_method").or_insert_with(|| method.into());
            return Ok(Some(settings));
        }
    }
    Err(CheckpointError::Packed { path: root.into(), tensor: packed.clone() })
}
