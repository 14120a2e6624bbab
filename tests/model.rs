//! The decoder against transformers.

use std::path::Path;

use crate::common::{self, FIXTURE, beside, command, finish, lrc, path};
use candle_core::{Device, Tensor};
use lrc::checkpoint::{Checkpoint, SafetensorsWriter, TensorSpec};
use lrc::model::Decoder;
use serde_json::Value;

/// Token ids, and logits at some positions; `tests/oracles/logits.py` made the values with transformers.
struct Oracle {
    ids: Tensor,
    positions: Tensor,
    logits: Vec<Vec<f32>>,
}

impl Oracle {
    fn new(json: &str) -> Self {
        let oracle: Value = serde_json::from_str(json).unwrap();
        let rows: Vec<Vec<u32>> = serde_json::from_value(oracle["ids"].clone()).unwrap();
        let positions: Vec<u32> = serde_json::from_value(oracle["positions"].clone()).unwrap();
        Self {
            ids: Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu).unwrap(),
            positions: Tensor::new(positions, &Device::Cpu).unwrap(),
            logits: serde_json::from_value(oracle["logits"].clone()).unwrap(),
        }
    }

    #[track_caller]
    fn check(&self, model: &Path, tolerance: f32) {
        let checkpoint = Checkpoint::open(model).unwrap();
        let logits = Decoder::open(&checkpoint).unwrap().logits(&self.ids).unwrap();
        let found = logits.index_select(&self.positions, 1).unwrap().flatten(0, 1).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(found.len(), self.logits.len());
        for (found, expected) in found.iter().flatten().zip(self.logits.iter().flatten()) {
            assert!((found - expected).abs() < tolerance, "{}: {found} {expected}", model.display());
        }
    }
}

#[test]
fn logits_equal_those_of_transformers() {
    Oracle::new(include_str!("oracles/tiny-llama-logits.json")).check(Path::new(FIXTURE), 1e-4);
}

/// Biases, `llama3` rope scaling, a head of its own, a config as transformers 5 writes it.
#[test]
fn every_option_of_llama_equals_transformers() {
    let oracle = Oracle::new(include_str!("oracles/pico-llama-logits.json"));
    let pico = "fixtures/pico-llama";
    oracle.check(Path::new(pico), 1e-4);
    // Factored at full rank it is the same model: biases move with their linear, and the head may be factored too.
    let folder = tempfile::tempdir().unwrap();
    for (layout, part, bias) in [("factors", ".lr_b.weight", "lr_b.bias"), ("pivot", ".lr_p.weight", "bias")] {
        for (name, targets) in [("all", "*_proj"), ("head", "*lm_head")] {
            let out = folder.path().join(format!("{layout}-{name}"));
            let args = ["compress", pico, "-o", common::path(&out), "-q", "--ranks", "full", "--targets", targets];
            common::ok(&[&args[..], &["--layout", layout]].concat());
            assert!(Checkpoint::open(&out).unwrap().tensors().any(|t| t.name.contains(part)));
            oracle.check(&out, 2e-4);
        }
        let biased = Checkpoint::open(&folder.path().join(format!("{layout}-all"))).unwrap();
        let biases = biased.tensors().filter(|t| t.name.contains("layers.1.mlp.up_proj") && t.name.ends_with(".bias"));
        let names: Vec<&str> = biases.map(|t| t.name.as_str()).collect();
        assert_eq!(names, [format!("model.layers.1.mlp.up_proj.{bias}")]);
    }
}

/// A checkpoint with other tensors: `edit` maps the name and the bytes of each tensor of `from`.
fn rewrite(from: &Path, to: &Path, edit: impl Fn(&str, Vec<u8>) -> Vec<(String, Vec<u8>)>) {
    let source = Checkpoint::open(from).unwrap();
    let mut tensors = Vec::new();
    for info in source.tensors() {
        let bytes = source.with_bytes(&info.name, <[u8]>::to_vec).unwrap();
        let spec = |name| TensorSpec { name, dtype: info.dtype, shape: info.shape.clone() };
        tensors.extend(edit(&info.name, bytes).into_iter().map(|(name, bytes)| (spec(name), bytes)));
    }
    common::copy(path(from), to);
    std::fs::remove_file(to.join("model.safetensors")).unwrap();
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(to, &specs, 1 << 30).unwrap();
    tensors.iter().for_each(|(spec, bytes)| writer.write(&spec.name, bytes).unwrap());
    writer.finish().unwrap();
}

