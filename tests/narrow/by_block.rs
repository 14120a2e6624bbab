//! Widths of their own for each block.

use std::path::Path;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, ok, path, perplexity};
use crate::families::{expected, logits, tokenizer};
use lrc::checkpoint::Checkpoint;
use lrc::model::open;
use serde_json::{Value, json};

use super::families::check;
use super::{Model, config, report, widths};

const FLAGS: [&str; 8] = ["--structure", "narrow", "--width-multiple", "16", "--calibration", TRAIN, "--samples", "16"];

fn narrow(out: &Path, flags: &[&str]) -> Value {
    ok(&[&["compress", FIXTURE, "-o", path(out), "-q", "--seq-len", "128"], &FLAGS[..], flags].concat());
    report(out)
}

#[test]
fn every_block_has_the_widths_that_it_deserves_under_the_same_budget() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for keep in ["0.9", "0.7"] {
        let uniform = narrow(&at(&format!("uniform-{keep}")), &["--keep", keep]);
        let own = narrow(&at(&format!("own-{keep}")), &["--keep", keep, "--uniform-width=false"]);
        let share = |report: &Value| report["sizes"]["keep"].as_f64().unwrap();
        let error = |report: &Value| -> f64 {
            let units = report["narrow"]["blocks"].as_array().unwrap().iter();
            units.map(|unit| unit["squared_error"].as_f64().unwrap()).sum()
        };
        assert!(share(&own) <= keep.parse().unwrap() && share(&own) >= share(&uniform) - 1e-9, "{keep}");
        assert!(error(&own) < error(&uniform), "{keep}: {} {}", error(&own), error(&uniform));
        let channels = widths(&own, "channels");
        assert!(channels.iter().any(|pair| *pair != channels[0]), "{channels:?}");
        assert!(channels.iter().all(|[before, after]| after.is_multiple_of(16) && after <= before));
    }
    let whole = Checkpoint::open(FIXTURE.as_ref()).unwrap().file_bytes();
    let target = whole * 3 / 4;
    let sized = narrow(&at("sized"), &["--target-size", &format!("{target}B"), "--uniform-width=false"]);
    let found = std::fs::metadata(at("sized").join("model.safetensors")).unwrap().len();
    assert_eq!(sized["size_bytes"], found);
    assert!(found <= target && found > target * 97 / 100, "{found} of {target}");
}

#[test]
fn outputs_by_block_are_sources_of_every_command_and_become_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let out = at("out");
    let made = narrow(&out, &["--keep", "0.7", "--format", "factored"]);
    let written = config(&out);
    assert_eq!(written["model_type"], "lrc_llama");
    assert_eq!(written["auto_map"]["AutoModelForCausalLM"], "modeling_lrc.LrcForCausalLM");
    assert!(out.join("modeling_lrc.py").is_file());
    let channels = widths(&made, "channels");
    let of_block = |block: usize, key: &str, common: u64| {
        written["per_layer_config"][block.to_string()].get(key).and_then(Value::as_u64).unwrap_or(common)
    };
    for (block, [before, after]) in channels.iter().enumerate() {
        assert_eq!(of_block(block, "intermediate_size", *before), *after);
        let module = format!("model.layers.{block}.mlp.down_proj");
        let shape = if before == after { Value::Null } else { json!([96, after]) };
        assert_eq!(written["lrc"]["shapes"].get(&module).unwrap_or(&Value::Null), &shape);
    }
    let dense = perplexity(path(&out), HELD_OUT, "128");
    // Of the same recipe, and of the output.
    let flags = ["--keep", "0.7", "--uniform-width=false", "--format", "gguf"];
    narrow(&at("gguf"), &flags);
    ok(&["export", path(&out), "--format", "gguf", "-o", path(&at("exported"))]);
    let [one, other] = ["gguf", "exported"].map(|name| std::fs::read(at(name).join("model.gguf")).unwrap());
    assert!(one == other);
    let gguf = perplexity(path(&at("gguf")), HELD_OUT, "128");
    assert!((gguf / dense - 1.0).abs() < 0.01, "{gguf} {dense}");
    let read = open(&at("gguf").join("model.gguf")).unwrap();
    assert_eq!(read.config().unwrap()["model_type"], "llama");

    ok(&["calibrate", path(&out), "--text", TRAIN, "--samples", "2", "-o", path(&at("stats.safetensors"))]);
    ok(&["compress", path(&out), "-o", path(&at("low-rank")), "-q", "--keep", "0.8"]);
    ok(&["eval", path(&at("low-rank")), "--text", HELD_OUT, "--seq-len", "128", "--max-windows", "2"]);
    // Narrower again: the widths of the blocks that the source has are the most.
    let again = ["--structure", "narrow", "--uniform-width=false", "--keep", "0.8", "--width-multiple", "16"];
    ok(&[&["compress", path(&out), "-o", path(&at("twice")), "-q"], &again[..]].concat());
    let twice = widths(&report(&at("twice")), "channels");
    assert!(twice.iter().zip(&channels).all(|([before, after], [_, own])| before == own && after <= before));
    let quantized = ["--quant", "rtn-int4-g32", "--format", "factored"];
    narrow(&at("codes"), &[&["--keep", "0.7"], &quantized[..]].concat());
    assert!(perplexity(path(&at("codes")), HELD_OUT, "128") < 1.5 * dense);
}

#[test]
fn in_every_family_dropped_channels_and_heads_are_at_zero() {
    for family in ["llama", "qwen2", "gemma3_text", "phi3", "gpt2", "bert", "smolvlm"] {
        let model = Model::pico(family, &tokenizer(family));
        let out = model.folder.path().join("out");
        ok(&model.arguments(&out, &["--keep", "0.7", "--width-multiple", "1", "--uniform-width=false"]));
        check(family, &model, &out);
        let (_, ids) = expected(family);
        assert!(logits(&out, &ids).is_ok(), "{family}");
        let notes = report(&out)["narrow"]["notes"].to_string();
        assert_eq!(notes.contains("queries, keys and values are one matrix"), family == "phi3", "{family}: {notes}");
    }
}
