//! Llama 1 to 3 and every checkpoint in its layout: grouped-query attention, rotary embedding, RMSNorm, SwiGLU.
//! Touvron et al. 2023, arXiv:2302.13971.

use super::{Architecture, Role};

pub(super) const LLAMA: Architecture = Architecture {
    model_type: "llama",
    embed_tokens: "model.embed_tokens",
    layers: "model.layers",
    input_layernorm: "input_layernorm",
    post_attention_layernorm: "post_attention_layernorm",
    norm: "model.norm",
    lm_head: "lm_head",
    linears: &[
        (Role::QProj, "self_attn.q_proj"),
        (Role::KProj, "self_attn.k_proj"),
        (Role::VProj, "self_attn.v_proj"),
        (Role::OProj, "self_attn.o_proj"),
        (Role::GateProj, "mlp.gate_proj"),
        (Role::UpProj, "mlp.up_proj"),
        (Role::DownProj, "mlp.down_proj"),
    ],
};
