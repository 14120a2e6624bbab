//! Sentence embeddings: encoders in folders of sentence-transformers, compared with that library.
//! `tests/oracles/sentence.py` made the values.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use crate::common::{lrc, ok, path};
use candle_core::{Device, Tensor};
use lrc::calibrate::{Needs, Observation, TargetedWindows, Targets, observe};
use lrc::checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec};
use lrc::model::{Decoder, Objective, WalkLimits};
use lrc::progress::Silent;
use lrc::store::Journal;
use lrc::text::{Bos, Tokenizer};
use serde_json::{Value, json};

const BERT: &str = "fixtures/pico/bert";

fn oracle() -> Value {
    serde_json::from_str(include_str!("oracles/sentence.json")).unwrap()
}

fn floats(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// The weights of the fixture in a folder with the files of a case.
fn folder_of(files: &Value, at: &Path) -> PathBuf {
    std::fs::create_dir_all(at).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(BERT).join(name), at.join(name)).unwrap();
    }
    std::fs::copy("fixtures/pico/tokenizer-encoder.json", at.join("tokenizer.json")).unwrap();
    for (name, content) in files.as_object().unwrap() {
        let file = at.join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, content.to_string()).unwrap();
        if name == "2_Dense/config.json" {
            dense(file.parent().unwrap());
        }
    }
    at.to_path_buf()
}

/// The weights of the `Dense` module of the oracle.
fn dense(folder: &Path) {
    let specs = [("linear.bias", vec![5]), ("linear.weight", vec![5, 16])];
    let spec = |(name, shape): &(&str, Vec<usize>)| TensorSpec {
        name: (*name).into(),
        dtype: Dtype::F32,
        shape: shape.clone(),
    };
    let mut writer = SafetensorsWriter::create(folder, &specs.iter().map(spec).collect::<Vec<_>>(), 1 << 30).unwrap();
    for (name, _) in specs {
        let bytes = floats(&oracle()["dense"][name]).into_iter().flat_map(|x| (x as f32).to_le_bytes());
        writer.write(name, &bytes.collect::<Vec<u8>>()).unwrap();
    }
    writer.finish().unwrap();
}

/// The embedding of a text as `lrc eval` computes it.
fn embed(model: &Path, text: &str) -> Vec<f32> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let decoder = Decoder::open(&checkpoint).unwrap();
    let tokenizer = Tokenizer::open(model).unwrap();
    let mut ids = tokenizer.encode(text, Bos::Never).unwrap().ids;
    if let Some(longest) = decoder.sentence().and_then(|modules| modules.max_seq_length) {
        ids.truncate(longest - tokenizer.n_added());
    }
    let ids = Tensor::new(tokenizer.wrap(&ids).0, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let states = decoder.states(&ids).unwrap().squeeze(0).unwrap();
    decoder.pooler().unwrap().pool(&states).unwrap().to_vec1().unwrap()
}

fn cosine(x: &[f32], y: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(x, y) / (dot(x, x) * dot(y, y)).sqrt()
}

fn texts() -> Vec<String> {
    serde_json::from_value(oracle()["texts"].clone()).unwrap()
}

/// The texts of the oracle as documents, and one long text made of them.
fn write_texts(folder: &Path) -> [PathBuf; 2] {
    let (documents, long) = (folder.join("documents.jsonl"), folder.join("text.txt"));
    let lines: Vec<String> = texts().iter().map(|text| json!({ "text": text }).to_string()).collect();
    std::fs::write(&documents, lines.join("\n")).unwrap();
    std::fs::write(&long, texts().join(" ").repeat(12)).unwrap();
    [documents, long]
}

#[test]
fn embeddings_are_those_of_sentence_transformers_in_every_mode() {
    let folder = tempfile::tempdir().unwrap();
    for (i, case) in oracle()["cases"].as_array().unwrap().iter().enumerate() {
        let model = folder_of(&case["files"], &folder.path().join(i.to_string()));
        for (text, expected) in texts().iter().zip(case["embeddings"].as_array().unwrap()) {
            let (found, expected) = (embed(&model, text), floats(expected));
            assert_eq!(found.len(), expected.len(), "{}", case["files"]);
            let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
            for (found, expected) in found.iter().zip(expected) {
                let error = (f64::from(*found) - expected).abs();
                assert!(error < 1e-5 * largest, "{}: {found} for {expected}", case["files"]);
            }
        }
    }
}

