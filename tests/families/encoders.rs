//! Encoders: measured through their pooled output, or by pseudo-perplexity.

use std::path::{Path, PathBuf};

use crate::common::{self, lrc, ok, path};
use candle_core::{Device, Tensor};
use lrc::calibrate::Targets;
use lrc::checkpoint::{Checkpoint, SafetensorsWriter, TensorSpec};
use lrc::model::Decoder;
use serde_json::Value;

use super::{check_gradients, error, expected, families, fixture, is_encoder, tokenizer};

/// An encoder without its head and its prefix, with norms under their early names.
fn headless(family: &str, folder: &Path) -> PathBuf {
    let source = Checkpoint::open(&fixture(family)).unwrap();
    let prefix = format!("{family}.");
    let rename = |name: &str| {
        let name = name.strip_prefix(&prefix)?;
        Some(name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
    };
    let kept = || source.tensors().filter_map(|info| Some((info, rename(&info.name)?)));
    let spec = |(info, name): (&lrc::checkpoint::TensorInfo, String)| TensorSpec {
        name,
        dtype: info.dtype,
        shape: info.shape.clone(),
    };
    let specs: Vec<TensorSpec> = kept().map(spec).collect();
    let model = folder.join(format!("{family}-headless"));
    std::fs::create_dir(&model).unwrap();
    let mut writer = SafetensorsWriter::create(&model, &specs, 1 << 30).unwrap();
    for (info, name) in kept() {
        writer.write(&name, &source.with_bytes(&info.name, <[u8]>::to_vec).unwrap()).unwrap();
    }
    writer.finish().unwrap();
    std::fs::copy(fixture(family).join("config.json"), model.join("config.json")).unwrap();
    std::fs::copy(tokenizer(family), model.join("tokenizer.json")).unwrap();
    model
}

/// The states of its halves can be healed; there are no tokens to compare.
#[test]
fn encoders_without_a_head_are_not_healed_by_their_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (model, [text, small, out]) = (headless("bert", folder.path()), ["text.txt", "small", "out"].map(at));
    std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(60)).unwrap();
    ok(&["compress", path(&model), "-o", path(&small), "--keep", "0.5", "-q"]);
    let heal = ["heal", path(&small), "--teacher", path(&model), "--text", path(&text), "-o", path(&out)];
    let windows = ["--samples", "16", "--seq-len", "24", "--epochs", "1"];
    let compress = ["compress", path(&model), "-o", path(&out), "--keep", "0.5", "--calibration", path(&text)];
    for args in [[&heal[..], &windows].concat(), [&compress[..], &["--heal", "blocks,model", "--dry-run"]].concat()] {
        let run = lrc(&args);
        assert_eq!(run.code, 4, "{}", run.stderr);
        assert!(run.stderr.contains("the stage `model` compares predicted tokens"), "{}", run.stderr);
        assert!(!out.exists() && !at("out.partial").exists());
    }
    ok(&[&heal[..], &windows, &["--stage", "blocks"]].concat());
}

#[test]
fn encoders_without_a_head_are_measured_through_their_pooled_output() {
    let folder = tempfile::tempdir().unwrap();
    for family in families().into_iter().filter(|family| is_encoder(family)) {
        let (expected, ids) = expected(family);
        let model = headless(family, folder.path());
        let checkpoint = Checkpoint::open(&model).unwrap();
        let decoder = Decoder::open(&checkpoint).unwrap();
        let states = decoder.states(&Tensor::new(ids.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap()).unwrap();
        assert!(error(&states, &expected["states"]) < 1e-5, "{family}");
        let pooled = decoder.pooler().unwrap().pool(&states.squeeze(0).unwrap()).unwrap();
        let wrapped = Value::Array(vec![expected["pooled"].clone()]);
        assert!(error(&pooled, &wrapped) < 1e-5, "{family}");
        check_gradients(family, &decoder, ids, Targets::default(), &expected["pooled_squared_gradients"]);

        // Compressed in every metric, and compared; there is no head to predict tokens.
        let text = folder.path().join("text.txt");
        std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(20)).unwrap();
        let calibration = ["--calibration", path(&text), "--samples", "4", "--seq-len", "24", "-q"];
        for method in ["svd", "svd-llm", "asvd", "fwsvd", "kfac"] {
            let out = folder.path().join(format!("{family}-{method}"));
            let flags = ["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--method", method];
            let calibration = if method == "svd" { &["-q"][..] } else { &calibration };
            let mode = if method == "kfac" { &["--sequential"][..] } else { &[] };
            ok(&[&flags[..], calibration, mode].concat());
            check_fidelity(&model, &out, expected["text"].as_str().unwrap());
        }
        if family == "bert" {
            // A pooler that is compressed on request still pools, wherever its bias is stored.
            for layout in ["factors", "pivot"] {
                let out = folder.path().join(format!("pooler-{layout}"));
                let flags = [
                    "--method",
                    "svd",
                    "--keep",
                    "0.6",
                    "--ranks",
                    "uniform",
                    "--targets",
                    "*pooler*",
                    "--layout",
                    layout,
                ];
                ok(&[&["compress", path(&model), "-o", path(&out), "-q"], &flags[..]].concat());
                assert!(Decoder::open(&Checkpoint::open(&out).unwrap()).unwrap().pooler().unwrap().is_learned());
            }
        }
        let out = folder.path().join(format!("{family}-coded"));
        let coded = ["--quant", "gptq-int4-channel", "--compensate", "kfac", "--compensate-rank", "2"];
        ok(&[&["compress", path(&model), "-o", path(&out)], &coded[..], &calibration].concat());
        let alone = common::lrc(&["eval", path(&model), "--text", path(&text)]);
        assert!(
            alone.code == 4 && alone.stderr.contains("neither perplexity nor pseudo-perplexity"),
            "{}",
            alone.stderr
        );
    }
}

