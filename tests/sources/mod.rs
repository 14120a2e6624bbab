//! Checkpoints of other tools as sources: quantized ones, and files of PyTorch.

mod pytorch;
mod quantized;

use std::path::{Path, PathBuf};

fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracles").join(name)
}

fn json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(oracle(name)).unwrap()).unwrap()
}
