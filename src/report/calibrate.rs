//! The report of `lrc calibrate`, and the record of a calibration in other reports.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `lrc calibrate`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CalibrateReport {
    /// Version of the fields of this report.
    pub schema_version: u32,
    /// Version of lrc that wrote the report.
    pub lrc_version: String,
    /// How another tool had quantized the weights, by method and layouts: `gptq: int4-g128`. lrc worked on
    /// the values of the codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_quantization: Option<String>,
    /// Bytes of the file of statistics.
    pub size_bytes: u64,
    /// Number of windows that were measured or merged.
    pub windows: usize,
    /// Number of tokens in them.
    pub tokens: usize,
    /// Windows whose gradients were taken, if not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient_windows: Option<usize>,
    /// Measured parts of texts: `1/4 of` and the first 12 digits of the text's SHA-256.
    #[serde(alias = "parts")]
    pub texts: Vec<String>,
    /// Seconds of the forward passes; 0 after `--merge`.
    pub forward_seconds: f64,
    /// Seconds of the backward passes; 0 after `--merge`.
    pub backward_seconds: f64,
    /// Peak resident memory of the process in bytes; Linux only.
    pub peak_memory_bytes: Option<u64>,
}

/// The calibration text.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
pub struct CalibrationRecord {
    /// SHA-256 of each text.
    pub text_sha256: Vec<String>,
    /// Number of windows.
    pub windows: usize,
    /// Number of tokens in all windows.
    pub tokens: usize,
    /// Windows whose gradients were taken, if not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient_windows: Option<usize>,
}
