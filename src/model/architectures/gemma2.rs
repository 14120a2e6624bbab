//! Gemma 2: norms before and after both halves of a block, weights of norms stored less 1, scaled embeddings, capped scores and
//! logits, every other block with a sliding window. Gemma team 2024, arXiv:2408.00118.

use super::llama::LLAMA;
use super::{Architecture, Norms, Sliding};
use crate::model::norm::NormKind;

pub(super) const GEMMA2: Architecture = Architecture {
    model_type: "gemma2",
    norms: Norms {
        before_attention: Some("input_layernorm"),
        after_attention: Some("post_attention_layernorm"),
        before_mlp: Some("pre_feedforward_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
        are_of_sums: false,
        query_key: None,
    },
    norm_kind: NormKind::RmsPlusOne,
    sliding: Sliding::AllBut(2),
    scales_embeddings: true,
    aliases: &[("hidden_activation", "hidden_act")],
    defaults: r#"{"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                  "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": true}"#,
    ..LLAMA
};
