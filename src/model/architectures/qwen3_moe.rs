//! Qwen 3 with experts in most blocks. Yang et al. 2025, arXiv:2505.09388.

use serde_json::{Map, Value};

use super::gguf;
use super::qwen2;
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
    gguf: Some(gguf::Family {
        architecture: "qwen3moe",
        class: "Qwen3MoeForCausalLM",
        names: &[
            ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
            ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
            ("model.layers.{}.mlp.gate", "blk.{}.ffn_gate_inp"),
            ("model.layers.{}.mlp.experts.{}.gate_proj", "blk.{}.ffn_gate_exps.{}"),
            ("model.layers.{}.mlp.experts.{}.down_proj", "blk.{}.ffn_down_exps.{}"),
            ("model.layers.{}.mlp.experts.{}.up_proj", "blk.{}.ffn_up_exps.{}"),
        ],
        metadata: &["expert_count", "expert_used_count", "expert_feed_forward_length"],
        misread,
        ..qwen2::GGUF
    }),
    ..QWEN3
};

/// llama.cpp always scales the weights of the active experts to a sum of one.
fn misread(config: &Map<String, Value>) -> Option<String> {
    let is_normalized = config.get("norm_topk_prob").and_then(Value::as_bool) == Some(true);
    let reason = "`norm_topk_prob` is not true, but llama.cpp scales the weights of the active experts to a sum of one";
    (!is_normalized).then(|| reason.into())
}
