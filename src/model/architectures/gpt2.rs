//! GPT-2: learned positions, layer norms, fused queries, keys and values, weights stored as (in, out). Radford
//! et al. 2019.

use super::gguf;
use super::llama::LLAMA;
use super::table::{Architecture, HeadCounts, NormKind, Norms};
use crate::model::slot::Role;

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
    head_counts: HeadCounts::Fixed,
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
    gguf: Some(gguf::Family {
        architecture: "gpt2",
        class: "GPT2LMHeadModel",
        names: &[
            ("transformer.wte", "token_embd"),
            ("transformer.wpe", "position_embd"),
            ("transformer.ln_f", "output_norm"),
            ("transformer.h.{}.ln_1", "blk.{}.attn_norm"),
            ("transformer.h.{}.attn.c_attn", "blk.{}.attn_qkv"),
            ("transformer.h.{}.attn.c_proj", "blk.{}.attn_output"),
            ("transformer.h.{}.ln_2", "blk.{}.ffn_norm"),
            ("transformer.h.{}.mlp.c_fc", "blk.{}.ffn_up"),
            ("transformer.h.{}.mlp.c_proj", "blk.{}.ffn_down"),
        ],
        optional_prefix: Some("transformer."),
        is_interleaved: false,
        transposed: &["c_attn", "c_proj", "c_fc"],
        buffers: &["attn.bias", "attn.masked_bias"],
        metadata: &["attention.layer_norm_epsilon"],
        pre_tokenizer: Some("gpt-2"),
        ..gguf::Family::COMMON
    }),
    ..LLAMA
};
