//! Mixtures of experts in GGUF files: one tensor for each linear of all experts of a block.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lrc::checkpoint::Dtype;
use lrc::codecs::gguf::{Description, read};
use serde_json::{Value, json};

use super::{alone, common, distance, fixture, json, logits, lrc, ok, path, tensors, write_weights};
use crate::families::{as_llama_cpp_expects, tokenizer};

const FAMILIES: [&str; 2] = ["mixtral", "qwen3_moe"];
const IDS: [u32; 12] = [1, 7, 9, 30, 12, 4, 41, 8, 8, 22, 15, 3];
const HIDDEN: usize = 32;
const INNER: usize = 64;
const EXPERTS: usize = 3;

/// A mixture of two blocks whose rows are made of whole blocks of codes.
fn mixture(folder: &Path, family: &str, dtype: Dtype) -> PathBuf {
    let model = folder.join(format!("{family}-{dtype:?}"));
    std::fs::create_dir(&model).unwrap();
    let mut config = json(&fixture(family).join("config.json"));
    let inner = if family == "mixtral" { "intermediate_size" } else { "moe_intermediate_size" };
    for (key, value) in [("hidden_size", HIDDEN), ("head_dim", 8), (inner, INNER), ("num_local_experts", EXPERTS)] {
        config[key] = value.into();
    }
    config["num_experts_per_tok"] = 2.into();
    config["mlp_only_layers"] = json!([]);
    config["dtype"] = if dtype == Dtype::F32 { "float32" } else { "bfloat16" }.into();
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    std::fs::copy(tokenizer(family), model.join("tokenizer.json")).unwrap();
    write_weights(&model, shapes(family), dtype);
    model
}

/// Names and shapes of its tensors.
fn shapes(family: &str) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_string(), vec![48, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
        ("lm_head.weight".into(), vec![48, HIDDEN]),
    ];
    let (part, [gate, up, down]) = match family {
        "mixtral" => ("block_sparse_moe", ["w1", "w3", "w2"]),
        _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
    };
    for block in 0..2 {
        let mut add = |name: String, shape: &[usize]| {
            all.push((format!("model.layers.{block}.{name}.weight"), shape.to_vec()));
        };
        for (name, rows) in [("q", 32), ("k", 16), ("v", 16), ("o", 32)] {
            add(format!("self_attn.{name}_proj"), &[rows, HIDDEN]);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(name.into(), &[HIDDEN]);
        }
        for name in ["q_norm", "k_norm"].into_iter().filter(|_| family != "mixtral") {
            add(format!("self_attn.{name}"), &[8]);
        }
        add(format!("{part}.gate"), &[EXPERTS, HIDDEN]);
        for expert in 0..EXPERTS {
            for (name, shape) in [(gate, [INNER, HIDDEN]), (up, [INNER, HIDDEN]), (down, [HIDDEN, INNER])] {
                add(format!("{part}.experts.{expert}.{name}"), &shape);
            }
        }
    }
    all
}

/// Shape and number of the type of every tensor of a file.
fn header(file: &Path) -> BTreeMap<String, (Vec<usize>, u32)> {
    let bytes = std::fs::read(file).unwrap();
    read(&bytes).unwrap().tensors.into_iter().map(|entry| (entry.name, (entry.shape, entry.type_id))).collect()
}

