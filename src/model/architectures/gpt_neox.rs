//! GPT-NeoX and Pythia: parallel attention and feed-forward, a partial rotary embedding, queries, keys and values fused
//! head by head. Black et al. 2022, arXiv:2204.06745.

use serde_json::{Map, Value};

use super::gguf;
use super::llama::LLAMA;
use super::olmo2;
use super::table::{Architecture, FusedQkv, HeadCounts, NormKind};
use crate::model::slot::Role;

pub(super) const GPT_NEOX: Architecture = Architecture {
    model_type: "gpt_neox",
    prefix: "gpt_neox.",
    embed_tokens: "embed_in",
    norm: Some("final_layer_norm"),
    lm_head: "embed_out",
    linears: &[
        (Role::QkvProj, "attention.query_key_value"),
        (Role::OProj, "attention.dense"),
        (Role::UpProj, "mlp.dense_h_to_4h"),
        (Role::DownProj, "mlp.dense_4h_to_h"),
    ],
    norm_kind: NormKind::Layer,
    fused_qkv: FusedQkv::Interleaved,
    head_counts: HeadCounts::Fixed,
    aliases: &[
        ("layer_norm_eps", "rms_norm_eps"),
        ("rotary_pct", "partial_rotary_factor"),
        ("rotary_emb_base", "rope_theta"),
    ],
    defaults: r#"{"hidden_act": "gelu", "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_parallel_residual": true,
                  "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false}"#,
    gguf: Some(gguf::Family {
        architecture: "gptneox",
        class: "GPTNeoXForCausalLM",
        names: &[
            ("gpt_neox.embed_in", "token_embd"),
            ("gpt_neox.final_layer_norm", "output_norm"),
            ("embed_out", "output"),
            ("gpt_neox.layers.{}.input_layernorm", "blk.{}.attn_norm"),
            ("gpt_neox.layers.{}.attention.query_key_value", "blk.{}.attn_qkv"),
            ("gpt_neox.layers.{}.attention.dense", "blk.{}.attn_output"),
            ("gpt_neox.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
            ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "blk.{}.ffn_up"),
            ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "blk.{}.ffn_down"),
        ],
        optional_prefix: Some("gpt_neox."),
        is_interleaved: false,
        fused_by_head: Some("attention.query_key_value"),
        buffers: &["attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"],
        metadata: &["attention.layer_norm_epsilon", "use_parallel_residual"],
        pre_tokenizer: Some("gpt-2"),
        misread: without_biases,
        ..gguf::Family::COMMON
    }),
    ..LLAMA
};

/// llama.cpp expects the biases and the head of the published models.
fn without_biases(config: &Map<String, Value>) -> Option<String> {
    let is_without = config.get("attention_bias") == Some(&Value::Bool(false));
    let reason = is_without.then(|| "`attention_bias` is false, and llama.cpp expects biases in this family".into());
    reason.or_else(|| olmo2::tied(config))
}
