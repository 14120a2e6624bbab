//! Bad input: one clear error that names the file and the tensor, the documented exit code, and nothing lost.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::common::{FIXTURE, HELD_OUT, TRAIN, copy, lrc, ok, path};
use lrc::checkpoint::Checkpoint;

/// A copy of the fixture that a test may break.
struct Broken {
    folder: tempfile::TempDir,
}

impl Broken {
    fn new() -> Self {
        let broken = Self { folder: tempfile::tempdir().unwrap() };
        copy(FIXTURE, &broken.model());
        broken
    }

    fn sharded() -> Self {
        let broken = Self { folder: tempfile::tempdir().unwrap() };
        let model = broken.model();
        ok(&["compress", FIXTURE, "-o", path(&model), "-q", "--keep", "1.0", "--max-shard-size", "600kB"]);
        assert!(model.join("model.safetensors.index.json").exists());
        broken
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    fn weights(&self) -> PathBuf {
        self.model().join("model.safetensors")
    }

    fn edit_config(&self, from: &str, to: &str) {
        let path = self.model().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
    }

    /// Changes the bytes of the weight file.
    fn edit_weights(&self, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.weights()).unwrap();
        edit(&mut bytes);
        std::fs::write(self.weights(), bytes).unwrap();
    }

    /// Changes the header text of the weight file, keeping its length.
    fn edit_header(&self, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        self.edit_weights(|bytes| {
            let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("the header has it");
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        });
    }

    /// Runs all three commands; each must fail with `code`, name `parts` in its error, and write nothing.
    #[track_caller]
    fn check(&self, code: i32, parts: &[&str]) {
        let (model, out) = (self.model(), self.folder.path().join("out"));
        let commands: [&[&str]; 3] = [
            &["eval", path(&model), "--text", HELD_OUT, "--max-windows", "1"],
            &["compress", path(&model), "-o", path(&out), "--keep", "0.8"],
            &["inspect", path(&model)],
        ];
        for args in commands {
            self.check_one(args, code, parts);
        }
    }

    #[track_caller]
    fn check_one(&self, args: &[&str], code: i32, parts: &[&str]) {
        let run = lrc(args);
        assert_eq!(run.code, code, "lrc {args:?}: {}", run.stderr);
        assert_eq!(run.stderr.matches("error: ").count(), 1, "{}", run.stderr);
        for part in parts {
            assert!(run.stderr.contains(part), "`{part}` is not in: {}", run.stderr);
        }
        let left: Vec<_> = std::fs::read_dir(self.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["model"], "something was left behind");
    }
}

#[test]
fn a_truncated_file() {
    let broken = Broken::new();
    broken.edit_weights(|bytes| bytes.truncate(bytes.len() - 1000));
    broken.check(4, &["model.safetensors", "truncated", "hint: download"]);
}

#[test]
fn a_header_length_beyond_the_file() {
    let broken = Broken::new();
    broken.edit_weights(|bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
    broken.check(4, &["model.safetensors", "header has 18446744073709551615 bytes", "hint:"]);
}

#[test]
fn overlapping_and_out_of_range_offsets() {
    let broken = Broken::new();
    let first = 384 * 96 * 4;
    broken.edit_header(&format!("[{first},"), &format!("[{},", first - 4));
    broken.check(4, &["model.safetensors", "tensor `", "overlap"]);

    let broken = Broken::new();
    broken.edit_header(&format!("[{first},"), &format!("[{},", 999_999));
    broken.check(4, &["tensor `", "hint:"]);
}

#[test]
fn a_missing_shard_and_a_tensor_absent_from_every_shard() {
    let broken = Broken::sharded();
    std::fs::remove_file(broken.model().join("model-00002-of-00004.safetensors")).unwrap();
    broken.check(4, &["model-00002-of-00004.safetensors", "hint: the download is incomplete"]);

    let broken = Broken::sharded();
    let index = broken.model().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    std::fs::write(
        &index,
        text.replacen("\"weight_map\": {", "\"weight_map\": {\"ghost\": \"model-00001-of-00004.safetensors\",", 1),
    )
    .unwrap();
    broken.check(4, &["tensor `ghost`", "index.json"]);

    std::fs::write(&index, text.replace("model-00001-of-00004", "../model-00001-of-00004")).unwrap();
    broken.check(4, &["not a plain file name"]);

    std::fs::write(&index, "{").unwrap();
    broken.check(4, &["index.json", "cannot be parsed"]);
}

#[test]
fn a_tensor_that_the_model_needs_is_absent() {
    let broken = Broken::new();
    broken.edit_header("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.no_proj.weight");
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let parts = ["tensor `model.layers.1.mlp.up_proj.weight`", "hint:"];
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &parts);
    broken.check_one(&["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--calibration", TRAIN], 4, &parts);
}

