//! Encoders in GGUF files: what llama.cpp's converter writes, what llama.cpp computes of it, and what is refused.
//! `tests/oracles/encoder_gguf.py` made the files and the values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use lrc::checkpoint::{Checkpoint, Dtype};
use lrc::codecs::gguf::{Description, Element, read};
use lrc::model::Decoder;
use lrc::text::{Bos, Tokenizer};
use serde_json::{Value, json};

use super::{alone, common, fixture, json, lrc, ok, oracle, path, write_weights};

const WORDPIECE: &str = "fixtures/pico/tokenizer-wordpiece.json";

/// The weights of the fixture with a WordPiece vocabulary, as a folder of sentence-transformers.
fn sentence_encoder(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    common::copy(path(&fixture("bert")), &model);
    with_modules(&model, &json!({"pooling_mode_mean_tokens": true}));
    let mut config = json(&model.join("config.json"));
    for key in ["bos_token_id", "eos_token_id"] {
        config.as_object_mut().unwrap().remove(key);
    }
    write(&model, "config.json", &config);
    model
}

fn write(model: &Path, name: &str, content: &Value) {
    std::fs::create_dir_all(model.join(name).parent().unwrap()).unwrap();
    std::fs::write(model.join(name), content.to_string()).unwrap();
}

/// Adds a vocabulary, and modules with this pooling.
fn with_modules(model: &Path, pooling: &Value) {
    std::fs::copy(WORDPIECE, model.join("tokenizer.json")).unwrap();
    let module = |(path, class): (&str, &str)| json!({"path": path, "type": format!("models.{class}")});
    let modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")].map(module);
    write(model, "modules.json", &json!(modules));
    write(model, "1_Pooling/config.json", pooling);
}

/// Name, shape, type and bytes of every tensor of a file.
fn tensors(file: &[u8]) -> BTreeMap<String, (Vec<usize>, u32, Vec<u8>)> {
    let header = read(file).unwrap();
    let tensor = |entry: &lrc::codecs::gguf::Entry| {
        let element = Element::of_type_id(entry.type_id).unwrap();
        let (begin, end) = header.place(entry, element, file.len()).unwrap();
        (entry.name.clone(), (entry.shape.clone(), entry.type_id, file[begin..end].to_vec()))
    };
    header.tensors.iter().map(tensor).collect()
}

/// The metadata of a file, without what is said of every model.
fn metadata(file: &[u8]) -> BTreeMap<String, String> {
    let header = read(file).unwrap();
    let description = Description::new(file, &header);
    let shown = |key: &str| {
        let numbers = (description.number(key), description.numbers(key));
        format!("{:?} {:?} {numbers:?} {:?}", description.text(key), description.texts(key), description.flag(key))
    };
    let own = description.keys().filter(|key| !key.starts_with("general."));
    own.map(|key| (key.to_string(), shown(key))).collect()
}

/// The last states of a text without padding, the embedding, and the ids.
fn embed(model: &Path, text: &str) -> (Vec<f32>, Vec<f32>, Vec<u32>) {
    let checkpoint = lrc::model::open(model).unwrap();
    let tokenizer = Tokenizer::open(&checkpoint).unwrap();
    let (ids, _) = tokenizer.wrap(&tokenizer.encode(text, Bos::Never).unwrap().ids);
    let states = states(&checkpoint, &ids);
    let pooler = Decoder::open(&checkpoint).unwrap().pooler().unwrap();
    let embedding = pooler.pool(&states).unwrap().to_vec1().unwrap();
    (states.flatten_all().unwrap().to_vec1().unwrap(), embedding, ids)
}

fn states(checkpoint: &Checkpoint, ids: &[u32]) -> Tensor {
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    Decoder::open(checkpoint).unwrap().states(&ids).unwrap().squeeze(0).unwrap()
}

fn largest_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max)
}

