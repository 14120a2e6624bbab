//! Stacks of experts in one tensor of three dimensions, in an unknown family: compressed by names and shapes.

use std::path::{Path, PathBuf};

use crate::common::{lrc, ok, path};
use lrc::checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec, cast};
use lrc::model::inventory;
use serde_json::{Value, json};

const STACKS: [(&str, [usize; 3]); 3] = [
    ("model.layers.0.mlp.experts.gate_up_proj", [4, 24, 16]),
    ("model.layers.0.mlp.experts.down_proj", [4, 16, 12]),
    ("model.layers.1.mlp.experts.down_proj.weight", [3, 16, 12]),
];

fn model(folder: &Path, dtype: Dtype) -> PathBuf {
    let model = folder.join(format!("model-{dtype:?}"));
    std::fs::create_dir(&model).unwrap();
    std::fs::write(model.join("config.json"), json!({"model_type": "unheard_of"}).to_string()).unwrap();
    let others: [(&str, &[usize]); 4] = [
        ("model.layers.0.self_attn.q_proj.weight", &[16, 16]),
        ("model.layers.0.mlp.router.weight", &[4, 16]),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", &[4, 24]),
        ("vision.patch.weight", &[8, 3, 4, 4]),
    ];
    let stacks = STACKS.iter().map(|(name, shape)| (*name, &shape[..]));
    let spec = |(name, shape): (&str, &[usize])| TensorSpec { name: name.into(), dtype, shape: shape.into() };
    let specs: Vec<TensorSpec> = stacks.chain(others).map(spec).collect();
    let mut writer = SafetensorsWriter::create(&model, &specs, 1 << 30).unwrap();
    for (i, spec) in specs.iter().enumerate() {
        let n: usize = spec.shape.iter().product();
        let value = |j: usize| ((i * 7919 + j) as f64 * 0.618_033_988_749_894_9).fract() as f32 - 0.5;
        writer.write(&spec.name, &cast::encode(dtype, &(0..n).map(value).collect::<Vec<_>>()).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    model
}

fn bytes(checkpoint: &Checkpoint, tensor: &str) -> Vec<u8> {
    checkpoint.with_bytes(tensor, <[u8]>::to_vec).unwrap()
}

#[test]
fn every_expert_is_a_matrix_and_stacks_come_back() {
    let folder = tempfile::tempdir().unwrap();
    for dtype in [Dtype::F32, Dtype::BF16] {
        let model = model(folder.path(), dtype);
        let source = Checkpoint::open(&model).unwrap();
        let out = |name: &str| folder.path().join(format!("{name}-{dtype:?}"));
        let compress = |name: &str, flags: &[&str]| -> PathBuf {
            ok(&[&["compress", path(&model), "-o", path(&out(name)), "-q", "--max-shard-size", "4kB"], flags].concat());
            out(name)
        };
        let low = ["--keep", "0.6", "--exclude", "*.down_proj.2"];
        for (name, flags) in [("low", &low[..]), ("coded", &["--quant", "rtn-int4-channel"])] {
            let dense = compress(&format!("{name}-dense"), &[flags, &["--format", "dense"]].concat());
            let factored = compress(name, flags);
            let exported = out(&format!("{name}-exported"));
            ok(&["export", path(&factored), "--format", "dense", "-o", path(&exported), "-q"]);
            let [dense, factored, exported] = [&dense, &factored, &exported].map(|at| Checkpoint::open(at).unwrap());
            let linears = inventory::linears(&factored);
            for (tensor, shape) in STACKS {
                let whole = dense.require(tensor).unwrap();
                assert_eq!((whole.shape.as_slice(), whole.dtype), (&shape[..], dtype), "{tensor} is whole");
                assert_eq!(exported.require(tensor).unwrap().shape, shape);
                let module = tensor.trim_end_matches(".weight");
                for index in 0..shape[0] {
                    let linear = linears.iter().find(|l| l.module == format!("{module}.{index}")).unwrap();
                    assert_eq!(linear.block, Some(usize::from(tensor.contains("layers.1"))));
                    let values = inventory::weight(&factored, linear).unwrap();
                    let found = dense.slice_values(tensor, index).unwrap();
                    let back = exported.slice_values(tensor, index).unwrap();
                    // Factors are rounded to the dtype, and so is their product.
                    let tolerance = if dtype == Dtype::F32 { 1e-6 } else { 2e-2 };
                    let close = |x: &[f32], y: &[f32]| x.iter().zip(y).all(|(x, y)| (x - y).abs() < tolerance);
                    assert!(close(&values, &found) && close(&values, &back), "{tensor} {index}");
                    let weight = source.slice_values(tensor, index).unwrap();
                    let is_left = name == "low" && module.ends_with("down_proj") && index == 2;
                    assert_eq!(found == weight, is_left, "{tensor} {index}");
                }
            }
            for other in source.tensors().filter(|t| !t.name.contains("experts.") && !t.name.contains("q_proj")) {
                let expected = bytes(&source, &other.name);
                assert!([&dense, &factored, &exported].iter().all(|c| bytes(c, &other.name) == expected));
            }
        }
        let report: Value =
            serde_json::from_slice(&std::fs::read(out("low").join("lrc-report.json")).unwrap()).unwrap();
        // 4 + 4 + 3 experts and one linear, less the two that are excluded.
        assert_eq!(report["linears"].as_array().unwrap().len(), 12 - 2);
        assert!(report["sizes"]["keep"].as_f64().unwrap() <= 0.6);
        let run = lrc(&["export", path(&out("coded")), "--format", "gptq", "-o", path(&out("refused"))]);
        assert!(run.code == 4 && !out("refused").exists(), "{}", run.stderr);
    }
}

/// A stack without a compressed matrix stays one tensor, in every format.
#[test]
fn a_stack_that_is_left_alone_stays_whole() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), Dtype::F32);
    let source = Checkpoint::open(&model).unwrap();
    let left = STACKS[2].0;
    for format in ["factored", "dense"] {
        let out = folder.path().join(format);
        let flags = ["--keep", "0.6", "--exclude", "*layers.1.*", "--format", format, "-q"];
        ok(&[&["compress", path(&model), "-o", path(&out)], &flags[..]].concat());
        let output = Checkpoint::open(&out).unwrap();
        assert_eq!(output.require(left).unwrap().shape, STACKS[2].1);
        assert!(bytes(&output, left) == bytes(&source, left));
        let listed = &output.config().unwrap().get("lrc").cloned().unwrap_or_default()["stacks"];
        let names: Vec<&String> = listed.as_object().map_or(Vec::new(), |stacks| stacks.keys().collect());
        let apart = if format == "factored" { vec![STACKS[0].0, STACKS[1].0] } else { Vec::new() };
        assert_eq!(names, apart);
    }
}

#[test]
fn a_dry_run_lists_what_is_taken_and_what_is_passed_through() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), Dtype::F32);
    let out = folder.path().join("out");
    let run = ok(&["compress", path(&model), "-o", path(&out), "--keep", "0.6", "--dry-run", "--json"]);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let modules: Vec<&str> =
        report["linears"].as_array().unwrap().iter().map(|l| l["module"].as_str().unwrap()).collect();
    assert!(modules.contains(&"model.layers.0.mlp.experts.gate_up_proj.3"), "{modules:?}");
    let passed = report["passed_through"].to_string();
    assert!(passed.contains("vision.patch.weight") && passed.contains("router") && !passed.contains("down_proj"));
}
