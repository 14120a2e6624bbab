//! Sizes before and after, seconds by stage, and memory.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sizes before and after, in all units that tools use.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Sizes {
    /// Parameters of the targeted linears.
    pub linear_parameters_before: u64,
    /// Parameters of their factors, and of the linears that stay dense. The dense format counts factors too, although
    /// it stores their products.
    pub linear_parameters_after: u64,
    /// `linear_parameters_after / linear_parameters_before`, the target of `--keep`.
    pub keep: f64,
    /// Elements of all tensors as stored, the target of `--params`. A code counts as the parameter that it encodes; the
    /// order of outputs in the pivot layout, of whole numbers, is none.
    pub parameters_before: u64,
    /// The same of the output.
    pub parameters_after: u64,
    /// Bytes of all tensors as stored.
    pub bytes_before: u64,
    /// The same of the output.
    pub bytes_after: u64,
    /// Bytes of the weight files with their headers, the target of `--target-size`.
    pub file_bytes_after: u64,
    /// Stored bits of the targeted linears over their number of weights in the source.
    pub bits_per_weight_before: f64,
    /// The same of the output, over the same number of weights.
    pub bits_per_weight_after: f64,
    /// The part of `bits_per_weight_after` in bases and in linears that stay dense.
    #[serde(default)]
    pub bits_per_weight_base: f64,
    /// The part of `bits_per_weight_after` in low-rank factors.
    #[serde(default)]
    pub bits_per_weight_factors: f64,
}

/// Seconds per stage of a compression.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    /// Statistics of inputs: the forward passes.
    pub calibrate_forward: f64,
    /// Statistics of gradients: the backward passes.
    pub calibrate_backward: f64,
    /// Decompositions and error curves.
    pub decompose: f64,
    /// Quantization, with compensation.
    #[serde(alias = "quantise", default)]
    pub quantize: f64,
    /// Sensitivities and ranks.
    pub allocate: f64,
    /// The sequential mode.
    pub anchor: f64,
    /// Writing the output.
    pub write: f64,
    /// The equal-bytes baseline without factors.
    #[serde(alias = "control", default)]
    pub equal_bytes_baseline: f64,
    /// With `--structure narrow` and `--structure depth`: one window of 64 tokens, or of the context, through the blocks of
    /// the source in lrc, in f32, without loading them.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub forward_before: Option<f64>,
    /// The same through the blocks of the smaller model, before its linears are quantized or become of low rank.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub forward_after: Option<f64>,
}

/// Peak resident memory of this process so far; none except on Linux.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