fn floats(bytes: &[u8], f: impl Fn(f32) -> f32) -> Vec<u8> {
    bytes.as_chunks::<4>().0.iter().flat_map(|&b| f(f32::from_le_bytes(b)).to_le_bytes()).collect()
}

const EMBEDDINGS: &str = "model.embed_tokens.weight";

/// `tie_word_embeddings` is true in the config of the fixture; transformers 5 gives these logits for each.
#[test]
fn a_head_that_differs_from_the_embeddings_is_not_tied_and_one_alone_is_both() {
    let oracle = || Oracle::new(include_str!("oracles/tiny-llama-logits.json"));
    let folder = tempfile::tempdir().unwrap();
    let with_head = |name: &str, change: fn(f32) -> f32, keep: bool| {
        let model = folder.path().join(name);
        rewrite(Path::new(FIXTURE), &model, |name, bytes| match name {
            EMBEDDINGS => {
                let head = ("lm_head.weight".to_string(), floats(&bytes, change));
                if keep { vec![(name.into(), bytes), head] } else { vec![head] }
            }
            _ => vec![(name.into(), bytes)],
        });
        model
    };
    let half = |mut oracle: Oracle| {
        oracle.logits.iter_mut().flatten().for_each(|x| *x *= 0.5);
        oracle
    };
    let (other, same) = (with_head("other", |x| x * 0.5, true), with_head("same", |x| x, true));
    let alone = with_head("alone", |x| x, false);
    oracle().check(&same, 1e-4);
    oracle().check(&alone, 1e-4);
    half(oracle()).check(&other, 1e-4);
    for (model, differs) in [(&other, true), (&same, false), (&alone, false)] {
        let run = common::ok(&["eval", path(model), "--text", common::HELD_OUT, "--max-windows", "1"]);
        let warnings = run.stderr.matches("`lm_head.weight` differs from `model.embed_tokens.weight`").count();
        assert_eq!(warnings, usize::from(differs), "{}", run.stderr);
        // Compressed in any format it stays the same model.
        for (name, flags) in [("factored", &[][..]), ("dense", &["--format", "dense"])] {
            let out = model.with_extension(name);
            let whole = ["compress", path(model), "-o", path(&out), "-q", "--ranks", "full", "--layout", "factors"];
            common::ok(&[&whole[..], flags].concat());
            if differs { half(oracle()).check(&out, 1e-3) } else { oracle().check(&out, 1e-3) }
        }
        // A separate head may be compressed, and then the config must not tie it; a head that is the table may not.
        let out = model.with_extension("head");
        let head = ["compress", path(model), "-o", path(&out), "-q", "--ranks", "full", "--targets", "lm_head"];
        let run = lrc(&head);
        if differs {
            assert_eq!(run.code, 0, "{}", run.stderr);
            half(oracle()).check(&out, 1e-3);
            let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
            assert_eq!(config["tie_word_embeddings"], false);
        } else {
            assert!(run.code == 4 && run.stderr.contains("is tied to the embeddings"), "{}", run.stderr);
        }
        let out = model.with_extension("gguf");
        let gguf = ["compress", path(model), "-o", path(&out), "-q", "--quant", "rtn-int8-channel", "--format", "gguf"];
        let run = lrc(&gguf);
        match model == &alone {
            true => assert!(run.code == 4 && run.stderr.contains("stored only as its head"), "{}", run.stderr),
            false => assert_eq!(run.code, 0, "{}", run.stderr),
        }
    }
}

