//! Matrices of zeros, dead channels, blocks that do nothing, experts without tokens.

use std::path::{Path, PathBuf};

use crate::common::{FIXTURE, HELD_OUT, TRAIN, copy, edit, ok, path, perplexity};
use lrc::checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec, cast};
use serde_json::Value;

use super::{CALIBRATED, check_numbers, compress, module};

const ROLES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// A copy of the fixture with these tensors set to zero.
fn with_zeros(folder: &Path, name: &str, tensors: &[String]) -> PathBuf {
    let model = folder.join(name);
    copy(FIXTURE, &model);
    tensors.iter().for_each(|tensor| edit(&model, tensor, |_, _| 0.0));
    model
}

/// Linears of zeros of every role: those of [`ruined`].
const ZEROS: [(usize, &str); 7] = [
    (0, "self_attn.q_proj"),
    (1, "self_attn.k_proj"),
    (2, "self_attn.v_proj"),
    (3, "self_attn.o_proj"),
    (1, "mlp.gate_proj"),
    (2, "mlp.up_proj"),
    (3, "mlp.down_proj"),
];

/// All cases in one model: a linear of zeros of every role, dead channels of norms, a norm that is dead altogether,
/// embeddings of zeros.
fn ruined(folder: &Path) -> PathBuf {
    let zeros: Vec<String> = ZEROS.iter().map(|&(block, role)| module(block, role) + ".weight").collect();
    let model = with_zeros(folder, "ruined", &zeros);
    edit(&model, "model.layers.0.input_layernorm.weight", |i, v| if i % 3 == 0 { 0.0 } else { v });
    edit(&model, "model.layers.1.post_attention_layernorm.weight", |i, v| if i > 5 { 0.0 } else { v });
    edit(&model, "model.layers.2.input_layernorm.weight", |_, _| 0.0);
    edit(&model, "model.embed_tokens.weight", |i, v| if i / 96 % 5 == 0 { 0.0 } else { v });
    model
}

/// The fixture with a copy of block 1 after it whose sublayers add nothing, as LLaMA Pro expands models (Wu et al.
/// 2024).
fn expanded(folder: &Path) -> PathBuf {
    let model = folder.join("expanded");
    copy(FIXTURE, &model);
    let parent = Checkpoint::open(Path::new(FIXTURE)).unwrap();
    let renamed = |name: &str| -> Vec<(String, bool)> {
        let Some(rest) = name.strip_prefix("model.layers.") else { return vec![(name.into(), false)] };
        let (block, rest) = rest.split_once('.').unwrap();
        match block.parse::<usize>().unwrap() {
            0 => vec![(name.into(), false)],
            1 => vec![(name.into(), false), (format!("model.layers.2.{rest}"), true)],
            block => vec![(format!("model.layers.{}.{rest}", block + 1), false)],
        }
    };
    let mut tensors = Vec::new();
    for info in parent.tensors() {
        for (name, is_new) in renamed(&info.name) {
            let is_zero = is_new && ["o_proj", "down_proj"].iter().any(|part| name.contains(part));
            let mut values = parent.values(&info.name).unwrap();
            if is_zero {
                values.fill(0.0);
            }
            tensors.push((TensorSpec { name, dtype: Dtype::F32, shape: info.shape.clone() }, values));
        }
    }
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(&model, &specs, u64::MAX).unwrap();
    for (spec, values) in &tensors {
        writer.write(&spec.name, &cast::encode(Dtype::F32, values).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let config = config.replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 5");
    std::fs::write(model.join("config.json"), config).unwrap();
    model
}

fn statistics(folder: &Path, model: &Path) -> String {
    let file = folder.join("statistics.safetensors");
    ok(&["calibrate", path(model), "--text", TRAIN, "--samples", "16", "--seq-len", "64", "-o", path(&file), "-q"]);
    path(&file).to_string()
}

fn linear<'a>(report: &'a Value, module: &str) -> &'a Value {
    report["linears"].as_array().unwrap().iter().find(|linear| linear["module"] == module).unwrap()
}

