//! RoBERTa: BERT with positions after two unused rows, and another head. Liu et al. 2019, arXiv:1907.11692.

use super::bert::{BERT, ENCODER};
use super::table::{Architecture, EncoderNames, MaskedHead};
use crate::model::activation::Activation;

pub(super) const ROBERTA: Architecture = Architecture {
    model_type: "roberta",
    prefix: "roberta.",
    embed_positions: Some(("embeddings.position_embeddings", 2)),
    lm_head: "lm_head.decoder",
    encoder: Some(EncoderNames {
        masked_head: MaskedHead {
            dense: "lm_head.dense",
            activation: Some(Activation::Gelu),
            norm: "lm_head.layer_norm",
            bias: "lm_head.bias",
        },
        ..ENCODER
    }),
    gguf: None,
    ..BERT
};
