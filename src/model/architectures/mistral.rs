//! Mistral 7B and Nemo: Llama with its own head width and, in early models, a sliding window. Jiang et al. 2023,
//! arXiv:2310.06825.

use super::gguf;
use super::llama::{self, LLAMA};
use super::table::{Architecture, HeadCounts, Sliding};

pub(super) const MISTRAL: Architecture = Architecture {
    model_type: "mistral",
    sliding: Sliding::All,
    gguf: Some(gguf::Family { class: "MistralForCausalLM", ..llama::GGUF }),
    head_counts: HeadCounts::Any,
    ..LLAMA
};
