//! One contract for every family: logits and gradients match transformers; an output compressed at any budget in
//! either layout equals its factors multiplied out; tied weights stay tied, and unknown tensors are passed through.

mod against_transformers;
mod centered;
mod compressed;
mod encoders;
mod experts;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use lrc::calibrate::{Needs, Observation, TargetedWindows, Targets, observe};
use lrc::checkpoint::{Checkpoint, SafetensorsWriter, TensorSpec};
use lrc::model::{Decoder, WalkLimits, architectures};
use lrc::progress::Silent;
use lrc::store::Journal;
use serde_json::Value;

/// Largest difference of logits, over the largest logit.
fn error(found: &Tensor, expected: &Value) -> f64 {
    let rows = expected.as_array().unwrap();
    let expected: Vec<f64> = rows.iter().flat_map(|row| row.as_array().unwrap()).map(|x| x.as_f64().unwrap()).collect();
    let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    found.iter().zip(&expected).map(|(f, e)| (f64::from(*f) - e).abs()).fold(0.0, f64::max) / largest
}

pub fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico").join(family)
}

/// Multimodal models, whose language models are run on text; the prefixes of the names of those, and of their towers.
const MULTIMODAL: [(&str, &str, &str); 4] = [
    ("gemma3", "language_model.model.layers.", "vision_tower."),
    ("llava", "language_model.model.layers.", "vision_tower."),
    ("qwen2_5_vl", "model.layers.", "visual."),
    ("smolvlm", "model.text_model.layers.", "model.vision_model."),
];

/// Every known family, models with options that others of their family lack, and multimodal models.
pub fn families() -> Vec<&'static str> {
    [architectures::known_types(), vec!["opt-350m"], MULTIMODAL.map(|(name, ..)| name).to_vec()].concat()
}

fn is_multimodal(family: &str) -> bool {
    MULTIMODAL.iter().any(|(name, ..)| *name == family)
}

pub fn is_encoder(family: &str) -> bool {
    architectures::find(family).is_some_and(|architecture| architecture.encoder.is_some())
}

pub fn tokenizer(family: &str) -> PathBuf {
    fixture(if is_encoder(family) { "tokenizer-encoder.json" } else { "tokenizer.json" })
}

/// What the refusal of a fixture says whose config llama.cpp would misread.
fn misread(family: &str) -> Option<&'static str> {
    match family {
        "gemma2" | "gemma3_text" => Some("`query_pre_attn_scalar` is 12"),
        "smollm3" => Some("each fourth block without a rotary embedding"),
        "qwen3_moe" => Some("block 0 has no experts"),
        _ => None,
    }
}

/// Changes a copy of such a fixture: its config, or blocks.
pub fn as_llama_cpp_expects(family: &str, model: &Path) {
    let mut config = json(&model.join("config.json"));
    match family {
        "gemma2" | "gemma3_text" => config["query_pre_attn_scalar"] = config["head_dim"].clone(),
        "smollm3" => config["no_rope_layers"] = serde_json::json!([1, 1, 1, 0]),
        "qwen3_moe" => {
            config["mlp_only_layers"] = serde_json::json!([]);
            give_experts_to_the_first_block(model);
        }
        _ => {}
    }
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
}