#[test]
fn files_are_those_of_the_converter_and_embed_as_llama_cpp_does() {
    let folder = tempfile::tempdir().unwrap();
    let model = sentence_encoder(folder.path());
    let (export, dense) = (folder.path().join("export"), folder.path().join("dense"));
    ok(&["export", path(&model), "-o", path(&export), "--format", "gguf", "-q"]);
    let card = std::fs::read_to_string(export.join("README.md")).unwrap();
    assert!(card.contains("llama-embedding -m model.gguf") && card.contains("--reference SOURCE"), "{card}");
    let cases = json(&oracle("encoder.json"));
    let cases = cases.as_array().unwrap();
    let text = |case: &Value| case["text"].as_str().unwrap().to_string();
    let in_folder = cases.iter().map(|case| embed(&export, &text(case)).1).collect::<Vec<_>>();
    let file = alone(folder.path(), &export);
    let [own, theirs] = [file.clone(), oracle("encoder.gguf")].map(|file| std::fs::read(file).unwrap());
    assert_eq!(tensors(&own), tensors(&theirs));
    let (mut own, theirs) = (metadata(&own), metadata(&theirs));
    assert!(own.remove("bert.vocab_size").is_some(), "which files without a vocabulary need");
    assert_eq!(own, theirs);

    ok(&["export", path(&file), "-o", path(&dense), "--format", "dense", "-q"]);
    for (case, in_folder) in cases.iter().zip(in_folder) {
        let (text, expected): (String, Vec<f32>) =
            (text(case), serde_json::from_value(case["embedding"].clone()).unwrap());
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        let source = embed(&model, &text);
        assert_eq!(source.2, ids, "{text}");
        assert_eq!(in_folder, source.1);
        for alone in [&file, &oracle("encoder.gguf"), &dense] {
            assert_eq!(embed(alone, &text), source, "{text}");
        }
        let cosine: f32 = source.1.iter().zip(&expected).map(|(a, b)| a * b).sum();
        // llama.cpp approximates GELU, and attention in 16 bits.
        assert!(cosine > 0.9999, "{text}: {cosine}");
    }
    for (name, key, expected) in [
        ("config.json", "architectures", json!(["BertModel"])),
        ("config.json", "layer_norm_eps", json!(1e-12)),
        ("config.json", "type_vocab_size", json!(2)),
        ("config.json", "hidden_act", json!("gelu")),
        ("config.json", "pad_token_id", json!(0)),
        ("tokenizer_config.json", "mask_token", json!("[MASK]")),
        ("1_Pooling/config.json", "pooling_mode_mean_tokens", json!(true)),
        ("1_Pooling/config.json", "pooling_mode_cls_token", json!(false)),
    ] {
        assert_eq!(json(&dense.join(name))[key], expected, "{name}: {key}");
    }
    let documents = folder.path().join("text.txt");
    std::fs::write(&documents, cases.iter().map(text).collect::<Vec<_>>().join("\n")).unwrap();
    let flags = ["--text", path(&documents), "--reference", path(&model), "--json", "-q"];
    let report = ok(&[&["eval", path(&file)], &flags[..]].concat()).json();
    assert!(report["pooled"]["cosine_min"].as_f64().unwrap() > 0.999_999, "{report}");
}

/// An encoder of one block whose rows are made of whole blocks of codes, without a prefix.
fn wide(folder: &Path, dtype: Dtype) -> PathBuf {
    let model = folder.join("wide");
    std::fs::create_dir(&model).unwrap();
    let mut config = json(&fixture("bert").join("config.json"));
    for (key, value) in [("hidden_size", 32), ("intermediate_size", 64), ("num_hidden_layers", 1)] {
        config[key] = value.into();
    }
    config["dtype"] = if dtype == Dtype::F32 { "float32" } else { "float16" }.into();
    write(&model, "config.json", &config);
    with_modules(&model, &json!({"pooling_mode": "cls"}));
    let mut shapes = vec![
        ("embeddings.word_embeddings.weight".to_string(), vec![51, 32]),
        ("embeddings.position_embeddings.weight".into(), vec![64, 32]),
        ("embeddings.token_type_embeddings.weight".into(), vec![2, 32]),
        ("pooler.dense.weight".into(), vec![32, 32]),
        ("pooler.dense.bias".into(), vec![32]),
    ];
    let layer = "encoder.layer.0";
    for norm in ["embeddings", &format!("{layer}.attention.output"), &format!("{layer}.output")] {
        shapes.extend(["gamma", "beta"].map(|part| (format!("{norm}.LayerNorm.{part}"), vec![32])));
    }
    let parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"];
    let square = parts.map(|part| (part, [32, 32]));
    for (part, shape) in square.into_iter().chain([("intermediate.dense", [64, 32]), ("output.dense", [32, 64])]) {
        shapes.push((format!("{layer}.{part}.weight"), shape.to_vec()));
        shapes.push((format!("{layer}.{part}.bias"), vec![shape[0]]));
    }
    write_weights(&model, shapes, dtype);
    model
}

