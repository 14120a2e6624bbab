//! PEFT adapters: merged as a source (`--adapter`), made of a fine-tune (`lrc delta`), and truncated.

use std::path::Path;

use crate::common::{self, FIXTURE, HELD_OUT, TRAIN, lrc, ok, path};
use candle_core::{Device, Tensor};
use lrc::checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec, cast};
use lrc::model::{Decoder, open, with_adapter};
use serde_json::{Value, json};

const ORACLES: &str = "tests/oracles/adapters";

fn oracle(name: &str) -> String {
    format!("{ORACLES}/{name}")
}

/// Base and adapter are what PEFT makes of them: scales by pattern, rank-stabilized, tables, whole modules, biases, matrices
/// stored as (in, out), and heads that were tied. `tests/oracles/adapters.py` made the values.
#[test]
fn a_merged_adapter_has_the_logits_of_peft() {
    let cases: Value = serde_json::from_str(include_str!("oracles/adapters.json")).unwrap();
    for (name, case) in cases.as_object().unwrap() {
        let base = open(Path::new(case["base"].as_str().unwrap())).unwrap();
        let model = with_adapter(base, Path::new(&oracle(name))).unwrap();
        let ids: Vec<Vec<u32>> = serde_json::from_value(case["ids"].clone()).unwrap();
        let ids = Tensor::from_vec(ids.concat(), (ids.len(), ids[0].len()), &Device::Cpu).unwrap();
        let positions: Vec<u32> = serde_json::from_value(case["positions"].clone()).unwrap();
        let expected: Vec<Vec<f32>> = serde_json::from_value(case["logits"].clone()).unwrap();
        let logits = Decoder::open(&model).unwrap().logits(&ids).unwrap();
        let positions = Tensor::new(positions, &Device::Cpu).unwrap();
        let found = logits.index_select(&positions, 1).unwrap().flatten(0, 1).unwrap().to_vec2::<f32>().unwrap();
        let largest = found.iter().flatten().zip(expected.iter().flatten()).map(|(x, y)| (x - y).abs());
        let largest = largest.fold(0.0, f32::max);
        assert!(largest < 2e-5, "{name}: logits differ by {largest}");
    }
}

