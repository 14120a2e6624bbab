//! Compressed models of every family: one model in every layout and format, with everything else passed through.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::common::{self, ok, path};
use candle_core::{Device, Tensor};
use lrc::checkpoint::Checkpoint;
use lrc::model::{Decoder, architectures, inventory};

use super::{
    MULTIMODAL, check_the_rest, distance, error, expected, families, fixture, is_multimodal, json, logits, tokenizer,
};

#[test]
fn what_is_compressed_is_one_model_in_every_layout_and_format() {
    let folder = tempfile::tempdir().unwrap();
    for family in families() {
        let (expected, ids) = expected(family);
        let model = folder.path().join(family);
        common::copy(path(&fixture(family)), &model);
        std::fs::remove_file(model.join("expected.json")).unwrap();
        std::fs::copy(tokenizer(family), model.join("tokenizer.json")).unwrap();
        let text = folder.path().join("text.txt");
        std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(40)).unwrap();
        let compress = |out: &str, flags: &[&str]| -> PathBuf {
            let out = folder.path().join(format!("{family}-{out}"));
            ok(&[&["compress", path(&model), "-o", path(&out), "-q"], flags].concat());
            out
        };
        let whole = compress("whole", &["--keep", "1.0"]);
        let kept = error(&logits(&whole, &ids).unwrap(), &expected["cases"][0]["logits"]);
        assert!(kept < 1e-5, "{family} at keep 1: {kept}");
        for (layout, method) in [("pivot", "kfac"), ("factors", "svd-llm"), ("pivot", "svd")] {
            let text = path(&text);
            let calibration = ["--calibration", text, "--samples", "4", "--seq-len", "24"];
            let mut flags = vec!["--keep", "0.8", "--ranks", "uniform", "--layout", layout, "--method", method];
            flags.extend(calibration.iter().filter(|_| method != "svd"));
            flags.extend(["--sequential"].iter().filter(|_| method == "kfac"));
            let factored = compress(&format!("{layout}-{method}"), &flags);
            flags.extend(["--format", "dense"]);
            let dense = compress(&format!("{layout}-{method}-dense"), &flags);
            let [low, full] =
                [&factored, &dense].map(|out| logits(out, &ids).unwrap_or_else(|e| panic!("{family}: {e:#}")));
            assert!(distance(&low, &full) < 1e-5, "{family}, {layout}, {method}: {}", distance(&low, &full));
            check_the_rest(family, &model, &factored);
        }
        let compensated = ["--quant", "rtn-int4-channel", "--compensate", "lorc", "--compensate-rank", "2", "--format"];
        if is_multimodal(family) {
            let out = folder.path().join("refused");
            let run =
                common::lrc(&[&["compress", path(&model), "-o", path(&out)], &compensated[..], &["peft"]].concat());
            assert!(run.code == 4 && run.stderr.contains("it is a multimodal model"), "{}", run.stderr);
        }
        let formats = ["dense", "factored", if is_multimodal(family) { "factored" } else { "peft" }];
        let [dense, others @ ..] = [0, 1, 2].map(|i| {
            let format = formats[i];
            // Its first block has no experts; see `adapters_of_experts_are_refused_where_peft_would_lose_them`.
            let excluded: &[&str] = if family == "qwen3_moe" { &["--exclude", "*.0.mlp.*_proj"] } else { &[] };
            let out = compress(&format!("{i}-{format}"), &[&compensated[..], &[format], excluded].concat());
            logits(&out, &ids).unwrap_or_else(|e| panic!("{family}: {e:#}"))
        });
        for other in others {
            assert!(distance(&other, &dense) < 1e-5, "{family}: {}", distance(&other, &dense));
        }
    }
}

/// Tables and heads in codes, whatever their names: the model that its dense twin is.
#[test]
fn coded_tables_and_heads_are_read_back_in_every_family() {
    let folder = tempfile::tempdir().unwrap();
    for family in families() {
        let (_, ids) = expected(family);
        let model = folder.path().join(family);
        common::copy(path(&fixture(family)), &model);
        std::fs::copy(tokenizer(family), model.join("tokenizer.json")).unwrap();
        let [coded, dense] = ["factored", "dense"].map(|format| {
            let out = folder.path().join(format!("{family}-{format}"));
            let flags = ["--quant", "rtn-int8-g16", "--embeddings", "quantize", "--format", format, "-q"];
            ok(&[&["compress", path(&model), "-o", path(&out)], &flags[..]].concat());
            logits(&out, &ids).unwrap_or_else(|e| panic!("{family}: {e:#}"))
        });
        assert!(distance(&coded, &dense) < 1e-5, "{family}: {}", distance(&coded, &dense));
    }
    // On request, by its name.
    let model = folder.path().join("gpt_neox");
    let out = folder.path().join("head");
    let flags = ["--targets", "*embed_out", "--keep", "0.5", "--json"];
    let report = ok(&[&["compress", path(&model), "-o", path(&out)], &flags[..]].concat()).json();
    assert_eq!(report["linears"][0]["module"], "embed_out");
    ok(&["inspect", path(&out), "-q"]);
}