#[test]
fn compressed_encoders_are_one_model_in_every_form() {
    const TEXT: &str = "the dog listens once, and once more!";
    let folder = tempfile::tempdir().unwrap();
    let model = wide(folder.path(), Dtype::F16);
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "once the dog teased a dog. the time!\n".repeat(40)).unwrap();
    let lorc = ["--quant", "rtn-int4-g32", "--compensate", "lorc", "--compensate-rank", "2"];
    let calibration = ["--samples", "4", "--seq-len", "24", "--calibration", path(&text)];
    let narrow = [&["--structure", "narrow", "--keep", "0.7", "--width-multiple", "8"], &calibration[..]].concat();
    for (name, flags, [matrix, table]) in [
        ("q8_0", &["--quant", "q8_0"][..], [8, 1]),
        ("iq4_nl", &["--quant", "iq4_nl", "--embeddings", "quantize"], [20, 20]),
        ("factors", &lorc, [2, 1]),
        ("narrow", &narrow, [1, 1]),
    ] {
        let [dense, gguf] = ["dense", "gguf"].map(|format| {
            let out = folder.path().join(format!("{name}-{format}"));
            ok(&[&["compress", path(&model), "-o", path(&out), "-q", "--format", format], flags].concat());
            out
        });
        let found = tensors(&std::fs::read(gguf.join("model.gguf")).unwrap());
        let type_of = |name: &str| found[&format!("{name}.weight")].1;
        assert_eq!([type_of("blk.0.ffn_down"), type_of("token_embd")], [matrix, table], "{name}");
        for in_f32 in ["position_embd", "token_types", "token_embd_norm", "blk.0.layer_output_norm"] {
            assert_eq!(type_of(in_f32), 0, "{name}: {in_f32}");
        }
        assert!(found.keys().all(|name| !name.contains("pooler")));
        let expected = embed(&dense, TEXT);
        assert!(largest_error(&expected.0, &embed(&model, TEXT).0) > 1e-3, "{name} is compressed");
        let error = largest_error(&embed(&gguf, TEXT).0, &expected.0);
        // Values of blocks are in 16 bits in the dense twin.
        assert!(error < 2e-3, "{name}: {error}");
        if name == "factors" {
            let lora = tensors(&std::fs::read(gguf.join("model-lora.gguf")).unwrap());
            assert_eq!(lora["blk.0.attn_q.weight.lora_a"].0, [2, 32]);
        }
    }
}

#[test]
fn encoders_that_llama_cpp_would_misread_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let check = |change: &dyn Fn(&Path), expected: &str| {
        let place = tempfile::tempdir().unwrap();
        let model = sentence_encoder(place.path());
        change(&model);
        let command = ["compress", path(&model), "-o", path(&out), "--format", "gguf", "--quant", "rtn-int8-channel"];
        let run = lrc(&command);
        assert!(run.code == 4 && !out.exists(), "{expected}: {} {}", run.code, run.stderr);
        for part in [expected, "hint: `--format factored` and `--format dense`"] {
            assert!(run.stderr.contains(part), "{part}: {}", run.stderr);
        }
    };
    let encoder = |model: &Path| {
        std::fs::copy("fixtures/pico/tokenizer-encoder.json", model.join("tokenizer.json")).unwrap();
    };
    check(&encoder, "`model.type` of its tokenizer is \"BPE\", and llama.cpp splits as if it were \"WordPiece\"");
    let with = |name: &'static str, pointer: &'static str, value: Value| {
        move |model: &Path| {
            let mut content = json(&model.join(name));
            *content.pointer_mut(pointer).unwrap() = value.clone();
            write(model, name, &content);
        }
    };
    check(
        &with("tokenizer.json", "/normalizer/handle_chinese_chars", json!(false)),
        "`normalizer.handle_chinese_chars`",
    );
    check(&with("config.json", "/hidden_act", json!("relu")), "`hidden_act` is `relu`");
    check(&with("modules.json", "/2/type", json!("models.LayerNorm")), "its embedding is `mean`");
    for (pooling, expected) in [
        (json!({"pooling_mode": "max"}), "its embedding is `max, normalized`, and llama.cpp has one of `mean`, `cls`"),
        (json!({"pooling_mode": ["cls", "mean"]}), "its embedding is `cls+mean, normalized`"),
        (json!({"pooling_mode": "attention"}), "unknown pooling mode"),
    ] {
        check(&|model| write(model, "1_Pooling/config.json", &pooling), expected);
    }
    check(
        &|model| std::fs::rename(model.join("tokenizer.json"), model.join("vocab.txt")).unwrap(),
        "its vocabulary is in `vocab.txt`",
    );
    check(
        &|model| {
            let mut tokenizer = json(&model.join("tokenizer.json"));
            tokenizer["normalizer"]["lowercase"] = false.into();
            write(model, "tokenizer.json", &tokenizer);
            write(model, "sentence_bert_config.json", &json!({"do_lower_case": true}));
        },
        "its texts are lowercased before the tokenizer",
    );
    let model = folder.path().join("roberta");
    common::copy(path(&fixture("roberta")), &model);
    let run = lrc(&["compress", path(&model), "-o", path(&out), "--format", "gguf", "--quant", "rtn-int8-channel"]);
    assert!(run.code == 4 && !out.exists() && run.stderr.contains("no table of GGUF names"), "{}", run.stderr);
}
