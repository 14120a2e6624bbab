//! Phi-3 and Phi-4: Llama with fused matrices; long-context variants stretch the rotary embedding by a table. Abdin et
//! al. 2024, arXiv:2404.14219.

use super::gguf;
use super::llama::LLAMA;
use super::table::{Architecture, HeadCounts, Sliding};
use crate::model::slot::Role;

pub(super) const PHI3: Architecture = Architecture {
    model_type: "phi3",
    linears: &[
        (Role::QkvProj, "self_attn.qkv_proj"),
        (Role::OProj, "self_attn.o_proj"),
        (Role::GateUpProj, "mlp.gate_up_proj"),
        (Role::DownProj, "mlp.down_proj"),
    ],
    sliding: Sliding::All,
    defaults: r#"{"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}"#,
    gguf: Some(gguf::Family {
        architecture: "phi3",
        class: "Phi3ForCausalLM",
        names: &[
            ("model.layers.{}.self_attn.qkv_proj", "blk.{}.attn_qkv"),
            ("model.layers.{}.mlp.gate_up_proj", "blk.{}.ffn_up"),
        ],
        is_interleaved: false,
        metadata: &["attention.sliding_window"],
        ..gguf::Family::COMMON
    }),
    head_counts: HeadCounts::Any,
    ..LLAMA
};
