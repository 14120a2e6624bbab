//! Llama 1 to 3 and every checkpoint in its layout: grouped-query attention, rotary embedding, RMSNorm, SwiGLU.
//! Touvron et al. 2023, arXiv:2302.13971.

use super::gguf;
use super::table::{Architecture, FusedQkv, HeadCounts, NormKind, Norms, Sliding};
use crate::model::slot::Role;

pub(super) const LLAMA: Architecture = Architecture {
    model_type: "llama",
    prefix: "model.",
    embed_tokens: "embed_tokens",
    embed_projections: None,
    embed_positions: None,
    layers: "layers",
    norms: Norms {
        before_attention: Some("input_layernorm"),
        after_attention: None,
        before_mlp: Some("post_attention_layernorm"),
        after_mlp: None,
        are_of_sums: false,
        query_key: None,
    },
    norm: Some("norm"),
    lm_head: "lm_head",
    encoder: None,
    linears: &[
        (Role::QProj, "self_attn.q_proj"),
        (Role::KProj, "self_attn.k_proj"),
        (Role::VProj, "self_attn.v_proj"),
        (Role::OProj, "self_attn.o_proj"),
        (Role::GateProj, "mlp.gate_proj"),
        (Role::UpProj, "mlp.up_proj"),
        (Role::DownProj, "mlp.down_proj"),
    ],
    experts: None,
    biased: &[],
    is_conv1d: false,
    norm_kind: NormKind::Rms,
    fused_qkv: FusedQkv::Concatenated,
    is_rotary: true,
    head_counts: HeadCounts::Divisors,
    sliding: Sliding::OnRequest,
    scales_embeddings: false,
    aliases: &[],
    defaults: "{}",
    gguf: Some(GGUF),
};

pub(super) const GGUF: gguf::Family =
    gguf::Family { architecture: "llama", class: "LlamaForCausalLM", ..gguf::Family::COMMON };

/// Llama with widths of its own in each block, which llama.cpp runs under the name of DeciLM.
pub(super) const GGUF_BY_BLOCK: gguf::Family = gguf::Family { architecture: "deci", has_own_widths: true, ..GGUF };