/// PEFT goes by the class of a layer: it corrects an adapter that says otherwise.
#[test]
fn matrices_have_the_order_of_their_family_whatever_an_adapter_says() {
    let folder = tempfile::tempdir().unwrap();
    let cases: Value = serde_json::from_str(include_str!("oracles/adapters.json")).unwrap();
    for (name, wrong) in [("conv1d", false), ("patterns", true)] {
        let changed = folder.path().join(name);
        common::copy(&oracle(name), &changed);
        let file = changed.join("adapter_config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        config["fan_in_fan_out"] = json!(wrong);
        std::fs::write(&file, config.to_string()).unwrap();
        let base = || open(Path::new(cases[name]["base"].as_str().unwrap())).unwrap();
        let [found, expected] =
            [&changed, Path::new(&oracle(name))].map(|adapter| with_adapter(base(), adapter).unwrap());
        for info in expected.tensors() {
            assert!(found.values(&info.name).unwrap() == expected.values(&info.name).unwrap(), "{name}: {}", info.name);
        }
    }
}

#[test]
fn an_adapter_is_part_of_the_model_in_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (base, adapter) = ("fixtures/pico-llama", oracle("patterns"));
    let merged = at("merged");
    let flags = ["--adapter", &adapter];
    let report =
        ok(&[&["export", base, "-o", path(&merged), "--format", "dense", "--json"], &flags[..]].concat()).json();
    assert!(report["adapter"]["files"]["adapter_model.safetensors"].is_string(), "{report}");
    assert!(report["source_files"]["adapter/adapter_config.json"].is_string(), "{report}");
    // The exported weights are those that the commands see.
    let with_adapter = [&["inspect", base][..], &flags].concat();
    let args: [&[&str]; 3] = [&["inspect", base], &with_adapter, &["inspect", path(&merged)]];
    let [plain, one, other] = args.map(|args| ok(&[args, &["--json"]].concat()).json()["linears"].clone());
    assert_eq!(one, other);
    assert_ne!(one, plain);
    let out = at("compressed");
    let report = ok(&[&["compress", base, "-o", path(&out), "--keep", "0.8", "--json"], &flags[..]].concat()).json();
    assert!(report["source_files"]["adapter/adapter_model.safetensors"].is_string());
    // A run of the base is not resumed with the adapter, and statistics of the base are not taken.
    let stats = at("stats.safetensors");
    ok(&["calibrate", FIXTURE, "--text", TRAIN, "--samples", "4", "-o", path(&stats)]);
    let tuned = at("tuned");
    fine_tune(&tuned);
    let delta = at("delta");
    ok(&["delta", FIXTURE, path(&tuned), "-o", path(&delta), "--ranks", "fixed:4", "-q"]);
    let out = at("refused");
    let run = lrc(&[
        "compress",
        FIXTURE,
        "--adapter",
        path(&delta),
        "-o",
        path(&out),
        "--keep",
        "0.8",
        "--statistics",
        path(&stats),
    ]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    assert!(run.stderr.contains("another model") && run.stderr.contains("adapter/"), "{}", run.stderr);
}

/// Changes a copy of the fixture: four linears by different amounts, a norm, and the table.
fn fine_tune(out: &Path) {
    common::copy(FIXTURE, out);
    let noise = |i: usize| {
        let mixed = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let smooth = |i: usize| ((i / 96) as f32 * 0.37).sin() * ((i % 96) as f32 * 0.23).cos();
    common::edit(out, "model.layers.0.self_attn.q_proj.weight", |i, w| w + 0.02 * smooth(i) + 0.002 * noise(i));
    common::edit(out, "model.layers.1.mlp.up_proj.weight", |i, w| w + 0.01 * noise(i));
    common::edit(out, "model.layers.2.self_attn.v_proj.weight", |i, w| w + 0.05 * smooth(i));
    common::edit(out, "model.layers.3.mlp.down_proj.weight", |i, w| w + 0.001 * noise(i));
    common::edit(out, "model.layers.1.input_layernorm.weight", |_, w| w * 1.1);
    common::edit(out, "model.embed_tokens.weight", |i, w| if i < 96 { w + 0.1 } else { w });
}

fn delta(tuned: &Path, out: &Path, extra: &[&str]) -> Value {
    ok(&[&["delta", FIXTURE, path(tuned), "-o", path(out), "--json"], extra].concat()).json()
}

/// KL of base and adapter from the fine-tuned model.
fn divergence(adapter: &Path, tuned: &Path) -> f64 {
    let args = ["eval", FIXTURE, "--adapter", path(adapter), "--reference", path(tuned), "--text", HELD_OUT];
    let report = ok(&[&args[..], &["--seq-len", "128", "--max-windows", "16", "--json"]].concat()).json();
    report["divergence"]["kl"]["mean"].as_f64().or_else(|| report["kl"]["mean"].as_f64()).unwrap()
}

#[test]
fn the_whole_difference_gives_the_fine_tuned_model() {
    let folder = tempfile::tempdir().unwrap();
    let (tuned, out) = (folder.path().join("tuned"), folder.path().join("out"));
    fine_tune(&tuned);
    let report = delta(&tuned, &out, &["--ranks", "full"]);
    let stored: Vec<&str> = report["delta"]["stored"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(
        stored,
        ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"],
        "the head is no longer the table of the base"
    );
    assert_eq!(report["delta"]["left_out"], json!({}));
    assert_eq!(report["delta"]["unchanged"], 24);
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["base_model_name_or_path"], FIXTURE);
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 4, "unchanged linears have no factors");
    assert_eq!(config["modules_to_save"].as_array().unwrap().len(), 3);
    assert!(divergence(&out, &tuned) < 1e-7);
    // Without them the rest is left out, named, and warned of.
    let bare = folder.path().join("bare");
    let run = ok(&["delta", FIXTURE, path(&tuned), "-o", path(&bare), "--ranks", "full", "--others", "leave-out"]);
    assert!(run.stderr.contains("it lacks `lm_head.weight`"), "{}", run.stderr);
    assert!(run.stdout.contains("left out: model.embed_tokens.weight"), "{}", run.stdout);
    let card = std::fs::read_to_string(bare.join("README.md")).unwrap();
    assert!(card.contains("lrc delta tiny-llama tuned -o OUT --others leave-out"), "{card}");
    assert!(divergence(&bare, &tuned) > 1e-6);
}

#[test]
fn budgets_of_a_difference_are_met_and_spent_where_it_is_large() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let tuned = at("tuned");
    fine_tune(&tuned);
    let leave = ["--others", "leave-out"];
    let uniform = delta(&tuned, &at("uniform"), &[&["--ranks", "fixed:6"], &leave[..]].concat());
    let size = uniform["size_bytes"].as_u64().unwrap();
    let target = format!("{size}B");
    let chosen =
        delta(&tuned, &at("chosen"), &[&["--target-size", &target, "--ranks", "knapsack"], &leave[..]].concat());
    let found = at("chosen").join("adapter_model.safetensors").metadata().unwrap().len();
    assert_eq!(chosen["size_bytes"], found);
    assert!(found <= size && found as f64 > 0.9 * size as f64, "{found} of {size}");
    let rank = |report: &Value, module: &str| {
        let linears = report["linears"].as_array().unwrap();
        linears.iter().find(|l| l["module"] == module).unwrap()["rank"].as_u64().unwrap()
    };
    assert_eq!(rank(&chosen, "model.layers.3.mlp.down_proj"), 0, "a tiny difference is left out");
    assert!(rank(&chosen, "model.layers.1.mlp.up_proj") > rank(&uniform, "model.layers.1.mlp.up_proj"));
    assert!(divergence(&at("chosen"), &tuned) < divergence(&at("uniform"), &tuned));
    // In the metric of the fine-tuned model, and the same bytes again from its recipe.
    let flags = ["--target-size", &target, "--calibration", TRAIN, "--samples", "8", "--seq-len", "128"];
    let kfac = delta(&tuned, &at("kfac"), &[&flags[..], &leave].concat());
    assert_eq!((&kfac["recipe"]["method"], &kfac["recipe"]["ranks"]), (&json!("kfac"), &json!("knapsack")));
    let recipe = at("kfac").join("lrc-recipe.toml");
    delta(&tuned, &at("again"), &[&["--recipe", path(&recipe)], &leave[..]].concat());
    let bytes = |name: &str| std::fs::read(at(name).join("adapter_model.safetensors")).unwrap();
    assert_eq!(bytes("kfac"), bytes("again"));
    let small = lrc(&["delta", FIXTURE, path(&tuned), "-o", path(&at("small")), "--target-size", "100kB"]);
    assert!(small.code == 2 && small.stderr.contains("--others leave-out"), "{}", small.stderr);
}

