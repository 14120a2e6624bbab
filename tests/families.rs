//! Every family, by one contract: the logits and gradients of transformers; compressed at any budget in both layouts, factors and
//! what they multiply out to are one model; what is tied stays tied, what is unknown passes through.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use crate::common::{self, ok, path};
use candle_core::{Device, Tensor};
use lrc::calibrate::{Needs, Observation, Targets, observe};
use lrc::checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec};
use lrc::model::{Decoder, WalkLimits, architectures, inventory};
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

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico").join(family)
}

/// Models that see as well, whose language models are asked about text; what is in front of the names of those, and of towers.
const MULTIMODAL: [(&str, &str, &str); 4] = [
    ("gemma3", "language_model.model.layers.", "vision_tower."),
    ("llava", "language_model.model.layers.", "vision_tower."),
    ("qwen2_5_vl", "model.layers.", "visual."),
    ("smolvlm", "model.text_model.layers.", "model.vision_model."),
];

/// Every family that is known, models that take options which their family's others do not, and those that see as well.
fn families() -> Vec<&'static str> {
    [architectures::known_types(), vec!["opt-350m"], MULTIMODAL.map(|(name, ..)| name).to_vec()].concat()
}

fn is_multimodal(family: &str) -> bool {
    MULTIMODAL.iter().any(|(name, ..)| *name == family)
}

fn is_encoder(family: &str) -> bool {
    architectures::find(family).is_some_and(|architecture| architecture.encoder.is_some())
}

