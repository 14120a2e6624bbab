//! GGUF files without a config beside them: model, tokenizer and blocks are what their metadata say.

mod encoders;
mod experts;
mod refusals;
mod split;
mod tokenizers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lrc::checkpoint::{Checkpoint, Dtype, MadeFiles, OfGguf, SafetensorsWriter, ShownTensor, TensorSpec, cast};
use lrc::codecs::gguf::Arrangement;
use lrc::model::architectures;
use serde_json::{Map, Value};

use super::common::{self, FIXTURE, HELD_OUT, lrc, ok, path};
use super::families::{as_llama_cpp_expects, distance, expected, fixture, is_encoder, json, logits};

/// A file by another writer; see `tests/oracles/gguf_files.py`.
fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracles").join(name)
}

/// The model file of an export, moved to a folder of its own.
fn alone(folder: &Path, export: &Path) -> PathBuf {
    let file = folder.join("alone/m.gguf");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::rename(export.join("model.gguf"), &file).unwrap();
    file
}

/// Writes weights of these names and shapes, any values between -0.5 and 0.5.
fn write_weights(model: &Path, shapes: Vec<(String, Vec<usize>)>, dtype: Dtype) {
    let specs: Vec<TensorSpec> = shapes.into_iter().map(|(name, shape)| TensorSpec { name, dtype, shape }).collect();
    let mut writer = SafetensorsWriter::create(model, &specs, 1 << 30).unwrap();
    for (i, spec) in specs.iter().enumerate() {
        let value = |j: usize| ((i * 7919 + j) as f64 * 0.618_033_988_749_894_9).fract() as f32 - 0.5;
        let values: Vec<f32> = (0..spec.shape.iter().product()).map(value).collect();
        writer.write(&spec.name, &cast::encode(dtype, &values).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

/// Shape and values of every tensor.
fn tensors(model: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let checkpoint = lrc::model::open(model).unwrap();
    let tensor = |info: &lrc::checkpoint::TensorInfo| {
        (info.name.clone(), (info.shape.clone(), checkpoint.values(&info.name).unwrap()))
    };
    checkpoint.tensors().map(tensor).collect()
}

#[test]
fn files_alone_are_the_models_that_they_were_made_of() {
    for family in architectures::known_types() {
        // Files of encoders have no head.
        if architectures::gguf_family(family).is_none() || is_encoder(family) {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let (_, ids) = expected(family);
        let model = folder.path().join("model");
        common::copy(path(&fixture(family)), &model);
        as_llama_cpp_expects(family, &model);
        if family == "mistral" {
            // GGUF files have no window for it.
            let mut config = json(&model.join("config.json"));
            config["sliding_window"] = Value::Null;
            std::fs::write(model.join("config.json"), config.to_string()).unwrap();
        }
        let export = folder.path().join("export");
        ok(&["export", path(&model), "-o", path(&export), "--format", "gguf", "-q"]);
        let file = alone(folder.path(), &export);
        let source = logits(&model, &ids).unwrap();
        let found = logits(&file, &ids).unwrap_or_else(|e| panic!("{family}: {e:#}"));
        assert!(distance(&found, &source) < 1e-5, "{family}: {}", distance(&found, &source));

        let dense = folder.path().join("dense");
        ok(&["export", path(&file), "-o", path(&dense), "--format", "dense", "-q"]);
        let (before, after) = (tensors(&model), tensors(&dense));
        for (name, (shape, values)) in &after {
            let (own_shape, own) = before.get(name).unwrap_or_else(|| panic!("{family}: `{name}`"));
            assert_eq!((family, name, shape), (family, name, own_shape));
            // 1 is added to norms in f32, and taken away again.
            assert!(values.iter().zip(own).all(|(a, b)| (a - b).abs() < 1e-6), "{family}: `{name}`");
        }
        let left_out = before.keys().filter(|name| !after.contains_key(*name));
        let left_out: Vec<&String> = left_out.filter(|name| !name.ends_with("attn.bias")).collect();
        assert!(left_out.is_empty(), "{family}: {left_out:?}");
        let (was, is) = (json(&model.join("config.json")), json(&dense.join("config.json")));
        let kept = ["hidden_size", "n_embd", "vocab_size", "tie_word_embeddings", "hidden_activation", "n_positions"];
        for key in kept.into_iter().chain(["sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping"]) {
            assert!(
                is.get(key).is_none_or(|value| value.is_null() || was.get(key) == Some(value)),
                "{family}: `{key}`"
            );
        }
        if family != "mistral" {
            assert_eq!(is["architectures"], was["architectures"]);
        }
    }
}

#[test]
fn quantized_files_alone_have_the_perplexity_of_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let export = folder.path().join("export");
    ok(&["compress", FIXTURE, "-o", path(&export), "--format", "gguf", "--quant", "q4_0", "-q"]);
    let score = |model: &Path| {
        ok(&["eval", path(model), "--text", HELD_OUT, "--seq-len", "64", "--max-windows", "4", "--json"]).json()
    };
    let before = score(&export);
    let file = alone(folder.path(), &export);
    let after = score(&file);
    for key in ["ppl", "total_tokens", "windows"] {
        assert_eq!(before[key], after[key], "{key}");
    }
    // The file in a folder without a config, among other files.
    std::fs::write(file.with_file_name("README.md"), "about").unwrap();
    assert_eq!(score(file.parent().unwrap())["ppl"], after["ppl"]);
    let dense = folder.path().join("dense");
    ok(&["export", path(&file), "-o", path(&dense), "--format", "dense", "-q"]);
    // Values of blocks are stored in 16 bits.
    let [dense, after] = [score(&dense), after].map(|report| report["ppl"].as_f64().unwrap());
    assert!((dense / after - 1.0).abs() < 1e-3, "{dense} {after}");
    let again = folder.path().join("again");
    let refused = lrc(&["compress", path(&file), "-o", path(&again), "--keep", "0.8"]);
    assert!(refused.code == 2 && refused.stderr.contains("`--dequantize`"), "{}", refused.stderr);
}

#[test]
fn blocks_have_the_values_that_their_library_gives() {
    fn shown(tensor: &str, _: &Map<String, Value>) -> Option<ShownTensor> {
        Some(ShownTensor { name: tensor.into(), arrangement: Arrangement::Same, is_transposed: false })
    }
    let of = OfGguf { tensor: shown, config: |_| Ok(Map::new()), files: |_, _| Ok(MadeFiles::new()) };
    let checkpoint = Checkpoint::open_with(&oracle("blocks.gguf"), of).unwrap();
    let names: Vec<&str> = checkpoint.tensors().map(|info| info.name.as_str()).collect();
    let blocks: Vec<&str> = names.into_iter().filter(|name| !name.ends_with(".values")).collect();
    assert_eq!(blocks.len(), 18);
    for name in blocks {
        let (found, expected) =
            (checkpoint.values(name).unwrap(), checkpoint.values(&format!("{name}.values")).unwrap());
        assert_eq!(found.len(), expected.len());
        let most = expected.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        for (f, e) in found.iter().zip(&expected) {
            assert!((f - e).abs() <= 1e-6 * most, "{name}: {f} {e}");
        }
    }
}

/// Made by transformers 5.24, which reads the file as well: the first four windows, without BOS.
#[test]
#[ignore = "needs `../shared/models/smollm2.gguf` and `../shared/text`"]
fn a_published_file_has_the_perplexity_that_transformers_gives() {
    let (file, text) = (common::beside("models/smollm2.gguf"), common::beside("text/wikitext2-evaluate.txt"));
    let score = |model: &Path| {
        let windows = ["--seq-len", "512", "--max-windows", "4", "--bos", "never", "--json"];
        ok(&[&["eval", path(model), "--text", path(&text)], &windows[..]].concat()).json()
    };
    let found = score(&file);
    assert_eq!(found["total_tokens"], 115_081);
    assert!((found["ppl"].as_f64().unwrap() - 44.564472).abs() < 2e-5, "{}", found["ppl"]);
    let folder = tempfile::tempdir().unwrap();
    let dense = folder.path().join("dense");
    ok(&["export", path(&file), "-o", path(&dense), "--format", "dense", "-q"]);
    let dense = score(&dense);
    assert_eq!(dense["total_tokens"], 115_081);
    assert!((dense["ppl"].as_f64().unwrap() - 44.564472).abs() < 2e-3, "{}", dense["ppl"]);
}
