//! Configs that are broken or absent, or that contradict the tensors.

use std::collections::BTreeSet;
use std::path::Path;

use crate::common::{HELD_OUT, TRAIN, copy, ok, path};
use lrc::checkpoint::Checkpoint;

use super::Broken;

#[test]
fn a_tensor_that_the_model_needs_is_absent() {
    let broken = Broken::new();
    broken.edit_header("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.no_proj.weight");
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let parts = ["tensor `model.layers.1.mlp.up_proj.weight`", "hint:"];
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &parts);
    broken.check_one(&["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--calibration", TRAIN], 4, &parts);
}

#[test]
fn a_shape_that_contradicts_the_config() {
    let broken = Broken::new();
    broken.edit_config("\"intermediate_size\": 256", "\"intermediate_size\": 255");
    let model = broken.model();
    let parts = [
        "model.layers.0.mlp.gate_proj.weight",
        "[256, 96]",
        "[255, 96]",
        "hint: check `hidden_size` and `intermediate_size`",
    ];
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &parts);
}

/// Commands that do not run the model need no config: a broken one causes a warning and is copied.
#[test]
fn a_broken_config() {
    for broken_by in ["", "[]", "{\"model_type\": \"llama\",}", "\u{feff}", "{\"model_type\": Inf}"] {
        let broken = Broken::new();
        let (model, config) = (broken.model(), broken.model().join("config.json"));
        std::fs::write(&config, broken_by).unwrap();
        let out = broken.folder.path().join("out");
        let parts = ["config.json", "cannot be parsed", "; a model is run from its config"];
        let statistics = broken.folder.path().join("statistics.safetensors");
        let compress = ["compress", path(&model), "-o", path(&out), "--keep", "0.8"];
        broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &parts);
        broken.check_one(&["calibrate", path(&model), "--text", TRAIN, "-o", path(&statistics)], 4, &parts);
        broken.check_one(&[&compress[..], &["--calibration", TRAIN]].concat(), 4, &parts);
        for args in [&["inspect", path(&model)][..], &[&compress[..], &["--format", "dense"]].concat()] {
            let stderr = ok(args).stderr;
            assert!(stderr.contains("cannot be parsed") && stderr.contains("names and shapes"), "{stderr}");
        }
        assert_eq!(std::fs::read_to_string(out.join("config.json")).unwrap(), broken_by);
    }
}

/// Outputs without a config of the source can be read again: codes, factors, and truncated factors.
#[test]
fn an_absent_config_is_no_hindrance_without_a_text() {
    let broken = Broken::new();
    std::fs::remove_file(broken.model().join("config.json")).unwrap();
    let (model, out, next) = (broken.model(), broken.folder.path().join("out"), broken.folder.path().join("next"));
    ok(&["inspect", path(&model)]);
    for flags in [&["--keep", "0.8"][..], &["--quant", "rtn-int4-g32"]] {
        ok(&[&["compress", path(&model), "-o", path(&out), "-q", "--force"], flags].concat());
        ok(&["inspect", path(&out)]);
        ok(&["export", path(&out), "--format", "dense", "-o", path(&next), "-q", "--force"]);
        let (source, dense) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&next).unwrap());
        let names = |checkpoint: &Checkpoint| checkpoint.tensors().map(|t| t.name.clone()).collect::<BTreeSet<_>>();
        assert_eq!(names(&source), names(&dense));
    }
    ok(&["compress", path(&model), "-o", path(&out), "-q", "--force", "--keep", "0.8"]);
    ok(&["truncate", path(&out), "-o", path(&next), "-q", "--force", "--keep", "0.5"]);
}

/// A config without blocks is wrong for a model that has some, whether the model is run or not; `lrc inspect` warns.
#[test]
fn a_config_without_blocks() {
    let broken = Broken::new();
    broken.edit_config("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 0");
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    broken.check_one(
        &["eval", path(&model), "--text", HELD_OUT],
        4,
        &["config.json", "`num_hidden_layers` is 0", "hint: "],
    );
    let parts = ["model` has 4 blocks, and `num_hidden_layers` of its config is 0", "hint: check"];
    broken.check_one(&["compress", path(&model), "-o", path(&out), "--keep", "0.8"], 4, &parts);
    assert!(ok(&["inspect", path(&model)]).stderr.contains(parts[0]));
}