/// Twice the rank, and far more than the rounding costs; truncated, they are 8-bit floats again.
#[test]
fn factors_of_8_bit_floats_are_closer_in_as_many_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let tuned = at("tuned");
    fine_tune(&tuned);
    let size = delta(&tuned, &at("uniform"), &["--ranks", "fixed:6"])["size_bytes"].to_string();
    let flags = ["--target-size", &size, "--method", "svd", "--ranks", "knapsack"];
    delta(&tuned, &at("plain"), &flags);
    let report = delta(&tuned, &at("float8"), &[&flags[..], &["--quant-factors", "float8"]].concat());
    let file = at("float8").join("adapter_model.safetensors");
    assert_eq!(report["size_bytes"], file.metadata().unwrap().len());
    let stored = Checkpoint::open_arrays(&file).unwrap();
    let are_float8 =
        |file: &Checkpoint| file.tensors().all(|info| (info.dtype == Dtype::F8_E4M3) == info.name.contains(".lora_"));
    assert!(are_float8(&stored));
    let config: Value =
        serde_json::from_slice(&std::fs::read(at("float8").join("adapter_config.json")).unwrap()).unwrap();
    let alpha = |module: &str| 4096.0 * config["alpha_pattern"][module].as_f64().unwrap();
    for (module, rank) in config["rank_pattern"].as_object().unwrap() {
        assert_eq!(alpha(module), rank.as_f64().unwrap());
    }
    assert!(divergence(&at("float8"), &tuned) < 0.7 * divergence(&at("plain"), &tuned));
    // The error of a truncation is that of its report and of rounding to 3 bits.
    let out = at("truncated");
    let report = ok(&["truncate", path(&at("float8")), "-o", path(&out), "--rank", "4", "--json"]).json();
    let after = Checkpoint::open_arrays(&out.join("adapter_model.safetensors")).unwrap();
    assert!(are_float8(&after));
    let module = report["modules"][0]["module"].as_str().unwrap();
    let names = ["A", "B"].map(|part| format!("{module}.lora_{part}.weight"));
    let names = [names[0].as_str(), names[1].as_str()];
    let scale = 1.0 / 4096.0;
    let error = relative(&product(&stored, names, scale), &product(&after, names, scale));
    let reported = report["modules"][0]["relative_error"].as_f64().unwrap();
    assert!(error >= reported && error.powi(2) < reported.powi(2) + 0.05f64.powi(2), "{error} and {reported}");
    for (flags, message) in [
        (["delta", FIXTURE, path(&tuned), "--keep", "0.1", "--quant-factors", "int8"], "`float8`"),
        (["compress", FIXTURE, "-q", "--keep", "0.5", "--quant-factors", "float8"], "is for adapters"),
    ] {
        let run = lrc(&[&flags[..], &["-o", path(&at("refused"))]].concat());
        assert!(run.code == 2 && run.stderr.contains(message) && run.stderr.contains("hint:"), "{}", run.stderr);
    }
}