/// The figures belong to the stored head, as if the config did not tie it; transformers 5 gives the same
/// (`oracles/untied.py`).
#[test]
fn the_perplexity_of_a_head_that_differs_is_that_of_the_untied_config() {
    let folder = tempfile::tempdir().unwrap();
    // The head differs from the table in direction, not only in scale.
    let rotated = |bytes: &[u8]| -> Vec<u8> {
        let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let head = (0..values.len()).map(|i| 0.9 * values[i] + 0.1 * values[(i + 96) % values.len()]);
        head.flat_map(f32::to_le_bytes).collect()
    };
    let with_head = |name: &str, tie: Option<bool>| {
        let model = folder.path().join(name);
        rewrite(Path::new(FIXTURE), &model, |name, bytes| match name {
            EMBEDDINGS if tie.is_some() => {
                let head = ("lm_head.weight".to_string(), rotated(&bytes));
                vec![(name.into(), bytes), head]
            }
            _ => vec![(name.into(), bytes)],
        });
        let file = model.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        config["tie_word_embeddings"] = tie.unwrap_or(true).into();
        std::fs::write(&file, config.to_string()).unwrap();
        model
    };
    let [says_tied, untied, tied] =
        [("says-tied", Some(true)), ("untied", Some(false)), ("tied", None)].map(|(name, tie)| with_head(name, tie));
    let figure = |model: &Path| {
        let run = common::ok(&["eval", path(model), "--text", common::HELD_OUT, "--json"]);
        let warnings = run.stderr.matches("`lm_head.weight` differs from `model.embed_tokens.weight`").count();
        (run.json()["ppl"].as_f64().unwrap(), warnings)
    };
    let ((found, warnings), (of_untied, none), (of_tied, none_either)) =
        (figure(&says_tied), figure(&untied), figure(&tied));
    assert_eq!((warnings, none, none_either), (1, 0, 0));
    assert_eq!(found, of_untied);
    for (found, expected) in [(found, 1.573261), (of_tied, 1.550431)] {
        assert!((found - expected).abs() < 1e-5, "{found}, transformers has {expected}");
    }
}

/// Prefixes of trainers and wrappers: the modules are found, and nothing is renamed.
#[test]
fn names_under_the_prefixes_of_wrappers_are_found_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let oracle = Oracle::new(include_str!("oracles/pico-llama-logits.json"));
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(20)).unwrap();
    for (i, (model_prefix, head_prefix)) in [
        ("module.model.", "module."),
        ("_orig_mod.model.", "_orig_mod."),
        ("module._orig_mod.model.", "module._orig_mod."),
        ("model._orig_mod.", ""),
        ("model.language_model.", ""),
        ("language_model.model.", "language_model."),
        ("_orig_mod.model.language_model.", "_orig_mod."),
        ("model.language_model.model.", "model.language_model."),
        ("", ""),
    ]
    .into_iter()
    .enumerate()
    {
        let renamed = |name: &str| match name.strip_prefix("model.") {
            Some(rest) => format!("{model_prefix}{rest}"),
            None => format!("{head_prefix}{name}"),
        };
        let model = folder.path().join(format!("model-{i}"));
        rewrite(Path::new("fixtures/pico-llama"), &model, |name, bytes| vec![(renamed(name), bytes)]);
        std::fs::copy("fixtures/pico/tokenizer.json", model.join("tokenizer.json")).unwrap();
        oracle.check(&model, 1e-4);
        for (name, flags) in [
            ("plain", &["--ranks", "full"][..]),
            ("calibrated", &["--keep", "1.0", "--calibration", path(&text), "--samples", "2", "--seq-len", "24"]),
        ] {
            let out = folder.path().join(format!("{name}-{i}"));
            let report = common::ok(&[&["compress", path(&model), "-o", path(&out), "--json"], flags].concat()).json();
            oracle.check(&out, 1e-3);
            let linears = report["linears"].as_array().unwrap();
            assert_eq!(linears.len(), 14);
            assert!(
                linears.iter().all(|l| l["module"].as_str().unwrap().starts_with(&format!("{model_prefix}layers.")))
            );
            let (before, after) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&out).unwrap());
            for kept in before.tensors().filter(|info| !info.name.contains("_proj")) {
                let bytes = |checkpoint: &Checkpoint| checkpoint.with_bytes(&kept.name, <[u8]>::to_vec).unwrap();
                assert!(bytes(&before) == bytes(&after), "{}", kept.name);
            }
        }
    }
}