/// Replaces the feed-forward layer of the first block by that of the second.
fn give_experts_to_the_first_block(model: &Path) {
    const PARTS: [&str; 2] = ["model.layers.0.mlp.", "model.layers.1.mlp."];
    let source = Checkpoint::open(model).unwrap();
    let kept = source.tensors().filter(|info| !info.name.starts_with(PARTS[0]));
    let mut specs: Vec<(String, TensorSpec)> = Vec::new();
    for info in kept {
        let spec = |name| TensorSpec { name, dtype: info.dtype, shape: info.shape.clone() };
        specs.push((info.name.clone(), spec(info.name.clone())));
        if let Some(rest) = info.name.strip_prefix(PARTS[1]) {
            specs.push((info.name.clone(), spec(format!("{}{rest}", PARTS[0]))));
        }
    }
    let folder = model.join("changed");
    std::fs::create_dir(&folder).unwrap();
    let all: Vec<TensorSpec> = specs.iter().map(|(_, spec)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(&folder, &all, u64::MAX).unwrap();
    for (from, spec) in &specs {
        writer.write(&spec.name, &source.with_bytes(from, <[u8]>::to_vec).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    std::fs::rename(folder.join("model.safetensors"), model.join("model.safetensors")).unwrap();
    std::fs::remove_dir(folder).unwrap();
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The values of transformers for a family, and the tokens that they belong to.
pub fn expected(family: &str) -> (Value, Vec<u32>) {
    let expected = json(&fixture(family).join("expected.json"));
    let ids = expected["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    (expected, ids)
}

pub fn logits(model: &Path, ids: &[u32]) -> anyhow::Result<Tensor> {
    let checkpoint = lrc::model::open(model)?;
    Decoder::open(&checkpoint)?.logits(&Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?)
}

/// Compares the gradients at the outputs of every linear with those of torch.
fn check_gradients(family: &str, decoder: &Decoder<'_>, ids: Vec<u32>, targets: Targets, expected: &Value) {
    let observation = Observation { needs: Needs::ALL, clip_gradients: false };
    let limits = WalkLimits::new(1 << 30, std::env::temp_dir());
    let mut sums = HashMap::new();
    let windows = TargetedWindows { windows: &[ids], targets: &[targets], n_gradients: 1 };
    observe(decoder, windows, observation, &limits, &Journal::default(), &Silent, &mut |found| {
        sums.extend(found.into_iter().map(|(name, array)| (name, array.read().unwrap().f32s().unwrap())));
        Ok(())
    })
    .unwrap();
    let by_linear: BTreeMap<String, Vec<f64>> = serde_json::from_value(expected.clone()).unwrap();
    let n_linears: usize = (0..decoder.n_blocks()).map(|block_idx| decoder.linears(block_idx).len()).sum();
    assert_eq!(by_linear.len(), n_linears, "{family}");
    for (module, expected) in by_linear {
        // Names are those of the fixture, even if the files of the decoder leave parts out.
        let native = || decoder.architecture.linear_id(decoder.architecture.prefix, &module);
        let id = decoder.linear_id(&module).or_else(native).unwrap_or_else(|| panic!("{family} knows no `{module}`"));
        // The diagonal of a lower triangle.
        let gram = &sums[&format!("{}.{}.output_gram", id.block, id.slot.name())];
        let found = (0..expected.len()).map(|i| f64::from(gram[i * (i + 1) / 2 + i]));
        let scale = expected.iter().fold(0.0, |m: f64, v| m.max(*v));
        for (found, expected) in found.zip(&expected) {
            assert!((found - expected).abs() <= 2e-5 * scale, "{family}, {module}: {found} for {expected}");
        }
    }
}

fn error_of(model: &Path, ids: &[u32], expected: &Value) -> f64 {
    error(&logits(model, ids).unwrap(), &expected["cases"][0]["logits"])
}

/// Largest difference over the largest value of `y`.
pub fn distance(x: &Tensor, y: &Tensor) -> f32 {
    let largest = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    largest((x - y).unwrap()) / largest(y.clone())
}

/// Everything but the compressed linears is in the output, byte for byte, and there is nothing else.
fn check_the_rest(family: &str, source: &Path, output: &Path) {
    let [before, after] = [source, output].map(|folder| Checkpoint::open(folder).unwrap());
    let report = json(&output.join("lrc-report.json"));
    let compressed: Vec<&str> = report["linears"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|l| !l["rank"].is_null())
        .map(|l| l["module"].as_str().unwrap())
        .collect();
    assert!(!compressed.is_empty());
    for info in before.tensors() {
        if compressed.iter().any(|module| info.name.starts_with(&format!("{module}."))) {
            continue;
        }
        let bytes = |checkpoint: &Checkpoint| checkpoint.with_bytes(&info.name, <[u8]>::to_vec).unwrap();
        assert!(bytes(&before) == bytes(&after), "{family}: `{}` is passed through", info.name);
    }
    let has_head = |checkpoint: &Checkpoint| {
        checkpoint.tensors().any(|t| t.name.contains("lm_head") || t.name.contains("embed_out"))
    };
    assert_eq!(has_head(&before), has_head(&after), "{family}: what is tied stays tied");
}
