//! Weights that other tools quantized: their values are those of the tools, and nothing compresses codes by mistake.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lrc::checkpoint::{Checkpoint, Dtype, cast};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::{json, oracle};
use crate::common::{FIXTURE, HELD_OUT, TRAIN, copy, lrc, ok, path, perplexity};

fn project(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A folder with some tensors and a config.
fn write(folder: &Path, tensors: Vec<(String, TensorView<'_>)>, quantization: &Value) {
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({"torch_dtype": "float32", "quantization_config": quantization});
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
}

/// The tensors of a case of `tests/oracles/quantized.py`.
fn of_case<'a>(all: &SafeTensors<'a>, case: &str) -> Vec<(String, TensorView<'a>)> {
    let own = |(name, view): (String, TensorView<'a>)| {
        let name = name.strip_prefix(case)?.strip_prefix('/')?;
        (!name.starts_with('/')).then(|| (name.to_string(), view))
    };
    all.tensors().into_iter().filter_map(own).collect()
}

/// Every seventh value of the weights of a case, by name.
fn expected(all: &SafeTensors<'_>, case: &str) -> BTreeMap<String, Vec<f32>> {
    let values = |view: &TensorView<'_>| {
        view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect::<Vec<f32>>()
    };
    let weights = all.tensors().into_iter();
    let own = |(name, view): (String, TensorView<'_>)| {
        Some((name.strip_prefix(case)?.strip_prefix("//")?.to_string(), values(&view)))
    };
    weights.filter_map(own).collect()
}

/// The values of a weight are those of the tool, rounded to the dtype that it is stored in.
fn check_values(checkpoint: &Checkpoint, case: &str, weight: &str, expected: &[f32]) {
    let (values, info) = (checkpoint.values(weight).unwrap(), checkpoint.require(weight).unwrap());
    let dtype = if info.is_encoded() { Dtype::F32 } else { info.dtype };
    assert_eq!(values.len().div_ceil(7), expected.len(), "{case}");
    let largest = expected.iter().fold(0f32, |largest, v| largest.max(v.abs()));
    for (value, expected) in values.iter().step_by(7).zip(expected) {
        let step = (cast::nearest(dtype, *expected) - expected).abs();
        assert!((value - expected).abs() <= 1.01 * step + 2e-7 * largest, "{case}: {value} for {expected}");
    }
}