/// Only the language model is compressed by default, whether its family is known or not; the rest is on request.
#[test]
fn towers_and_projectors_are_left_alone_unless_they_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(40)).unwrap();
    for (family, blocks, tower) in MULTIMODAL {
        let model = folder.path().join(family);
        common::copy(path(&fixture(family)), &model);
        std::fs::copy(tokenizer(family), model.join("tokenizer.json")).unwrap();
        let n_linears = 7 * Decoder::open(&Checkpoint::open(&model).unwrap()).unwrap().n_blocks();
        let modules = |name: &str, flags: &[&str]| -> Vec<String> {
            let out = folder.path().join(format!("{family}-{name}"));
            let report =
                ok(&[&["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--json"], flags].concat()).json();
            let linears = report["linears"].as_array().unwrap();
            linears.iter().map(|l| l["module"].as_str().unwrap().to_string()).collect()
        };
        let check = |found: Vec<String>, expected: usize, start: &str| {
            assert!(found.len() == expected && found.iter().all(|m| m.starts_with(start)), "{family}: {found:?}");
        };
        check(modules("plain", &[]), n_linears, blocks);
        let calibration = ["--calibration", path(&text), "--samples", "4", "--seq-len", "24"];
        check(modules("calibrated", &calibration), n_linears, blocks);
        let named = format!("{tower}*");
        assert!(modules("tower", &["--targets", &named]).iter().all(|module| module.starts_with(tower)));
        let outside = folder.path().join("refused");
        let flags = ["compress", path(&model), "-o", path(&outside), "--keep", "0.8", "--targets", &named];
        let refused = common::lrc(&[&flags[..], &calibration].concat());
        assert!(refused.code == 4 && refused.stderr.contains("is outside of the blocks"), "{}", refused.stderr);
        // A language model of an unknown family.
        let mut config = json(&model.join("config.json"));
        config["text_config"]["model_type"] = "unheard_of".into();
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
        check(modules("unknown", &[]), n_linears, blocks);
        let run = common::lrc(&["eval", path(&model), "--text", path(&text)]);
        assert!(run.code == 4 && run.stderr.contains("`text_config.model_type` `unheard_of`"), "{}", run.stderr);
    }
}

