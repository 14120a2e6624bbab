//! Qwen 3: Llama with norms over the heads of queries and keys. Yang et al. 2025, arXiv:2505.09388.

use super::gguf;
use super::llama::LLAMA;
use super::qwen2;
use super::table::{Architecture, HeadCounts, Norms, QueryKeyNorm};

pub(super) const HEAD_NORMS: QueryKeyNorm =
    QueryKeyNorm { query: "self_attn.q_norm", key: "self_attn.k_norm", is_per_head: true };

pub(super) const QWEN3: Architecture = Architecture {
    model_type: "qwen3",
    norms: Norms { query_key: Some(HEAD_NORMS), ..LLAMA.norms },
    defaults: r#"{"use_sliding_window": false}"#,
    gguf: Some(gguf::Family {
        architecture: "qwen3",
        class: "Qwen3ForCausalLM",
        names: &[
            ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
            ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
        ],
        ..qwen2::GGUF
    }),
    head_counts: HeadCounts::Any,
    ..LLAMA
};
