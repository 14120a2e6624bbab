//! Qwen 2 and 2.5: Llama with biases on queries, keys and values. Yang et al. 2024, arXiv:2407.10671.

use super::llama::LLAMA;
use super::{Architecture, Role};

pub(super) const QWEN2: Architecture = Architecture {
    model_type: "qwen2",
    biased: &[Role::QProj, Role::KProj, Role::VProj],
    defaults: r#"{"use_sliding_window": false}"#,
    ..LLAMA
};
