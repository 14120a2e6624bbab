//! Graphs compute what the model computes, in every family and every form of its linears, and are whole by themselves.

mod interpreter;

use std::collections::HashSet;
use std::path::Path;

use candle_core::{Device, Tensor};
use lrc::checkpoint::Checkpoint;
use lrc::model::Decoder;
use serde_json::Value;

use crate::common::{FIXTURE, TRAIN, copy, lrc, ok, path};
use crate::families::{families, fixture};
use interpreter::Files;

const IDS: [u32; 9] = [5, 9, 33, 47, 2, 17, 40, 8, 21];

fn largest(t: &Tensor) -> f32 {
    t.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// The last states of an encoder, or the logits of a language model, as lrc computes them.
fn expected(model: &Path, ids: &Tensor) -> Tensor {
    let checkpoint = Checkpoint::open(model).unwrap();
    let decoder = Decoder::open(&checkpoint).unwrap();
    match decoder.architecture.encoder {
        Some(_) => decoder.states(ids).unwrap(),
        None => decoder.logits(ids).unwrap(),
    }
}

/// Exports a model, and compares its graph with it, the second time on padded sequences.
fn check(model: &Path, out: &Path) -> Files {
    ok(&["export", path(model), "--format", "onnx", "-o", path(out), "-q"]);
    let files = Files::of(out);
    expect_whole(&files);
    let ids = Tensor::new(&IDS, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let expected = expected(model, &ids);
    let found = files.run(&ids, 0);
    assert_eq!(found.dims(), expected.dims());
    let error = largest(&(&found - &expected).unwrap()) / largest(&expected);
    assert!(error < 1e-5, "{}: {error}", model.display());
    // Tokens before the padding do not see it, in a batch of two.
    let padded = Tensor::new(&[&IDS[..], &[3, 3]].concat()[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let found = files.run(&Tensor::cat(&[&padded, &padded], 0).unwrap(), 2);
    let found = found.get(1).unwrap().narrow(0, 0, IDS.len()).unwrap();
    let error = largest(&(&found - &expected.get(0).unwrap()).unwrap()) / largest(&expected);
    assert!(error < 1e-5, "{}: {error} with padding", model.display());
    files
}

/// Every operand is there before its node, names are given once, and tensors are apart and as long as their shapes say.
fn expect_whole(files: &Files) {
    let graph = files.graph();
    let opsets: Vec<(&str, i64)> = files.model.opset_import.iter().map(|set| (&set.domain[..], set.version)).collect();
    assert_eq!((files.model.ir_version, opsets[0]), (8, ("", 17)));
    let mut names: HashSet<&str> = HashSet::new();
    let given = graph.input.iter().map(|input| &input.name[..]).chain(graph.initializer.iter().map(|t| &t.name[..]));
    given.for_each(|name| assert!(names.insert(name), "`{name}` is given twice"));
    let mut nodes: HashSet<&str> = HashSet::new();
    for node in &graph.node {
        assert!(node.input.iter().all(|name| names.contains(&name[..])), "{node:?}");
        assert!(nodes.insert(&node.name) && node.output.iter().all(|name| names.insert(name)), "{node:?}");
        assert!(opsets.iter().any(|(domain, _)| *domain == node.domain), "{node:?}");
    }
    assert!(names.contains(&graph.output[0].name[..]));
    let read: HashSet<&str> = graph.node.iter().flat_map(|node| &node.input).map(String::as_str).collect();
    let mut end = 0;
    for tensor in &graph.initializer {
        assert!(read.contains(&tensor.name[..]), "`{}` is read", tensor.name);
        let width =
            [(1, 4), (2, 1), (6, 4), (7, 8), (10, 2), (16, 2)].iter().find(|(kind, _)| *kind == tensor.data_type);
        let n_elements: i64 = tensor.dims.iter().product();
        assert_eq!(files.bytes(tensor).len(), n_elements as usize * width.unwrap().1, "{}", tensor.name);
        if let Some((begin, to)) = files.place(tensor) {
            assert!(begin >= end && begin - end < 64 && begin % 64 == 0, "{}: {begin} after {end}", tensor.name);
            end = to;
        }
    }
    assert_eq!(end, files.data.len());
}

#[test]
fn every_family_without_experts_is_a_graph() {
    let folder = tempfile::tempdir().unwrap();
    for family in families() {
        let (model, out) = (fixture(family), folder.path().join(family));
        let refused = match family {
            "mixtral" => Some("`model.layers.0` has experts"),
            "qwen3_moe" => Some("has experts"),
            "gemma3" | "llava" | "qwen2_5_vl" | "smolvlm" => Some("it is a multimodal model"),
            _ => None,
        };
        let Some(refused) = refused else {
            check(&model, &out);
            continue;
        };
        let run = lrc(&["export", path(&model), "--format", "onnx", "-o", path(&out), "-q"]);
        assert!(run.code == 4 && run.stderr.contains(refused), "{family}: {}", run.stderr);
        assert!(
            run.stderr.contains("hint: `--format factored` and `--format dense` hold every model"),
            "{}",
            run.stderr
        );
    }
}

#[test]
fn values_are_the_bytes_of_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let files = check(Path::new(FIXTURE), &folder.path().join("out"));
    let source = Checkpoint::open(Path::new(FIXTURE)).unwrap();
    let mut n_bytes = 0;
    for info in source.tensors() {
        let tensor = files.tensor(&info.name);
        source.with_bytes(&info.name, |bytes| assert!(files.bytes(tensor) == bytes, "{}", info.name)).unwrap();
        n_bytes += info.n_bytes();
    }
    // Nothing else is stored apart; the graph itself is small.
    assert!(files.data.len() as u64 - n_bytes < 64 * source.tensors().count() as u64);
    let inputs: Vec<&str> = files.graph().input.iter().map(|input| &input.name[..]).collect();
    assert_eq!((inputs, &files.graph().output[0].name[..]), (vec!["input_ids", "attention_mask"], "logits"));
}

/// Compresses the fixture to the default format and to a graph, which are the same model.
fn compressed(folder: &Path, flags: &[&str]) -> Files {
    let at = |name: &str| folder.join(format!("{name}{}", flags.join("_").replace('/', "")));
    for format in ["factored", "onnx"] {
        ok(&[&["compress", FIXTURE, "-o", path(&at(format)), "--format", format, "-q"], flags].concat());
    }
    check(&at("factored"), &at("exported"));
    let files = Files::of(&at("onnx"));
    expect_whole(&files);
    // What linears share is stored once, and no export knows that they do.
    let exported = Files::of(&at("exported"));
    for tensor in files.graph().initializer.iter().filter(|tensor| tensor.data_location.is_some()) {
        let same = exported.tensor(&tensor.name);
        assert!(files.bytes(tensor) == exported.bytes(same), "{flags:?}: `{}` is exported as another", tensor.name);
    }
    assert!(flags.contains(&"--share") || exported.data.len() == files.data.len(), "{flags:?}");
    let report: Value = serde_json::from_slice(&std::fs::read(at("onnx").join("lrc-report.json")).unwrap()).unwrap();
    let sizes =
        ["model.onnx", "model.onnx_data"].map(|name| at("onnx").join("onnx").join(name).metadata().unwrap().len());
    assert_eq!(report["sizes"]["file_bytes_after"], sizes.iter().sum::<u64>(), "{flags:?}");
    files
}

#[test]
fn every_form_of_a_linear_has_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let text = ["--calibration", TRAIN, "--samples", "2", "--seq-len", "32", "--sequential=false"];
    for (flags, op, least) in [
        (&["--keep", "0.7"][..], "EyeLike", 20),
        (&["--keep", "0.7", "--layout", "factors", "--ranks", "uniform"], "MatMul", 56),
        (&["--keep", "0.7", "--layout", "monarch"], "MatMul", 40),
        (&["--keep", "0.7", "--layout", "blast"], "ReduceSum", 4),
        (&["--keep", "0.7", "--quant-factors", "int8"], "MatMulNBits", 30),
        (&["--quant", "rtn-int4-g32"], "MatMulNBits", 28),
        (&["--quant", "rtn-int3-channel-asym", "--compensate", "lorc", "--compensate-rank", "4"], "MatMulNBits", 28),
        (&["--structure", "narrow", "--keep", "0.7", "--uniform-width=false", "--width-multiple", "16"], "MatMul", 28),
        (&[&["--keep", "0.7", "--layout", "factors", "--share"][..], &text].concat(), "MatMul", 40),
    ] {
        let files = compressed(folder.path(), flags);
        let n_nodes = files.graph().node.iter().filter(|node| node.op_type == op).count();
        assert!(n_nodes >= least, "{flags:?}: {n_nodes} of `{op}`");
    }
}

#[test]
fn a_budget_in_bytes_is_that_of_both_files() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    ok(&["compress", FIXTURE, "-o", path(&out), "--format", "onnx", "--target-size", "900kB", "-q"]);
    let size = |name: &str| out.join("onnx").join(name).metadata().unwrap().len();
    let found = size("model.onnx") + size("model.onnx_data");
    assert!((890_000..=900_000).contains(&found), "{found}");
}

#[test]
fn sixteen_bits_stay_sixteen_bits() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    copy(FIXTURE, &at("bf16"));
    let source = Checkpoint::open(Path::new(FIXTURE)).unwrap();
    let specs: Vec<_> = source
        .tensors()
        .map(|info| lrc::checkpoint::TensorSpec {
            name: info.name.clone(),
            dtype: lrc::checkpoint::Dtype::BF16,
            shape: info.shape.clone(),
        })
        .collect();
    let values: Vec<Vec<f32>> = specs.iter().map(|spec| source.values(&spec.name).unwrap()).collect();
    lrc::checkpoint::write_file(&at("bf16").join("model.safetensors"), &specs, |spec| {
        let at = specs.iter().position(|other| other.name == spec.name).unwrap();
        Ok::<_, anyhow::Error>(lrc::checkpoint::cast::encode(spec.dtype, &values[at]).unwrap())
    })
    .unwrap();
    let files = check(&at("bf16"), &at("out"));
    let largest = files.graph().initializer.iter().max_by_key(|tensor| files.bytes(tensor).len()).unwrap();
    assert_eq!(largest.data_type, 16, "{}", largest.name);
}