/// Matrices of zeros took nothing from the budget, and no byte.
#[track_caller]
fn check_zeros(report: &Value) {
    for (block, role) in ZEROS {
        let linear = linear(report, &module(block, role));
        let zero = [&linear["rank"], &linear["parameters_after"], &linear["bits_base"], &linear["bits_factors"]];
        assert!(zero.iter().all(|value| value.as_f64() == Some(0.0)), "{linear}");
        assert_eq!(linear["note"], "all weights are zero");
        assert_eq!(linear["relative_error"], 0.0);
    }
}

#[test]
fn a_linear_of_zeros_of_any_role_is_compressed_by_default() {
    let folder = tempfile::tempdir().unwrap();
    for role in ROLES {
        let name = module(1, role);
        let model = with_zeros(folder.path(), role, &[format!("{name}.weight")]);
        let out = folder.path().join("out");
        let text = ["--calibration", TRAIN, "--samples", "4", "--seq-len", "64"];
        let report = compress(&model, &out, &[&["--keep", "0.8"], &text[..]].concat());
        check_numbers(&report);
        assert_eq!(
            (&linear(&report, &name)["rank"], &linear(&report, &name)["parameters_after"]),
            (&0.into(), &0.into())
        );
        assert!(report["keep"].as_f64().unwrap() > 0.75, "{role}: its share goes to the others: {}", report["keep"]);
        assert!(perplexity(path(&out), HELD_OUT, "64").is_finite());
    }
}

#[test]
fn every_method_and_allocator_takes_zeros_and_dead_channels() {
    let folder = tempfile::tempdir().unwrap();
    let model = ruined(folder.path());
    let statistics = statistics(folder.path(), &model);
    let out = folder.path().join("out");
    let common = ["--statistics", &statistics];
    for method in ["svd", "fwsvd", "asvd", "svd-llm", "kfac"] {
        let with = if method == "svd" { &[][..] } else { &common };
        for layout in ["factors", "pivot"] {
            let report =
                compress(&model, &out, &[&["--method", method, "--layout", layout, "--keep", "0.7"], with].concat());
            check_numbers(&report);
            check_zeros(&report);
        }
    }
    for ranks in ["uniform", "welore", "energy", "energy:0.9", "effective-rank", "knapsack", "fixed:8", "full"] {
        let budget: &[&str] = if ["fixed:8", "full", "energy:0.9"].contains(&ranks) { &[] } else { &["--keep", "0.7"] };
        for method in ["svd", "kfac"] {
            let with = if method == "svd" { &[][..] } else { &common };
            let args = [&["--ranks", ranks, "--method", method], budget, with].concat();
            let dry = compress(&model, &out, &[&args[..], &["--dry-run=full"]].concat());
            let report = compress(&model, &out, &args);
            check_numbers(&report);
            check_zeros(&report);
            assert_eq!(dry["sizes"], report["sizes"], "{ranks} {method}");
        }
    }
    for extra in [
        &["--target-size", "1500kB"][..],
        &["--bits", "20"],
        &["--keep", "0.7", "--rank-multiple", "8", "--rank-floor", "0.3"],
        &["--keep", "0.7", "--quant-factors", "int8"],
        &["--keep", "0.7", "--format", "dense"],
        &["--keep", "0.7", "--sensitivity", "energy"],
        &["--keep", "0.7", "--depth-weight", "0.5"],
    ] {
        check_numbers(&compress(&model, &out, &[extra, &common].concat()));
    }
}