fn tokenizer(family: &str) -> PathBuf {
    fixture(if is_encoder(family) { "tokenizer-encoder.json" } else { "tokenizer.json" })
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What transformers says of a family, and the tokens that it was asked about.
fn expected(family: &str) -> (Value, Vec<u32>) {
    let expected = json(&fixture(family).join("expected.json"));
    let ids = expected["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    (expected, ids)
}

fn logits(model: &Path, ids: &[u32]) -> anyhow::Result<Tensor> {
    let checkpoint = lrc::model::open(model)?;
    Decoder::open(&checkpoint)?.logits(&Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?)
}

#[test]
fn logits_of_every_family_are_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let mut failed = Vec::new();
    for family in families() {
        let copy = folder.path().join(family);
        common::copy(path(&fixture(family)), &copy);
        let (expected, ids) = expected(family);
        for case in expected["cases"].as_array().unwrap() {
            let mut config = json(&fixture(family).join("config.json"));
            config.as_object_mut().unwrap().extend(case["changes"].as_object().unwrap().clone());
            std::fs::write(copy.join("config.json"), config.to_string()).unwrap();
            let error = match logits(&copy, &ids) {
                Ok(logits) => error(&logits, &case["logits"]),
                Err(reason) => panic!("{family} with {}: {reason:#}", case["changes"]),
            };
            println!("{family:12} {:9.2e} {}", error, case["changes"]);
            if error > 1e-5 {
                failed.push(format!("{family} with {}: {error:.2e}", case["changes"]));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// `rope_type` and its older name `type`, as transformers writes both: what either gives alone, and `rope_type` where they differ.
#[test]
fn both_names_of_a_kind_of_rope_scaling_are_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut kinds = Vec::new();
    for family in ["llama", "phi3", "gemma3"] {
        let copy = folder.path().join(family);
        common::copy(path(&fixture(family)), &copy);
        let (expected, ids) = expected(family);
        for case in expected["cases"].as_array().unwrap() {
            let mut config = json(&fixture(family).join("config.json"));
            config.as_object_mut().unwrap().extend(case["changes"].as_object().unwrap().clone());
            let own = if family == "gemma3" { &mut config["text_config"] } else { &mut config };
            let all = &mut own["rope_parameters"];
            let by_kind = all["full_attention"].is_object();
            let rope = if by_kind { &mut all["full_attention"] } else { all };
            let (kind, fields) = (rope["rope_type"].clone(), rope.as_object_mut().unwrap());
            kinds.push(kind.clone());
            fields.shift_remove("rope_type");
            fields.shift_remove("type");
            let plain = fields.clone();
            for (newer, older) in [
                (Some(kind.clone()), None),
                (None, Some(kind.clone())),
                (Some(kind.clone()), Some(kind.clone())),
                (Some(kind.clone()), Some("mystery".into())),
            ] {
                // As transformers 4 has it, where there is one for all blocks.
                for key in ["rope_parameters", "rope_scaling"] {
                    let mut config = config.clone();
                    let own = if family == "gemma3" { &mut config["text_config"] } else { &mut config };
                    let mut fields = plain.clone();
                    fields.extend(newer.clone().map(|kind| ("rope_type".to_string(), kind)));
                    fields.extend(older.clone().map(|kind| ("type".to_string(), kind)));
                    match by_kind {
                        true => own["rope_parameters"]["full_attention"] = fields.into(),
                        false => {
                            own.as_object_mut().unwrap().shift_remove("rope_parameters");
                            own[key] = fields.into();
                        }
                    }
                    std::fs::write(copy.join("config.json"), config.to_string()).unwrap();
                    let found = error(&logits(&copy, &ids).unwrap(), &case["logits"]);
                    assert!(found < 1e-5, "{family}, {newer:?}, {older:?}, {key}: {found}");
                }
            }
        }
    }
    for kind in ["linear", "dynamic", "yarn", "longrope", "llama3"] {
        assert!(kinds.iter().any(|found| found == kind), "{kind}");
    }
}

#[test]
fn gradients_reach_every_linear_and_are_those_of_torch() {
    for family in families() {
        let (expected, ids) = expected(family);
        let checkpoint = Checkpoint::open(&fixture(family)).unwrap();
        let decoder = Decoder::open(&checkpoint).unwrap();
        let targets = match expected["asked"].as_array() {
            None => Targets::next(&ids),
            Some(asked) => {
                let rows: Vec<u32> = asked.iter().map(|row| row.as_u64().unwrap() as u32).collect();
                Targets { tokens: rows.iter().map(|&row| ids[row as usize]).collect(), rows, probe: 0 }
            }
        };
        check_gradients(family, &decoder, ids, targets, &expected["squared_gradients"]);
    }
}

/// Holds the gradients at the outputs of every linear against those of torch.
fn check_gradients(family: &str, decoder: &Decoder<'_>, ids: Vec<u32>, targets: Targets, expected: &Value) {
    let observation = Observation { needs: Needs::ALL, clip_gradients: false };
    let limits = WalkLimits::new(1 << 30, std::env::temp_dir());
    let mut sums = HashMap::new();
    observe(decoder, (&[ids], &[targets]), observation, &limits, &Journal::default(), &Silent, &mut |found| {
        sums.extend(found.into_iter().map(|(name, array)| (name, array.values.f32s().unwrap())));
        Ok(())
    })
    .unwrap();
    let by_linear: BTreeMap<String, Vec<f64>> = serde_json::from_value(expected.clone()).unwrap();
    let n_linears: usize = (0..decoder.n_blocks()).map(|block_idx| decoder.linears(block_idx).len()).sum();
    assert_eq!(by_linear.len(), n_linears, "{family}");
    for (module, expected) in by_linear {
        // Its names are those of the fixture, whatever the files of the decoder leave out.
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

/// The language model is what is compressed, whether or not its family is known; the rest is on request.
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
        // A language model that nobody knows.
        let mut config = json(&model.join("config.json"));
        config["text_config"]["model_type"] = "unheard_of".into();
        std::fs::write(model.join("config.json"), config.to_string()).unwrap();
        check(modules("unknown", &[]), n_linears, blocks);
        let run = common::lrc(&["eval", path(&model), "--text", path(&text)]);
        assert!(run.code == 4 && run.stderr.contains("`text_config.model_type` `unheard_of`"), "{}", run.stderr);
    }
}

/// What a wrapper's config leaves out is what the class of its language model takes.
#[test]
fn a_wrapper_may_leave_out_the_defaults_of_its_language_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    common::copy(path(&fixture("gemma3")), &model);
    let mut config = json(&model.join("config.json"));
    config["text_config"].as_object_mut().unwrap().shift_remove("num_attention_heads");
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let error = logits(&model, &[1, 2]).unwrap_err();
    assert!(format!("{error:#}").contains("expected [64, 16]"), "{error:#}");
    // Qwen2-VL's first files have no `text_config`, and its rotary embedding under the older name.
    let (expected, ids) = expected("qwen2_5_vl");
    common::copy(path(&fixture("qwen2_5_vl")), &model);
    let mut config = json(&model.join("config.json"));
    let mut fields = config["text_config"].take();
    for key in ["rope_parameters", "model_type", "rms_norm_eps"] {
        fields.as_object_mut().unwrap().shift_remove(key);
    }
    config.as_object_mut().unwrap().shift_remove("text_config");
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    config["rope_scaling"] = serde_json::json!({"type": "mrope", "mrope_section": [1, 1, 0]});
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let found = error_of(&model, &ids, &expected);
    assert!(found < 1e-5, "{found}");
}

fn error_of(model: &Path, ids: &[u32], expected: &Value) -> f64 {
    error(&logits(model, ids).unwrap(), &expected["cases"][0]["logits"])
}

#[test]
fn adapters_of_experts_are_refused_where_peft_would_lose_them() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (family, flags, reason) in [
        ("qwen3_moe", &["--compensate-rank", "2"][..], "PEFT does not find `model.layers.0.mlp.down_proj`"),
        ("mixtral", &["--compensate-rank", "auto", "--bits", "9"], "but PEFT needs one rank for all experts"),
    ] {
        let model = fixture(family);
        let base = ["compress", path(&model), "-o", path(&out), "--format", "peft", "--quant", "rtn-int4-channel"];
        let run = common::lrc(&[&base[..], &["--compensate", "lorc"], flags].concat());
        assert!(run.code == 4 && run.stderr.contains(reason), "{}", run.stderr);
    }
}

/// A mixture's report tells what every expert saw, and which saw too little.
#[test]
fn experts_are_measured_by_the_tokens_that_they_see() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(40)).unwrap();
    let report = |out: &str, windows: &str, length: &str, method: &str| {
        let (model, out) = (fixture("mixtral"), folder.path().join(out));
        let model = {
            let copy = folder.path().join("model");
            common::copy(path(&model), &copy);
            std::fs::copy(fixture("tokenizer.json"), copy.join("tokenizer.json")).unwrap();
            copy
        };
        let calibration = ["--calibration", path(&text), "--samples", windows, "--seq-len", length, "--method", method];
        ok(&[&["compress", path(&model), "-o", path(&out), "-q", "--keep", "0.6"], &calibration[..]].concat());
        json(&out.join("lrc-report.json"))
    };
    let linears = |report: &Value| report["linears"].as_array().unwrap().clone();
    let is_expert = |l: &&Value| l["module"].as_str().unwrap().contains("experts");
    let noted = |l: &&Value| l["note"].as_str().is_some_and(|note| note.starts_with("data-free metric"));
    for method in ["kfac", "svd-llm", "fwsvd", "asvd"] {
        // 12 windows of 30 tokens, of which every token sees two of four experts.
        let much = linears(&report(&format!("much-{method}"), "12", "30", method));
        for block in 0..2 {
            let w1 = |l: &&Value| l["block"] == block && l["module"].as_str().unwrap().ends_with("w1");
            let seen: u64 = much.iter().filter(w1).map(|l| l["expert_tokens"].as_u64().unwrap()).sum();
            assert_eq!(seen, 2 * 12 * 30);
        }
        let few = |l: &&Value| is_expert(l) && l["expert_tokens"].as_u64().unwrap() < l["shape"][1].as_u64().unwrap();
        // 16 tokens: no expert sees as many as `w2` has inputs.
        let little = linears(&report(&format!("little-{method}"), "1", "16", method));
        for found in [&much, &little] {
            let [few, noted]: [Vec<&Value>; 2] =
                [found.iter().filter(few).collect(), found.iter().filter(noted).collect()];
            assert_eq!(few, noted, "{method}");
        }
        assert!(little.iter().filter(noted).count() >= 8);
        // The data-free metric counts the errors of experts without tokens; the knapsack does not cut them to the smallest rank.
        let has_error = |l: &Value| l["rank"].is_null() || l["relative_error"].as_f64().unwrap() > 0.0;
        assert!(little.iter().filter(noted).all(has_error), "{method}");
        if method == "kfac" {
            let mut unused = little.iter().filter(|l| l["expert_tokens"] == 0);
            assert!(unused.any(|l| l["rank"].as_u64().is_none_or(|rank| rank > 1)), "{method}");
        }
    }
}

