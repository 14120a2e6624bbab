//! Model families as data: the names of their tensors, and their options of the decoder. Each family is one file and
//! one line in `ALL`.

mod bert;
mod distilbert;
mod gemma2;
mod gemma3_text;
pub mod gguf;
mod gpt2;
mod gpt_neox;
mod llama;
mod mistral;
mod mixtral;
mod olmo2;
mod opt;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod roberta;
mod smollm3;
pub(super) mod table;

use serde_json::{Map, Value};

pub use self::table::{Architecture, FusedQkv, HeadCounts, NormKind};
use crate::checkpoint::ShownTensor;

/// Every family that `lrc` can run.
const ALL: &[&Architecture] = &[
    &llama::LLAMA,
    &mistral::MISTRAL,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &gemma2::GEMMA2,
    &gemma3_text::GEMMA3_TEXT,
    &phi3::PHI3,
    &olmo2::OLMO2,
    &smollm3::SMOLLM3,
    &gpt2::GPT2,
    &gpt_neox::GPT_NEOX,
    &opt::OPT,
    &mixtral::MIXTRAL,
    &qwen3_moe::QWEN3_MOE,
    &bert::BERT,
    &roberta::ROBERTA,
    &distilbert::DISTILBERT,
];

/// The family for a `model_type`.
pub fn find(model_type: &str) -> Option<&'static Architecture> {
    ALL.iter().copied().find(|a| a.model_type == model_type)
}

/// Every `model_type` that [`find`] knows.
pub fn known_types() -> Vec<&'static str> {
    ALL.iter().map(|a| a.model_type).collect()
}

/// How GGUF files store the family for a `model_type`.
pub fn gguf_family(model_type: &str) -> Option<&'static gguf::Family> {
    find(model_type)?.gguf.as_ref()
}

/// How GGUF files store a model of the family whose blocks have widths of their own; `None` if llama.cpp reads one
/// width for all.
pub fn gguf_family_by_block(model_type: &str) -> Option<&'static gguf::Family> {
    (model_type == llama::LLAMA.model_type).then_some(&llama::GGUF_BY_BLOCK)
}

/// A tensor of a GGUF file as a checkpoint with this config has it; families without a table have the common names.
pub fn of_gguf(tensor: &str, config: &Map<String, Value>) -> Option<ShownTensor> {
    let family = config.get("model_type").and_then(Value::as_str).and_then(gguf_family);
    let family = family.unwrap_or(&gguf::Family::COMMON);
    let name = family.from_gguf(tensor)?;
    let (arrangement, is_transposed) = (family.arrangement(&name, config), family.is_transposed(&name));
    Some(ShownTensor { name, arrangement, is_transposed })
}

/// The families that GGUF files call by this `general.architecture`.
pub fn of_gguf_architecture(name: &str) -> Vec<(&'static Architecture, &'static gguf::Family)> {
    let with_table = ALL.iter().filter_map(|&architecture| Some((architecture, architecture.gguf.as_ref()?)));
    let with_table = with_table.chain([(&llama::LLAMA, &llama::GGUF_BY_BLOCK)]);
    with_table.filter(|(_, family)| family.architecture == name).collect()
}

/// Every `general.architecture` that [`of_gguf_architecture`] knows.
pub fn gguf_architectures() -> Vec<&'static str> {
    let names = ALL.iter().filter_map(|a| Some(a.gguf.as_ref()?.architecture));
    let mut distinct = Vec::new();
    for name in names.chain([llama::GGUF_BY_BLOCK.architecture]) {
        if !distinct.contains(&name) {
            distinct.push(name);
        }
    }
    distinct
}

/// The GGUF name of a tensor of a linear, in any family: linears have the same name in every family that has them.
pub fn gguf_name(tensor: &str) -> Option<String> {
    let own = || ALL.iter().find_map(|architecture| architecture.gguf.as_ref()?.to_gguf(tensor));
    gguf::Family::COMMON.to_gguf(tensor).or_else(own)
}

#[cfg(test)]
mod tests {
    use super::super::slot::{LinearId, Slot};
    use super::*;

    #[test]
    fn names_and_ids_are_inverse() {
        for architecture in ALL {
            let shared = architecture.linears.iter().map(|&(role, _)| Slot::shared(role));
            let of_experts = architecture.experts.iter().flat_map(|e| e.linears);
            let of_experts = of_experts.map(|&(role, _)| Slot { role, expert: Some(31) });
            for slot in shared.chain(of_experts) {
                let id = LinearId { block: 12, slot };
                for prefix in architecture.prefixes().chain(["language_model.model.", "_orig_mod.layers."]) {
                    let module = architecture.module(prefix, id);
                    assert_eq!(architecture.linear_id(prefix, &module), Some(id));
                    assert_eq!(
                        architecture.split_name(&module).map(|(before, block, _)| (before, block)),
                        Some((prefix, 12))
                    );
                }
            }
            architecture.in_common_words(&Map::new());
            assert_eq!(architecture.linear_id("", architecture.lm_head), None);
            assert_eq!(architecture.linear_id("model.", "model.layers.x.mlp.down_proj"), None);
        }
    }

    #[test]
    fn gguf_tables_are_not_inherited_by_accident() {
        let known: Vec<&str> = known_types().into_iter().filter(|t| gguf_family(t).is_some()).collect();
        assert_eq!(
            known,
            [
                "llama",
                "mistral",
                "qwen2",
                "qwen3",
                "gemma2",
                "gemma3_text",
                "phi3",
                "olmo2",
                "smollm3",
                "gpt2",
                "gpt_neox",
                "mixtral",
                "qwen3_moe",
                "bert"
            ]
        );
    }

    #[test]
    fn gguf_names_are_those_of_the_family() {
        let to = |model_type, tensor: &str| gguf_family(model_type).unwrap().to_gguf(tensor);
        let from = |model_type, tensor: &str| gguf_family(model_type).unwrap().from_gguf(tensor);
        for (model_type, ours) in
            [("phi3", "model.layers.1.mlp.gate_up_proj.weight"), ("qwen2", "model.layers.1.mlp.up_proj.weight")]
        {
            assert_eq!(gguf_name(ours).as_deref(), Some("blk.1.ffn_up.weight"));
            assert_eq!(from(model_type, "blk.1.ffn_up.weight").as_deref(), Some(ours));
        }
        for (model_type, ours, theirs) in [
            ("mixtral", "model.layers.1.block_sparse_moe.experts.7.w3.weight", "blk.1.ffn_up_exps.7.weight"),
            ("qwen3_moe", "model.layers.1.mlp.experts.7.up_proj.weight", "blk.1.ffn_up_exps.7.weight"),
            ("qwen3_moe", "model.layers.1.mlp.gate.weight", "blk.1.ffn_gate_inp.weight"),
        ] {
            assert_eq!(to(model_type, ours).as_deref(), Some(theirs));
            assert_eq!(from(model_type, theirs).as_deref(), Some(ours));
        }
        // A name that means different things in two families, and one without its prefix.
        let norm = "model.layers.3.post_attention_layernorm.weight";
        assert_eq!(to("llama", norm).as_deref(), Some("blk.3.ffn_norm.weight"));
        assert_eq!(to("gemma2", norm).as_deref(), Some("blk.3.post_attention_norm.weight"));
        for name in ["transformer.h.2.attn.c_attn.bias", "h.2.attn.c_attn.bias"] {
            assert_eq!(to("gpt2", name).as_deref(), Some("blk.2.attn_qkv.bias"));
            assert_eq!(gguf_name(name).as_deref(), Some("blk.2.attn_qkv.bias"));
        }
    }
}
