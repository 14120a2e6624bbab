//! SmolLM3: Llama without a rotary embedding in every fourth block (NoPE, Yang et al. 2025, arXiv:2501.18795).

use serde_json::{Map, Value};

use super::gguf;
use super::llama::LLAMA;
use super::table::{Architecture, HeadCounts};

pub(super) const SMOLLM3: Architecture = Architecture {
    model_type: "smollm3",
    defaults: r#"{"no_rope_layer_interval": 4, "rope_theta": 2000000.0, "use_sliding_window": false}"#,
    gguf: Some(gguf::Family {
        architecture: "smollm3",
        class: "SmolLM3ForCausalLM",
        misread: other_blocks,
        ..gguf::Family::COMMON
    }),
    head_counts: HeadCounts::Any,
    ..LLAMA
};

/// llama.cpp knows which blocks are not rotated, and does not read it.
fn other_blocks(config: &Map<String, Value>) -> Option<String> {
    let interval = config.get("no_rope_layer_interval").and_then(Value::as_u64).unwrap_or(4);
    let is_same = |(i, rotates): (usize, &Value)| (*rotates == 0) == ((i + 1) % 4 == 0);
    let layers = config.get("no_rope_layers").and_then(Value::as_array);
    let is_usual = layers.map_or(interval == 4, |layers| layers.iter().enumerate().all(is_same));
    (!is_usual).then(|| "llama.cpp expects each fourth block without a rotary embedding, and no other".into())
}