#[test]
fn a_shape_that_contradicts_the_config() {
    let broken = Broken::new();
    broken.edit_config("\"intermediate_size\": 256", "\"intermediate_size\": 255");
    let model = broken.model();
    let parts = [
        "model.layers.0.mlp.gate_proj.weight",
        "[256, 96]",
        "[255, 96]",
        "hint: check `hidden_size` and `intermediate_size`",
    ];
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &parts);
}

/// What needs no model to run needs no config: a broken one gets a warning, and is copied.
#[test]
fn a_broken_config() {
    for broken_by in ["", "[]", "{\"model_type\": \"llama\",}", "\u{feff}", "{\"model_type\": Inf}"] {
        let broken = Broken::new();
        let (model, config) = (broken.model(), broken.model().join("config.json"));
        std::fs::write(&config, broken_by).unwrap();
        let out = broken.folder.path().join("out");
        let parts = ["config.json", "cannot be parsed", "; a model is run from its config"];
        let statistics = broken.folder.path().join("statistics.safetensors");
        let compress = ["compress", path(&model), "-o", path(&out), "--keep", "0.8"];
        broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &parts);
        broken.check_one(&["calibrate", path(&model), "--text", TRAIN, "-o", path(&statistics)], 4, &parts);
        broken.check_one(&[&compress[..], &["--calibration", TRAIN]].concat(), 4, &parts);
        for args in [&["inspect", path(&model)][..], &[&compress[..], &["--format", "dense"]].concat()] {
            let told = ok(args).stderr;
            assert!(told.contains("cannot be parsed") && told.contains("names and shapes"), "{told}");
        }
        assert_eq!(std::fs::read_to_string(out.join("config.json")).unwrap(), broken_by);
    }
}

/// What is written without the source's config is read again: codes, factors, and shorter ones.
#[test]
fn an_absent_config_is_no_hindrance_without_a_text() {
    let broken = Broken::new();
    std::fs::remove_file(broken.model().join("config.json")).unwrap();
    let (model, out, next) = (broken.model(), broken.folder.path().join("out"), broken.folder.path().join("next"));
    ok(&["inspect", path(&model)]);
    for flags in [&["--keep", "0.8"][..], &["--quant", "rtn-int4-g32"]] {
        ok(&[&["compress", path(&model), "-o", path(&out), "-q", "--force"], flags].concat());
        ok(&["inspect", path(&out)]);
        ok(&["export", path(&out), "--format", "dense", "-o", path(&next), "-q", "--force"]);
        let (source, dense) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&next).unwrap());
        let names = |checkpoint: &Checkpoint| checkpoint.tensors().map(|t| t.name.clone()).collect::<BTreeSet<_>>();
        assert_eq!(names(&source), names(&dense));
    }
    ok(&["compress", path(&model), "-o", path(&out), "-q", "--force", "--keep", "0.8"]);
    ok(&["truncate", path(&out), "-o", path(&next), "-q", "--force", "--keep", "0.5"]);
}

