//! BERT: an encoder whose tokens see each other in both directions, with a masked-language-model head. Devlin et
//! al. 2019, arXiv:1810.04805.

use serde_json::{Map, Value};

use super::gguf;
use super::llama::LLAMA;
use super::table::{Architecture, EncoderNames, HeadCounts, MaskedHead, NormKind, Norms};
use crate::model::slot::Role;

pub(super) const ENCODER: EncoderNames = EncoderNames {
    embed_types: Some("embeddings.token_type_embeddings"),
    embed_norm: "embeddings.LayerNorm",
    masked_head: MaskedHead {
        dense: "cls.predictions.transform.dense",
        activation: None,
        norm: "cls.predictions.transform.LayerNorm",
        bias: "cls.predictions.bias",
    },
    pooler: Some("pooler.dense"),
};

pub(super) const BERT: Architecture = Architecture {
    model_type: "bert",
    prefix: "bert.",
    embed_tokens: "embeddings.word_embeddings",
    embed_positions: Some(("embeddings.position_embeddings", 0)),
    layers: "encoder.layer",
    norms: Norms {
        before_attention: None,
        after_attention: Some("attention.output.LayerNorm"),
        before_mlp: None,
        after_mlp: Some("output.LayerNorm"),
        are_of_sums: true,
        ..LLAMA.norms
    },
    norm: None,
    lm_head: "cls.predictions.decoder",
    encoder: Some(ENCODER),
    linears: &[
        (Role::QProj, "attention.self.query"),
        (Role::KProj, "attention.self.key"),
        (Role::VProj, "attention.self.value"),
        (Role::OProj, "attention.output.dense"),
        (Role::UpProj, "intermediate.dense"),
        (Role::DownProj, "output.dense"),
    ],
    norm_kind: NormKind::Layer,
    is_rotary: false,
    head_counts: HeadCounts::Fixed,
    aliases: &[("layer_norm_eps", "rms_norm_eps")],
    defaults: r#"{"hidden_act": "gelu", "rms_norm_eps": 1e-12, "attention_bias": true, "mlp_bias": true}"#,
    gguf: Some(GGUF),
    ..LLAMA
};

/// llama.cpp computes the last states alone, without pooler and head.
const GGUF: gguf::Family = gguf::Family {
    architecture: "bert",
    class: "BertModel",
    names: &[
        ("bert.embeddings.word_embeddings", "token_embd"),
        ("bert.embeddings.token_type_embeddings", "token_types"),
        ("bert.embeddings.position_embeddings", "position_embd"),
        ("bert.embeddings.LayerNorm", "token_embd_norm"),
        ("bert.encoder.layer.{}.attention.self.query", "blk.{}.attn_q"),
        ("bert.encoder.layer.{}.attention.self.key", "blk.{}.attn_k"),
        ("bert.encoder.layer.{}.attention.self.value", "blk.{}.attn_v"),
        ("bert.encoder.layer.{}.attention.output.dense", "blk.{}.attn_output"),
        ("bert.encoder.layer.{}.attention.output.LayerNorm", "blk.{}.attn_output_norm"),
        ("bert.encoder.layer.{}.intermediate.dense", "blk.{}.ffn_up"),
        ("bert.encoder.layer.{}.output.dense", "blk.{}.ffn_down"),
        ("bert.encoder.layer.{}.output.LayerNorm", "blk.{}.layer_output_norm"),
    ],
    optional_prefix: Some("bert."),
    is_interleaved: false,
    buffers: &["embeddings.position_ids", "embeddings.token_type_ids"],
    unused: &["pooler", "cls.predictions", "cls.seq_relationship"],
    in_f32: &["token_types", "position_embd"],
    metadata: &["attention.layer_norm_epsilon"],
    without: &[
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
    ],
    pre_tokenizer: Some("jina-v2-en"),
    misread: other_activation,
    ..gguf::Family::COMMON
};

/// llama.cpp computes GELU by tanh in this family, whichever kind of GELU the config names.
fn other_activation(config: &Map<String, Value>) -> Option<String> {
    let name = config.get("hidden_act").and_then(Value::as_str)?;
    let is_gelu = name.starts_with("gelu");
    (!is_gelu).then(|| format!("`hidden_act` is `{name}`, and llama.cpp computes GELU in this family"))
}
