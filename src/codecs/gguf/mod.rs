//! GGUF: headers, element types, the places of tensors and the order of their rows, both ways.
//!
//! llama.cpp has its own names for tensors. It rotates neighboring rows of a head where Hugging Face rotates halves, so
//! families with that kind of rotary embedding store the rows of q and k in another order. Which name and which order a
//! tensor has is in the tables of families.

mod bytes;
mod data;
mod description;
mod element;
mod factors;
mod header;
mod rows;
mod stacks;
mod value;

pub use data::{Damage, Writer, expect_apart};
pub use description::Description;
pub use element::{Element, type_name};
pub use factors::{factor_name, split_factor};
pub use header::{Entry, GgufTensor, Header, file_bytes, is_begun, read, unread, write};
pub use rows::Arrangement;
pub use stacks::{matrix_name, split_matrix, stacked};
pub use value::Value;

/// The weights, in the output folder.
pub const MODEL_FILE: &str = "model.gguf";
/// The factors over quantized bases, for `--lora` of llama.cpp.
pub const LORA_FILE: &str = "model-lora.gguf";
/// Scaling of rotary frequencies. It is computed from the config, and no checkpoint stores it.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";
/// The same for windows within the context of the original model, and beyond it.
pub const LONG_ROPE_FACTORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

/// Whether a tensor scales rotary frequencies, which are part of the config.
pub fn is_rope_factors(tensor: &str) -> bool {
    tensor == ROPE_FACTORS || LONG_ROPE_FACTORS.contains(&tensor)
}