/// A config that counts no blocks is wrong for a model that has some, whether it is run or not; `lrc inspect` warns.
#[test]
fn a_config_without_blocks() {
    let broken = Broken::new();
    broken.edit_config("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 0");
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    broken.check_one(
        &["eval", path(&model), "--text", HELD_OUT],
        4,
        &["config.json", "`num_hidden_layers` is 0", "hint: "],
    );
    let parts = ["model` has 4 blocks, and `num_hidden_layers` of its config is 0", "hint: check"];
    broken.check_one(&["compress", path(&model), "-o", path(&out), "--keep", "0.8"], 4, &parts);
    assert!(ok(&["inspect", path(&model)]).stderr.contains(parts[0]));
}

/// Configs as Python writes them: numbers that JSON has no words for, a byte-order mark.
#[test]
fn configs_of_python_are_read_and_written() {
    let broken = Broken::new();
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let figure = |model: &Path| ok(&["eval", path(model), "--text", HELD_OUT, "--json"]).json()["nll_sum"].as_f64();
    let before = figure(&model);
    for (name, added) in [
        ("config.json", "\u{feff}{\"limit\": [0.0, Infinity, -Infinity, NaN], \"a \\\" NaN\": \"NaN, Infinity\","),
        ("tokenizer_config.json", "\u{feff}{\"length\": Infinity,"),
    ] {
        let text = std::fs::read_to_string(model.join(name)).unwrap();
        std::fs::write(model.join(name), text.replacen('{', added, 1)).unwrap();
    }
    assert_eq!(figure(&model), before);
    for flags in [
        &["--keep", "0.8"][..],
        &["--keep", "0.8", "--calibration", TRAIN, "--samples", "2"],
        &["--keep", "0.8", "--format", "dense"],
    ] {
        ok(&[&["compress", path(&model), "-o", path(&out), "-q", "--force"], flags].concat());
        let written = std::fs::read_to_string(out.join("config.json")).unwrap();
        let words: String = written.split_whitespace().collect();
        assert!(words.contains(r#""limit":[0.0,Infinity,-Infinity,NaN],"a\"NaN":"NaN,Infinity""#), "{written}");
        figure(&out);
    }
    // A field that the model needs is named.
    let text = std::fs::read_to_string(model.join("config.json")).unwrap();
    std::fs::write(model.join("config.json"), text.replace("\"rope_theta\": 10000.0", "\"rope_theta\": Infinity"))
        .unwrap();
    std::fs::remove_dir_all(&out).unwrap();
    let expected =
        ["config.json`: `rope_theta`: invalid type: number `Infinity`, expected a finite number", "hint: compare"];
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &expected);
    for (value, expected) in [
        ("0.0", "config.json`: `rope_theta` is 0, expected a positive number"),
        ("-5, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}", "`rope_theta` is -5, expected"),
        ("1e4, \"rope_scaling\": {\"type\": \"linear\", \"factor\": 0}", "`rope_scaling.factor` is 0, expected"),
        (
            "1e4, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": NaN}",
            "`rope_scaling.factor`: invalid type: number `NaN`",
        ),
    ] {
        let changed = text.replace("\"rope_theta\": 10000.0", &format!("\"rope_theta\": {value}"));
        std::fs::write(model.join("config.json"), changed).unwrap();
        broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &["config.json", expected, "hint: compare"]);
    }
    // The index of shards.
    let sharded = Broken::sharded();
    let index = sharded.model().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    std::fs::write(&index, format!("\u{feff}{}", text.replacen("\"metadata\": {", "\"metadata\": {\"x\": NaN,", 1)))
        .unwrap();
    ok(&["inspect", path(&sharded.model())]);
}

