//! Qwen 3 with experts in most blocks. Yang et al. 2025, arXiv:2505.09388.

use super::qwen3::QWEN3;
use super::table::{Architecture, ExpertNames};
use crate::model::slot::Role;

pub(super) const QWEN3_MOE: Architecture = Architecture {
    model_type: "qwen3_moe",
    experts: Some(ExpertNames {
        router: "mlp.gate",
        list: "mlp.experts",
        linears: &[(Role::GateProj, "gate_proj"), (Role::UpProj, "up_proj"), (Role::DownProj, "down_proj")],
    }),
    aliases: &[("num_local_experts", "num_experts")],
    defaults: r#"{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "use_sliding_window": false}"#,
    gguf: None,
    ..QWEN3
};
