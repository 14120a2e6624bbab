//! The largest floats, values that are not finite, and outputs larger than their source.

use std::path::Path;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, copy, edit, lrc, ok, path};
use lrc::checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec, cast, write_file};
use lrc::operator::Kind;

use super::{CALIBRATED, check_numbers, compress, module};

#[test]
fn weights_beyond_the_scales_of_a_quantizer_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    copy(FIXTURE, &model);
    edit(&model, &(module(1, "mlp.up_proj") + ".weight"), |i, v| if i == 5 { 1e9 } else { v });
    let run = lrc(&["compress", path(&model), "-o", path(&out), "--quant", "rtn-int4"]);
    assert_eq!(run.code, 5, "{}", run.stderr);
    for part in ["model.layers.1.mlp.up_proj", "1e9", "f16 scales of `rtn-int4-g128`", "--exclude"] {
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
    compress(&model, &out, &["--quant", "rtn-int4", "--exclude", "model.layers.1.mlp.up_proj"]);
}

#[test]
fn weights_up_to_the_largest_float_are_compressed_and_inspected() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    for (size, dtype) in [(2e19f32, Dtype::F32), (1e30, Dtype::F32), (f32::MAX, Dtype::F32), (f32::MAX, Dtype::BF16)] {
        copy(FIXTURE, &model);
        // One matrix whose squares exceed the range of f32.
        let name = module(1, "mlp.up_proj") + ".weight";
        let checkpoint = Checkpoint::open(&model).unwrap();
        let largest = checkpoint.values(&name).unwrap().iter().fold(0f32, |m, v| m.max(v.abs()));
        edit(&model, &name, |_, v| v / largest * size);
        if dtype == Dtype::BF16 {
            in_dtype(&model, dtype);
        }
        for extra in
            [&[][..], &["--layout", "factors"], &["--ranks", "uniform"], &["--format", "dense"], &["--elastic"]]
        {
            let report = compress(&model, &out, &[&["--keep", "0.8"], extra].concat());
            check_numbers(&report);
        }
        ok(&["truncate", path(&out), "--keep", "0.6", "-o", path(&folder.path().join("shorter")), "--force", "-q"]);
        let seen = ok(&["inspect", path(&model), "--json"]).json();
        let text = seen.to_string();
        let of = seen["linears"].as_array().unwrap().iter().find(|l| l["module"] == module(1, "mlp.up_proj")).unwrap();
        assert!(of["frobenius_norm"].as_f64().unwrap() >= f64::from(size) * 0.99 && !text.contains("inf"), "{of}");
        // The model overflows or its perplexity is a number: never a panic, and the error names the place.
        let run = lrc(&["eval", path(&model), "--text", HELD_OUT, "--seq-len", "64", "--max-windows", "2"]);
        assert!(run.code == 0 || run.code == 5 && run.stderr.contains("model.layers."), "{} {}", run.code, run.stderr);
    }
}

#[test]
fn matrices_too_small_for_any_rank_stay_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model.safetensors"), folder.path().join("out"));
    let shapes = [("wide.weight", [24, 32]), ("tiny.weight", [2, 2])];
    let specs = shapes.map(|(name, shape)| TensorSpec { name: name.into(), dtype: Dtype::F32, shape: shape.into() });
    write_file::<anyhow::Error>(&model, &specs, |spec| {
        let values: Vec<f32> = (0..spec.shape.iter().product()).map(|i: usize| ((i * 37) % 19) as f32 - 9.0).collect();
        Ok(cast::encode(Dtype::F32, &values).unwrap())
    })
    .unwrap();
    for kind in Kind::layouts() {
        let (layout, planned) = (kind.name(), kind.planned().unwrap_or(kind));
        for ranks in ["uniform", "welore", "energy:0.5", "effective-rank", "knapsack"] {
            let args = ["--keep", "0.6", "--layout", layout, "--ranks", ranks];
            let report = compress(&model, &out, &args);
            let tiny = report["linears"].as_array().unwrap().iter().find(|linear| linear["module"] == "tiny").unwrap();
            assert!(planned.name() == "pivot" || tiny["rank"].is_null(), "{layout} {ranks}: {tiny}");
        }
    }
}

