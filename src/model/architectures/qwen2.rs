//! Qwen 2 and 2.5: Llama with biases on queries, keys and values. Yang et al. 2024, arXiv:2407.10671.

use super::gguf;
use super::llama::LLAMA;
use super::table::{Architecture, HeadCounts};
use crate::model::slot::Role;

pub(super) const GGUF: gguf::Family = gguf::Family {
    architecture: "qwen2",
    class: "Qwen2ForCausalLM",
    is_interleaved: false,
    pre_tokenizer: Some("qwen2"),
    ..gguf::Family::COMMON
};

pub(super) const QWEN2: Architecture = Architecture {
    model_type: "qwen2",
    biased: &[Role::QProj, Role::KProj, Role::VProj],
    defaults: r#"{"use_sliding_window": false}"#,
    gguf: Some(GGUF),
    head_counts: HeadCounts::Any,
    ..LLAMA
};
