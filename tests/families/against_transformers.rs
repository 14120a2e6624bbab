//! Logits and gradients of every family match transformers, in every spelling of configs and names.

use crate::common::{self, ok, path};
use lrc::calibrate::Targets;
use lrc::checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec};
use lrc::model::Decoder;

use super::{check_gradients, check_the_rest, distance, error, error_of, expected, families, fixture, json, logits};

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

/// `rope_type` and its older name `type`, as transformers writes both: either alone decides, and `rope_type` wins if
/// they differ.
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
                // The field of transformers 4, if all blocks have the same rotary embedding.
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

/// Fields that a wrapper's config leaves out have the defaults of the class of its language model.
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
    // The first files of Qwen2-VL have no `text_config`, and spell the rotary embedding the older way.
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

/// Files of early models: without today's prefix, and with buffers that nobody reads.
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