#[test]
fn what_makes_no_difference_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (out, recipe) = (folder.path().join("out"), folder.path().join("recipe.toml"));
    std::fs::write(&recipe, "format = \"adapter\"\nkeep = 0.1\n").unwrap();
    let [low_rank, coded] = ["low-rank", "coded"].map(|name| folder.path().join(name));
    ok(&["compress", FIXTURE, "-q", "--keep", "0.5", "-o", path(&low_rank)]);
    ok(&["compress", FIXTURE, "-q", "--quant", "rtn-int4-g32", "-o", path(&coded)]);
    let [low_rank, coded] = [path(&low_rank), path(&coded)];
    for (args, code, message) in [
        (["delta", FIXTURE, low_rank, "--keep", "0.1"], 4, "is already of low rank"),
        (["delta", low_rank, FIXTURE, "--keep", "0.1"], 4, "is already of low rank"),
        (["delta", FIXTURE, coded, "--keep", "0.1"], 4, "coded`: `model.layers.0."),
        (["delta", FIXTURE, coded, "--keep", "0.1"], 4, "in the fine-tuned model `"),
        (["delta", coded, FIXTURE, "--keep", "0.1"], 4, "in the base `"),
        (["delta", FIXTURE, FIXTURE, "--method", "svd"], 2, "`--ranks fixed:16`"),
        (["delta", FIXTURE, FIXTURE, "--keep", "0.1"], 4, "differs from the linear of"),
        (["delta", "fixtures/pico-llama", FIXTURE, "--keep", "0.1"], 4, "expected"),
        (["delta", FIXTURE, FIXTURE, "--keep", "1"], 2, "`--keep 1`"),
        (["compress", FIXTURE, "-q", "--recipe", path(&recipe)], 2, "lrc delta"),
    ] {
        let run = lrc(&[&args[..], &["-o", path(&out)]].concat());
        assert_eq!(run.code, code, "{args:?}: {}", run.stderr);
        assert!(run.stderr.contains(message) && run.stderr.contains("hint:"), "{args:?}: {}", run.stderr);
        assert!(!out.exists());
    }
}

/// A tensor by its name and shape.
type Shaped<'a> = (&'a str, &'a [usize]);

fn of<'a>(name: &'a str, shape: &'a [usize]) -> Shaped<'a> {
    (name, shape)
}

