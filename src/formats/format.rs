//! The names of the formats.

use serde::{Deserialize, Serialize};

/// The output formats, by their names on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Factors and codes as they are; loads in lrc, and in transformers with `trust_remote_code`
    #[default]
    Factored,
    /// Factors multiplied out: loads everywhere, but is no smaller
    Dense,
    /// Packed int4 or int8 for transformers and vLLM; factors in a separate PEFT adapter
    CompressedTensors,
    /// GPTQ int4 or int8 for vLLM, and transformers with gptqmodel; factors in a separate PEFT adapter
    Gptq,
    /// Dequantized base; factors in a separate PEFT adapter
    Peft,
    /// For llama.cpp and its derivatives; factors in a separate GGUF LoRA
    Gguf,
    /// A graph for ONNX Runtime and sentence-transformers; factors and codes as they are
    Onnx,
    /// A PEFT adapter over another model, which is not stored; of `lrc delta` alone
    #[cfg_attr(feature = "cli", value(skip))]
    Adapter,
}

impl Format {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Factored => "factored",
            Self::Dense => "dense",
            Self::CompressedTensors => "compressed-tensors",
            Self::Gptq => "gptq",
            Self::Peft => "peft",
            Self::Gguf => "gguf",
            Self::Onnx => "onnx",
            Self::Adapter => "adapter",
        }
    }
}