/// Checks the names, shapes and types that llama.cpp expects of a mixture, and its metadata.
fn check_file(family: &str, file: &Path, [experts, others]: [u32; 2]) {
    let found = header(file);
    for block in 0..2 {
        let of = |name: &str| found.get(&format!("blk.{block}.{name}.weight")).unwrap_or_else(|| panic!("{name}"));
        for name in ["ffn_gate_exps", "ffn_up_exps"] {
            assert_eq!(*of(name), (vec![EXPERTS, INNER, HIDDEN], experts), "{family}: {name}");
        }
        assert_eq!(*of("ffn_down_exps"), (vec![EXPERTS, HIDDEN, INNER], experts), "{family}");
        assert_eq!(*of("ffn_gate_inp"), (vec![EXPERTS, HIDDEN], 0), "{family}: routers are f32");
        assert_eq!(*of("ffn_norm"), (vec![HIDDEN], 0), "{family}");
        assert_eq!(of("attn_q").1, experts, "{family}");
    }
    assert_eq!(found["token_embd.weight"].1, others, "{family}");
    assert!(found.keys().all(|name| !name.contains("exps.") || name.ends_with("exps.weight")), "{family}");
    assert_eq!(found.contains_key("blk.1.attn_q_norm.weight"), family == "qwen3_moe");
    let bytes = std::fs::read(file).unwrap();
    let header = read(&bytes).unwrap();
    let description = Description::new(&bytes, &header);
    let architecture = if family == "mixtral" { "llama" } else { "qwen3moe" };
    assert_eq!(description.text("general.architecture").as_deref(), Some(architecture));
    let count = |key: &str| description.count(&format!("{architecture}.{key}"));
    assert_eq!([count("expert_count"), count("expert_used_count")], [Some(EXPERTS as u64), Some(2)], "{family}");
    let own = (family == "qwen3_moe").then_some(INNER as u64);
    assert_eq!(count("expert_feed_forward_length"), own, "{family}");
}

#[test]
fn experts_are_stacked_and_come_back_one_by_one() {
    for family in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let model = mixture(folder.path(), family, Dtype::F32);
        let out = |name: &str| folder.path().join(name);
        ok(&["export", path(&model), "-o", path(&out("plain")), "--format", "gguf", "-q"]);
        check_file(family, &out("plain").join("model.gguf"), [0, 0]);
        let half = mixture(folder.path(), family, Dtype::BF16);
        ok(&["export", path(&half), "-o", path(&out("half")), "--format", "gguf", "-q"]);
        check_file(family, &out("half").join("model.gguf"), [30, 30]);
        for (quant, type_id) in [("q8_0", 8), ("iq4_nl", 20), ("rtn-int4-g32", 2)] {
            let [dense, gguf] = ["dense", "gguf"].map(|format| {
                let out = out(&format!("{quant}-{format}"));
                ok(&["compress", path(&model), "-o", path(&out), "--quant", quant, "--format", format, "-q"]);
                out
            });
            check_file(family, &gguf.join("model.gguf"), [type_id, 0]);
            let expected = logits(&dense, &IDS).unwrap();
            let found = logits(&gguf, &IDS).unwrap();
            assert!(distance(&found, &expected) < 1e-5, "{family}, {quant}: {}", distance(&found, &expected));
            std::fs::create_dir_all(out(quant)).unwrap();
            let file = alone(&out(quant), &gguf);
            // Values of blocks have 16 bits in a config that a file describes, and are computed with in f32.
            let found = logits(&file, &IDS).unwrap();
            assert!(distance(&found, &expected) < 1e-5, "{family}, {quant} alone: {}", distance(&found, &expected));
            let inspected = ok(&["inspect", path(&file)]).stdout;
            assert!(inspected.contains("experts."), "{inspected}");
            let names = |model: &Path| tensors(model).into_keys().collect::<Vec<_>>();
            assert_eq!(names(&file), names(&model), "{family}");
        }
    }
}

#[test]
fn factors_of_experts_are_stacked_in_the_adapter() {
    for family in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let model = mixture(folder.path(), family, Dtype::F32);
        let flags = ["--quant", "rtn-int4-g32", "--compensate", "lorc", "--compensate-rank", "2", "-q", "--format"];
        let [dense, gguf] = ["dense", "gguf"].map(|format| {
            let out = folder.path().join(format);
            ok(&[&["compress", path(&model), "-o", path(&out)], &flags[..], &[format]].concat());
            out
        });
        let found = header(&gguf.join("model-lora.gguf"));
        assert_eq!(found["blk.1.ffn_down_exps.weight.lora_a"], (vec![EXPERTS, 2, INNER], 0));
        assert_eq!(found["blk.1.ffn_down_exps.weight.lora_b"], (vec![EXPERTS, HIDDEN, 2], 0));
        let error = distance(&logits(&gguf, &IDS).unwrap(), &logits(&dense, &IDS).unwrap());
        assert!(error < 1e-5, "{family}: {error}");
    }
}

