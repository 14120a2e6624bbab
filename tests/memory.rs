//! Memory of runs at a real size.

use std::path::Path;

use crate::common::{self, FIXTURE, TRAIN, ok, path};

const SOURCE: &str = "target/llama-8b";

/// A block of an 8B Llama's shapes, 437 MB in bf16, with inner matrices of 14336² that take 822 MB in f32.
#[test]
#[ignore = "needs half an hour, and target/llama-8b: cargo run --release --example random_checkpoint -- target/llama-8b --shapes llama-8b --blocks 1"]
fn a_block_of_an_8b_model_is_compressed_and_evaluated_in_4_gb() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(SOURCE);
    assert!(source.exists(), "this test needs `{SOURCE}`");
    let folder = tempfile::tempdir().unwrap();
    let [model, out] = ["model", "out"].map(|name| folder.path().join(name));
    common::copy(FIXTURE, &model);
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    for entry in std::fs::read_dir(&source).unwrap() {
        let entry = entry.unwrap();
        let to = model.join(entry.file_name());
        if to.exists() {
            std::fs::remove_file(&to).unwrap();
        }
        std::os::unix::fs::symlink(entry.path(), to).unwrap();
    }
    let text = ["--calibration", TRAIN, "--samples", "4", "--seq-len", "512", "--sequential=false"];
    for (method, flags) in [("svd", &[][..]), ("svd-llm", &text), ("kfac", &text)] {
        let run = ["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--method", method];
        let report = ok(&[&run[..], &["--memory", "1GiB", "--force", "-q", "--json"], flags].concat()).json();
        expect_below_4_gb(method, &report);
    }
    let flags = ["--seq-len", "1024", "--max-windows", "4", "--memory", "1GiB", "-q", "--json"];
    expect_below_4_gb("eval", &ok(&[&["eval", path(&model), "--text", TRAIN], &flags[..]].concat()).json());
}

fn expect_below_4_gb(run: &str, report: &serde_json::Value) {
    let peak = report["peak_memory_bytes"].as_u64().unwrap();
    assert!(peak < 4_000_000_000, "{run}: {peak} bytes");
}
