//! OLMo 2: norms after attention and feed-forward instead of before, and over queries and keys as a whole. OLMo team
//! 2025, arXiv:2501.00656.

use super::llama::LLAMA;
use super::table::{Architecture, Norms, QueryKeyNorm};

pub(super) const OLMO2: Architecture = Architecture {
    model_type: "olmo2",
    norms: Norms {
        before_attention: None,
        after_attention: Some("post_attention_layernorm"),
        before_mlp: None,
        after_mlp: Some("post_feedforward_layernorm"),
        are_of_sums: false,
        query_key: Some(QueryKeyNorm { query: "self_attn.q_norm", key: "self_attn.k_norm", is_per_head: false }),
    },
    has_free_heads: false,
    defaults: r#"{"rms_norm_eps": 1e-5}"#,
    gguf: None,
    ..LLAMA
};