#[test]
fn an_unknown_model_type_is_compressed_by_name_and_shape_but_not_run() {
    let broken = Broken::new();
    broken.edit_config("\"llama\"", "\"unheard_of\"");
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let parts = ["`unheard_of`", "hint: known families: llama"];
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &parts);
    broken.check_one(&["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--calibration", TRAIN], 4, &parts);
    ok(&["inspect", path(&model)]);
    let report = ok(&["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--json"]).json();
    assert_eq!(report["linears"].as_array().unwrap().len(), 28);
}

#[test]
fn nan_and_infinity_in_a_weight() {
    for value in [f32::NAN, f32::INFINITY] {
        let broken = Broken::new();
        let checkpoint = Checkpoint::open(&broken.model()).unwrap();
        let at = checkpoint.info("model.layers.2.self_attn.v_proj.weight").unwrap().begin + 40;
        broken.edit_weights(|bytes| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()));
        broken.check(
            5,
            &[
                "model.layers.2.self_attn.v_proj.weight",
                "model.safetensors",
                "1 NaN or infinite values, the first at element 10",
            ],
        );
    }
}

#[test]
fn things_that_are_not_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("model");
    std::fs::create_dir(&empty).unwrap();
    let broken = Broken { folder };
    broken.check(4, &["is not a checkpoint", "hint: give a folder"]);
    std::fs::write(empty.join("pytorch_model.bin"), "x").unwrap();
    broken.check(4, &["not in safetensors form"]);
    std::fs::remove_file(empty.join("pytorch_model.bin")).unwrap();
    std::fs::write(empty.join("model.safetensors"), "{}").unwrap();
    broken.check(4, &["is not a safetensors file but a text"]);
    std::fs::write(empty.join("model.safetensors"), [1, 2, 3]).unwrap();
    broken.check(4, &["truncated"]);
    let run = lrc(&["inspect", "no/such/folder"]);
    assert_eq!(run.code, 4);
    assert!(run.stderr.contains("there is no such folder"), "{}", run.stderr);
}

#[test]
fn texts_that_cannot_be_used() {
    let broken = Broken::new();
    let model = broken.model();
    let text = broken.model().join("text.txt");
    let eval = |broken: &Broken, code, parts: &[&str]| {
        broken.check_one(&["eval", path(&model), "--text", path(&text)], code, parts)
    };
    eval(&broken, 2, &["text.txt"]);
    std::fs::write(&text, "").unwrap();
    eval(&broken, 4, &["is empty"]);
    std::fs::write(&text, [0xff, 0xfe]).unwrap();
    eval(&broken, 4, &["not UTF-8"]);
    std::fs::write(&text, "Too short.").unwrap();
    eval(&broken, 4, &["tokens, but a window needs 128", "hint: give a longer text"]);
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    eval(&broken, 4, &["tokenizer.json` is missing"]);
}

#[test]
fn usage_errors_come_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let recipe = folder.path().join("recipe.toml");
    std::fs::write(&recipe, "kepe = 0.8").unwrap();
    let compress = ["compress", FIXTURE, "-o", path(&out)];
    for (extra, expected) in [
        (&[][..], "`--keep` or `--target-size` is missing"),
        (&["--keep", "1.5"], "outside (0, 1]"),
        (&["--keep", "0.8", "--method", "svd-llm"], "needs `--calibration FILE`"),
        (&["--keep", "0.8", "--ranks", "best"], "welore"),
        (&["--keep", "0.8", "--targets", "*.qproj"], "matches no linear"),
        (&["--keep", "0.8", "--exclude", "*"], "`--exclude` leaves no linear to compress"),
        (&["--keep", "0.8", "--share", "--ranks", "uniform"], "hint: add `--ranks knapsack`"),
        (&["--recipe", path(&recipe)], "kepe"),
        (&["--keep", "0.8", "--recipe", "no-such-file.toml"], "no-such-file.toml"),
        (&["--keep", "0.8", "--calibration", "no-such-file.txt"], "no-such-file.txt"),
        (&["--keep", "0.8", "--calibration", TRAIN, "--seq-len", "1"], "`--seq-len 1` is too short"),
    ] {
        let run = lrc(&[&compress[..], extra].concat());
        assert_eq!(run.code, 2, "{extra:?}: {}", run.stderr);
        assert!(run.stderr.contains(expected), "{extra:?}: {}", run.stderr);
        assert!(!out.exists());
    }
    assert_eq!(lrc(&["eval", FIXTURE, "--text", HELD_OUT, "--seq-len", "1"]).code, 2);
    assert_eq!(lrc(&["compress"]).code, 2);
    assert_eq!(lrc(&["--help"]).code, 0);
}

