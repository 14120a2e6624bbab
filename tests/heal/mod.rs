//! Healing: a compressed model learns from its source, in the same shapes and bytes.

mod formats;
mod labels;
mod records;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use lrc::checkpoint::Checkpoint;
use serde_json::Value;

use crate::common::{self, FIXTURE, HELD_OUT, TRAIN, command, finish, lrc, ok, path};

struct Model {
    folder: tempfile::TempDir,
    compressed: PathBuf,
}

impl Model {
    /// The fixture, compressed with these flags.
    fn new(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let compressed = folder.path().join("compressed");
        ok(&[&["compress", FIXTURE, "-o", path(&compressed), "-q"][..], flags].concat());
        Self { folder, compressed }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments<'a>(&'a self, out: &'a Path, flags: &[&'a str]) -> Vec<&'a str> {
        let own = ["heal", path(&self.compressed), "--teacher", FIXTURE, "-o", path(out), "--json"];
        let windows = [["--samples", "16"], ["--seq-len", "64"], ["--learning-rate", "1e-3"]];
        let others = windows.iter().filter(|[flag, _]| !flags.contains(flag)).flatten().copied();
        own.into_iter().chain(others).chain(flags.iter().copied()).collect()
    }

    fn heal(&self, name: &str, flags: &[&str]) -> (PathBuf, Value) {
        let out = self.out(name);
        let report = ok(&self.arguments(&out, &[&["--text", TRAIN], flags].concat())).json();
        (out, report)
    }
}

fn divergence(model: &Path) -> f64 {
    let text = ["--text", HELD_OUT, "--seq-len", "64", "--max-windows", "16", "--reference", FIXTURE, "--json"];
    ok(&[&["eval", path(model)][..], &text].concat()).json()["kl"]["mean"].as_f64().unwrap()
}

/// Names of the tensors, each with dtype and shape.
fn shapes(model: &Path) -> Vec<String> {
    let checkpoint = Checkpoint::open(model).unwrap();
    checkpoint.tensors().map(|info| format!("{} {:?} {:?}", info.name, info.dtype, info.shape)).collect()
}

/// The names of the tensors with other values.
fn changed(before: &Path, after: &Path) -> Vec<String> {
    let [before, after] = [before, after].map(|folder| Checkpoint::open(folder).unwrap());
    let bytes = |of: &Checkpoint, name: &str| of.with_bytes(name, <[u8]>::to_vec).unwrap();
    let names = before.tensors().map(|info| info.name.clone());
    names.filter(|name| bytes(&before, name) != bytes(&after, name)).collect()
}

#[test]
fn every_stage_brings_the_model_nearer_to_its_source_on_other_text() {
    let model = Model::new(&["--keep", "0.5", "--calibration", TRAIN, "--samples", "8"]);
    let before = divergence(&model.compressed);
    let statistics = model.out("statistics.safetensors");
    let calibrate = ["calibrate", FIXTURE, "--text", TRAIN, "--method", "kfac", "--samples", "8", "-q"];
    ok(&[&calibrate[..], &["-o", path(&statistics)]].concat());
    let runs: [(&str, &[&str]); 5] = [
        ("blocks", &["--stage", "blocks"]),
        ("fisher", &["--stage", "blocks", "--statistics", path(&statistics)]),
        ("output", &["--stage", "blocks", "--statistics", path(&statistics), "--loss", "output"]),
        ("model", &["--stage", "model"]),
        ("both", &[]),
    ];
    for (name, flags) in runs {
        let (out, report) = model.heal(name, flags);
        let healed = &report["healed"];
        let after = divergence(&out);
        assert!(after < 0.9 * before, "{name}: {after}, not {before}");
        assert_eq!(shapes(&out), shapes(&model.compressed), "{name}");
        let changed = changed(&model.compressed, &out);
        assert!(changed.iter().all(|name| name.starts_with("model.layers.")), "{changed:?}");
        let parts = healed["parts"].as_array().unwrap();
        let n_layers = report["linears"].as_array().unwrap().len() / 7;
        assert_eq!(parts.len(), if name == "model" { 0 } else { 2 * n_layers }, "{name}");
        for part in parts {
            let error = |when: &str| part[when].as_f64().unwrap();
            assert!(error("error_after") <= error("error_before"), "{name}: {part}");
        }
        let perplexity = |of: &str| healed["perplexity"][of].as_f64().unwrap();
        assert!(perplexity("teacher") < perplexity("after") && perplexity("after") < perplexity("before"), "{name}");
        assert_eq!(healed["distance"], if name == "fisher" { "fisher" } else { "output" });
        let bytes = |folder: &Path| std::fs::metadata(folder.join("model.safetensors")).unwrap().len();
        assert_eq!(bytes(&out), bytes(&model.compressed));
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        assert!(card.contains("lrc heal OUT --teacher") && card.contains("## Healing"), "{card}");
        assert!(healed["steps"].as_u64().unwrap() > 0 && healed["seconds"].as_f64().unwrap() > 0.0, "{healed}");
        assert!(card.contains(&format!("in {} steps on 1024 tokens of `train.txt`", healed["steps"])), "{card}");
    }
}