/// Parts of fused matrices, each with a rank of its own: the same model as the matrices that they make up.
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
        let kfac = [&["--keep", "0.7", "--layout", "factors"], &calibration[..]].concat();
        let coded = ["--quant", "rtn-int4-channel", "--compensate", "lorc", "--compensate-rank", "2"];
        for (name, flags) in [("kfac", &kfac[..]), ("svd", &["--keep", "0.7"]), ("coded", &coded)] {
            let out = compress(name, flags);
            let (source, compressed) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&out).unwrap());
            let decoder = Decoder::open(&source).unwrap();
            let linears = inventory::linears(&compressed);
            let parts: Vec<_> = linears.iter().filter(|linear| inventory::is_part(&compressed, linear)).collect();
            assert_eq!(parts.len(), n_parts * decoder.n_blocks(), "{family}");
            // The fused matrices put together by hand, everything else multiplied out.
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
    for family in architectures::known_types().into_iter().filter(|family| architectures::gguf_family(family).is_some())
    {
        let folder = tempfile::tempdir().unwrap();
        let (_, ids) = expected(family);
        let model = folder.path().join("model");
        common::copy(path(&fixture(family)), &model);
        if family == "gemma2" {
            // llama.cpp scales scores by the width of a head, whatever the config says: another scale is refused.
            let out = folder.path().join("refused");
            let other = ["compress", path(&model), "-o", path(&out), "--quant", "rtn-int8-channel", "--format", "gguf"];
            let refused = common::lrc(&other);
            assert!(refused.stderr.contains("`query_pre_attn_scalar` is 12"), "{}", refused.stderr);
            let mut config = json(&model.join("config.json"));
            config["query_pre_attn_scalar"] = config["head_dim"].clone();
            std::fs::write(model.join("config.json"), config.to_string()).unwrap();
        }
        let [dense, gguf] = ["dense", "gguf"].map(|format| {
            let out = folder.path().join(format);
            ok(&["compress", path(&model), "-o", path(&out), "-q", "--quant", "rtn-int8-channel", "--format", format]);
            logits(&out, &ids).unwrap_or_else(|e| panic!("{family}: {e:#}"))
        });
        assert!(distance(&gguf, &dense) < 1e-5, "{family}: {}", distance(&gguf, &dense));
    }
}

