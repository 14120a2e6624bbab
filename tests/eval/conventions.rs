//! Conventions give the figures of their tools, and gates end with exit code 3.

use crate::common::{FIXTURE, HELD_OUT, lrc, ok};
use serde_json::Value;

use super::{JSONL, PARQUET};

/// Values of the tools themselves; `tests/oracles/conventions.py` made them.
fn oracle() -> Value {
    serde_json::from_str(include_str!("../oracles/conventions.json")).unwrap()
}

#[test]
fn conventions_give_the_numbers_of_their_tools() {
    let oracle = oracle();
    let check = |text: &str, convention: &str, of: &str, more: &[&str]| {
        let args = [&["eval", FIXTURE, "--text", text, "--convention", convention, "--json"], more].concat();
        let report = ok(&args).json();
        let expected = &oracle[of];
        for (field, theirs) in [
            ("ppl", "ppl"),
            ("bits_per_byte", "bits_per_byte"),
            ("scored_tokens", "tokens"),
            ("scored_words", "words"),
            ("scored_bytes", "bytes"),
        ] {
            let Some(expected) = expected[theirs].as_f64() else { continue };
            let found = report[field].as_f64().unwrap();
            // llama.cpp prints four digits after the decimal point, and has kernels of its own.
            let tolerance = if of == "llamacpp" { 2e-4 } else { 1e-6 };
            assert!((found / expected - 1.0).abs() < tolerance, "{of}, {text}: {field} is {found}, theirs {expected}");
        }
        assert!(expected["ppl"].is_number(), "{of} has a value");
    };
    for text in [JSONL, PARQUET] {
        check(text, "gptq", "gptq", &["--seq-len", "128"]);
        check(text, "hf-strided", "hf-strided", &["--seq-len", "128", "--stride", "50"]);
        check(text, "lm-eval", "lm-eval", &["--seq-len", "128"]);
        check(text, "lm-eval", "lm-eval without BOS", &["--bos", "never"]);
    }
    let seq_len = oracle["llamacpp"]["seq_len"].to_string();
    check(HELD_OUT, "llamacpp", "llamacpp", &["--seq-len", &seq_len]);
}

#[test]
fn all_conventions_stand_side_by_side_and_can_be_gated() {
    let all = ok(&["eval", FIXTURE, "--text", JSONL, "--convention", "all", "--json"]).json();
    let names: Vec<&String> = all.as_object().unwrap().keys().collect();
    assert_eq!(names, ["gptq", "hf-strided", "llamacpp", "lm-eval"]);
    for name in names {
        let one = ok(&["eval", FIXTURE, "--text", JSONL, "--convention", name, "--json"]).json();
        assert_eq!((&all[name]["ppl"], &all[name]["convention"]), (&one["ppl"], &Value::from(name.as_str())));
    }
    let gated = lrc(&["eval", FIXTURE, "--text", JSONL, "--convention", "all", "--fail-if", "lm-eval.ppl > 2"]);
    assert_eq!(gated.code, 3);
    assert!(gated.stderr.contains("`--fail-if lm-eval.ppl > 2`: `lm-eval.ppl` is 2.52"), "{}", gated.stderr);
    assert!(gated.stdout.contains("hf-strided"), "the report is printed all the same");
}

#[test]
fn gates_end_with_code_3_and_unknown_fields_before_any_work() {
    let eval = |model: &str, gates: &[&str]| {
        let gates = gates.iter().flat_map(|gate| ["--fail-if", gate]);
        let args: Vec<&str> =
            ["eval", model, "--text", HELD_OUT, "--max-windows", "2", "-q"].into_iter().chain(gates).collect();
        lrc(&args)
    };
    assert_eq!(eval(FIXTURE, &["ppl > 100", "size_bytes > 4GiB"]).code, 0);
    let failed = eval(FIXTURE, &["ppl > 1", "size_bytes > 1MiB", "ppl > 100"]);
    assert_eq!(failed.code, 3);
    for gate in ["ppl > 1", "size_bytes > 1MiB"] {
        assert!(failed.stderr.contains(&format!("`--fail-if {gate}`: ")), "{}", failed.stderr);
    }
    assert!(!failed.stderr.contains("ppl > 100"));
    // The error comes before the model is opened.
    for (gate, expected) in [
        ("perplexity > 1", "the report has no field `perplexity`"),
        ("kl.mean > 1", "`--reference MODEL` measures it"),
        ("text > 1", "`text` is not a number"),
    ] {
        let run = eval("no/such/model", &[gate]);
        assert_eq!(run.code, 2, "{}", run.stderr);
        assert!(run.stderr.contains(expected), "{}", run.stderr);
    }
    assert_eq!(eval(FIXTURE, &["ppl"]).code, 2);
    let stride = lrc(&["eval", FIXTURE, "--text", HELD_OUT, "--stride", "8"]);
    assert!(stride.code == 2 && stride.stderr.contains("`--stride` has no effect with `--convention gptq`"));
}