/// Parts of fused matrices with a rank each: the same model as the fused matrices that they form.
#[test]
fn fused_matrices_are_split_into_their_parts() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(40)).unwrap();
    for (family, n_parts) in [("phi3", 5), ("gpt2", 3), ("gpt_neox", 3)] {
        let (expected, ids) = expected(family);
        let model = folder.path().join(family);
        common::copy(path(&fixture(family)), &model);
        std::fs::copy(tokenizer(family), model.join("tokenizer.json")).unwrap();
        let compress = |out: &str, flags: &[&str]| -> PathBuf {
            let out = folder.path().join(format!("{family}-{out}"));
            ok(&[&["compress", path(&model), "-o", path(&out), "-q", "--fused", "split"], flags].concat());
            out
        };
        let whole = compress("whole", &["--keep", "1.0"]);
        let kept = error(&logits(&whole, &ids).unwrap(), &expected["cases"][0]["logits"]);
        assert!(kept < 1e-5, "{family} at keep 1: {kept}");
        let calibration = ["--calibration", path(&text), "--samples", "4", "--seq-len", "24"];
        let kfac = [&["--keep", "0.7", "--layout", "factors", "--sequential"], &calibration[..]].concat();
        let coded = ["--quant", "rtn-int4-channel", "--compensate", "lorc", "--compensate-rank", "2"];
        for (name, flags) in [("kfac", &kfac[..]), ("svd", &["--keep", "0.7"]), ("coded", &coded)] {
            let out = compress(name, flags);
            let (source, compressed) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&out).unwrap());
            let decoder = Decoder::open(&source).unwrap();
            let linears = inventory::linears(&compressed);
            let parts: Vec<_> = linears.iter().filter(|linear| inventory::is_part(&compressed, linear)).collect();
            assert_eq!(parts.len(), n_parts * decoder.n_blocks(), "{family}");
            // The fused matrices assembled by hand, everything else multiplied out.
            let mut above: HashMap<String, Tensor> = HashMap::new();
            for linear in &linears {
                let values = inventory::weight(&compressed, linear).unwrap();
                let (m, n) = linear.shape();
                let rows = |id: lrc::model::LinearId| {
                    decoder.architecture.rows_of(id.slot.role, &decoder.config.widths(id.block))
                };
                let Some(rows) = linear.id.and_then(rows) else {
                    above.insert(linear.weight_name(), Tensor::from_vec(values, (m, n), &Device::Cpu).unwrap());
                    continue;
                };
                let whole = format!("{}.weight", linear.module.rsplit_once('.').unwrap().0);
                let all = source.require(&whole).unwrap().n_elements() as usize;
                let before = above.remove(&whole);
                let zeros = || Tensor::zeros((all / n, n), candle_core::DType::F32, &Device::Cpu).unwrap();
                let indices: Vec<u32> = rows.indices().map(|row| row as u32).collect();
                assert_eq!(indices.len(), m);
                let part = Tensor::from_vec(values, (m, n), &Device::Cpu).unwrap();
                let indices = Tensor::new(indices, &Device::Cpu).unwrap();
                above.insert(whole, before.unwrap_or_else(zeros).index_add(&indices, &part, 0).unwrap());
            }
            let overlay = lrc::model::Overlay { below: &source, above };
            let ids_tensor = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let by_hand = decoder.with_weights(&overlay).logits(&ids_tensor).unwrap();
            let found = logits(&out, &ids).unwrap();
            assert!(distance(&found, &by_hand) < 1e-5, "{family}, {name}: {}", distance(&found, &by_hand));
            assert!(distance(&found, &logits(&model, &ids).unwrap()) > 1e-4, "{family}, {name} is compressed");
            let exported = folder.path().join("exported");
            let refused = common::lrc(&["export", path(&out), "--format", "dense", "-o", path(&exported)]);
            assert!(refused.code == 4 && refused.stderr.contains("is part of a fused matrix"), "{}", refused.stderr);
        }
        let out = folder.path().join("refused");
        let split = ["compress", path(&model), "-o", path(&out), "--keep", "0.7", "--fused", "split"];
        assert_eq!(common::lrc(&[&split[..], &["--format", "dense"]].concat()).code, 2);
        let mut config = json(&model.join("config.json"));
        config[if family == "gpt2" { "n_embd" } else { "hidden_size" }] = 32.into();
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
        let refused = common::lrc(&split);
        assert!(refused.code == 4 && refused.stderr.contains("and cannot be split"), "{}", refused.stderr);
    }
}

#[test]
fn gguf_files_come_back_as_the_same_model() {
    // Files of encoders have no head: `tests/gguf/encoders.rs`.
    let is_stored = |family: &&str| architectures::gguf_family(family).is_some() && !super::is_encoder(family);
    for family in architectures::known_types().into_iter().filter(is_stored) {
        let folder = tempfile::tempdir().unwrap();
        let (_, ids) = expected(family);
        let model = folder.path().join("model");
        common::copy(path(&fixture(family)), &model);
        if let Some(reason) = super::misread(family) {
            // llama.cpp does not read everything that these configs say, so that other values are refused.
            let out = folder.path().join("refused");
            let other = ["compress", path(&model), "-o", path(&out), "--quant", "rtn-int8-channel", "--format", "gguf"];
            let refused = common::lrc(&other);
            assert!(refused.stderr.contains(reason), "{}", refused.stderr);
            super::as_llama_cpp_expects(family, &model);
        }
        let [dense, gguf] = ["dense", "gguf"].map(|format| {
            let out = folder.path().join(format);
            ok(&["compress", path(&model), "-o", path(&out), "-q", "--quant", "rtn-int8-channel", "--format", format]);
            logits(&out, &ids).unwrap_or_else(|e| panic!("{family}: {e:#}"))
        });
        assert!(distance(&gguf, &dense) < 1e-5, "{family}: {}", distance(&gguf, &dense));
    }
}