/// Writes an adapter of `tensors` with this config.
fn write_adapter(folder: &Path, config: &Value, tensors: &[Shaped<'_>]) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    write_file(&folder.join("adapter_model.safetensors"), tensors, |i| ((i * 7919 % 101) as f32 / 50.5 - 1.0) * 0.1);
}

fn write_file(file: &Path, tensors: &[Shaped<'_>], value: impl Fn(usize) -> f32) {
    let spec = |&(name, shape): &Shaped<'_>| TensorSpec { name: name.into(), dtype: Dtype::F32, shape: shape.into() };
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    let name = file.file_name().unwrap().to_str().unwrap();
    let mut writer = SafetensorsWriter::create_named(file.parent().unwrap(), name, &specs, u64::MAX).unwrap();
    for (at, spec) in specs.iter().enumerate() {
        let values: Vec<f32> = (0..spec.n_elements() as usize).map(|i| value(i + 13 * at)).collect();
        writer.write(&spec.name, &cast::encode(spec.dtype, &values).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn an_adapter_that_does_not_fit_is_refused_by_the_name_of_its_tensor() {
    const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    let folder = tempfile::tempdir().unwrap();
    let good = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4});
    let with = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        config
    };
    let pair = [of(A, &[2, 24]), of(B, &[32, 2])];
    let and = |name: &'static str, shape: &'static [usize]| [&pair[..], &[of(name, shape)]].concat();
    const MAGNITUDE: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector";
    let cases: Vec<(Value, Vec<Shaped<'_>>, &str)> = vec![
        (with("use_dora", json!(true)), pair.to_vec(), "`use_dora`"),
        (with("peft_type", json!("LOHA")), pair.to_vec(), "`LOHA`"),
        (with("init_lora_weights", json!("pissa")), pair.to_vec(), "`pissa`"),
        (with("r", json!(3)), pair.to_vec(), "gives 3"),
        (with("rank_pattern", json!({".*q_proj": 2})), pair.to_vec(), "regular expression"),
        (with("lora_alpha", json!("much")), pair.to_vec(), "invalid type"),
        (good.clone(), vec![of(A, &[2, 24])], "whose `B` is absent"),
        (good.clone(), vec![of(A, &[2, 24]), of(B, &[30, 2])], "q_proj.weight` has shape [32, 24]"),
        (good.clone(), vec![of(A, &[2, 24]), of(B, &[32, 3])], "its rank is 2"),
        (good.clone(), and("base_model.model.model.layers.0.mlp.nothing.weight", &[2]), "nothing.weight"),
        (good.clone(), and("base_model.model.model.norm.weight", &[23]), "its shape is [23]"),
        (good.clone(), and(MAGNITUDE, &[32]), "lora_magnitude_vector"),
        (good.clone(), vec![], "no tensor"),
        (good.clone(), and(&A["base_model.model.".len()..], &[2, 24]), "is the same factor"),
    ];
    for (i, (config, tensors, message)) in cases.iter().enumerate() {
        let adapter = folder.path().join(i.to_string());
        write_adapter(&adapter, config, tensors);
        let run = lrc(&["inspect", "fixtures/pico-llama", "--adapter", path(&adapter)]);
        assert_eq!(run.code, 4, "{message}: {}", run.stderr);
        assert!(run.stderr.contains(message) && run.stderr.contains("hint:"), "{message}: {}", run.stderr);
    }
    let fine = folder.path().join("fine");
    write_adapter(&fine, &good, &pair);
    ok(&["inspect", "fixtures/pico-llama", "--adapter", path(&fine)]);
    std::fs::remove_file(fine.join("adapter_config.json")).unwrap();
    let run = lrc(&["inspect", "fixtures/pico-llama", "--adapter", path(&fine)]);
    assert!(run.code == 4 && run.stderr.contains("adapter_config.json"), "{}", run.stderr);
    // Numbers that JSON has no word for, a file in place of a folder, and nothing at all.
    let config = good.to_string().replace("4", "NaN");
    std::fs::write(fine.join("adapter_config.json"), config).unwrap();
    let (file, nothing) = (fine.join("adapter_model.safetensors"), folder.path().join("nothing"));
    for (adapter, message) in [(&fine, "number `NaN`"), (&file, "is not a folder"), (&nothing, "no such folder")] {
        let run = lrc(&["inspect", "fixtures/pico-llama", "--adapter", path(adapter)]);
        assert!(run.code == 4 && run.stderr.contains(message), "{message}: {}", run.stderr);
        assert!(run.stderr.contains("hint: give the folder of a LoRA adapter"), "{}", run.stderr);
    }
}

/// Sizes that are too small name their flag and the least that serves, which does.
#[test]
fn a_size_without_room_for_a_factor_names_the_least_that_has() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (oracle("patterns"), folder.path().join("out"));
    for [flag, size] in [["--target-size", "300B"], ["--keep", "0.0001"]] {
        let truncate = |size: &str| lrc(&["truncate", &source, "-o", path(&out), flag, size]);
        let run = truncate(size);
        assert!(run.code == 2 && run.stderr.contains(&format!("error: `{flag} ")), "{}", run.stderr);
        let least = run.stderr.split(&format!("at least `{flag} ")).nth(1).unwrap().split('`').next().unwrap();
        let run = truncate(least);
        assert!(run.code == 0, "{least}: {}", run.stderr);
        std::fs::remove_dir_all(&out).unwrap();
    }
    let run = lrc(&["truncate", &source, "-o", path(&out)]);
    let expected = "error: `--keep`, `--target-size`, `--rank` or `--energy` is missing";
    assert!(run.code == 2 && run.stderr.contains(expected), "{}", run.stderr);
    let copy = folder.path().join("copy");
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        common::copy(&source, &copy);
        std::fs::remove_file(copy.join(file)).unwrap();
        let run = lrc(&["truncate", path(&copy), "-o", path(&out), "--rank", "1"]);
        assert!(run.code == 4 && run.stderr.contains(&format!("it has no `{file}`")), "{}", run.stderr);
        std::fs::remove_dir_all(&copy).unwrap();
    }
}