#[test]
fn gradients_of_an_embedding_are_those_of_torch() {
    let oracle = oracle();
    let folder = tempfile::tempdir().unwrap();
    let pooling =
        |modules: Value| json!({ "modules.json": modules, "1_Pooling/config.json": { "pooling_mode": "mean" } });
    let model = folder_of(&pooling(oracle["cases"][0]["files"]["modules.json"].clone()), folder.path());
    let checkpoint = Checkpoint::open(&model).unwrap();
    let decoder = Decoder::open(&checkpoint).unwrap();
    assert_eq!(decoder.objective(), Objective::Sentence, "modules go before a masked-language-model head");
    let targets = Targets { probe: oracle["seed"].as_u64().unwrap(), ..Targets::default() };
    let ids: Vec<u32> = serde_json::from_value(oracle["ids"].clone()).unwrap();

    let observation = Observation { needs: Needs::ALL, clip_gradients: false };
    let limits = WalkLimits::new(1 << 30, std::env::temp_dir());
    let mut sums = HashMap::new();
    let windows = TargetedWindows { windows: &[ids], targets: &[targets], n_gradients: 1 };
    observe(&decoder, windows, observation, &limits, &Journal::default(), &Silent, &mut |found| {
        sums.extend(found.into_iter().map(|(name, array)| (name, array.read().unwrap().f32s().unwrap())));
        Ok(())
    })
    .unwrap();
    let by_linear: BTreeMap<String, Value> = serde_json::from_value(oracle["squared_gradients"].clone()).unwrap();
    assert_eq!(by_linear.len(), 12);
    for (module, expected) in by_linear {
        let id = decoder.linear_id(&module).unwrap();
        let gram = &sums[&format!("{}.{}.output_gram", id.block, id.slot.name())];
        let expected = floats(&expected);
        let scale = expected.iter().fold(0.0, |m: f64, v| m.max(*v));
        for (i, expected) in expected.iter().enumerate() {
            let found = f64::from(gram[i * (i + 1) / 2 + i]); // the diagonal of a lower triangle
            assert!((found - expected).abs() <= 2e-5 * scale, "{module}: {found} for {expected}");
        }
    }
}

#[test]
fn gradients_of_every_mode_are_those_of_finite_differences() {
    let oracle = oracle();
    let folder = tempfile::tempdir().unwrap();
    let signs = oracle["signs"].as_str().unwrap().chars().map(|sign| if sign == '+' { 1.0 } else { -1.0 });
    let signs: Vec<f64> = signs.collect();
    let (n_tokens, width) = (5, 16);
    let values: Vec<f32> = (0..n_tokens * width).map(|i| ((37 * i) % 83) as f32 / 41.0 - 1.0).collect();
    let states = |values: &[f32]| Tensor::from_slice(values, (n_tokens, width), &Device::Cpu).unwrap();
    for (i, case) in oracle["cases"].as_array().unwrap().iter().enumerate() {
        for similarity in ["cosine", "dot"] {
            let mut files = case["files"].clone();
            files["config_sentence_transformers.json"] = json!({ "similarity_fn_name": similarity });
            let checkpoint =
                Checkpoint::open(&folder_of(&files, &folder.path().join(format!("{i}-{similarity}")))).unwrap();
            let pooler = Decoder::open(&checkpoint).unwrap().pooler().unwrap();
            let product = |values: &[f32]| -> Option<f64> {
                let e: Vec<f32> = pooler.pool(&states(values)).unwrap().to_vec1().unwrap();
                let norm = e.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                let product: f64 = e.iter().zip(&signs).map(|(x, sign)| f64::from(*x) * sign).sum();
                (e.len() <= signs.len()).then_some(if similarity == "cosine" { product / norm } else { product })
            };
            if product(&values).is_none() {
                continue; // the oracle has as many signs as the states are wide
            }
            let seed = oracle["seed"].as_u64().unwrap();
            let gradient = pooler.probe_gradient(&states(&values), seed).unwrap();
            let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
            let largest = gradient.iter().fold(0.0f64, |m, g| m.max(f64::from(g.abs())));
            for (at, found) in gradient.iter().enumerate() {
                let step = 5e-3;
                let moved = |step: f32| {
                    let mut values = values.clone();
                    values[at] += step;
                    product(&values).unwrap()
                };
                let expected = (moved(step) - moved(-step)) / f64::from(2.0 * step);
                let error = (f64::from(*found) - expected).abs();
                assert!(error < 2e-3 * largest, "{similarity}, {}: {found} for {expected}", case["files"]);
            }
        }
    }
}

