//! BERT: an encoder whose tokens see each other in both directions, with a masked-language-model head. Devlin et
//! al. 2019, arXiv:1810.04805.

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
    gguf: None,
    ..LLAMA
};
