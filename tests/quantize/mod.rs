//! Quantized bases, compensation, exact sizes, and every format that stores them.

mod budgets;
mod formats;
mod sources;

use std::path::Path;

use crate::common::{FIXTURE, HELD_OUT, ok, path, perplexity};
use serde_json::Value;

const LORC: &[&str] = &["--compensate", "lorc", "--compensate-rank", "8"];

fn compress(out: &Path, extra: &[&str]) -> Value {
    ok(&[&["compress", FIXTURE, "-o", path(out), "-q", "--json"], extra].concat()).json()
}

fn ppl(model: &Path) -> f64 {
    perplexity(path(model), HELD_OUT, "128")
}

const MODULE: &str = "model.layers.1.mlp.down_proj";
