//! OLMo 2: norms after attention and feed-forward instead of before, and over queries and keys as a whole. OLMo team
//! 2025, arXiv:2501.00656.

use serde_json::{Map, Value};

use super::gguf;
use super::llama::LLAMA;
use super::table::{Architecture, HeadCounts, Norms, QueryKeyNorm};

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
    head_counts: HeadCounts::Fixed,
    defaults: r#"{"rms_norm_eps": 1e-5}"#,
    gguf: Some(gguf::Family {
        architecture: "olmo2",
        class: "Olmo2ForCausalLM",
        names: &[
            ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
            ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
            ("model.layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
            ("model.layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
        ],
        is_interleaved: false,
        misread: tied,
        ..gguf::Family::COMMON
    }),
    ..LLAMA
};

/// llama.cpp has no tied heads in this family.
pub(super) fn tied(config: &Map<String, Value>) -> Option<String> {
    let is_tied = config.get("tie_word_embeddings") == Some(&Value::Bool(true));
    is_tied.then(|| "`tie_word_embeddings` is true, and llama.cpp expects a head of its own in this family".into())
}