#[test]
fn a_dry_run_refuses_what_the_run_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    // A head has no calibration statistics.
    let model = folder.path().join("model");
    copy("fixtures/pico-llama", &model);
    std::fs::copy(Path::new(FIXTURE).join("tokenizer.json"), model.join("tokenizer.json")).unwrap();
    let args =
        ["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--targets", "*lm_head", "--calibration", TRAIN];
    for extra in [&[][..], &["--dry-run"]] {
        let run = lrc(&[&args[..], extra].concat());
        assert_eq!(run.code, 4, "{}", run.stderr);
        assert!(run.stderr.contains("`lm_head` is outside of the blocks"), "{}", run.stderr);
        assert!(!out.exists());
    }
}

#[test]
fn a_compressed_model_is_not_compressed_again() {
    let broken = Broken { folder: tempfile::tempdir().unwrap() };
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    ok(&["compress", FIXTURE, "-o", path(&model), "-q", "--keep", "0.8"]);
    broken.check_one(
        &["compress", path(&model), "-o", path(&out), "--keep", "0.5"],
        4,
        &["is already of low rank", "hint:"],
    );
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_noticed_and_gone_on_from() {
    // /dev/full cannot hold a folder; a limit on the size of files stands in for a disk that fills up in the middle.
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let script = format!(
        "ulimit -f 500; trap '' XFSZ; exec {} compress {FIXTURE} -o {} --keep 0.8 -q",
        env!("CARGO_BIN_EXE_lrc"),
        path(&out)
    );
    let output = std::process::Command::new("bash")
        .args(["-c", &script])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(6), "{stderr}");
    assert!(
        stderr.contains("error: stopped: ")
            && stderr.contains("cannot write `")
            && stderr.contains("model.safetensors"),
        "{stderr}"
    );
    assert!(stderr.contains("run the same command again to resume"), "{stderr}");
    assert!(!out.exists());
    ok(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "-q"]);
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["out"]);
}

#[test]
fn logits_that_overflow_are_an_error_and_not_a_number() {
    let broken = Broken::new();
    // Finite weights whose products are not: the last norm times 1e38.
    let checkpoint = Checkpoint::open(&broken.model()).unwrap();
    let info = checkpoint.info("model.norm.weight").unwrap().clone();
    broken.edit_weights(|bytes| {
        for value in bytes[info.begin..info.end].chunks_exact_mut(4) {
            value.copy_from_slice(&3e38f32.to_le_bytes());
        }
    });
    let model = broken.model();
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 5, &["logits are not finite"]);
}

#[test]
fn a_folder_under_construction_is_left_to_its_owner() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let owner = lrc::checkpoint::OutputFolder::create(&out, false, "x").unwrap();
    let run = lrc(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8"]);
    assert_eq!(run.code, 6, "{}", run.stderr);
    assert!(run.stderr.contains("being written by another run"));
    assert!(owner.path().exists());
    drop(owner);
    ok(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "-q"]);
}

