//! Output formats, each for one or more runtimes. One format per file, one line in [`Format::exporter`].

mod adapter;
mod compressed_tensors;
mod dense;
mod exporter;
mod factored;
mod format;
mod gguf;
mod gptq;
mod mlx;
mod onnx;
mod output;
mod refusal;
mod registry;
mod residual;

pub use exporter::{Adapter, Container, Exporter, NamedBytes, OutTensor, Refusal, Source, Target};
pub use factored::{load, stored_forms};
pub use format::Format;
pub use output::{Files, Finished, Output, copy_side, side, warn_of_growth, warn_of_non_finite};
pub use registry::loading;

/// The files with which transformers and mlx-lm run a factored output.
pub const MODELING_FILES: [&str; 2] = [factored::MODELING_FILE, mlx::FILE];

/// Error curves next to factored weights, for `lrc truncate`: the current file name and an older one. No runtime loads
/// this extension: vLLM reads every `*.safetensors` of a folder as weights, and in object stores also the files
/// of subfolders.
pub const CURVES_FILES: [&str; 2] = ["lrc-curves.arrays", "lrc-curves.safetensors"];