/// Configs as Python writes them: numbers that JSON cannot express, and a byte-order mark.
#[test]
fn configs_of_python_are_read_and_written() {
    let broken = Broken::new();
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let figure = |model: &Path| ok(&["eval", path(model), "--text", HELD_OUT, "--json"]).json()["nll_sum"].as_f64();
    let before = figure(&model);
    for (name, added) in [
        ("config.json", "\u{feff}{\"limit\": [0.0, Infinity, -Infinity, NaN], \"a \\\" NaN\": \"NaN, Infinity\","),
        ("tokenizer_config.json", "\u{feff}{\"length\": Infinity,"),
    ] {
        let text = std::fs::read_to_string(model.join(name)).unwrap();
        std::fs::write(model.join(name), text.replacen('{', added, 1)).unwrap();
    }
    assert_eq!(figure(&model), before);
    for flags in [
        &["--keep", "0.8"][..],
        &["--keep", "0.8", "--calibration", TRAIN, "--samples", "2"],
        &["--keep", "0.8", "--format", "dense"],
    ] {
        ok(&[&["compress", path(&model), "-o", path(&out), "-q", "--force"], flags].concat());
        let written = std::fs::read_to_string(out.join("config.json")).unwrap();
        let words: String = written.split_whitespace().collect();
        assert!(words.contains(r#""limit":[0.0,Infinity,-Infinity,NaN],"a\"NaN":"NaN,Infinity""#), "{written}");
        figure(&out);
    }
    // A field that the model needs is named.
    let text = std::fs::read_to_string(model.join("config.json")).unwrap();
    std::fs::write(model.join("config.json"), text.replace("\"rope_theta\": 10000.0", "\"rope_theta\": Infinity"))
        .unwrap();
    std::fs::remove_dir_all(&out).unwrap();
    let expected =
        ["config.json`: `rope_theta`: invalid type: number `Infinity`, expected a finite number", "hint: compare"];
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &expected);
    for (value, expected) in [
        ("0.0", "config.json`: `rope_theta` is 0, expected a positive number"),
        ("-5, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}", "`rope_theta` is -5, expected"),
        ("1e4, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 0}", "`rope_scaling.factor` is 0, expected"),
        (
            "1e4, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": NaN}",
            "`rope_scaling.factor`: invalid type: number `NaN`",
        ),
        ("1e4, \"rope_scaling\": {\"type\": \"linear\"}", "config.json`: `rope_scaling` lacks `factor`"),
        (
            "1e4, \"rope_scaling\": {\"type\": \"longrope\", \"factor\": 2, \"short_factor\": [1]}",
            "config.json`: `short_factor` of `rope_scaling` does not have",
        ),
    ] {
        let changed = text.replace("\"rope_theta\": 10000.0", &format!("\"rope_theta\": {value}"));
        std::fs::write(model.join("config.json"), changed).unwrap();
        broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &["config.json", expected, "hint: compare"]);
    }
    // The index of shards.
    let sharded = Broken::sharded();
    let index = sharded.model().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    std::fs::write(&index, format!("\u{feff}{}", text.replacen("\"metadata\": {", "\"metadata\": {\"x\": NaN,", 1)))
        .unwrap();
    ok(&["inspect", path(&sharded.model())]);
}

#[test]
fn an_unknown_model_type_is_compressed_by_name_and_shape_but_not_run() {
    let broken = Broken::new();
    broken.edit_config("\"llama\"", "\"unheard_of\"");
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let parts = ["`unheard_of`", "hint: known families: llama"];
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &parts);
    broken.check_one(&["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--calibration", TRAIN], 4, &parts);
    ok(&["inspect", path(&model)]);
    let report = ok(&["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--json"]).json();
    assert_eq!(report["linears"].as_array().unwrap().len(), 28);
}

/// The file and a way out, whatever contradicts in a config.
#[test]
fn fields_that_contradict_each_other_are_named_with_a_hint() {
    for (from, to, parts) in [
        (
            "\"rope_theta\": 10000.0",
            "\"rope_theta\": 1e4, \"rope_scaling\": {\"type\": \"foo\"}",
            ["`rope_scaling` of type `foo` is not supported", "hint: supported: default"],
        ),
        ("\"llama\"", "3", ["`model_type` in `", "is absent, or not a string"]),
        (
            "\"max_position_embeddings\": 128",
            "\"max_position_embeddings\": 1",
            ["`max_position_embeddings` leaves room for 1 tokens", "hint: compare"],
        ),
        (
            "\"num_key_value_heads\": 3",
            "\"num_key_value_heads\": 4",
            ["is not a multiple of `num_key_value_heads` 4", "hint: compare"],
        ),
        ("\"head_dim\": 16", "\"head_dim\": 23", ["of `head_dim` 23 cannot be rotated", "hint: compare"]),
        (
            "\"hidden_size\"",
            "\"per_layer_config\": {\"9\": {\"intermediate_size\": 128}}, \"hidden_size\"",
            ["`per_layer_config.9`: the model has 4 blocks", "hint: compare"],
        ),
    ] {
        let broken = Broken::new();
        broken.edit_config(from, to);
        let model = broken.model();
        let parts = [&["config.json`", "hint: "], &parts[..]].concat();
        broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &parts);
    }
}

