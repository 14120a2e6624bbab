//! SmolLM3: Llama without a rotary embedding in every fourth block (NoPE, Yang et al. 2025, arXiv:2501.18795).

use super::llama::LLAMA;
use super::table::Architecture;

pub(super) const SMOLLM3: Architecture = Architecture {
    model_type: "smollm3",
    defaults: r#"{"no_rope_layer_interval": 4, "rope_theta": 2000000.0, "use_sliding_window": false}"#,
    gguf: None,
    ..LLAMA
};