#[test]
fn narrower_mixtures_become_one_model_in_every_form() {
    for family in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
        common::copy(path(&fixture(family)), &model);
        std::fs::copy(tokenizer(family), model.join("tokenizer.json")).unwrap();
        as_llama_cpp_expects(family, &model);
        std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(40)).unwrap();
        let flags = ["--structure", "narrow", "--keep", "0.6", "--width-multiple", "4", "--samples", "4"];
        let flags = [&flags[..], &["--seq-len", "24", "--calibration", path(&text), "-q", "--format"]].concat();
        let [dense, gguf] = ["dense", "gguf"].map(|format| {
            let out = folder.path().join(format);
            ok(&[&["compress", path(&model), "-o", path(&out)], &flags[..], &[format]].concat());
            out
        });
        let expected = logits(&dense, &IDS).unwrap();
        assert!(distance(&expected, &logits(&model, &IDS).unwrap()) > 1e-3, "{family} is narrower");
        let config = json(&dense.join("config.json"));
        let file = alone(folder.path(), &gguf);
        let found = &header(&file)["blk.1.ffn_up_exps.weight"].0;
        let inner = if family == "mixtral" { "intermediate_size" } else { "moe_intermediate_size" };
        let numbers = ["num_local_experts", inner, "hidden_size"].map(|key| config[key].as_u64().unwrap() as usize);
        assert_eq!(found[..], numbers, "{family}");
        let error = distance(&logits(&file, &IDS).unwrap(), &expected);
        assert!(error < 1e-5, "{family}: {error}");
    }
}

#[test]
fn experts_that_cannot_be_stacked_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let model = mixture(folder.path(), "mixtral", Dtype::F32);
    let check = |model: &Path, flags: &[&str], parts: &[&str]| {
        let run = lrc(&[&["compress", path(model), "-o", path(&out), "--format", "gguf"], flags].concat());
        assert!(run.code == 4 && !out.exists(), "{flags:?}: {}", run.stderr);
        parts.iter().for_each(|part| assert!(run.stderr.contains(part), "{part}: {}", run.stderr));
    };
    let one = "all experts of a block need one quantizer and one rank";
    check(
        &model,
        &["--quant", "q8_0", "--exclude", "*experts.1.w1"],
        &[one, "`blk.0.ffn_gate_exps.weight`", "--exclude 'model.layers.*.block_sparse_moe.experts.*.w1'"],
    );
    check(&model, &["--quant", "q4_0,q8_0", "--bits", "6"], &[one]);
    check(&model, &["--quant", "q8_0", "--target-size", "100kB"], &[one]);
    let auto = ["--quant", "rtn-int4-g32", "--compensate", "lorc", "--compensate-rank", "auto", "--bits", "6"];
    check(&model, &auto, &[one]);

    let model = mixture(folder.path(), "qwen3_moe", Dtype::F32);
    let was = json(&model.join("config.json"));
    let with = |key: &str, value: Value| {
        let mut config = was.clone();
        config[key] = value;
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    };
    for value in [false.into(), Value::Null] {
        with("norm_topk_prob", value);
        check(&model, &["--quant", "q8_0"], &["`norm_topk_prob` is not true"]);
    }
    let run = lrc(&["export", path(&fixture("qwen3_moe")), "-o", path(&out), "--format", "gguf"]);
    assert!(run.code == 4 && run.stderr.contains("block 0 has no experts"), "{}", run.stderr);
}