/// Compares the agreement that `lrc eval` reports for a text of one window with the definitions.
fn check_fidelity(reference: &Path, model: &Path, text: &str) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text.txt");
    std::fs::write(&file, text).unwrap();
    let report = ok(&["eval", path(model), "--text", path(&file), "--reference", path(reference), "--json", "-q"]);
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    assert_eq!(report["windows"], 1);
    let tokens = lrc::text::Tokenizer::open(model).unwrap();
    let (ids, _) = tokens.wrap(&tokens.encode(text, lrc::text::Bos::Never).unwrap().ids);
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let vectors = |model: &Path| -> [Vec<Vec<f32>>; 2] {
        let checkpoint = Checkpoint::open(model).unwrap();
        let decoder = Decoder::open(&checkpoint).unwrap();
        let states = decoder.states(&ids).unwrap().squeeze(0).unwrap();
        let pooled = decoder.pooler().unwrap().pool(&states).unwrap();
        [states.to_vec2().unwrap(), vec![pooled.to_vec1().unwrap()]]
    };
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>();
    for ((name, theirs), own) in ["states", "pooled"].iter().zip(vectors(reference)).zip(vectors(model)) {
        let pairs = || theirs.iter().zip(&own);
        let cosines: Vec<f64> = pairs().map(|(r, x)| dot(r, x) / (dot(r, r) * dot(x, x)).sqrt()).collect();
        let apart: f64 = pairs().map(|(r, x)| dot(r, r) - 2.0 * dot(r, x) + dot(x, x)).sum();
        let norm: f64 = theirs.iter().map(|r| dot(r, r)).sum();
        let expected = [
            ("cosine_mean", cosines.iter().sum::<f64>() / cosines.len() as f64),
            ("cosine_min", cosines.iter().copied().fold(1.0, f64::min)),
            ("relative_error", (apart / norm).sqrt()),
        ];
        for (figure, expected) in expected {
            let found = report[name][figure].as_f64().unwrap();
            assert!((found - expected).abs() < 1e-5, "{name}.{figure}: {found} for {expected}");
        }
        assert!(report[name]["relative_error"].as_f64().unwrap() > 1e-4, "the model is compressed");
    }
}

#[test]
fn encoders_have_pseudo_perplexity_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    for family in families().into_iter().filter(|family| is_encoder(family)) {
        let (expected, _) = expected(family);
        let model = folder.path().join(family);
        common::copy(path(&fixture(family)), &model);
        std::fs::copy(tokenizer(family), model.join("tokenizer.json")).unwrap();
        let text = folder.path().join("text.txt");
        std::fs::write(&text, expected["text"].as_str().unwrap()).unwrap();
        let report = ok(&["eval", path(&model), "--text", path(&text), "--json", "-q"]);
        let report: Value = serde_json::from_str(&report.stdout).unwrap();
        let (found, nll) = (report["nll_sum"].as_f64().unwrap(), expected["pseudo_nll"].as_f64().unwrap());
        assert!((found / nll - 1.0).abs() < 1e-5, "{family}: {found} for {nll}");
        // A model compared with itself.
        let same = ["eval", path(&model), "--text", path(&text), "--reference", path(&model), "--json", "-q"];
        let same: Value = serde_json::from_str(&ok(&same).stdout).unwrap();
        assert_eq!((&same["states"]["relative_error"], &same["pooled"]["relative_error"]), (&0.0.into(), &0.0.into()));
        for arguments in [&["eval", "--convention", "gptq"][..], &["sweep", "--keep", "0.5"]] {
            let run =
                common::lrc(&[&arguments[..1], &[path(&model)], &arguments[1..], &["--text", path(&text)]].concat());
            assert!(run.code == 4 && run.stderr.contains("it is an encoder"), "{}", run.stderr);
        }
    }
    let decoder = common::lrc(&["eval", common::FIXTURE, "--text", common::TRAIN, "--convention", "masked"]);
    assert!(decoder.code == 4 && decoder.stderr.contains("is for encoders"), "{}", decoder.stderr);
}
