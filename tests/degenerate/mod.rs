//! Valid models in degenerate cases: matrices of zeros, dead channels, blocks without effect, the largest floats.

mod extremes;
mod zeros;

use std::path::Path;

use crate::common::{TRAIN, ok, path};
use serde_json::Value;

const CALIBRATED: [&str; 6] = ["--calibration", TRAIN, "--samples", "16", "--seq-len", "64"];

fn module(block: usize, role: &str) -> String {
    format!("model.layers.{block}.{role}")
}

fn compress(model: &Path, out: &Path, extra: &[&str]) -> Value {
    ok(&[&["compress", path(model), "-o", path(out), "--json", "-q", "--force"], extra].concat()).json()
}

/// No number is missing from a report: JSON has no NaN, and serde writes null instead.
fn check_numbers(report: &Value) {
    for linear in report["linears"].as_array().unwrap() {
        assert!(linear["relative_error"].as_f64().is_some_and(|error| (0.0..=1.5).contains(&error)), "{linear}");
    }
    assert!(report["linear"]["mean_error"].is_number() && report["keep"].is_number());
}
