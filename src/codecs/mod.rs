//! Byte layouts of quantized and renamed weights: for each the reader and the writer, in one file.
//!
//! Everything here maps headers and bytes to matrices and back. No file is opened, no module is named beyond the suffixes of its
//! tensors, and no family of models is known: tables of names come from the caller.

pub mod cast;
mod coded;
pub mod compressed_tensors;
pub mod gguf;
pub mod gptq;
pub mod packed;
pub mod peft;

pub use cast::Dtype;
pub use coded::{Tensor, Values, Written};
