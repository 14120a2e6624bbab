//! DistilBERT: half of BERT's blocks, without token types and without a pooler. Sanh et al. 2019, arXiv:1910.01108.

use super::bert::{BERT, ENCODER};
use super::table::{Architecture, EncoderNames, MaskedHead, Norms};
use crate::model::slot::Role;

pub(super) const DISTILBERT: Architecture = Architecture {
    model_type: "distilbert",
    prefix: "distilbert.",
    layers: "transformer.layer",
    norms: Norms { after_attention: Some("sa_layer_norm"), after_mlp: Some("output_layer_norm"), ..BERT.norms },
    lm_head: "vocab_projector",
    encoder: Some(EncoderNames {
        embed_types: None,
        masked_head: MaskedHead {
            dense: "vocab_transform",
            activation: None,
            norm: "vocab_layer_norm",
            bias: "vocab_projector.bias",
        },
        pooler: None,
        ..ENCODER
    }),
    linears: &[
        (Role::QProj, "attention.q_lin"),
        (Role::KProj, "attention.k_lin"),
        (Role::VProj, "attention.v_lin"),
        (Role::OProj, "attention.out_lin"),
        (Role::UpProj, "ffn.lin1"),
        (Role::DownProj, "ffn.lin2"),
    ],
    aliases: &[
        ("dim", "hidden_size"),
        ("hidden_dim", "intermediate_size"),
        ("n_layers", "num_hidden_layers"),
        ("n_heads", "num_attention_heads"),
        ("activation", "hidden_act"),
    ],
    gguf: None,
    ..BERT
};
