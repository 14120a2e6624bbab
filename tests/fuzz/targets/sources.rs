//! Files of other tools: archives of PyTorch, and weights that they quantized.

use std::fs;
use std::path::{Path, PathBuf};

use lrc::checkpoint::Checkpoint;
use safetensors::SafeTensors;

use super::{Bed, read_all, split_name};

fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracles").join(name)
}

pub(super) fn of_pytorch(_: &Bed) -> Vec<Vec<u8>> {
    vec![fs::read(oracle("pytorch.bin")).unwrap()]
}

pub(super) fn read_pytorch(bed: &Bed, input: &[u8]) -> bool {
    let folder = bed.folder("pytorch", &[("pytorch_model.bin", input)]);
    lrc::model::open(&folder).is_ok_and(|checkpoint| read_all(&checkpoint))
}

fn cases() -> serde_json::Value {
    serde_json::from_slice(&fs::read(oracle("quantized.json")).unwrap()).unwrap()
}

/// `CASE.safetensors`, then its tensors.
pub(super) fn of_quantized(_: &Bed) -> Vec<Vec<u8>> {
    let bytes = fs::read(oracle("quantized.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let of = |case: &String| {
        let prefix = format!("{case}/");
        let tensors = all.tensors().into_iter();
        let own = tensors.filter(|(name, _)| name.strip_prefix(&prefix).is_some_and(|name| !name.starts_with('/')));
        let views: Vec<_> = own.map(|(name, view)| (name[prefix.len()..].to_string(), view)).collect();
        [format!("{case}.safetensors\n").into_bytes(), safetensors::serialize(views, None).unwrap()].concat()
    };
    cases().as_object().unwrap().keys().map(of).collect()
}

pub(super) fn read_quantized(bed: &Bed, input: &[u8]) -> bool {
    let Some((name, weights)) = split_name(input) else { return false };
    let cases = cases();
    let Some(settings) = name.strip_suffix(".safetensors").and_then(|case| cases.get(case)) else { return false };
    let config = serde_json::json!({"quantization_config": settings}).to_string();
    let folder = bed.folder("quantized", &[("config.json", config.as_bytes()), ("model.safetensors", weights)]);
    let Ok(checkpoint) = Checkpoint::open(&folder) else { return false };
    read_all(&checkpoint) && read_all(&checkpoint.dequantized())
}
