//! Gemma 3, the text model: Gemma 2 with norms over the heads of queries and keys instead of caps; five of six blocks
//! have a sliding window and their own rotary embedding. Gemma team 2025, arXiv:2503.19786.

use serde_json::{Map, Value};

use super::gemma2::{self, GEMMA2};
use super::gguf::{self, Scores};
use super::qwen3::HEAD_NORMS;
use super::table::{Architecture, Norms, Sliding};

pub(super) const GEMMA3_TEXT: Architecture = Architecture {
    model_type: "gemma3_text",
    norms: Norms { query_key: Some(HEAD_NORMS), ..GEMMA2.norms },
    sliding: Sliding::AllBut(6),
    aliases: &[("hidden_activation", "hidden_act"), ("_sliding_window_pattern", "sliding_window_pattern")],
    defaults: r#"{"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                  "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "tie_word_embeddings": true}"#,
    gguf: Some(gguf::Family {
        architecture: "gemma3",
        class: "Gemma3ForCausalLM",
        names: &[
            ("model.layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
            ("model.layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
            ("model.layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
            ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
            ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
        ],
        scores: Some(Scores { blocks_of_largest: 62 }),
        misread: other_blocks,
        ..gemma2::GGUF
    }),
    ..GEMMA2
};

/// llama.cpp knows which blocks have a window and how those are rotated, and does not read it.
fn other_blocks(config: &Map<String, Value>) -> Option<String> {
    let parameters = config.get("rope_parameters").and_then(|parameters| parameters.get("sliding_attention"));
    let theta = parameters.and_then(|local| local.get("rope_theta")).or(config.get("rope_local_base_freq"));
    if let Some(theta) = theta.and_then(Value::as_f64).filter(|&theta| theta != 10_000.0) {
        return Some(format!("blocks with a window rotate with theta {theta}, but llama.cpp uses 10000"));
    }
    let types = config.get("layer_types").and_then(Value::as_array);
    let is_same = |(i, kind): (usize, &Value)| (*kind == "full_attention") == ((i + 1) % 6 == 0);
    let pattern =
        ["sliding_window_pattern", "_sliding_window_pattern"].iter().find_map(|key| config.get(*key)?.as_u64());
    let is_usual = types.map_or(pattern.unwrap_or(6) == 6, |types| types.iter().enumerate().all(is_same));
    (!is_usual).then(|| "llama.cpp expects full attention in each sixth block, and a window in all others".into())
}
