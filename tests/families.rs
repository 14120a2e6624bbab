//! Every family, by one contract: the logits of transformers.

mod common;

use std::path::Path;

use candle_core::{Device, Tensor};
use lrc::checkpoint::Checkpoint;
use lrc::model::{Decoder, architectures};
use serde_json::Value;

/// Largest difference of logits, over the largest logit.
fn error(found: &Tensor, expected: &Value) -> f64 {
    let rows = expected.as_array().unwrap();
    let expected: Vec<f64> = rows.iter().flat_map(|row| row.as_array().unwrap()).map(|x| x.as_f64().unwrap()).collect();
    let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    found.iter().zip(&expected).map(|(f, e)| (f64::from(*f) - e).abs()).fold(0.0, f64::max) / largest
}

#[test]
fn logits_of_every_family_are_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let mut failed = Vec::new();
    for family in architectures::known_types() {
        let source = format!("fixtures/pico/{family}");
        let copy = folder.path().join(family);
        common::copy(&source, &copy);
        let read = |name: &str| -> Value {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&source).join(name);
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
        };
        let expected = read("expected.json");
        let ids: Vec<u32> = expected["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        for case in expected["cases"].as_array().unwrap() {
            let mut config = read("config.json");
            config.as_object_mut().unwrap().extend(case["changes"].as_object().unwrap().clone());
            std::fs::write(copy.join("config.json"), config.to_string()).unwrap();
            let checkpoint = Checkpoint::open(&copy).unwrap();
            let error = match Decoder::open(&checkpoint).and_then(|decoder| decoder.logits(&ids)) {
                Ok(logits) => error(&logits, &case["logits"]),
                Err(reason) => panic!("{family} with {}: {reason:#}", case["changes"]),
            };
            println!("{family:12} {:9.2e} {}", error, case["changes"]);
            if error > 1e-5 {
                failed.push(format!("{family} with {}: {error:.2e}", case["changes"]));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