#[test]
fn every_way_through_the_text_takes_zeros_and_dead_channels() {
    let folder = tempfile::tempdir().unwrap();
    let model = ruined(folder.path());
    let out = folder.path().join("out");
    for extra in [
        &["--sequential"][..],
        &["--sequential", "--anchor", "1", "--method", "svd-llm"],
        &["--sequential=false", "--sensitivity", "measured"],
        &["--sequential=false", "--depth-weight", "auto"],
        &["--elastic"],
    ] {
        let report = compress(&model, &out, &[&["--keep", "0.7"], &CALIBRATED[..], extra].concat());
        check_numbers(&report);
        check_zeros(&report);
    }
    let codes = ["--quant", "cd-int3-g32", "--method", "kfac", "--sequential", "--anchor", "1"];
    check_numbers(&compress(&model, &folder.path().join("codes"), &[&CALIBRATED[..], &codes].concat()));
    // The norm before the attention of block 2 is dead, so the inputs of its queries, keys and values are zero.
    let report: Value = serde_json::from_slice(&std::fs::read(out.join("lrc-report.json")).unwrap()).unwrap();
    let note = linear(&report, &module(2, "self_attn.q_proj"))["note"].as_str().unwrap();
    assert!(note.contains("plain metric on both sides"), "{note}");
    let note = linear(&report, &module(1, "self_attn.q_proj"))["note"].as_str().unwrap();
    assert!(note.contains("plain metric on its output side"), "keys of zeros pass no gradient: {note}");
    assert!(linear(&report, &module(0, "self_attn.o_proj")).get("note").is_none());

    let seen = ok(&[&["inspect", path(&model), "--json"], &CALIBRATED[..4]].concat()).json();
    let linears = seen["linears"].as_array().unwrap();
    let of = |name: &str| linears.iter().find(|l| l["module"] == name).unwrap();
    assert!(of(&module(2, "self_attn.k_proj"))["note"].as_str().unwrap().contains("plain metric"), "{seen}");
    assert!(of(&module(0, "mlp.down_proj")).get("note").is_none());
    assert!(linears.iter().all(|l| l["weighted"]["effective_rank"].is_number() || l["block"].is_null()));
    let table = ok(&[&["inspect", path(&model)], &CALIBRATED[..4]].concat()).stdout;
    assert!(table.contains(&format!("{}: plain metric on both sides", module(2, "self_attn.k_proj"))), "{table}");
    assert!(!table.contains("-0.0000") && !table.contains("NaN") && !table.contains("inf"), "{table}");

    let sweep = ["sweep", path(&model), "--text", HELD_OUT, "--keep", "0.9,0.5", "--json", "--max-windows", "4"];
    let sweep = ok(&[&sweep, &CALIBRATED[..]].concat()).json();
    assert!(sweep["points"].as_array().unwrap().iter().all(|point| point["ppl"].is_number()));
}

#[test]
fn quantized_bases_take_zeros_and_dead_channels() {
    let folder = tempfile::tempdir().unwrap();
    let model = ruined(folder.path());
    let statistics = statistics(folder.path(), &model);
    let out = folder.path().join("out");
    let common = ["--statistics", &statistics, "--targets", "model.layers.*"];
    for compensate in ["lorc", "lqer", "qera-approx", "eora", "kfac", "loftq", "lq-lora"] {
        let budgets = [&["--bits", "5"][..], &["--compensate-rank", "4"]];
        let n = if ["lorc", "kfac", "lq-lora"].contains(&compensate) { 2 } else { 1 };
        for &budget in &budgets[..n] {
            let args = [&["--quant", "rtn-int4-g32", "--compensate", compensate], budget, &common].concat();
            let report = compress(&model, &out, &args);
            check_numbers(&report);
            for (block, role) in ZEROS.into_iter().filter(|_| budget[0] == "--bits") {
                let linear = linear(&report, &module(block, role));
                assert_eq!((&linear["rank"], &linear["relative_error"]), (&Value::Null, &0.0.into()), "{linear}");
            }
        }
    }
    for format in ["factored", "dense", "compressed-tensors", "gptq", "peft", "gguf"] {
        let args = [
            &["--quant", "gptq-int4-g32", "--compensate", "eora", "--compensate-rank", "4", "--format", format],
            &common[..],
        ];
        let report = compress(&model, &out, &args.concat());
        check_numbers(&report);
        let note = linear(&report, &module(2, "self_attn.k_proj"))["note"].as_str().unwrap();
        assert!(note.contains("plain metric on"), "{note}");
        assert!(perplexity(path(&out), HELD_OUT, "64").is_finite());
    }
}