/// The model's tensors in another dtype.
fn in_dtype(model: &Path, dtype: Dtype) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let names: Vec<(String, Vec<usize>)> = checkpoint.tensors().map(|t| (t.name.clone(), t.shape.clone())).collect();
    let values: Vec<Vec<f32>> = names.iter().map(|(name, _)| checkpoint.values(name).unwrap()).collect();
    drop(checkpoint);
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    let specs: Vec<TensorSpec> = names.into_iter().map(|(name, shape)| TensorSpec { name, dtype, shape }).collect();
    let mut writer = SafetensorsWriter::create(model, &specs, u64::MAX).unwrap();
    for (spec, values) in specs.iter().zip(&values) {
        writer.write(&spec.name, &cast::encode(dtype, values).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn what_is_not_finite_is_named_where_it_arises() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let check = |expected: &[&str], args: &[&str]| {
        let run = lrc(args);
        assert_eq!(run.code, 5, "{}", run.stderr);
        for part in expected {
            assert!(run.stderr.contains(part), "`{part}` is not in: {}", run.stderr);
        }
        assert!(run.stderr.contains("hint: the checkpoint is damaged, or overflows in f32"), "{}", run.stderr);
    };
    let out = folder.path().join("out");
    let calibrated = [&["compress", path(&model), "-o", path(&out), "--keep", "0.8"], &CALIBRATED[..]].concat();
    let eval = ["eval", path(&model), "--text", HELD_OUT, "--seq-len", "64"];

    copy(FIXTURE, &model);
    edit(&model, &(module(2, "mlp.up_proj") + ".weight"), |_, v| v * 1e38);
    edit(&model, "model.layers.2.post_attention_layernorm.weight", |_, v| v * 1e10);
    check(&["window 0", TRAIN, "`model.layers.2.mlp.down_proj`", "not finite"], &calibrated);
    check(&["window 0", HELD_OUT, "`model.layers.2.mlp.down_proj`", "not finite"], &eval);

    copy(FIXTURE, &model);
    edit(&model, "model.norm.weight", |_, _| 3e38);
    check(&["window 0", TRAIN, "logits are not finite"], &calibrated);
    check(&["window 0", HELD_OUT, "logits are not finite"], &eval);
}

#[test]
fn broken_norms_and_embeddings_are_copied_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let [model, out, shorter, dense] = ["model", "out", "shorter", "dense"].map(|name| folder.path().join(name));
    copy(FIXTURE, &model);
    let broken = ["model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"];
    edit(&model, broken[0], |i, v| if i == 7 { f32::NAN } else { v });
    edit(&model, broken[1], |i, v| if i == 3 { f32::INFINITY } else { v });
    let check = |args: &[&str]| {
        let run = ok(args);
        let warning = run.stderr.lines().find(|line| line.contains("NaN or infinite values were copied"));
        let warning = warning.unwrap_or_else(|| panic!("no warning: {}", run.stderr));
        assert!(broken.iter().all(|name| warning.contains(&format!("`{name}`"))), "{warning}");
        assert!(!warning.contains("model.norm.weight"), "{warning}");
        run
    };
    let report = check(&["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--json"]).json();
    let mut listed: Vec<&str> = report["non_finite"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    listed.sort_unstable();
    assert_eq!(listed, [broken[1], broken[0]]);
    check(&["truncate", path(&out), "-o", path(&shorter), "--keep", "0.7"]);
    check(&["export", path(&out), "-o", path(&dense), "--format", "dense"]);
    let sound = ok(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "--force"]);
    assert!(!sound.stderr.contains("NaN"), "{}", sound.stderr);
}

#[test]
fn an_output_that_is_larger_than_its_source_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    let [large, small, dense] = ["large", "small", "dense"].map(|name| folder.path().join(name));
    let warns = |args: &[&str]| ok(args).stderr.contains("more than the");
    let full = ["compress", FIXTURE, "-o", path(&large), "--ranks", "full", "--layout", "factors"];
    assert!(warns(&full));
    assert!(
        warns(&[&full[..], &["--dry-run", "--force"]].concat())
            && lrc(&[&full[..], &["-q", "--force"]].concat()).stderr.is_empty()
    );
    assert!(!warns(&["compress", FIXTURE, "-o", path(&small), "--keep", "0.6"]));
    assert!(!warns(&["compress", FIXTURE, "-o", path(&dense), "--keep", "1.0"]));
    assert!(warns(&["export", path(&small), "--format", "dense", "-o", path(&dense), "--force"]));
    assert!(!warns(&["truncate", path(&small), "--keep", "0.5", "-o", path(&dense), "--force"]));
}
