//! GPT-NeoX and Pythia: parallel attention and feed-forward, a partial rotary embedding, queries, keys and values fused
//! head by head. Black et al. 2022, arXiv:2204.06745.

use super::llama::LLAMA;
use super::table::{Architecture, FusedQkv, NormKind};
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
    has_free_heads: false,
    aliases: &[
        ("layer_norm_eps", "rms_norm_eps"),
        ("rotary_pct", "partial_rotary_factor"),
        ("rotary_emb_base", "rope_theta"),
    ],
    defaults: r#"{"hidden_act": "gelu", "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_parallel_residual": true,
                  "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false}"#,
    gguf: None,
    ..LLAMA
};