#[test]
fn rank_0_is_the_same_model_in_every_form_and_stays_shortenable() {
    let folder = tempfile::tempdir().unwrap();
    let model = ruined(folder.path());
    let [factored, dense, shorter, out] = ["factored", "dense", "shorter", "out"].map(|name| folder.path().join(name));
    // The zeros alone are a quarter of all parameters.
    compress(&model, &factored, &["--keep", "0.6"]);
    let expected = perplexity(path(&factored), HELD_OUT, "64");
    ok(&["export", path(&factored), "--format", "dense", "-o", path(&dense), "-q"]);
    assert!((perplexity(path(&dense), HELD_OUT, "64") - expected).abs() < 1e-4);
    let report = ok(&["truncate", path(&factored), "--keep", "0.4", "-o", path(&shorter), "--json"]).json();
    check_zeros(&report);
    assert!(report["keep"].as_f64().unwrap() <= 0.4 && perplexity(path(&shorter), HELD_OUT, "64").is_finite());
    ok(&["inspect", path(&factored), "--json"]);
    // In a dense copy of the source, zeros stay zeros.
    compress(&model, &out, &["--ranks", "full"]);
    let (source, full) = (perplexity(path(&model), HELD_OUT, "64"), perplexity(path(&out), HELD_OUT, "64"));
    assert!((source - full).abs() < 1e-3 * source, "{source} {full}");
}

#[test]
fn blocks_that_do_nothing_cost_no_more_than_their_share() {
    let folder = tempfile::tempdir().unwrap();
    let model = expanded(folder.path());
    let (parent, own) = (perplexity(FIXTURE, HELD_OUT, "64"), perplexity(path(&model), HELD_OUT, "64"));
    assert!((parent - own).abs() < 1e-9 * parent, "{parent} {own}");
    let statistics = statistics(folder.path(), &model);
    let (out, of_parent) = (folder.path().join("out"), folder.path().join("parent"));
    for method in ["svd", "fwsvd", "asvd", "svd-llm", "kfac"] {
        let with = if method == "svd" { &[][..] } else { &["--statistics", &statistics] };
        let report = compress(&model, &out, &[&["--method", method, "--keep", "0.8"], with].concat());
        check_numbers(&report);
        let notes: Vec<bool> = ROLES.iter().map(|role| !linear(&report, &module(2, role))["note"].is_null()).collect();
        let of_gradients = ["fwsvd", "kfac"].contains(&method);
        // No gradient passes through sublayers of zeros; their linears get rank 0.
        assert_eq!(
            notes,
            [of_gradients, of_gradients, of_gradients, true, of_gradients, of_gradients, true],
            "{method}"
        );
    }
    compress(&model, &out, &[&["--keep", "0.8"], &CALIBRATED[..]].concat());
    compress(Path::new(FIXTURE), &of_parent, &[&["--keep", "0.8"], &CALIBRATED[..]].concat());
    let (found, of_parent) = (perplexity(path(&out), HELD_OUT, "64"), perplexity(path(&of_parent), HELD_OUT, "64"));
    assert!(found < 1.01 * of_parent, "{found} {of_parent}");
}

#[test]
fn experts_that_no_token_meets_and_biases_of_zeros_are_compressed() {
    let folder = tempfile::tempdir().unwrap();
    for family in ["mixtral", "qwen2"] {
        let model = folder.path().join(family);
        copy(&format!("fixtures/pico/{family}"), &model);
        std::fs::copy("fixtures/pico/tokenizer.json", model.join("tokenizer.json")).unwrap();
        let checkpoint = Checkpoint::open(&model).unwrap();
        let names: Vec<String> = checkpoint.tensors().map(|info| info.name.clone()).collect();
        // Biases, and the router, which then always takes the same experts.
        for name in names.iter().filter(|name| name.ends_with(".bias") || name.contains(".gate.weight")) {
            edit(&model, name, |_, _| 0.0);
        }
        let out = folder.path().join("out");
        for method in ["svd-llm", "kfac", "fwsvd", "asvd"] {
            let text = ["--calibration", TRAIN, "--samples", "4", "--seq-len", "32"];
            check_numbers(&compress(&model, &out, &[&["--method", method, "--keep", "0.7"], &text[..]].concat()));
        }
    }
}