/// Blocks after the last one of the config, which predict further tokens (MTP), are not part of the model.
#[test]
fn blocks_behind_the_last_one_are_passed_through_and_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    common::copy(FIXTURE, &model);
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let cut = config.replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 3");
    assert_ne!(config, cut);
    let calibration = ["--calibration", common::TRAIN, "--samples", "4", "--seq-len", "64"];
    for (i, (model_type, flags)) in [
        ("llama", &calibration[..]),
        ("llama", &[&["--method", "svd-llm", "--sequential=false"][..], &calibration[..]].concat()),
        ("llama", &[]),
        ("llama", &["--quant", "rtn-int4-g32"]),
        ("unheard_of", &[]),
    ]
    .into_iter()
    .enumerate()
    {
        std::fs::write(model.join("config.json"), cut.replace("\"llama\"", &format!("\"{model_type}\""))).unwrap();
        let out = folder.path().join(format!("out-{i}"));
        let budget: &[&str] = if flags.contains(&"--quant") { &[] } else { &["--keep", "0.8"] };
        let run = common::ok(&[&["compress", path(&model), "-o", path(&out), "--json"], budget, flags].concat());
        assert!(run.stderr.contains("block 3 is beyond the 3 of `num_hidden_layers`"), "{}", run.stderr);
        let report = run.json();
        assert_eq!(report["linears"].as_array().unwrap().len(), 21);
        let passed: Vec<&str> = report["passed_through"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let (before, after) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&out).unwrap());
        let behind: Vec<_> = before.tensors().filter(|info| info.name.contains("layers.3.")).collect();
        assert_eq!(behind.len(), 9);
        for info in behind {
            assert!(passed.contains(&info.name.as_str()), "{}", info.name);
            let bytes = |checkpoint: &Checkpoint| checkpoint.with_bytes(&info.name, <[u8]>::to_vec).unwrap();
            assert!(bytes(&before) == bytes(&after), "{}", info.name);
        }
    }
    let out = folder.path().join("gguf");
    std::fs::write(model.join("config.json"), cut).unwrap();
    let run = lrc(&["compress", path(&model), "-o", path(&out), "--quant", "rtn-int8-g32", "--format", "gguf"]);
    assert!(run.code == 4 && run.stderr.contains("block 3 is beyond `num_hidden_layers`"), "{}", run.stderr);
    // On request without a text; with one there is nothing to measure them by.
    let named = ["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--targets", "*layers.3.*", "-q"];
    let run = lrc(&[&named[..], &calibration].concat());
    assert!(run.code == 4 && run.stderr.contains("is outside of the blocks"), "{}", run.stderr);
    common::ok(&named);
}

fn stories_perplexity(model: &str, bos: &str) -> (f64, u64) {
    let model = beside(&format!("models/stories260K/{model}"));
    let text = beside("text/tinystories-eval-small.txt");
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let run = lrc(&["eval", model, "--text", text, "--seq-len", "512", "--bos", bos, "--json"]);
    let report = run.json();
    (report["ppl"].as_f64().unwrap(), report["scored_tokens"].as_u64().unwrap())
}

/// Perplexities of a trained Llama, measured by other tools in f32.
#[test]
#[ignore = "needs ../shared/models/stories260K and ../shared/text"]
fn perplexity_equals_that_of_transformers() {
    for (model, bos, expected) in [
        ("f32", "auto", 4.40181),
        ("f32", "never", 4.40274),
        ("f16", "never", 4.40272),
        ("f32-sharded3", "auto", 4.40181),
    ] {
        let (ppl, scored_tokens) = stories_perplexity(model, bos);
        assert_eq!(scored_tokens, 99_134);
        assert!((ppl - expected).abs() < 1.5e-5, "{model} {bos}: {ppl}, expected {expected}");
    }
}

#[test]
fn perplexity_does_not_depend_on_memory_or_threads() {
    let eval = |memory: &str, threads: &str| {
        let args = ["eval", FIXTURE, "--text", common::HELD_OUT, "--memory", memory, "--json"];
        finish(command(&args).env("RAYON_NUM_THREADS", threads)).json()["nll_sum"].as_f64().unwrap()
    };
    let reference = eval("1GiB", "2");
    // A limit of one byte: every hidden state goes to disk, one window at a time.
    assert_eq!(eval("1B", "2"), reference);
    assert_eq!(eval("1GiB", "1"), reference);
}

#[test]
fn conventions_score_their_own_tokens() {
    let eval = |convention: &str| {
        common::ok(&[
            "eval",
            FIXTURE,
            "--text",
            common::HELD_OUT,
            "--convention",
            convention,
            "--seq-len",
            "128",
            "--max-windows",
            "5",
            "--json",
        ])
        .json()
    };
    let (gptq, llamacpp) = (eval("gptq"), eval("llamacpp"));
    assert_eq!(gptq["scored_tokens"], 5 * 127);
    assert_eq!(llamacpp["scored_tokens"], 5 * 63);
    assert_eq!(gptq["bos_added"], true);
    // More context for every scored token.
    assert!(llamacpp["ppl"].as_f64() < gptq["ppl"].as_f64());
}
