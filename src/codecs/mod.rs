//! Byte layouts of quantized and renamed weights; the reader and the writer of each are in one file.
//!
//! Everything here maps headers and bytes to matrices and back. No file is opened, only the suffixes of tensors are
//! named, and no model family is known: the caller provides the tables of names.

mod awq;
mod bitsandbytes;
pub mod cast;
mod coded;
pub mod compressed_tensors;
pub mod float8;
mod fp8;
pub mod gguf;
pub mod gptq;
pub mod layout;
mod mxfp4;
pub mod onnx;
pub mod packed;
pub mod peft;
pub mod registry;
mod scaled;
pub mod torch;

pub use cast::Dtype;
pub use coded::{Tensor, Values, Written};