/// Windows of another text choose, all of the first are trained, and only parts of low rank change.
#[test]
fn another_text_chooses_and_matrices_of_low_rank_learn_alone() {
    let model = Model::new(&["--keep", "0.5", "--calibration", TRAIN, "--samples", "8", "--exclude", "*.0.*"]);
    let flags = ["--held-out", HELD_OUT, "--train", "lrc", "--epochs", "3"];
    for stage in ["blocks", "model"] {
        let (out, report) = model.heal(stage, &[&flags[..], &["--stage", stage]].concat());
        let healed = &report["healed"];
        assert_eq!((&healed["trained_windows"], &healed["held_out_windows"]), (&16.into(), &2.into()), "{stage}");
        assert_eq!(healed["held_out_text"]["windows"], 2);
        assert_ne!(healed["held_out_text"]["text_sha256"], healed["texts"][0]["text_sha256"]);
        assert_eq!(healed["trained"], "lrc");
        let changed = changed(&model.compressed, &out);
        let is_part = |name: &String| name.contains(".lr_") && !name.contains(".layers.0.");
        assert!(!changed.is_empty() && changed.iter().all(is_part), "{changed:?}");
        assert!(divergence(&out) < divergence(&model.compressed), "{stage}");
        let page = std::fs::read_to_string(out.join("lrc-report.html")).unwrap();
        let title = if stage == "model" { "divergence, nats per token" } else { "attention, held-out loss" };
        assert!(page.contains("<h2>Healing</h2>") && page.contains(title));
    }
    let coded = Model::new(&["--quant", "rtn-int4-g32"]);
    let run = lrc(&coded.arguments(&coded.out("x"), &["--text", TRAIN, "--train", "lrc"]));
    assert!(run.code == 2 && run.stderr.contains("no matrix of low rank"), "{}", run.stderr);
}

