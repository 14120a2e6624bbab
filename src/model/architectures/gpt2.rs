//! GPT-2: learned positions, layer norms, fused queries, keys and values, weights stored (in, out). Radford et al. 2019.

use super::llama::LLAMA;
use super::{Architecture, Norms, Role};
use crate::model::norm::NormKind;

pub(super) const GPT2: Architecture = Architecture {
    model_type: "gpt2",
    prefix: "transformer.",
    embed_tokens: "wte",
    embed_positions: Some(("wpe", 0)),
    layers: "h",
    norms: Norms { before_attention: Some("ln_1"), before_mlp: Some("ln_2"), ..LLAMA.norms },
    norm: Some("ln_f"),
    linears: &[
        (Role::QkvProj, "attn.c_attn"),
        (Role::OProj, "attn.c_proj"),
        (Role::UpProj, "mlp.c_fc"),
        (Role::DownProj, "mlp.c_proj"),
    ],
    is_conv1d: true,
    norm_kind: NormKind::Layer,
    is_rotary: false,
    aliases: &[
        ("n_embd", "hidden_size"),
        ("n_inner", "intermediate_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
        ("n_positions", "max_position_embeddings"),
        ("activation_function", "hidden_act"),
        ("layer_norm_epsilon", "rms_norm_eps"),
    ],
    defaults: r#"{"intermediate_size": "4 hidden_size", "hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "attention_bias": true,
                  "mlp_bias": true}"#,
    ..LLAMA
};
