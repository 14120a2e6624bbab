//! Gemma 2: norms before and after both halves of a block, norm weights stored minus 1, scaled embeddings, capped
//! scores and logits, a sliding window in every other block. Gemma team 2024, arXiv:2408.00118.

use super::gguf::{self, MergeOrder, Scores};
use super::llama::LLAMA;
use super::table::{Architecture, NormKind, Norms, Sliding};

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
    gguf: Some(GGUF),
    ..LLAMA
};

pub(super) const GGUF: gguf::Family = gguf::Family {
    architecture: "gemma2",
    class: "Gemma2ForCausalLM",
    names: &[
        ("model.layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
        ("model.layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
        ("model.layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
    ],
    is_interleaved: false,
    has_whole_norms: true,
    metadata: &["attention.sliding_window"],
    // Scores of its vocabulary are not in the order of merges.
    merge_order: MergeOrder::Ids,
    scores: Some(Scores { blocks_of_largest: 46 }),
    ..gguf::Family::COMMON
};
