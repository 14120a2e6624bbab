//! Gemma 2: norms before and after both halves of a block, norm weights stored minus 1, scaled embeddings, capped
//! scores and logits, a sliding window in every other block. Gemma team 2024, arXiv:2408.00118.

use serde_json::{Map, Value};

use super::gguf;
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
    gguf: Some(gguf::Family {
        architecture: "gemma2",
        names: &[
            ("model.layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
            ("model.layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
            ("model.layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
        ],
        is_interleaved: false,
        has_whole_norms: true,
        metadata: &["attention.sliding_window"],
        misread: other_scale,
        ..gguf::Family::COMMON
    }),
    ..LLAMA
};

/// llama.cpp does not read the scale of scores, but infers it from the size of the model.
fn other_scale(config: &Map<String, Value>) -> Option<String> {
    let number = |key: &str| config.get(key).and_then(Value::as_f64);
    let asked = number("query_pre_attn_scalar")?;
    // llama.cpp recognizes the largest model of the family by its number of blocks.
    let is_largest = number("num_hidden_layers") == Some(46.0);
    let of_heads = || Some(number("hidden_size")? / number("num_attention_heads")?);
    let taken = if is_largest { of_heads()? } else { number("head_dim").unwrap_or(256.0) };
    (taken != asked).then(|| format!("`query_pre_attn_scalar` is {asked}, but llama.cpp uses {taken}"))
}
