//! Names of files and folders.

use std::path::Path;

/// Names that Hugging Face gives to the files of a checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The index of shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The config of the model.
pub const CONFIG_FILE: &str = "config.json";

/// The report of an output of `lrc`, which marks a folder as one.
pub const REPORT_FILE: &str = "lrc-report.json";

/// Files of settings that some tools write instead of `quantization_config`, with the method that each belongs to.
pub(super) const SETTINGS_FILES: [(&str, &str); 3] =
    [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")];

/// The folder of a file; a bare name is in the current folder.
pub(crate) fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "gguf")
}

/// Whether a file is one of PyTorch, by its name.
pub(super) fn is_torch(path: &Path) -> bool {
    path.extension().is_some_and(|e| TORCH.iter().any(|known| e == *known))
}

/// Extensions of files of PyTorch.
pub(super) const TORCH: [&str; 3] = ["bin", "pt", "pth"];

/// Weights in any format, and what describes them.
pub(super) fn is_weight_file(name: &str) -> bool {
    const SUFFIXES: &[&str] = &[
        ".safetensors",
        ".safetensors.index.json",
        ".bin",
        ".bin.index.json",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".ggml",
        ".h5",
        ".h5.index.json",
        ".msgpack",
        ".msgpack.index.json",
        ".onnx",
        ".onnx_data",
        ".onnx.data",
        ".ot",
        ".tflite",
        ".mlmodel",
        ".pdparams",
        ".nemo",
        ".llamafile",
    ];
    let is_vocabulary = ["tokenizer", "vocab"].iter().any(|word| name.contains(word));
    SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) && !is_vocabulary
}