#[test]
fn what_no_node_computes_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (flags, code, expected) in [
        (&["--quant", "nf4"][..], 4, "ONNX Runtime multiplies integers, not `nf4"),
        (&["--quant", "q8_0"], 4, "ONNX Runtime multiplies integers, not `q8_0`"),
        (&["--quant", "rtn-int4-g8"], 4, "a power of two of columns from 16, not 8"),
        (&["--keep", "0.7", "--layout", "monarch", "--quant-factors", "int8"], 4, "not of the layout `monarch`"),
        (&["--keep", "0.7", "--layout", "blast", "--quant-factors", "int8"], 4, "not of the layout `blast`"),
        (&["--keep", "0.7", "--elastic"], 2, "`--elastic` has no effect with `--format onnx`"),
        (&["--target-size", "300kB", "--embeddings", "quantize"], 2, "whose loaders read embeddings in floats"),
    ] {
        let run = lrc(&[&["compress", FIXTURE, "-o", path(&out), "--format", "onnx", "-q"], flags].concat());
        assert!(run.code == code && run.stderr.contains(expected), "{flags:?}: {} {}", run.code, run.stderr);
        assert!(run.stderr.contains("hint: "), "{flags:?}: {}", run.stderr);
        assert!(!out.exists());
    }
    copy(FIXTURE, &folder.path().join("model"));
    let config = folder.path().join("model/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let scaling = "\"rope_scaling\": {\"rope_type\": \"dynamic\", \"factor\": 2.0},\n  \"rope_theta\"";
    std::fs::write(&config, text.replace("\"rope_theta\"", scaling)).unwrap();
    let run = lrc(&["export", path(&folder.path().join("model")), "--format", "onnx", "-o", path(&out), "-q"]);
    assert!(run.code == 4 && run.stderr.contains("`dynamic`, depends on the length of the text"), "{}", run.stderr);
}
