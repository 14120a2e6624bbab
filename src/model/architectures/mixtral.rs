//! Mixtral: Mistral with experts instead of the feed-forward layer. Jiang et al. 2024, arXiv:2401.04088.

use super::gguf;
use super::llama;
use super::mistral::MISTRAL;
use super::table::{Architecture, ExpertNames};
use crate::model::slot::Role;

pub(super) const MIXTRAL: Architecture = Architecture {
    model_type: "mixtral",
    experts: Some(ExpertNames {
        router: "block_sparse_moe.gate",
        list: "block_sparse_moe.experts",
        linears: &[(Role::GateProj, "w1"), (Role::UpProj, "w3"), (Role::DownProj, "w2")],
    }),
    aliases: &[("num_local_experts", "num_experts")],
    defaults: r#"{"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": true, "rms_norm_eps": 1e-5}"#,
    gguf: Some(gguf::Family {
        class: "MixtralForCausalLM",
        names: &[
            ("model.layers.{}.block_sparse_moe.gate", "blk.{}.ffn_gate_inp"),
            ("model.layers.{}.block_sparse_moe.experts.{}.w1", "blk.{}.ffn_gate_exps.{}"),
            ("model.layers.{}.block_sparse_moe.experts.{}.w2", "blk.{}.ffn_down_exps.{}"),
            ("model.layers.{}.block_sparse_moe.experts.{}.w3", "blk.{}.ffn_up_exps.{}"),
        ],
        metadata: &["expert_count", "expert_used_count"],
        ..llama::GGUF
    }),
    ..MISTRAL
};
