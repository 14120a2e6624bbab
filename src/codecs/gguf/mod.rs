//! GGUF: the header of a file, the types of its elements, row orders, and how tables of families give names to tensors.
//!
//! llama.cpp has names of its own for tensors, and rotates neighboring rows of a head where Hugging Face rotates halves: families
//! with a rotary embedding of that kind store the rows of q and k in another order.

mod element;
mod header;
mod names;
mod rows;

pub use element::Element;
pub use header::{Entry, GgufTensor, Header, Value, file_bytes, is_begun, read, write};
pub use names::{Family, FamilyOf};
pub use rows::Arrangement;

pub const MODEL_FILE: &str = "model.gguf";
pub const LORA_FILE: &str = "model-lora.gguf";
/// Scaling of rotary frequencies, computed from the config: no tensor of a checkpoint.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";
