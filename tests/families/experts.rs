//! Mixtures of experts: the tokens of each expert, and the factors that PEFT would lose.

use crate::common::{self, ok, path};
use serde_json::Value;

use super::{fixture, json};

#[test]
fn adapters_of_experts_are_refused_where_peft_would_lose_them() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (family, flags, reason) in [
        ("qwen3_moe", &["--compensate-rank", "2"][..], "PEFT does not find `model.layers.0.mlp.down_proj`"),
        ("mixtral", &["--compensate-rank", "auto", "--bits", "9"], "but PEFT needs one rank for all experts"),
    ] {
        let model = fixture(family);
        let base = ["compress", path(&model), "-o", path(&out), "--format", "peft", "--quant", "rtn-int4-channel"];
        let run = common::lrc(&[&base[..], &["--compensate", "lorc"], flags].concat());
        assert!(run.code == 4 && run.stderr.contains(reason), "{}", run.stderr);
    }
}

/// The report of a mixture lists the tokens of every expert, and notes those with too few.
#[test]
fn experts_are_measured_by_the_tokens_that_they_see() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(40)).unwrap();
    let report = |out: &str, windows: &str, length: &str, method: &str| {
        let (model, out) = (fixture("mixtral"), folder.path().join(out));
        let model = {
            let copy = folder.path().join("model");
            common::copy(path(&model), &copy);
            std::fs::copy(fixture("tokenizer.json"), copy.join("tokenizer.json")).unwrap();
            copy
        };
        let calibration = ["--calibration", path(&text), "--samples", windows, "--seq-len", length, "--method", method];
        ok(&[&["compress", path(&model), "-o", path(&out), "-q", "--keep", "0.6"], &calibration[..]].concat());
        json(&out.join("lrc-report.json"))
    };
    let linears = |report: &Value| report["linears"].as_array().unwrap().clone();
    let is_expert = |l: &&Value| l["module"].as_str().unwrap().contains("experts");
    let noted = |l: &&Value| l["note"].as_str().is_some_and(|note| note.starts_with("data-free metric"));
    for method in ["kfac", "svd-llm", "fwsvd", "asvd"] {
        // 12 windows of 30 tokens, of which every token sees two of four experts.
        let much = linears(&report(&format!("much-{method}"), "12", "30", method));
        for block in 0..2 {
            let w1 = |l: &&Value| l["block"] == block && l["module"].as_str().unwrap().ends_with("w1");
            let seen: u64 = much.iter().filter(w1).map(|l| l["expert_tokens"].as_u64().unwrap()).sum();
            assert_eq!(seen, 2 * 12 * 30);
        }
        let few = |l: &&Value| is_expert(l) && l["expert_tokens"].as_u64().unwrap() < l["shape"][1].as_u64().unwrap();
        // 16 tokens: no expert sees as many as `w2` has inputs.
        let little = linears(&report(&format!("little-{method}"), "1", "16", method));
        for found in [&much, &little] {
            let [few, noted]: [Vec<&Value>; 2] =
                [found.iter().filter(few).collect(), found.iter().filter(noted).collect()];
            assert_eq!(few, noted, "{method}");
        }
        assert!(little.iter().filter(noted).count() >= 8);
        // The data-free metric counts the errors of experts without tokens; the knapsack does not cut them to the smallest rank.
        let has_error = |l: &Value| l["rank"].is_null() || l["relative_error"].as_f64().unwrap() > 0.0;
        assert!(little.iter().filter(noted).all(has_error), "{method}");
        if method == "kfac" {
            let mut unused = little.iter().filter(|l| l["expert_tokens"] == 0);
            assert!(unused.any(|l| l["rank"].as_u64().is_none_or(|rank| rank > 1)), "{method}");
        }
    }
}