/// Compressing and healing in one run gives the tensors of both commands, one after the other.
#[test]
fn a_compression_heals_what_it_made() {
    let windows = ["--samples", "16", "--seq-len", "64", "--calibration", TRAIN, "-q"];
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let compress = |name: &str, flags: &[&str]| {
        let out = at(name);
        ok(&[&["compress", FIXTURE, "-o", path(&out)][..], &windows, flags].concat());
        out
    };
    let cases: [&[&str]; 3] = [
        &["--keep", "0.5", "--sequential=false"],
        &["--keep", "0.5", "--method", "svd-llm"],
        &["--structure", "narrow", "--keep", "0.6", "--width-multiple", "16"],
    ];
    for (i, flags) in cases.iter().enumerate() {
        let alone = compress(&format!("alone-{i}"), flags);
        let healed = compress(&format!("healed-{i}"), &[*flags, &["--heal", "blocks"][..]].concat());
        let report: Value =
            serde_json::from_str(&std::fs::read_to_string(healed.join("lrc-report.json")).unwrap()).unwrap();
        let distance = if flags.contains(&"svd-llm") { "output" } else { "fisher" };
        assert_eq!(report["healed"]["distance"], distance);
        assert_eq!(report["recipe"]["heal"], serde_json::json!(["blocks"]));
        assert_eq!(shapes(&healed), shapes(&alone));
        assert!(divergence(&healed) < divergence(&alone), "{flags:?}");
        let card = std::fs::read_to_string(healed.join("README.md")).unwrap();
        assert!(card.contains("--heal blocks") && !card.contains("lrc heal"), "{card}");
        let again = at(&format!("again-{i}"));
        ok(&["compress", FIXTURE, "-o", path(&again), "-q", "--recipe", path(&healed.join("lrc-recipe.toml"))]);
        assert!(weights(&again) == weights(&healed));
        let (statistics, by_hand) = (at(&format!("{i}.safetensors")), at(&format!("by-hand-{i}")));
        let text = ["--text", TRAIN, "--samples", "16", "--seq-len", "64", "-q"];
        ok(&[&["calibrate", FIXTURE, "-o", path(&statistics), "--method", "kfac"][..], &text].concat());
        let metric = if distance == "fisher" { &["--statistics", path(&statistics)][..] } else { &[] };
        let heal = ["heal", path(&alone), "--teacher", FIXTURE, "--stage", "blocks", "-o", path(&by_hand)];
        ok(&[&heal[..], &text, metric].concat());
        assert_eq!(changed(&by_hand, &healed), Vec::<String>::new(), "{flags:?}");
    }
    for (i, flags) in [cases[0], cases[2]].iter().enumerate() {
        let out = at(&format!("planned-{i}"));
        let flags = [&["compress", FIXTURE, "-o", path(&out)][..], &windows, flags, &["--heal", "blocks"]].concat();
        let dry = ok(&[&flags[..], &["--dry-run=full", "--json"]].concat()).json();
        assert_eq!(dry["recipe"]["heal"], serde_json::json!(["blocks"]));
        assert!(!out.exists() && dry["kept_in"] == format!("{}.partial", path(&out)), "{dry}");
        ok(&flags);
        assert!(weights(&out) == weights(&at(&format!("healed-{}", 2 * i))), "{flags:?}");
    }
    let out = at("refused");
    let check = |flags: &[&str], message: &str| {
        let run = lrc(&[&["compress", FIXTURE, "-o", path(&out), "--heal", "blocks"][..], flags].concat());
        assert!(run.code == 2 && run.stderr.contains(message) && !out.exists(), "{}", run.stderr);
    };
    check(&["--keep", "0.5", "--method", "svd"], "`--heal` needs `--calibration FILE`");
    let text = ["--calibration", TRAIN, "--keep", "0.8"];
    check(&[&text[..], &["--structure", "depth"]].concat(), "`--heal` cannot follow `--structure depth`");
    check(&[&text[..], &["--format", "onnx"]].concat(), "`--heal` cannot follow `--format onnx`");
}

#[test]
fn every_family_is_healed() {
    for family in ["gpt2", "gpt_neox", "opt", "gemma2", "qwen3", "mixtral", "phi3", "bert", "distilbert"] {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        common::copy(&format!("fixtures/pico/{family}"), &at("model"));
        let tokenizer = if family.ends_with("bert") { "tokenizer-encoder.json" } else { "tokenizer.json" };
        std::fs::copy(format!("fixtures/pico/{tokenizer}"), at("model/tokenizer.json")).unwrap();
        std::fs::write(at("text.txt"), "once upon a time there was a little dog. it liked to run! ".repeat(60))
            .unwrap();
        let compressed = at("compressed");
        ok(&["compress", path(&at("model")), "-o", path(&compressed), "--keep", "0.5", "-q"]);
        let [source, text, healed] = ["model", "text.txt", "healed"].map(at);
        let own = ["heal", path(&compressed), "--teacher", path(&source), "--text", path(&text)];
        let flags = ["--samples", "16", "--seq-len", "24", "--stage", "blocks", "--json", "--learning-rate", "2e-3"];
        let report = ok(&[&own[..], &["-o", path(&healed)], &flags].concat()).json();
        let parts = report["healed"]["parts"].as_array().unwrap();
        let error = |part: &Value, when: &str| part[when].as_f64().unwrap();
        let ratio = |part: &Value| error(part, "error_after") / error(part, "error_before").max(1e-30);
        assert!(parts.iter().all(|part| ratio(part) <= 1.0), "{family}");
        assert!(parts.iter().any(|part| ratio(part) < 0.9), "{family}: {parts:?}");
        assert_eq!(shapes(&healed), shapes(&compressed), "{family}");
    }
}

#[test]
fn a_model_that_is_its_source_already_stays() {
    let whole = tempfile::tempdir().unwrap().path().join("whole");
    let flags = ["--keep", "1", "--calibration", TRAIN, "--heal", "blocks"];
    let run = ok(&[&["compress", FIXTURE, "-o", path(&whole)][..], &flags].concat());
    assert!(run.stderr.contains("`--heal` has no effect"), "{}", run.stderr);
    let model = Model::new(&["--keep", "1"]);
    let (out, report) = model.heal("healed", &[]);
    assert_eq!(changed(&model.compressed, &out), Vec::<String>::new());
    assert_eq!(report["healed"]["parameters"], 0);
    assert!(report["healed"]["model"]["divergence_after"].as_f64().unwrap() < 1e-6);
}