#[test]
fn values_are_those_of_the_tools() {
    let bytes = std::fs::read(oracle("quantized.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cases = json("quantized.json");
    assert!(cases.as_object().unwrap().len() > 30);
    for (case, settings) in cases.as_object().unwrap() {
        let source = folder.path().join(case);
        write(&source, of_case(&all, case), settings);
        let checkpoint = Checkpoint::open(&source).unwrap_or_else(|error| panic!("{case}: {error}"));
        let weights = expected(&all, case);
        let names: Vec<&str> = checkpoint.tensors().map(|info| info.name.as_str()).collect();
        assert_eq!(names, weights.keys().map(String::as_str).collect::<Vec<_>>(), "{case}");
        let method = settings["quant_method"].as_str().unwrap();
        assert!(checkpoint.source_quantization().unwrap().starts_with(method));
        for (weight, expected) in &weights {
            check_values(&checkpoint, case, weight, expected);
        }
        // Hidden codes have the same values, and so has each matrix of a stack.
        let checkpoint = checkpoint.dequantized();
        for (weight, expected) in &weights {
            assert_eq!(checkpoint.storage(weight).unwrap(), None);
            check_values(&checkpoint, case, weight, expected);
            let info = checkpoint.require(weight).unwrap();
            if let &[n, ..] = info.shape.as_slice()
                && info.shape.len() == 3
            {
                let apart: Vec<f32> = (0..n).flat_map(|i| checkpoint.slice_values(weight, i).unwrap()).collect();
                assert_eq!(apart, checkpoint.values(weight).unwrap());
            }
        }
    }
}

#[test]
fn every_source_is_inspected_and_exported_as_floats() {
    let bytes = std::fs::read(oracle("quantized.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cases = json("quantized.json");
    for case in ["gptq-3-v1", "gptq-4-desc_act", "awq", "compressed-int4-asym-g16", "fp8-block", "bnb-nf4", "mxfp4"] {
        let (source, dense) = (folder.path().join(case), folder.path().join(format!("{case}-dense")));
        write(&source, of_case(&all, case), &cases[case]);
        let report = ok(&["inspect", path(&source), "--json"]).json();
        let words = report["source_quantization"].as_str().unwrap();
        assert!(words.starts_with(cases[case]["quant_method"].as_str().unwrap()), "{words}");
        let linears = report["linears"].as_array().unwrap().len();
        assert_eq!(linears, if case == "mxfp4" { 2 } else { 1 });
        ok(&["export", path(&source), "--format", "dense", "-o", path(&dense), "-q"]);
        let config: Value = serde_json::from_slice(&std::fs::read(dense.join("config.json")).unwrap()).unwrap();
        assert_eq!(config, json!({"torch_dtype": "float32"}));
        let checkpoint = Checkpoint::open(&dense).unwrap();
        for (weight, expected) in expected(&all, case) {
            assert!(!checkpoint.require(&weight).unwrap().is_encoded());
            check_values(&checkpoint, case, &weight, &expected);
        }
        // Every weight is a float of the model's dtype in the compressed output too.
        let out = folder.path().join(format!("{case}-out"));
        let targets = if case == "mxfp4" { "experts.*" } else { "m" };
        let report = ok(&[
            "compress",
            path(&source),
            "-o",
            path(&out),
            "--keep",
            "0.5",
            "--dequantize",
            "--targets",
            targets,
            "--json",
        ]);
        assert_eq!(report.json()["source_quantization"], words);
        ok(&["inspect", path(&out), "-q"]);
    }
}

/// An output of lrc without its report: as if another tool had written it.
fn foreign(folder: &Path, format: &str) -> PathBuf {
    let out = folder.join(format);
    ok(&["compress", FIXTURE, "-o", path(&out), "-q", "--quant", "rtn-int4-g32", "--format", format]);
    std::fs::remove_file(out.join("lrc-report.json")).unwrap();
    out
}

#[test]
fn codes_are_compressed_only_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let (out, statistics) = (folder.path().join("out"), folder.path().join("statistics.safetensors"));
    for format in ["gptq", "compressed-tensors"] {
        let source = foreign(folder.path(), format);
        let first = ["--seq-len", "128", "--max-windows", "96", "--json"];
        let evaluated = ok(&[&["eval", path(&source), "--text", HELD_OUT], &first[..]].concat()).json();
        assert_eq!(evaluated["source_quantization"], format!("{format}: int4-g32"));
        let compress = ["compress", path(&source), "-o", path(&out), "--keep", "0.8"];
        let calibrate =
            ["calibrate", path(&source), "--text", TRAIN, "-o", path(&statistics), "--samples", "2", "--seq-len", "64"];
        let sweep =
            ["sweep", path(&source), "--text", HELD_OUT, "--keep", "0.9", "--max-windows", "1", "--eval-seq-len", "64"];
        for args in [&compress[..], &calibrate, &sweep] {
            let run = lrc(args);
            assert_eq!(run.code, 2, "{}", run.stderr);
            assert!(
                run.stderr.contains("are quantized") && run.stderr.contains("hint: `--dequantize`"),
                "{}",
                run.stderr
            );
            let report = ok(&[args, &["--dequantize", "--json"]].concat()).json();
            assert_eq!(report["source_quantization"], format!("{format}: int4-g32"));
        }
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        assert!(card.contains("--dequantize"), "{card}");
        // The values are those of the dense export, whose compression has the same bytes.
        let (dense, again) = (folder.path().join("dense"), folder.path().join("again"));
        ok(&["export", path(&source), "--format", "dense", "-o", path(&dense), "-q"]);
        assert_eq!(perplexity(path(&dense), HELD_OUT, "128"), evaluated["ppl"].as_f64().unwrap());
        ok(&["compress", path(&dense), "-o", path(&again), "--keep", "0.8", "-q"]);
        let weights = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
        assert!(weights(&out) == weights(&again));
        for made in [&out, &dense, &again] {
            std::fs::remove_dir_all(made).unwrap();
        }
        std::fs::remove_file(&statistics).unwrap();
    }
    let run = lrc(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "--dequantize"]);
    assert!(run.code == 2 && run.stderr.contains("`--dequantize` has no effect"), "{}", run.stderr);
}

/// A pico checkpoint with the linears of its blocks in int8, as bitsandbytes has them: (out, in) in every family.
fn in_int8(folder: &Path, family: &str) -> PathBuf {
    let source = folder.join(family);
    copy(&format!("fixtures/pico/{family}"), &source);
    std::fs::copy(project("fixtures/pico/tokenizer.json"), source.join("tokenizer.json")).unwrap();
    let checkpoint = Checkpoint::open(&source).unwrap();
    let mut stored: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for info in checkpoint.tensors() {
        let is_linear = [".h.", ".layers."].iter().any(|blocks| info.name.contains(blocks)) && info.shape.len() == 2;
        let (name, shape) = (info.name.clone(), info.shape.clone());
        if !is_linear {
            stored.push((name.clone(), info.dtype, shape, checkpoint.with_bytes(&name, <[u8]>::to_vec).unwrap()));
            continue;
        }
        let values = checkpoint.values(&name).unwrap();
        let (out, input) = if family == "gpt2" { (shape[1], shape[0]) } else { (shape[0], shape[1]) };
        let at = |i: usize, j: usize| if family == "gpt2" { values[j * out + i] } else { values[i * input + j] };
        let scale = |i: usize| (0..input).fold(1e-9f32, |largest, j| largest.max(at(i, j).abs()));
        let codes = (0..out).flat_map(|i| (0..input).map(move |j| (i, j)));
        let codes = codes.map(|(i, j)| (at(i, j) / scale(i) * 127.0).round() as i8 as u8).collect();
        let scales: Vec<u8> = (0..out).flat_map(|i| scale(i).to_le_bytes()).collect();
        let module = name.strip_suffix(".weight").unwrap();
        stored.push((format!("{module}.SCB"), safetensors::Dtype::F32, vec![out], scales));
        stored.push((name, safetensors::Dtype::I8, vec![out, input], codes));
    }
    let views = stored
        .iter()
        .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(source.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config["quantization_config"] = json!({"quant_method": "bitsandbytes", "load_in_8bit": true});
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();
    source
}

/// Codes are (out, in) in every family, and GPT-2 stores weights as (in, out); fused matrices are split after decoding.
#[test]
fn dequantized_weights_are_those_of_their_family() {
    let folder = tempfile::tempdir().unwrap();
    let ppl = |model: &Path| {
        let text = project("fixtures/text/held-out.txt");
        let args = ["eval", path(model), "--text", path(&text), "--max-windows", "2", "--seq-len", "16", "--json"];
        ok(&args).json()["ppl"].as_f64().unwrap()
    };
    for family in ["gpt2", "phi3", "llama"] {
        let source = in_int8(folder.path(), family);
        let at = |name: &str| folder.path().join(format!("{family}-{name}"));
        let expected = ppl(&source);
        ok(&["export", path(&source), "--format", "dense", "-o", path(&at("dense")), "-q"]);
        let original = Checkpoint::open(&project(&format!("fixtures/pico/{family}"))).unwrap();
        let dense = Checkpoint::open(&at("dense")).unwrap();
        for info in original.tensors() {
            assert_eq!(dense.require(&info.name).unwrap().shape, info.shape, "{}", info.name);
        }
        for (name, flags) in [
            ("factored", &["--keep", "1"][..]),
            ("compressed-dense", &["--ranks", "full", "--layout", "factors", "--format", "dense"]),
            ("split", &["--fused", "split", "--ranks", "full", "--layout", "factors"]),
        ] {
            if name == "split" && family == "llama" {
                continue;
            }
            ok(&[&["compress", path(&source), "-o", path(&at(name)), "--dequantize", "-q"], flags].concat());
            let found = ppl(&at(name));
            assert!((found / expected - 1.0).abs() < 1e-4, "{family} {name}: {found} {expected}");
        }
        let found = ppl(&at("dense"));
        assert!((found / expected - 1.0).abs() < 1e-4, "{family} dense: {found} {expected}");
    }
}

/// Codes and floats of one weight, and parts of codes without the codes: neither is a model.
#[test]
fn codes_beside_their_weight_and_parts_without_codes_are_refused() {
    let bytes = std::fs::read(oracle("quantized.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (source, cases) = (folder.path().join("source"), json("quantized.json"));
    let out = folder.path().join("out");
    let check = |case: &str, tensors: Vec<(String, TensorView<'_>)>, named: &[&str]| {
        write(&source, tensors, &cases[case]);
        let run = lrc(&["export", path(&source), "--format", "dense", "-o", path(&out)]);
        assert_eq!(run.code, 4, "{case}: {}", run.stderr);
        for part in ["hint: ", "source"].iter().chain(named) {
            assert!(run.stderr.contains(part), "{case}, {part}: {}", run.stderr);
        }
    };
    let zeros = [0; 32];
    for (case, codes) in [("gptq-4-v1", "m.qweight"), ("awq", "m.qweight"), ("compressed-int4-g16", "m.weight_packed")]
    {
        let mut tensors = of_case(&all, case);
        tensors.push(("m.weight".into(), TensorView::new(safetensors::Dtype::F32, vec![2, 4], &zeros).unwrap()));
        check(case, tensors, &[&format!("tensor `{codes}`"), "`m.weight`"]);
        let mut tensors = of_case(&all, case);
        tensors.retain(|(name, _)| name != codes);
        // The scales of compressed-tensors may belong to codes of one byte.
        check(
            case,
            tensors,
            &[
                "tensor `m.",
                if case == "compressed-int4-g16" { "its `weight` is absent" } else { "its `qweight` is absent" },
            ],
        );
    }
}

/// A case with one tensor changed or left out: an error that names the file, the tensor and what is wrong.
#[test]
fn broken_codes_are_refused() {
    let bytes = std::fs::read(oracle("quantized.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cases = json("quantized.json");
    let source = folder.path().join("source");
    let check = |case: &str, tensor: &str, change: fn(TensorView<'_>) -> Option<TensorView<'_>>, expected: &str| {
        let mut tensors = of_case(&all, case);
        let at = tensors.iter().position(|(name, _)| name == tensor).unwrap();
        match change(tensors[at].1.clone()) {
            Some(changed) => tensors[at].1 = changed,
            None => drop(tensors.remove(at)),
        }
        write(&source, tensors, &cases[case]);
        let run = lrc(&["inspect", path(&source)]);
        assert_eq!(run.code, 4, "{case} {tensor}: {}", run.stderr);
        for part in [expected, "hint: ", "source", "tensor `"] {
            assert!(run.stderr.contains(part), "{case} {tensor}: {}", run.stderr);
        }
    };
    // One row less.
    fn short(view: TensorView<'_>) -> Option<TensorView<'_>> {
        let mut shape = view.shape().to_vec();
        let width = view.data().len() / shape[0];
        shape[0] -= 1;
        Some(TensorView::new(view.dtype(), shape, &view.data()[width..]).unwrap())
    }
    check("gptq-4-v1", "m.scales", |_| None, "its `scales` is absent");
    check("gptq-4-v1", "m.qweight", short, "do not have 2, 3, 4 or 8 bits");
    check("gptq-4-v1", "m.qzeros", short, "`scales` has shape");
    check("awq", "m.qzeros", |_| None, "its `qzeros` is absent");
    check("awq", "m.scales", short, "`scales` has shape");
    check("compressed-int4-asym-g16", "m.weight_scale", |_| None, "its `weight_scale` is absent");
    check("compressed-int4-asym-g16", "m.weight_zero_point", short, "`weight_zero_point` has shape");
    check("compressed-int4-asym-g16", "m.weight_shape", |_| None, "its `weight_shape` is absent");
    check("compressed-int4-g16", "m.weight_packed", short, "`weight_shape`");
    check("compressed-fp8-channel", "m.weight_scale", |_| None, "its scales are absent");
    check("fp8-block", "m.weight_scale_inv", |_| None, "its scales are absent");
    check("fp8-block", "m.weight", |_| None, "its `weight` is absent");
    check("fp8-block", "m.weight_scale_inv", short, "are not the scales of blocks of [8, 16]");
    check("bnb-nf4", "m.weight.quant_map", |_| None, "its `weight.quant_map` is absent");
    check("bnb-nf4", "m.weight", short, "do not hold the codes");
    check("bnb-nf4", "m.weight.absmax", |_| None, "its scales are absent");
    check("bnb-nf4-nested", "m.weight.nested_quant_map", short, "`weight.nested_quant_map` has shape [255]");
    check("bnb-int8", "m.SCB", |_| None, "its scales are absent");
    check("bnb-int8", "m.SCB", short, "`SCB` has shape [5], expected [6]");
    check("mxfp4", "experts.down_proj_scales", |_| None, "its `scales` is absent");
    check("mxfp4", "experts.down_proj_blocks", short, "`scales` has shape");
}
