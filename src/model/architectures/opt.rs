//! OPT: learned positions after two unused rows, layer norms (post-norm in OPT-350M), ReLU. Zhang et al. 2022,
//! arXiv:2205.01068.

use super::llama::LLAMA;
use super::table::{Architecture, HeadCounts, NormKind, Norms};
use crate::model::slot::Role;

pub(super) const OPT: Architecture = Architecture {
    model_type: "opt",
    prefix: "model.decoder.",
    embed_projections: Some(("project_in", "project_out")),
    embed_positions: Some(("embed_positions", 2)),
    norms: Norms {
        before_attention: Some("self_attn_layer_norm"),
        before_mlp: Some("final_layer_norm"),
        ..LLAMA.norms
    },
    norm: Some("final_layer_norm"),
    linears: &[
        (Role::QProj, "self_attn.q_proj"),
        (Role::KProj, "self_attn.k_proj"),
        (Role::VProj, "self_attn.v_proj"),
        (Role::OProj, "self_attn.out_proj"),
        (Role::UpProj, "fc1"),
        (Role::DownProj, "fc2"),
    ],
    norm_kind: NormKind::Layer,
    is_rotary: false,
    head_counts: HeadCounts::Fixed,
    aliases: &[
        ("ffn_dim", "intermediate_size"),
        ("activation_function", "hidden_act"),
        ("enable_bias", "attention_bias"),
        ("enable_bias", "mlp_bias"),
    ],
    defaults: r#"{"hidden_act": "relu", "rms_norm_eps": 1e-5, "attention_bias": true, "mlp_bias": true}"#,
    gguf: None,
    ..LLAMA
};