fn weights(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model.safetensors")).unwrap()
}

#[test]
fn the_bytes_are_those_of_any_number_of_threads_and_of_any_kills() {
    let model = Model::new(&["--keep", "0.5"]);
    killed(1, &|out| owned(&model.arguments(out, &["--text", TRAIN, "--epochs", "2"])));
}

#[test]
fn the_whole_model_goes_on_from_its_last_state() {
    let model = Model::new(&["--keep", "0.5"]);
    let flags = ["--text", TRAIN, "--stage", "model", "--epochs", "3", "--save-steps"];
    let whole = model.out("whole");
    ok(&model.arguments(&whole, &[&flags[..], &["100"]].concat()));
    let out = model.out("killed");
    let arguments = model.arguments(&out, &[&flags[..], &["1"]].concat());
    let state = PathBuf::from(format!("{}.partial/pieces/healing-model", path(&out)));
    let kept = || std::fs::metadata(&state).and_then(|found| found.modified()).ok();
    let mut n_kills = 0;
    loop {
        let mut child = command(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let before = kept();
        while kept().is_none_or(|now| Some(now) == before) && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if child.try_wait().unwrap().is_some() {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        n_kills += 1;
    }
    assert!(n_kills >= 4, "{n_kills} kills");
    assert!(weights(&out) == weights(&whole) && !state.exists());
}

#[test]
fn a_compression_that_heals_can_be_killed_in_either_half() {
    let flags = ["--keep", "0.5", "--calibration", TRAIN, "--samples", "8", "--seq-len", "64", "--heal", "blocks"];
    killed(9, &|out| owned(&[&["compress", FIXTURE, "-q", "-o", path(out)][..], &flags].concat()));
}

/// The number of files in a folder and those below.
fn n_files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { n_files(&entry.path()) } else { 1 }).sum()
}

fn owned(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|argument| argument.to_string()).collect()
}