#[test]
fn a_config_with_more_blocks_than_the_file_is_named() {
    let broken = Broken::new();
    broken.edit_config("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 6");
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let out = ["-o", path(&out)];
    let parts = ["is incomplete", "4 of the 6 blocks", "no block 4", "hint: check that all shards are there"];
    for command in [
        &["compress", path(&model), "--keep", "0.8"][..],
        &["compress", path(&model), "--keep", "0.8", "--calibration", TRAIN],
        &["export", path(&model), "--format", "dense"],
        &["sweep", path(&model), "--keep", "0.8", "--text", HELD_OUT],
    ] {
        broken.check_one(&[command, &out].concat(), 4, &parts);
    }
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &["model.layers.4.", "hint:"]);
    let run = ok(&["inspect", path(&model)]);
    assert!(run.stderr.contains("4 of the 6 blocks"), "{}", run.stderr);
}

#[test]
fn tensors_that_a_config_asks_for_are_named_where_they_are_absent() {
    let check = |absent: &[(&str, &str)], parts: &[&str]| {
        let broken = Broken::new();
        absent.iter().for_each(|(from, to)| broken.edit_header(from, to));
        let (model, out) = (broken.model(), broken.folder.path().join("out"));
        let out = ["-o", path(&out)];
        let parts = [parts, &["is incomplete", "in no weight file", "hint: check that all shards are there"]].concat();
        for command in [
            &["compress", path(&model), "--keep", "0.8"][..],
            &["compress", path(&model), "--keep", "0.8", "--dry-run"],
            &["compress", path(&model), "--quant", "rtn-int4-g32", "--format", "dense"],
            &["export", path(&model), "--format", "dense"],
            &["sweep", path(&model), "--keep", "0.8", "--text", HELD_OUT],
        ] {
            broken.check_one(&[command, &out].concat(), 4, &parts);
        }
        let stderr = ok(&["inspect", path(&model)]).stderr;
        assert!(stderr.contains("is incomplete") && stderr.contains(parts[0]), "{stderr}");
    };
    check(
        &[("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.dawn_proj.weight")],
        &["tensor `model.layers.1.mlp.down_proj.weight` is in no"],
    );
    check(&[("model.embed_tokens.weight", "model.embed_tokems.weight")], &["tensor `model.embed_tokens.weight`"]);
    check(&[("\"model.norm.weight", "\"model.nurm.weight")], &["tensor `model.norm.weight`"]);
    check(
        &[
            ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernurm.weight"),
            ("model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.k_praj.weight"),
            ("model.layers.2.self_attn.v_proj.weight", "model.layers.2.self_attn.v_praj.weight"),
            ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_praj.weight"),
        ],
        &[
            "tensors `model.layers.0.input_layernorm.weight`, `model.layers.2.self_attn.q_proj.weight`",
            "and 1 more are in",
        ],
    );
    // Unknown families have no table to check against.
    let broken = Broken::new();
    broken.edit_header("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.dawn_proj.weight");
    broken.edit_config("\"llama\"", "\"no_such_family\"");
    let out = broken.folder.path().join("out");
    let run = ok(&["compress", path(&broken.model()), "--keep", "0.8", "-o", path(&out)]);
    assert!(!run.stderr.contains("is incomplete"), "{}", run.stderr);
}

/// A model that was saved without its head is complete.
#[test]
fn a_head_may_be_absent_without_a_text() {
    let broken = Broken { folder: tempfile::tempdir().unwrap() };
    copy("fixtures/pico/llama", &broken.model());
    broken.edit_header("\"lm_head.weight", "\"lm_heed.weight");
    let out = broken.folder.path().join("out");
    let run = ok(&["compress", path(&broken.model()), "--keep", "0.8", "-o", path(&out)]);
    assert!(!run.stderr.contains("is incomplete"), "{}", run.stderr);
}

#[test]
#[cfg(unix)]
fn a_config_that_is_no_file_is_refused_before_any_work() {
    for kind in ["folder", "pipe"] {
        let broken = Broken::new();
        let (model, out) = (broken.model(), broken.folder.path().join("out"));
        let config = model.join("config.json");
        std::fs::remove_file(&config).unwrap();
        match kind {
            "folder" => std::fs::create_dir(&config).unwrap(),
            _ => assert!(std::process::Command::new("mkfifo").arg(&config).status().unwrap().success()),
        }
        for args in [
            &["inspect", path(&model)][..],
            &["compress", path(&model), "-o", path(&out), "--keep", "0.8"],
            &["export", path(&model), "-o", path(&out), "--format", "dense"],
        ] {
            broken.check_one(args, 4, &["config.json` is a", kind, "not a file", "hint:"]);
        }
    }
}
