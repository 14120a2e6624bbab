//! `--structure depth`: models with fewer blocks that every runtime loads.

use std::path::Path;

use crate::common::{self, FIXTURE, HELD_OUT, TRAIN, lrc, ok, path, perplexity};
use crate::families::{distance, expected, logits, tokenizer};
use lrc::checkpoint::{Checkpoint, SafetensorsWriter, TensorSpec, cast};
use lrc::model::{inventory, open};
use serde_json::Value;

use super::{Model, config, report};

const CALIBRATED: [&str; 6] = ["--calibration", TRAIN, "--samples", "16", "--seq-len", "128"];

fn compress(out: &Path, flags: &[&str]) -> Value {
    ok(&[&["compress", FIXTURE, "-o", path(out), "-q"], &CALIBRATED[..], flags].concat());
    report(out)
}

fn dropped(report: &Value) -> Vec<usize> {
    serde_json::from_value(report["narrow"].get("dropped").cloned().unwrap_or_else(|| Value::Array(Vec::new())))
        .unwrap()
}

/// The source, with zeros where a block adds to the states.
fn silenced(source: &Checkpoint, from: &Path, to: &Path, block: usize) {
    common::copy(path(from), to);
    let linears = inventory::linears(source);
    let adding = linears.iter().filter(|linear| {
        let name = linear.id.filter(|id| id.block == block).map(|id| format!("{:?}", id.slot.role));
        ["OProj", "DownProj"].map(|role| Some(role.to_string())).contains(&name)
    });
    let zeros: Vec<String> =
        adding.flat_map(|linear| linear.bias_names().into_iter().chain([linear.weight_name()])).collect();
    let spec = |name: &str| {
        source.info(name).map(|t| TensorSpec { name: name.into(), dtype: t.dtype, shape: t.shape.clone() })
    };
    let specs: Vec<TensorSpec> = source.tensors().filter_map(|info| spec(&info.name)).collect();
    let mut writer = SafetensorsWriter::create(to, &specs, u64::MAX).unwrap();
    for spec in &specs {
        let mut bytes = source.with_bytes(&spec.name, <[u8]>::to_vec).unwrap();
        if zeros.contains(&spec.name) {
            let n = source.values(&spec.name).unwrap().len();
            bytes = cast::encode(spec.dtype, &vec![0.0; n]).unwrap();
        }
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn the_output_is_the_source_with_a_block_that_adds_nothing() {
    for family in ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "llava"] {
        let model = Model::pico(family, &tokenizer(family));
        let out = model.folder.path().join("out");
        ok(&model.of(&out, "depth", &["--keep", "0.6"]));
        let report = report(&out);
        let [block] = dropped(&report)[..] else { panic!("{family}: {}", report["narrow"]) };
        let zeroed = model.folder.path().join("zeroed");
        silenced(&open(&model.model).unwrap(), &model.model, &zeroed, block);
        let (_, ids) = expected(family);
        let [found, zeroed, dense] = [&out, &zeroed, &model.model].map(|model| logits(model, &ids).unwrap());
        assert!(distance(&found, &zeroed) < 1e-6, "{family}: {}", distance(&found, &zeroed));
        assert!(distance(&zeroed, &dense) > 1e-3, "{family}: the oracle depends on the block");
        assert_eq!(report["sizes"]["keep"], 0.5, "{family}");
    }
}

#[test]
fn blocks_whose_error_is_not_measured_stay() {
    for (family, reason) in [
        ("gemma2", "normalize what they add"),
        ("olmo2", "normalize what they add"),
        ("bert", "normalize what they add"),
        ("mixtral", "blocks with experts stay"),
    ] {
        let model = Model::pico(family, &tokenizer(family));
        let out = model.folder.path().join("out");
        let run = lrc(&model.of(&out, "narrow,depth", &["--keep", "0.6"]));
        assert!(run.code == 4 && run.stderr.contains(reason), "{family}: {}", run.stderr);
        assert!(run.stderr.contains("hint: ") && !out.exists());
    }
}

#[test]
fn fewer_blocks_are_a_plain_model_and_go_with_narrower_ones() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let deep = compress(&at("depth"), &["--structure", "depth", "--keep", "0.75"]);
    assert_eq!((dropped(&deep).len(), &deep["sizes"]["keep"]), (1, &Value::from(0.75)));
    let own = config(&at("depth"));
    assert_eq!(own["num_hidden_layers"], 3);
    assert!(["lrc", "auto_map", "per_layer_config"].iter().all(|key| own.get(key).is_none()));
    let blocks =
        |linear: &Value| linear["module"].as_str().unwrap().split('.').nth(2).unwrap().parse::<usize>().unwrap();
    assert_eq!(deep["linears"].as_array().unwrap().iter().map(blocks).max(), Some(2));
    let one = perplexity(path(&at("depth")), HELD_OUT, "128");
    ok(&["export", path(&at("depth")), "--format", "gguf", "-o", path(&at("gguf"))]);
    assert!((perplexity(path(&at("gguf")), HELD_OUT, "128") / one - 1.0).abs() < 0.01);

    for (name, flags) in [("uniform", &[][..]), ("own", &["--uniform-width=false"])] {
        let both = ["--structure", "narrow,depth", "--keep", "0.5", "--width-multiple", "16"];
        let report = compress(&at(name), &[&both[..], flags].concat());
        let keep = report["sizes"]["keep"].as_f64().unwrap();
        assert!(keep <= 0.5 && keep > 0.42, "{name}: {keep}");
        assert!(perplexity(path(&at(name)), HELD_OUT, "128") > one);
    }
    let whole = Checkpoint::open(FIXTURE.as_ref()).unwrap().file_bytes();
    let target = format!("{}B", whole * 3 / 4);
    let sized = compress(&at("sized"), &["--structure", "depth", "--target-size", &target]);
    assert!(sized["size_bytes"].as_u64().unwrap() <= whole * 3 / 4 && !dropped(&sized).is_empty());
    // The recipe beside an output makes the same weights again.
    let recipe = at("own").join("lrc-recipe.toml");
    ok(&["compress", FIXTURE, "-o", path(&at("remade")), "-q", "--recipe", path(&recipe)]);
    let weights = |name: &str| std::fs::read(at(name).join("model.safetensors")).unwrap();
    assert!(weights("own") == weights("remade"));
}

#[test]
fn what_has_no_meaning_without_widths_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let check = |flags: &[&str], expected: &str| {
        let run = lrc(&[&["compress", FIXTURE, "-o", path(&out), "--keep", "0.7", "--structure"], flags].concat());
        assert!(run.code == 2 && run.stderr.contains(expected), "{flags:?}: {} {}", run.code, run.stderr);
        assert!(!out.exists());
    };
    check(&["depth", "--selection", "forward"], "`--selection` has no effect without `--structure narrow`");
    check(&["depth", "--uniform-width"], "`--uniform-width` has no effect without `--structure narrow`");
    check(&["depth", "--targets", "*.mlp.*"], "`--targets` cannot be combined with `--structure depth`");
    check(&["depth", "--ranks", "uniform"], "`--ranks` cannot be combined with `--structure depth`");
    check(&["deep"], "`--structure deep` is not one of low-rank, narrow, depth");
}