/// A command gives the same bytes at any number of threads, and where it is killed after every so many pieces.
fn killed(step: usize, arguments: &dyn Fn(&Path) -> Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, threads: &str| {
        let out = folder.path().join(name);
        let arguments = arguments(&out);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let run = finish(command(&arguments).env("RAYON_NUM_THREADS", threads));
        assert_eq!(run.code, 0, "{}", run.stderr);
        weights(&out)
    };
    let expected = run("one", "1");
    assert!(run("three", "3") == expected);
    let out = folder.path().join("killed");
    let arguments = arguments(&out);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let pieces = PathBuf::from(format!("{}.partial/pieces", path(&out)));
    let count = || n_files(&pieces);
    let mut n_kills = 0;
    loop {
        let mut child = command(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let before = count();
        while count() < before + step && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // It may have ended by itself meanwhile.
        child.kill().unwrap();
        let status = child.wait().unwrap();
        if status.success() || out.join("lrc-report.json").is_file() {
            break;
        }
        assert_eq!(status.code(), None, "{status}");
        n_kills += 1;
    }
    assert!(n_kills >= 4, "{n_kills} kills");
    assert!(weights(&out) == expected);
}

#[test]
fn texts_share_the_windows_by_weight() {
    let model = Model::new(&["--keep", "0.5"]);
    let [a, b] = [format!("{TRAIN}:3"), format!("{HELD_OUT}:1")];
    let out = model.out("mixed");
    let flags = ["--text", a.as_str(), "--text", b.as_str(), "--stage", "blocks", "--epochs", "1"];
    let report = ok(&model.arguments(&out, &flags)).json();
    let windows = report["healed"]["texts"].as_array().unwrap().iter().map(|text| text["windows"].as_u64().unwrap());
    assert_eq!(windows.collect::<Vec<_>>(), [12, 4]);
    // The command of the card gives the same bytes.
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    let line = card.lines().find(|line| line.starts_with("lrc heal ")).unwrap();
    let again = model.out("again");
    let word = |word: &str| match word {
        "OUT" => path(&model.compressed).to_string(),
        "HEALED" => path(&again).to_string(),
        "tiny-llama" => FIXTURE.to_string(),
        word => word.replace("train.txt", TRAIN).replace("held-out.txt", HELD_OUT),
    };
    let words: Vec<String> = line.split(' ').skip(1).map(word).collect();
    ok(&words.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(weights(&again) == weights(&out), "{line}");
    assert!(card.contains("tokens of `train.txt` and "), "{card}");
}

/// These arguments end with the code and an error with these parts, and `out` is not there.
fn expect_refused(out: &Path, arguments: &[&str], code: i32, parts: &[&str]) {
    let run = lrc(arguments);
    assert_eq!(run.code, code, "{}", run.stderr);
    for part in parts {
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
    assert!(!out.exists(), "{arguments:?}");
}

#[test]
fn what_lacks_windows_files_or_an_order_is_refused_before_any_work() {
    let model = Model::new(&["--keep", "0.5"]);
    let out = model.out("out");
    let check = |arguments: &[&str], code, parts: &[&str]| expect_refused(&out, arguments, code, parts);
    let few = ["compress", FIXTURE, "-o", path(&out), "--keep", "0.5", "--calibration", TRAIN, "--heal", "blocks"];
    for depth in [&[][..], &["--dry-run"]] {
        check(&[&few[..], &["--samples", "4"], depth].concat(), 2, &["healing needs 8 windows", "raise `--samples`"]);
    }
    check(&[&few[..], &["--elastic"]].concat(), 2, &["`--heal` cannot be combined with `--elastic`"]);
    let bare = model.out("bare");
    common::copy(path(&model.compressed), &bare);
    std::fs::remove_file(bare.join("modeling_lrc.py")).unwrap();
    check(
        &["heal", path(&bare), "--teacher", FIXTURE, "--text", TRAIN, "-o", path(&out)],
        4,
        &["modeling_lrc.py` is missing", "with all its files"],
    );
}

#[test]
fn what_cannot_be_healed_is_refused() {
    let model = Model::new(&["--keep", "0.5"]);
    let out = model.out("out");
    let check = |arguments: &[&str], code, parts: &[&str]| expect_refused(&out, arguments, code, parts);
    let short = model.out("short.txt");
    std::fs::write(&short, "once upon a time ".repeat(20)).unwrap();
    check(
        &model.arguments(&out, &["--text", path(&short)]),
        2,
        &["healing needs 8 windows, to hold one out; found in `", "raise `--samples`"],
    );
    let shares = ["--text", "fixtures/text/train.txt:1e-9", "--text", "fixtures/text/held-out.txt:1"];
    check(&model.arguments(&out, &shares), 2, &["`fixtures/text/train.txt` has no share in 16 windows"]);
    let compressed = path(&model.compressed);
    let with_teacher =
        |teacher: &'static str| ["heal", compressed, "--teacher", teacher, "--text", TRAIN, "-o", path(&out)];
    check(
        &with_teacher("fixtures/pico-llama"),
        4,
        &["`fixtures/pico-llama` has ", "the teacher is the model that was compressed"],
    );
    let other = model.out("other");
    common::copy(FIXTURE, &other);
    let tokenizer = std::fs::read_to_string(other.join("tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_str(&tokenizer).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (vocabulary["a"].clone(), vocabulary["e"].clone());
    (vocabulary["a"], vocabulary["e"]) = (b, a);
    std::fs::write(other.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    check(
        &["heal", compressed, "--teacher", path(&other), "--text", TRAIN, "-o", path(&out)],
        4,
        &["into other tokens", "the teacher is the model that was compressed"],
    );
    check(
        &model.arguments(&out, &["--text", TRAIN, "--loss", "fisher"]),
        2,
        &["`--loss fisher` needs Grams of the gradients", "lrc calibrate MODEL --method kfac"],
    );
    let of_source = ["heal", FIXTURE, "--teacher", FIXTURE, "--text", TRAIN, "-o", path(&out)];
    check(&of_source, 4, &["lrc-report.json` cannot be read", "a folder written by `lrc compress`"]);
    check(
        &model.arguments(&out, &["--text", TRAIN, "--loss", "output", "--stage", "model"]),
        2,
        &["`--loss output` has no effect without the stage `blocks`"],
    );
    check(&model.arguments(&out, &["--text", "a.txt:0"]), 2, &["`--text a.txt:0`: expected FILE or FILE:WEIGHT"]);
    check(&model.arguments(&out, &["--text", TRAIN, "--stage", "blocks,blocks"]), 2, &["`blocks` is given twice"]);
    let flags = [&["--text", TRAIN][..], &["--learning-rate", "2"]].concat();
    let own = ["heal", compressed, "--teacher", FIXTURE, "-o", path(&out)];
    check(&[&own[..], &flags].concat(), 2, &["`--learning-rate 2` is outside (0, 1)"]);
}