#[test]
fn half_a_checkpoint_is_no_checkpoint() {
    let broken = Broken::sharded();
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let (index, first) = (model.join("model.safetensors.index.json"), model.join("model-00001-of-00004.safetensors"));
    // One shard by its name, beside the others.
    for command in [&["inspect", path(&first)][..], &["compress", path(&first), "-o", path(&out), "--keep", "0.8"]] {
        broken.check_one(command, 4, &["one of 4 shards", "hint: give the folder"]);
    }
    // An index that was cut short with its shards.
    let text = std::fs::read_to_string(&index).unwrap();
    let mut short: serde_json::Value = serde_json::from_str(&text).unwrap();
    let last = "model-00004-of-00004.safetensors";
    short["weight_map"].as_object_mut().unwrap().retain(|_, shard| shard != last);
    std::fs::write(&index, short.to_string()).unwrap();
    broken.check(4, &["names 3 shards", "is one of 4", "incomplete"]);
    // One shard and no index, as a folder and as a file.
    for shard in 2..=4 {
        std::fs::remove_file(model.join(format!("model-0000{shard}-of-00004.safetensors"))).unwrap();
    }
    std::fs::remove_file(index).unwrap();
    broken.check(4, &["one of 4 shards", "hint: the download is incomplete"]);
    broken.check_one(&["export", path(&first), "--format", "dense", "-o", path(&out)], 4, &["one of 4 shards"]);
}

#[test]
fn a_config_with_more_blocks_than_the_file_is_named() {
    let broken = Broken::new();
    broken.edit_config("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 6");
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let out = ["-o", path(&out)];
    let parts = ["is incomplete", "4 of the 6 blocks", "no block 4", "hint: check that all shards are there"];
    for command in [
        &["compress", path(&model), "--keep", "0.8"][..],
        &["compress", path(&model), "--keep", "0.8", "--calibration", TRAIN],
        &["export", path(&model), "--format", "dense"],
        &["sweep", path(&model), "--keep", "0.8", "--text", HELD_OUT],
    ] {
        broken.check_one(&[command, &out].concat(), 4, &parts);
    }
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 4, &["model.layers.4.", "hint:"]);
    let run = ok(&["inspect", path(&model)]);
    assert!(run.stderr.contains("4 of the 6 blocks"), "{}", run.stderr);
}

#[test]
fn tensors_that_a_config_asks_for_are_named_where_they_are_absent() {
    let check = |absent: &[(&str, &str)], parts: &[&str]| {
        let broken = Broken::new();
        absent.iter().for_each(|(from, to)| broken.edit_header(from, to));
        let (model, out) = (broken.model(), broken.folder.path().join("out"));
        let out = ["-o", path(&out)];
        let parts = [parts, &["is incomplete", "in no weight file", "hint: check that all shards are there"]].concat();
        for command in [
            &["compress", path(&model), "--keep", "0.8"][..],
            &["compress", path(&model), "--keep", "0.8", "--dry-run"],
            &["compress", path(&model), "--quant", "rtn-int4-g32", "--format", "dense"],
            &["export", path(&model), "--format", "dense"],
            &["sweep", path(&model), "--keep", "0.8", "--text", HELD_OUT],
        ] {
            broken.check_one(&[command, &out].concat(), 4, &parts);
        }
        let told = ok(&["inspect", path(&model)]).stderr;
        assert!(told.contains("is incomplete") && told.contains(parts[0]), "{told}");
    };
    check(
        &[("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.dawn_proj.weight")],
        &["tensor `model.layers.1.mlp.down_proj.weight` is in no"],
    );
    check(&[("model.embed_tokens.weight", "model.embed_tokems.weight")], &["tensor `model.embed_tokens.weight`"]);
    check(&[("\"model.norm.weight", "\"model.nurm.weight")], &["tensor `model.norm.weight`"]);
    check(
        &[
            ("model.layers.0.input_layernorm.weight", "model.layers.0.input_layernurm.weight"),
            ("model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.k_praj.weight"),
            ("model.layers.2.self_attn.v_proj.weight", "model.layers.2.self_attn.v_praj.weight"),
            ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_praj.weight"),
        ],
        &[
            "tensors `model.layers.0.input_layernorm.weight`, `model.layers.2.self_attn.q_proj.weight`",
            "and 1 more are in",
        ],
    );
    // Nothing is known of other families.
    let broken = Broken::new();
    broken.edit_header("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.dawn_proj.weight");
    broken.edit_config("\"llama\"", "\"no_such_family\"");
    let out = broken.folder.path().join("out");
    let run = ok(&["compress", path(&broken.model()), "--keep", "0.8", "-o", path(&out)]);
    assert!(!run.stderr.contains("is incomplete"), "{}", run.stderr);
}

