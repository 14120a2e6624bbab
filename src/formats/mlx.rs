//! The file with which mlx-lm runs a factored output, beside the one for transformers: `model_file` in the config names it.

use serde_json::{Map, Value};

/// Its name.
pub(super) const FILE: &str = "modeling_lrc_mlx.py";

const TEMPLATE: &str = include_str!("modeling_lrc_mlx.py");

/// Families whose models in mlx-lm name modules as transformers does; `tests/interop/in_mlx.py` runs each.
const FAMILIES: [&str; 9] = ["gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"];

/// The file for a source with this config; `None` if mlx-lm has no model for it that the file extends.
pub(super) fn modeling(config: &Map<String, Value>) -> Option<String> {
    let family = config.get("model_type")?.as_str()?;
    let class = config.get("architectures")?.get(0)?.as_str()?;
    (class.ends_with("ForCausalLM") && FAMILIES.contains(&family)).then(|| TEMPLATE.replace("@TYPE@", family))
}

/// How mlx-lm loads the output, for the card.
pub(super) fn loading(config: &Map<String, Value>) -> Option<&'static str> {
    modeling(config)?;
    Some("\nIn mlx-lm:\n\n```sh\nmlx_lm.generate --model FOLDER --trust-remote-code --prompt TEXT\n```\n")
}