#[test]
fn fidelity_is_that_of_the_embeddings_and_of_every_document() {
    let folder = tempfile::tempdir().unwrap();
    let [documents, long] = write_texts(folder.path());
    for (i, pooling) in [(2, "mean"), (6, "cls, normalized"), (12, "mean, normalized"), (13, "mean, dense, normalized")]
    {
        let model = folder_of(&oracle()["cases"][i]["files"], &folder.path().join(i.to_string()));
        let out = folder.path().join(format!("{i}-out"));
        ok(&["compress", path(&model), "-o", path(&out), "--keep", "0.6", "--calibration", path(&long), "-q"]);
        // An output without the modules is compared with the modules of its source.
        let _ = std::fs::remove_file(out.join("modules.json"));
        let eval = ["eval", path(&out), "--text", path(&documents), "--reference", path(&model), "--json", "-q"];
        let report = ok(&eval).json();
        assert_eq!((&report["windows"], &report["pooling"]), (&json!(3), &json!(pooling)));
        for (name, _) in oracle()["cases"][i]["files"].as_object().unwrap() {
            std::fs::create_dir_all(out.join(name).parent().unwrap()).unwrap();
            std::fs::copy(model.join(name), out.join(name)).unwrap();
        }
        if pooling.contains("dense") {
            dense(&out.join("2_Dense"));
        }
        assert_eq!(ok(&eval).json()["pooled"], report["pooled"]);
        let cosines: Vec<f64> = texts().iter().map(|text| cosine(&embed(&model, text), &embed(&out, text))).collect();
        let found = report["pooled"]["cosine_mean"].as_f64().unwrap();
        assert!((found - cosines.iter().sum::<f64>() / 3.0).abs() < 1e-6 && found < 0.9999, "{found} for {cosines:?}");
    }
}

#[test]
fn ranks_follow_the_pooled_output() {
    let folder = tempfile::tempdir().unwrap();
    let [_, long] = write_texts(folder.path());
    let modes = ["cls", "lasttoken"];
    let model = |mode: &str| {
        let files = json!({ "modules.json": oracle()["cases"][0]["files"]["modules.json"],
            "1_Pooling/config.json": { "pooling_mode": mode } });
        folder_of(&files, &folder.path().join(mode))
    };
    let models = modes.map(model);
    let outs = models.each_ref().map(|model| {
        let out = model.with_extension("out");
        let flags = ["--keep", "0.6", "--seq-len", "64", "--calibration", path(&long), "-q"];
        ok(&[&["compress", path(model), "-o", path(&out)], &flags[..]].concat());
        // Both models use the modules of the reference.
        let _ = std::fs::remove_file(out.join("modules.json"));
        out
    });
    let ranks = |out: &PathBuf| -> Vec<Value> {
        let report: Value = serde_json::from_slice(&std::fs::read(out.join("lrc-report.json")).unwrap()).unwrap();
        report["linears"].as_array().unwrap().iter().map(|linear| linear["rank"].clone()).collect()
    };
    assert_ne!(ranks(&outs[0]), ranks(&outs[1]));
    let cosine = |model: &PathBuf, out: &PathBuf| {
        let eval = ["eval", path(out), "--text", path(&long), "--reference", path(model), "--json", "-q"];
        let report = ok(&eval).json();
        report["pooled"]["cosine_mean"].as_f64().unwrap()
    };
    for (model, [own, other]) in models.iter().zip([[0, 1], [1, 0]]) {
        let (own, other) = (cosine(model, &outs[own]), cosine(model, &outs[other]));
        println!("{}: {own} made for it, {other} for the other", model.display());
        assert!(own > other, "{}: {own} for {other}", model.display());
    }
}

