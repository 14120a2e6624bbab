//! Gemma 3, the text model: Gemma 2 with norms over the heads of queries and keys instead of caps; five of six blocks
//! have a sliding window and their own rotary embedding. Gemma team 2025, arXiv:2503.19786.

use super::gemma2::GEMMA2;
use super::qwen3::HEAD_NORMS;
use super::table::{Architecture, Norms, Sliding};

pub(super) const GEMMA3_TEXT: Architecture = Architecture {
    model_type: "gemma3_text",
    norms: Norms { query_key: Some(HEAD_NORMS), ..GEMMA2.norms },
    sliding: Sliding::AllBut(6),
    aliases: &[("hidden_activation", "hidden_act"), ("_sliding_window_pattern", "sliding_window_pattern")],
    defaults: r#"{"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                  "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "tie_word_embeddings": true}"#,
    gguf: None,
    ..GEMMA2
};
