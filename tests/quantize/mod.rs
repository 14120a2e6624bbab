//! Quantized bases, compensation, exact sizes, and every format that stores them.

mod budgets;
mod formats;
mod sources;

use std::path::Path;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, lrc, ok, path, perplexity};
use serde_json::Value;

const LORC: &[&str] = &["--compensate", "lorc", "--compensate-rank", "8"];

fn compress(out: &Path, extra: &[&str]) -> Value {
    ok(&[&["compress", FIXTURE, "-o", path(out), "-q", "--json"], extra].concat()).json()
}

fn ppl(model: &Path) -> f64 {
    perplexity(path(model), HELD_OUT, "128")
}

/// Codes that are rounded block by block, on the inputs of the rounded blocks before and towards the outputs of the source,
/// are as many bytes as those of one shot, and nearer to the source; their errors in the report are not those of one shot.
#[test]
fn codes_of_the_sequential_mode_are_nearer_to_the_source() {
    let folder = tempfile::tempdir().unwrap();
    for quant in ["rtn-int3-g32", "gptq-int3-g32", "cd-int3-g32"] {
        let made = |name: &str, flags: &[&str]| {
            let out = folder.path().join(format!("{quant}-{name}"));
            let text =
                ["--quant", quant, "--method", "kfac", "--calibration", TRAIN, "--samples", "32", "--seq-len", "128"];
            let report = compress(&out, &[&text[..], flags].concat());
            (ppl(&out), report["sizes"]["bytes_after"].as_u64(), report["linear"]["mean_error"].as_f64().unwrap())
        };
        let (one_shot, sequential) = (made("one-shot", &[]), made("sequential", &["--sequential"]));
        assert!(one_shot.1 == sequential.1 && sequential.0 < one_shot.0, "{quant}: {sequential:?} {one_shot:?}");
        // In the metric of the source's inputs what aims at other inputs has another error.
        assert!(sequential.2 != one_shot.2 && sequential.2 < 2.0 * one_shot.2, "{quant}: {sequential:?} {one_shot:?}");
    }
    let with_factors = ["--quant", "gptq-int3-g32", "--compensate", "eora", "--compensate-rank", "4", "--sequential"];
    let refused = lrc(&[&["compress", FIXTURE, "-o", path(&folder.path().join("no"))], &with_factors[..]].concat());
    assert!(refused.code == 2 && refused.stderr.contains("only codes alone"), "{}", refused.stderr);
}

const MODULE: &str = "model.layers.1.mlp.down_proj";