#[test]
fn statistics_of_one_pooling_are_refused_for_another() {
    let folder = tempfile::tempdir().unwrap();
    let case = oracle()["cases"][0].clone();
    let model = folder_of(&case["files"], &folder.path().join("model"));
    let [stats, text, out] = ["stats.safetensors", "text.txt", "out"].map(|name| folder.path().join(name));
    std::fs::write(&text, texts().join("\n").repeat(40)).unwrap();
    let calibrate = ["calibrate", path(&model), "--text", path(&text), "--samples", "2", "--seq-len", "16", "-q"];
    ok(&[&calibrate[..], &["-o", path(&stats)]].concat());
    let compress = ["compress", path(&model), "-o", path(&out), "--keep", "0.6", "--statistics", path(&stats), "-q"];
    ok(&compress);
    let other = |file: &str, content: Option<Value>| {
        let at = model.join(file);
        let before = std::fs::read(&at).ok();
        match content {
            Some(content) => std::fs::write(&at, content.to_string()).unwrap(),
            None => std::fs::remove_file(&at).unwrap(),
        }
        for args in
            [&[&compress[..], &["--force"]].concat()[..], &["inspect", path(&model), "--statistics", path(&stats)]]
        {
            let run = lrc(args);
            assert_eq!(run.code, 4, "{file}: {}", run.stderr);
            for part in ["belongs to another model (differs in: ", file, "hint: calibrate this model"] {
                assert!(run.stderr.contains(part), "{}", run.stderr);
            }
        }
        let again = folder.path().join("again.safetensors");
        ok(&[&calibrate[..], &["-o", path(&again)]].concat());
        let merged = folder.path().join("merged.safetensors");
        let run = lrc(&["calibrate", "--merge", path(&stats), path(&again), "-o", path(&merged)]);
        assert!(run.code == 4 && run.stderr.contains("belongs to another model"), "{}", run.stderr);
        std::fs::remove_file(again).unwrap();
        match before {
            Some(before) => std::fs::write(&at, before).unwrap(),
            None => std::fs::remove_file(&at).unwrap(),
        }
    };
    other("1_Pooling/config.json", Some(json!({"word_embedding_dimension": 16, "pooling_mode": "mean"})));
    other("modules.json", None);
    other("config_sentence_transformers.json", Some(json!({"similarity_fn_name": "dot"})));
    ok(&[&compress[..], &["--force"]].concat());
}

#[test]
fn modules_that_are_not_run_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let [documents, _] = write_texts(folder.path());
    let files = oracle()["cases"][13]["files"].clone();
    let check = |name: &str, change: &dyn Fn(&mut Value), code: i32, expected: &str| {
        let mut files = files.clone();
        change(&mut files);
        let model = folder_of(&files, &folder.path().join(name));
        let run = lrc(&["eval", path(&model), "--text", path(&documents), "--reference", path(&model), "--json"]);
        assert!(run.code == code && run.stderr.contains(expected), "{name}: {} {}", run.code, run.stderr);
        run
    };
    let class = "sentence_transformers.models.LSTM";
    let run = check("class", &|f| f["modules.json"][2]["type"] = class.into(), 0, class);
    assert_eq!(run.json()["pooling"], "mean", "what stands before it is compared");
    let no_pooling = |f: &mut Value| f["modules.json"][1]["type"] = class.into();
    assert_eq!(
        check("no-pooling", &no_pooling, 0, "does not list a transformer and a pooling").json()["pooling"],
        "pooler"
    );
    let residual = |f: &mut Value| f["2_Dense/config.json"]["use_residual"] = true.into();
    check("residual", &residual, 0, "`2_Dense`: it is not a plain linear");
    let mode = |f: &mut Value| f["1_Pooling/config.json"] = json!({ "pooling_mode": "median" });
    check("mode", &mode, 4, "1_Pooling/config.json` has the unknown pooling mode \"median\"");
    let flag = |f: &mut Value| f["1_Pooling/config.json"] = json!({ "pooling_mode_median_tokens": true });
    check("flag", &flag, 4, "unknown pooling mode `pooling_mode_median_tokens`");
    let width = |f: &mut Value| f["1_Pooling/config.json"]["word_embedding_dimension"] = 17.into();
    check("width", &width, 4, "pools states of width 17, the model's are 16 wide");
    check("broken", &|f| f["modules.json"] = json!({}), 4, "modules.json` cannot be used");
}
