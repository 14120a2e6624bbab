//! The decoder against transformers.

mod common;

use std::path::Path;

use candle_core::{Device, Tensor};
use common::{FIXTURE, beside, command, finish, lrc};
use lrc::checkpoint::Checkpoint;
use lrc::model::Decoder;
use serde_json::Value;

/// Token ids, and logits at some positions; `tests/oracles/logits.py` made the values with transformers.
struct Oracle {
    ids: Tensor,
    positions: Tensor,
    logits: Vec<Vec<f32>>,
}

impl Oracle {
    fn new(json: &str) -> Self {
        let oracle: Value = serde_json::from_str(json).unwrap();
        let rows: Vec<Vec<u32>> = serde_json::from_value(oracle["ids"].clone()).unwrap();
        let positions: Vec<u32> = serde_json::from_value(oracle["positions"].clone()).unwrap();
        Self {
            ids: Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu).unwrap(),
            positions: Tensor::new(positions, &Device::Cpu).unwrap(),
            logits: serde_json::from_value(oracle["logits"].clone()).unwrap(),
        }
    }

    #[track_caller]
    fn check(&self, model: &Path, tolerance: f32) {
        let checkpoint = Checkpoint::open(model).unwrap();
        let logits = Decoder::open(&checkpoint).unwrap().logits(&self.ids).unwrap();
        let found = logits.index_select(&self.positions, 1).unwrap().flatten(0, 1).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(found.len(), self.logits.len());
        for (found, expected) in found.iter().flatten().zip(self.logits.iter().flatten()) {
            assert!((found - expected).abs() < tolerance, "{}: {found} {expected}", model.display());
        }
    }
}

#[test]
fn logits_equal_those_of_transformers() {
    Oracle::new(include_str!("oracles/tiny-llama-logits.json")).check(Path::new(FIXTURE), 1e-4);
}

/// Biases, `llama3` rope scaling, a head of its own, a config as transformers 5 writes it.
#[test]
fn every_option_of_llama_equals_transformers() {
    let oracle = Oracle::new(include_str!("oracles/pico-llama-logits.json"));
    let pico = "fixtures/pico-llama";
    oracle.check(Path::new(pico), 1e-4);
    // Factored at full rank it is the same model: biases move with their linear, the head may be factored too.
    let folder = tempfile::tempdir().unwrap();
    for (layout, part, bias) in [("factors", ".lr_b.weight", "lr_b.bias"), ("pivot", ".lr_p.weight", "bias")] {
        for (name, targets) in [("all", "*_proj"), ("head", "*lm_head")] {
            let out = folder.path().join(format!("{layout}-{name}"));
            let args = ["compress", pico, "-o", common::path(&out), "-q", "--ranks", "full", "--targets", targets];
            common::ok(&[&args[..], &["--layout", layout]].concat());
            assert!(Checkpoint::open(&out).unwrap().tensors().any(|t| t.name.contains(part)));
            oracle.check(&out, 2e-4);
        }
        let biased = Checkpoint::open(&folder.path().join(format!("{layout}-all"))).unwrap();
        let biases = biased.tensors().filter(|t| t.name.contains("layers.1.mlp.up_proj") && t.name.ends_with(".bias"));
        let names: Vec<&str> = biases.map(|t| t.name.as_str()).collect();
        assert_eq!(names, [format!("model.layers.1.mlp.up_proj.{bias}")]);
    }
}

fn stories_perplexity(model: &str, bos: &str) -> Option<(f64, u64)> {
    let model = beside(&format!("models/stories260K/{model}"))?;
    let text = beside("text/tinystories-eval-small.txt")?;
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let run = lrc(&["eval", model, "--text", text, "--seq-len", "512", "--bos", bos, "--json"]);
    let report = run.json();
    Some((report["ppl"].as_f64()?, report["scored_tokens"].as_u64()?))
}

/// Perplexities of a trained Llama by others, computed by transformers in f32.
#[test]
fn perplexity_equals_that_of_transformers() {
    for (model, bos, expected) in [
        ("f32", "auto", 4.40181),
        ("f32", "never", 4.40274),
        ("f16", "never", 4.40272),
        ("f32-sharded3", "auto", 4.40181),
    ] {
        let Some((ppl, scored_tokens)) = stories_perplexity(model, bos) else { return };
        assert_eq!(scored_tokens, 99_134);
        assert!((ppl - expected).abs() < 1.5e-5, "{model} {bos}: {ppl}, expected {expected}");
    }
}

#[test]
fn perplexity_does_not_depend_on_memory_or_threads() {
    let eval = |memory: &str, threads: &str| {
        let args = ["eval", FIXTURE, "--text", common::HELD_OUT, "--memory", memory, "--json"];
        finish(command(&args).env("RAYON_NUM_THREADS", threads)).json()["nll_sum"].as_f64().unwrap()
    };
    let reference = eval("1GiB", "2");
    // One byte: every hidden state goes to disk, one window at a time.
    assert_eq!(eval("1B", "2"), reference);
    assert_eq!(eval("1GiB", "1"), reference);
}

#[test]
fn conventions_score_their_own_tokens() {
    let eval = |convention: &str| {
        common::ok(&[
            "eval",
            FIXTURE,
            "--text",
            common::HELD_OUT,
            "--convention",
            convention,
            "--seq-len",
            "128",
            "--max-windows",
            "5",
            "--json",
        ])
        .json()
    };
    let (gptq, llamacpp) = (eval("gptq"), eval("llamacpp"));
    assert_eq!(gptq["scored_tokens"], 5 * 127);
    assert_eq!(llamacpp["scored_tokens"], 5 * 63);
    assert_eq!(gptq["bos_added"], true);
    // More context for every scored token.
    assert!(llamacpp["ppl"].as_f64() < gptq["ppl"].as_f64());
}