/// A model that is saved without its head is whole.
#[test]
fn a_head_may_be_absent_without_a_text() {
    let broken = Broken { folder: tempfile::tempdir().unwrap() };
    copy("fixtures/pico/llama", &broken.model());
    broken.edit_header("\"lm_head.weight", "\"lm_heed.weight");
    let out = broken.folder.path().join("out");
    let run = ok(&["compress", path(&broken.model()), "--keep", "0.8", "-o", path(&out)]);
    assert!(!run.stderr.contains("is incomplete"), "{}", run.stderr);
}

#[test]
#[cfg(unix)]
fn a_config_that_is_no_file_is_refused_before_any_work() {
    for kind in ["folder", "pipe"] {
        let broken = Broken::new();
        let (model, out) = (broken.model(), broken.folder.path().join("out"));
        let config = model.join("config.json");
        std::fs::remove_file(&config).unwrap();
        match kind {
            "folder" => std::fs::create_dir(&config).unwrap(),
            _ => assert!(std::process::Command::new("mkfifo").arg(&config).status().unwrap().success()),
        }
        for args in [
            &["inspect", path(&model)][..],
            &["compress", path(&model), "-o", path(&out), "--keep", "0.8"],
            &["export", path(&model), "-o", path(&out), "--format", "dense"],
        ] {
            broken.check_one(args, 4, &["config.json` is a", kind, "not a file", "hint:"]);
        }
    }
}

#[test]
fn outputs_of_a_later_version_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let [out, next] = ["out", "next"].map(|name| folder.path().join(name));
    let coded = folder.path().join("coded");
    ok(&["compress", FIXTURE, "-o", path(&out), "-q", "--keep", "0.8"]);
    ok(&["compress", FIXTURE, "-o", path(&coded), "-q", "--quant", "rtn-int4-g32"]);
    const DOWN: &str = "model.layers.0.mlp.down_proj";
    type Change<'a> = &'a dyn Fn(&mut serde_json::Value);
    let newer = "hint: a newer lrc wrote it: update lrc";
    let changed = "hint: the output was changed";
    let changes: [(&PathBuf, Change<'_>, &str, &str); 6] = [
        (&out, &|lrc| lrc["version"] = 2.into(), "`lrc.version` in", newer),
        (&coded, &|lrc| lrc["version"] = 2.into(), "is 2, and this lrc knows 1", newer),
        (&out, &|lrc| lrc["version"] = "1".into(), "`lrc.version` in", changed),
        (&out, &|lrc| drop(lrc.as_object_mut().unwrap().remove("version")), "`lrc.version` in", changed),
        (&out, &|lrc| lrc["modules"][DOWN]["layout"] = "tucker".into(), "knows `factors`, `pivot`", newer),
        (
            &out,
            &|lrc| lrc["modules"][DOWN]["layout"] = "factors".into(),
            "its tensors are laid out as `pivot`",
            changed,
        ),
    ];
    for (model, change, expected, hint) in changes {
        let config = model.join("config.json");
        let whole = std::fs::read(&config).unwrap();
        let mut fields: serde_json::Value = serde_json::from_slice(&whole).unwrap();
        change(&mut fields["lrc"]);
        std::fs::write(&config, fields.to_string()).unwrap();
        for args in [
            &["inspect", path(model)][..],
            &["eval", path(model), "--text", HELD_OUT],
            &["eval", FIXTURE, "--reference", path(model), "--text", HELD_OUT],
            &["compress", path(model), "-o", path(&next), "--keep", "0.5"],
            &["truncate", path(model), "-o", path(&next), "--keep", "0.5"],
            &["export", path(model), "-o", path(&next), "--format", "dense"],
        ] {
            let run = lrc(args);
            assert_eq!(run.code, 4, "{args:?}: {}", run.stderr);
            for part in ["config.json", expected, hint] {
                assert!(run.stderr.contains(part), "{args:?}: `{part}` is not in {}", run.stderr);
            }
            assert!(!next.exists() && !folder.path().join("next.partial").exists());
        }
        std::fs::write(config, whole).unwrap();
    }
    // The report, from which `truncate` goes.
    let report = out.join("lrc-report.json");
    let mut fields: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    fields["schema_version"] = 99.into();
    std::fs::write(&report, fields.to_string()).unwrap();
    let run = lrc(&["truncate", path(&out), "-o", path(&next), "--keep", "0.5"]);
    assert!(
        run.code == 4 && run.stderr.contains("`schema_version` in") && run.stderr.contains(newer),
        "{}",
        run.stderr
    );
}