/// Largest difference over the largest value of `y`.
fn distance(x: &Tensor, y: &Tensor) -> f32 {
    let largest = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    largest((x - y).unwrap()) / largest(y.clone())
}

/// Files of early models: without the prefix that transformers writes today, with buffers that nobody reads.
#[test]
fn names_without_their_prefix_are_the_same_model() {
    for (family, prefix) in [("gpt2", "transformer."), ("opt", "model.")] {
        let folder = tempfile::tempdir().unwrap();
        let (expected, ids) = expected(family);
        let source = Checkpoint::open(&fixture(family)).unwrap();
        let short = |name: &str| name.strip_prefix(prefix).unwrap_or(name).to_string();
        let mut specs: Vec<TensorSpec> = source
            .tensors()
            .map(|t| TensorSpec { name: short(&t.name), dtype: t.dtype, shape: t.shape.clone() })
            .collect();
        let mask = || TensorSpec { name: "h.0.attn.bias".into(), dtype: Dtype::F32, shape: vec![1, 1, 8, 8] };
        specs.push(mask());
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let mut writer = SafetensorsWriter::create(&model, &specs, 1 << 30).unwrap();
        for info in source.tensors() {
            writer.write(&short(&info.name), &source.with_bytes(&info.name, <[u8]>::to_vec).unwrap()).unwrap();
        }
        writer.write(&mask().name, &vec![0; mask().n_bytes() as usize]).unwrap();
        writer.finish().unwrap();
        std::fs::copy(fixture(family).join("config.json"), model.join("config.json")).unwrap();
        let found = error(&logits(&model, &ids).unwrap(), &expected["cases"][0]["logits"]);
        assert!(found < 1e-5, "{family}: {found}");
        let out = folder.path().join("out");
        ok(&["compress", path(&model), "-o", path(&out), "--keep", "0.8", "-q"]);
        logits(&out, &ids).unwrap();
        check_the_rest(family, &model, &out);
        if family == "gpt2" {
            let [dense, gguf] = ["dense", "gguf"].map(|format| {
                let out = folder.path().join(format);
                let flags = ["--quant", "rtn-int8-channel", "--exclude", "*c_attn", "--format", format, "-q"];
                ok(&[&["compress", path(&model), "-o", path(&out)], &flags[..]].concat());
                logits(&out, &ids).unwrap()
            });
            assert!(distance(&gguf, &dense) < 1e-5, "{}", distance(&gguf, &dense));
        }
    }
}

/// An encoder without its head and its prefix, with the names of norms that early files have.
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

        // Compressed with every metric, and compared; there is no head to predict tokens with.
        let text = folder.path().join("text.txt");
        std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(20)).unwrap();
        let calibration = ["--calibration", path(&text), "--samples", "4", "--seq-len", "24", "-q"];
        for method in ["svd", "svd-llm", "asvd", "fwsvd", "kfac"] {
            let out = folder.path().join(format!("{family}-{method}"));
            let flags = ["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--method", method];
            let calibration = if method == "svd" { &["-q"][..] } else { &calibration };
            ok(&[&flags[..], calibration].concat());
            check_fidelity(&model, &out, expected["text"].as_str().unwrap());
        }
        if family == "bert" {
            // A pooler that is compressed on request is still the pooler, wherever its bias stands.
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

/// Holds the agreement that `lrc eval` tells of a text of one window against the definitions.
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
        // Of a model and itself.
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

/// Everything but the compressed linears is in the output, byte for byte, and nothing else is.
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

/// What is known of a family is in its table: files and byte layouts are the same for all.
#[test]
fn checkpoints_and_codecs_name_no_family() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = vec![source.join("checkpoint"), source.join("codecs")];
    let mut n_files = 0;
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            paths.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        n_files += 1;
        let text = std::fs::read_to_string(&path).unwrap();
        let words: Vec<&str> = text.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '.').collect();
        for family in architectures::known_types() {
            assert!(!words.iter().any(|word| word.eq_ignore_ascii_case(family)), "{} names `{family}`", path.display());
        }
    }
    assert!(n_files > 40);
}
