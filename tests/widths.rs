//! Models whose blocks have widths of their own, as `per_layer_config` gives them.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use lrc::checkpoint::{Checkpoint, SafetensorsWriter, TensorSpec, cast};
use lrc::model::{Decoder, open};
use serde_json::{Value, json};

use crate::common::{lrc, ok, path};

/// 2 blocks with 4 heads of width 8 in 2 groups, hidden size 16, and 24 channels in the feed-forward layer.
const SOURCE: &str = "fixtures/pico/llama";
const HEAD_DIM: usize = 8;

/// The part of a tensor that is kept: its first rows and columns.
#[derive(Clone, Copy)]
struct Kept {
    rows: usize,
    columns: usize,
}

/// Block 0 keeps one of its groups, block 1 keeps 10 channels of its feed-forward layer.
fn kept(name: &str, [rows, columns]: [usize; 2]) -> Kept {
    let has = |part: &str| name.contains(part);
    match name {
        _ if has("layers.0.self_attn.q_proj") => Kept { rows: 2 * HEAD_DIM, columns },
        _ if has("layers.0.self_attn.k_proj") || has("layers.0.self_attn.v_proj") => Kept { rows: HEAD_DIM, columns },
        _ if has("layers.0.self_attn.o_proj") => Kept { rows, columns: 2 * HEAD_DIM },
        _ if has("layers.1.mlp.gate_proj") || has("layers.1.mlp.up_proj") => Kept { rows: 10, columns },
        _ if has("layers.1.mlp.down_proj") => Kept { rows, columns: 10 },
        _ => Kept { rows, columns },
    }
}

/// Writes the source with everything else cut off, or set to 0.
fn write(folder: &Path, is_cut: bool, config: &Value) -> PathBuf {
    let model = folder.join(if is_cut { "narrow" } else { "zeroed" });
    std::fs::create_dir(&model).unwrap();
    let source = Checkpoint::open(Path::new(SOURCE)).unwrap();
    let tensors: Vec<(TensorSpec, Vec<f32>)> = source
        .tensors()
        .map(|info| {
            let values = source.values(&info.name).unwrap();
            let spec = |shape| TensorSpec { name: info.name.clone(), dtype: info.dtype, shape };
            let &[rows, columns] = info.shape.as_slice() else { return (spec(info.shape.clone()), values) };
            let kept = kept(&info.name, [rows, columns]);
            let is_kept = |i: usize| i / columns < kept.rows && i % columns < kept.columns;
            let indexed = values.into_iter().enumerate();
            if is_cut {
                let left = indexed.filter(|(i, _)| is_kept(*i)).map(|(_, v)| v).collect();
                (spec(vec![kept.rows, kept.columns]), left)
            } else {
                (spec(info.shape.clone()), indexed.map(|(i, v)| if is_kept(i) { v } else { 0.0 }).collect())
            }
        })
        .collect();
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(&model, &specs, 1 << 30).unwrap();
    for (spec, values) in &tensors {
        writer.write(&spec.name, &cast::encode(spec.dtype, values).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    model
}

fn config(per_layer: Value) -> Value {
    let text = std::fs::read_to_string(Path::new(SOURCE).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["per_layer_config"] = per_layer;
    config
}

fn narrow(folder: &Path) -> PathBuf {
    let by_block = json!({"0": {"num_attention_heads": 2, "num_key_value_heads": 1}, "1": {"intermediate_size": 10}});
    write(folder, true, &config(by_block))
}

fn logits(model: &Path) -> Tensor {
    let checkpoint = open(model).unwrap();
    let ids = Tensor::new(&[1u32, 7, 30, 2, 19, 5, 44, 23], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    Decoder::open(&checkpoint).unwrap().logits(&ids).unwrap()
}

fn distance(x: &Tensor, y: &Tensor) -> f32 {
    let largest = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    largest((x - y).unwrap()) / largest(y.clone())
}

/// A group whose values nothing reads, and a channel that is always 0, make no difference.
#[test]
fn narrower_blocks_compute_what_zeros_in_wide_ones_do() {
    let folder = tempfile::tempdir().unwrap();
    let narrow = narrow(folder.path());
    let zeroed = write(folder.path(), false, &config(json!({})));
    let (found, expected) = (logits(&narrow), logits(&zeroed));
    assert!(distance(&found, &expected) < 1e-6, "{}", distance(&found, &expected));
    assert!(distance(&expected, &logits(Path::new(SOURCE))) > 1e-3, "the oracle depends on what was cut");
}

#[test]
fn narrower_blocks_are_compressed_and_written_in_formats_that_can_hold_them() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (narrow(folder.path()), folder.path().join("out"));
    let expected = logits(&model);
    for format in ["factored", "dense", "compressed-tensors"] {
        let flags = ["--quant", "rtn-int8-channel", "--format", format, "-q", "--force"];
        ok(&[&["compress", path(&model), "-o", path(&out)], &flags[..]].concat());
        assert!(distance(&logits(&out), &expected) < 0.05, "{format}");
    }
    ok(&["compress", path(&model), "-o", path(&out), "--keep", "1.0", "-q", "--force"]);
    assert!(distance(&logits(&out), &expected) < 1e-4);
    // llama.cpp has such blocks in the family of Llama.
    let gguf = folder.path().join("gguf");
    ok(&["export", path(&model), "-o", path(&gguf), "--format", "gguf"]);
    assert!(distance(&logits(&gguf.join("model.gguf")), &expected) < 1e-5);
    let mut mistral: Value = serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
    mistral["model_type"] = "mistral".into();
    std::fs::write(model.join("config.json"), mistral.to_string()).unwrap();
    let refused = lrc(&["export", path(&model), "-o", path(&folder.path().join("g")), "--format", "gguf"]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    assert!(refused.stderr.contains("`per_layer_config`"), "{}", refused.stderr);
}

#[test]
fn widths_that_cannot_be_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = narrow(folder.path());
    for (by_block, expected) in [
        (json!({"1": {"skip": ["mlp"]}}), "`per_layer_config.1.skip`"),
        (json!({"1": {"intermediate_size": 0}}), "`per_layer_config.1`"),
        (json!({"0": {"num_key_value_heads": 3}}), "not a multiple"),
        (json!({"0": {"head_dim": 4}}), "one rotary embedding"),
        (json!({"2": {"intermediate_size": 9}}), "2 blocks"),
        (json!({"0": {"intermediate_size": 9}}), "has shape"),
        (json!({"1": {"intermediate_size": 1u64 << 60}}), "`intermediate_size` is"),
    ] {
        std::fs::write(model.join("config.json"), config(by_block.clone()).to_string()).unwrap();
        let run = lrc(&["eval", path(&model), "--text", crate::common::HELD_OUT]);
        assert!(run.code == 4 && run.stderr.contains(expected), "{by_block}: {}", run.stderr);
    }
}