/// Moves the settings of a quantized output out of its config, as other tools have them.
fn move_settings(model: &Path, file: &str, change: impl Fn(&mut serde_json::Value)) {
    let path = model.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut settings = config.as_object_mut().unwrap().shift_remove("quantization_config").unwrap();
    settings.as_object_mut().unwrap().shift_remove("quant_method");
    change(&mut settings);
    std::fs::write(path, config.to_string()).unwrap();
    std::fs::write(model.join(file), settings.to_string()).unwrap();
}

#[test]
fn settings_of_a_quantizer_are_found_where_other_tools_have_them() {
    let quantized = || {
        let broken = Broken { folder: tempfile::tempdir().unwrap() };
        ok(&["compress", FIXTURE, "-o", path(&broken.model()), "-q", "--quant", "rtn-int4-g32", "--format", "gptq"]);
        broken
    };
    // GPTQ as AutoGPTQ writes it is read like our own.
    let broken = quantized();
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let eval = ["eval", path(&model), "--text", HELD_OUT, "--max-windows", "4", "--json"];
    let expected = ok(&eval).json()["ppl"].clone();
    move_settings(&model, "quantize_config.json", |_| {});
    assert_eq!(ok(&eval).json()["ppl"], expected);
    ok(&["export", path(&model), "--format", "dense", "-o", path(&out), "-q"]);
    let dense = Checkpoint::open(&out).unwrap();
    assert!(dense.tensors().all(|info| !info.name.ends_with(".qweight") && info.storage().is_none()));
    assert!(!out.join("quantize_config.json").exists(), "settings of codes that are not there any more");
    let eval = ["eval", path(&out), "--text", HELD_OUT, "--max-windows", "4", "--json"];
    assert_eq!(ok(&eval).json()["ppl"], expected);

    let check = |file: &str, change: &dyn Fn(&mut serde_json::Value), parts: &[&str]| {
        let broken = quantized();
        move_settings(&broken.model(), file, change);
        broken.check(4, parts);
        let out = broken.folder.path().join("out");
        broken.check_one(&["export", path(&broken.model()), "--format", "dense", "-o", path(&out)], 4, parts);
    };
    check("quantize_config.json", &|settings| settings["bits"] = 3.into(), &["quantized by gptq, 3 bits", "hint:"]);
    check("quant_config.json", &|_| {}, &["quantized by awq", "hint:"]);
    check("hf_quant_config.json", &|_| {}, &["quantized by modelopt", "hint:"]);
    check("elsewhere.json", &|_| {}, &[".qweight`", "packed by a quantizer", "hint: get `quantize_config.json`"]);
}