/// scale · B A of a module (m, n), row-major.
fn product(file: &Checkpoint, [a, b]: [&str; 2], scale: f32) -> Vec<f32> {
    let rank = file.info(a).unwrap().shape[0];
    let (a, b) = (file.factor(a).unwrap(), file.factor(b).unwrap());
    let n = a.len() / rank;
    let entry = |i: usize, j: usize| (0..rank).map(|k| b[i * rank + k] * a[k * n + j]).sum::<f32>() * scale;
    (0..b.len() / rank).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| entry(i, j)).collect()
}

/// Norm of the difference over that of the first.
fn relative(whole: &[f32], part: &[f32]) -> f64 {
    let squared = |values: Vec<f32>| values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
    (squared(whole.iter().zip(part).map(|(x, y)| x - y).collect()) / squared(whole.to_vec())).sqrt()
}

#[test]
fn a_truncated_adapter_of_peft_has_the_error_of_its_report() {
    let folder = tempfile::tempdir().unwrap();
    let source = oracle("patterns");
    let weights = |folder: &Path| Checkpoint::open_arrays(&folder.join("adapter_model.safetensors")).unwrap();
    let before = weights(Path::new(&source));
    let (a, b) = (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    );
    let whole = product(&before, [a, b], 5.0 / 3.0);
    for flags in [["--rank", "2"], ["--rank", "9"], ["--energy", "0.8"], ["--keep", "0.5"], ["--target-size", "4kB"]] {
        let out = folder.path().join(flags.concat());
        let report = ok(&["truncate", &source, "-o", path(&out), flags[0], flags[1], "--json"]).json();
        let module =
            report["modules"].as_array().unwrap().iter().find(|m| a.starts_with(m["module"].as_str().unwrap()));
        let module = module.unwrap();
        let after = weights(&out);
        assert_eq!(report["size_bytes"], out.join("adapter_model.safetensors").metadata().unwrap().len());
        if module["rank"] == 0 {
            assert!(after.info(a).is_none() && flags[0] != "--rank");
            continue;
        }
        let error = relative(&whole, &product(&after, [a, b], 1.0));
        let reported = module["relative_error"].as_f64().unwrap();
        assert!((error - reported).abs() < 1e-5, "{flags:?}: {error} and {reported}");
        // It is an adapter again.
        ok(&["inspect", "fixtures/pico-llama", "--adapter", path(&out)]);
    }
    let run = lrc(&["truncate", FIXTURE, "-o", path(&folder.path().join("x")), "--rank", "2"]);
    assert!(run.code == 2 && run.stderr.contains("`--keep`"), "{}", run.stderr);
}

#[test]
fn a_file_of_kohya_is_truncated_with_its_names_and_alphas() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("lora.safetensors"), folder.path().join("small.safetensors"));
    write_file(
        &file,
        &[
            of("lora_unet_down_0.alpha", &[]),
            of("lora_unet_down_0.lora_down.weight", &[4, 6, 3, 3]),
            of("lora_unet_down_0.lora_up.weight", &[8, 4, 1, 1]),
            of("lora_te_q.lora_down.weight", &[4, 5]),
            of("lora_te_q.lora_up.weight", &[7, 4]),
        ],
        |i| if i == 0 { 2.0 } else { ((i * i * 31 + i * 7) % 67) as f32 / 33.5 - 1.0 },
    );
    let report = ok(&["truncate", path(&file), "-o", path(&out), "--rank", "2", "--json"]).json();
    let (before, after) = (Checkpoint::open_arrays(&file).unwrap(), Checkpoint::open_arrays(&out).unwrap());
    assert_eq!(after.info("lora_unet_down_0.lora_down.weight").unwrap().shape, [2, 6, 3, 3]);
    assert_eq!(after.values("lora_unet_down_0.alpha").unwrap(), [2.0]);
    assert!(after.info("lora_te_q.alpha").is_none());
    for (at, (module, scale)) in [("lora_unet_down_0", 2.0 / 4.0), ("lora_te_q", 1.0)].into_iter().enumerate() {
        let names = [format!("{module}.lora_down.weight"), format!("{module}.lora_up.weight")];
        let names = [names[0].as_str(), names[1].as_str()];
        let error = relative(&product(&before, names, scale), &product(&after, names, 1.0));
        let reported = report["modules"][at]["relative_error"].as_f64().unwrap();
        assert!((error - reported).abs() < 1e-5 && error > 0.0, "{module}: {error} and {reported}");
    }
}
