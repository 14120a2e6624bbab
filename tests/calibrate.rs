//! Statistics: against torch and finite differences, merged, kept, refused.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::common::{self, FIXTURE, HELD_OUT, TRAIN, command, copy, finish, lrc, ok, path};
use candle_core::{Device, Tensor};
use lrc::calibrate::{Needs, Observation, TargetedWindows, Targets, observe};
use lrc::checkpoint::Checkpoint;
use lrc::model::{Decoder, Overlay, WalkLimits};
use lrc::progress::Silent;
use lrc::store::Journal;
use serde_json::Value;

const PICO: &str = "fixtures/pico-llama";

/// Every sum over `windows`, by name.
fn sums(checkpoint: &Checkpoint, windows: &[Vec<u32>]) -> HashMap<String, Vec<f32>> {
    sums_with_gradients(checkpoint, windows, windows.len())
}

/// Sums of inputs over `windows`, and of gradients over the first `n_gradients`.
fn sums_with_gradients(checkpoint: &Checkpoint, windows: &[Vec<u32>], n_gradients: usize) -> HashMap<String, Vec<f32>> {
    let decoder = Decoder::open(checkpoint).unwrap();
    let observation = Observation { needs: Needs::ALL, clip_gradients: false };
    let limits = WalkLimits::new(1 << 30, std::env::temp_dir());
    let mut all = HashMap::new();
    let targets: Vec<Targets> = windows.iter().map(|ids| Targets::next(ids)).collect();
    let windows = TargetedWindows { windows, targets: &targets, n_gradients };
    observe(&decoder, windows, observation, &limits, &Journal::default(), &Silent, &mut |sums| {
        all.extend(sums.into_iter().map(|(name, array)| (name, array.read().unwrap().f32s().unwrap())));
        Ok(())
    })
    .unwrap();
    all
}

/// Windows, and the statistics of block 0 and of the vocabulary by name.
fn oracle() -> (Vec<Vec<u32>>, BTreeMap<String, Vec<f64>>) {
    let json: Value = serde_json::from_str(include_str!("oracles/pico-llama-gradients.json")).unwrap();
    let values = |value: &Value| -> BTreeMap<String, Vec<f64>> { serde_json::from_value(value.clone()).unwrap() };
    let under =
        |place: String, value: &Value| values(value).into_iter().map(move |(name, v)| (format!("{place}.{name}"), v));
    let of_block = json["block_0"].as_object().unwrap().iter().flat_map(|(role, v)| under(format!("0.{role}"), v));
    let all = of_block.chain(under("vocabulary".into(), &json["vocabulary"])).collect();
    (serde_json::from_value(json["ids"].clone()).unwrap(), all)
}

#[test]
fn gradients_are_those_of_torch() {
    let (windows, expected) = oracle();
    let checkpoint = Checkpoint::open(Path::new(PICO)).unwrap();
    let found = sums(&checkpoint, &windows);
    // Two blocks; four input sites with three statistics, seven linears with three; four of the vocabulary.
    assert_eq!(found.len(), 2 * (4 * 3 + 7 * 3) + 4);
    assert_eq!(expected.len(), 7 * 3 + 4);
    for (name, expected) in &expected {
        let found = &found[name];
        assert_eq!(found.len(), expected.len(), "{name}");
        let scale = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        for (found, expected) in found.iter().zip(expected) {
            let error = (f64::from(*found) - expected).abs() / scale;
            assert!(error < 2e-5, "{name}: {found} {expected}");
        }
    }
}

/// `Σ (∂L/∂w)²` of one sequence, every derivative from two perturbed models.
#[test]
fn squared_gradients_are_those_of_finite_differences() {
    let (windows, _) = oracle();
    let window = &windows[0];
    let checkpoint = Checkpoint::open(Path::new(PICO)).unwrap();
    let decoder = Decoder::open(&checkpoint).unwrap();
    let name = "model.layers.0.self_attn.v_proj.weight";
    let weight = checkpoint.values(name).unwrap();
    let (m, n) = (16, 24);
    let ids = Tensor::new(window.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let loss = |values: Vec<f32>| -> f64 {
        let tensor = Tensor::from_vec(values, (m, n), &Device::Cpu).unwrap();
        let overlay = Overlay { below: &checkpoint, above: HashMap::from([(name.to_string(), tensor)]) };
        let logits = decoder.with_weights(&overlay).logits(&ids).unwrap().squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        let nll = |(row, &target): (&Vec<f32>, &u32)| {
            let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
            sum.ln() - f64::from(row[target as usize])
        };
        logits.iter().zip(&window[1..]).map(nll).sum()
    };
    let step = 0.02;
    let derivative = |at: usize| {
        let moved = |by: f32| {
            let mut values = weight.clone();
            values[at] += by;
            loss(values)
        };
        (moved(step) - moved(-step)) / (2.0 * f64::from(step))
    };
    let found = sums(&checkpoint, std::slice::from_ref(window));
    let found = &found["0.v_proj.squared_gradient_input"];
    for column in [0, 7, 23] {
        let expected: f64 = (0..m).map(|row| derivative(row * n + column).powi(2)).sum();
        let error = (f64::from(found[column]) / expected - 1.0).abs();
        assert!(error < 0.02, "column {column}: {} {expected}", found[column]);
    }
}

#[test]
fn gradients_may_be_of_some_windows() {
    let checkpoint = Checkpoint::open(Path::new(PICO)).unwrap();
    let windows: Vec<Vec<u32>> = (0..5u32).map(|i| (0..12).map(|j| (i * 7 + j * 5) % 32).collect()).collect();
    let (all, few) = (sums(&checkpoint, &windows), sums(&checkpoint, &windows[..2]));
    let found = sums_with_gradients(&checkpoint, &windows, 2);
    assert_eq!(found.len(), all.len());
    for (name, found) in &found {
        // Those of the vocabulary are all of windows that go back.
        let of_inputs = name.contains(".input_") && !name.starts_with("vocabulary.");
        let expected = if of_inputs { &all[name] } else { &few[name] };
        let scale = expected.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
        assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() <= 1e-5 * scale), "{name}");
        assert!(of_inputs || *found != all[name], "{name}");
    }
}

const DRAWN: &[&str] = &["--samples", "12", "--seq-len", "64"];

fn calibrate(out: &Path, extra: &[&str]) {
    ok(&[&["calibrate", FIXTURE, "--text", TRAIN, "-o", path(out), "-q"], DRAWN, extra].concat());
}

fn arrays(file: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = Checkpoint::open(file).unwrap();
    let names: Vec<String> = file.tensors().map(|t| t.name.clone()).filter(|n| n != "header").collect();
    names.into_iter().map(|name| (name.clone(), file.values(&name).unwrap())).collect()
}

#[test]
fn merged_parts_are_the_whole() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(format!("{name}.safetensors"));
    calibrate(&file("whole"), &[]);
    for part in ["1", "2", "3"] {
        calibrate(&file(part), &["--part", &format!("{part}/3")]);
    }
    let merge = |out: &str, parts: &[&str]| {
        let files: Vec<_> = parts.iter().map(|p| file(p)).collect();
        let files: Vec<&str> = files.iter().map(|f| path(f)).collect();
        lrc(&[&["calibrate", "-o", path(&file(out)), "-q", "--merge"][..], &files].concat())
    };
    assert_eq!(merge("merged", &["3", "1", "2"]).code, 0);
    let (whole, merged) = (arrays(&file("whole")), arrays(&file("merged")));
    assert_eq!(whole.len(), 4 * (4 * 3 + 7 * 3) + 4);
    for (name, expected) in &whole {
        let scale = expected.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
        for (found, expected) in merged[name].iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-6 * scale, "{name}: {found} {expected}");
        }
    }
    // With gradients of two windows in twelve, of which one part has none.
    let few = |name: &str, extra: &[&str]| {
        let flags = ["--method", "kfac", "--gradient-samples", "2", "--force"];
        calibrate(&file(name), &[&flags[..], extra].concat());
        arrays(&file(name))
    };
    let whole = few("whole", &[]);
    let parts = ["1", "2", "3"].map(|part| few(part, &["--part", &format!("{part}/3")]));
    let is_zero = |part: &BTreeMap<String, Vec<f32>>| part["0.o_proj.output_gram"].iter().all(|&v| v == 0.0);
    assert_eq!(parts.iter().filter(|part| is_zero(part)).count(), 1);
    for (name, expected) in &whole {
        let scale = expected.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
        for (i, expected) in expected.iter().enumerate() {
            let found: f32 = parts.iter().map(|part| part[name][i]).sum();
            assert!((found - expected).abs() <= 1e-6 * scale, "{name}: {found} {expected}");
        }
    }
    // Nothing is counted twice, and nothing is overwritten.
    let twice = merge("twice", &["1", "2", "1"]);
    assert_eq!(twice.code, 2, "{}", twice.stderr);
    assert!(twice.stderr.contains("part 1/3 of a text would be counted twice"), "{}", twice.stderr);
    // Parts of other divisions are separate only where they have no window in common.
    for (name, part) in [("third", "1/3"), ("half", "1/2"), ("quarter", "3/4"), ("last", "4/4")] {
        calibrate(&file(name), &["--part", part]);
    }
    let twice = merge("twice", &["half", "third"]);
    let expected = "windows that parts 1/2 and 1/3 of a text have in common would be counted twice";
    assert!(twice.code == 2 && twice.stderr.contains(expected), "{}", twice.stderr);
    calibrate(&file("all"), &[]);
    let twice = merge("twice", &["all", "half"]);
    assert!(twice.code == 2 && twice.stderr.contains("parts 1/1 and 1/2 of a text"), "{}", twice.stderr);
    assert_eq!(merge("by-halves", &["half", "quarter", "last"]).code, 0);
    // A file that is read is not replaced.
    let halves = [file("half"), file("quarter")];
    let before = std::fs::read(&halves[0]).unwrap();
    let over = ["calibrate", "-o", path(&halves[0]), "--force", "--merge", path(&halves[0]), path(&halves[1])];
    let over = lrc(&over);
    assert!(over.code == 2 && over.stderr.contains("is read by the same command"), "{}", over.stderr);
    assert!(std::fs::read(&halves[0]).unwrap() == before);
    for name in ["third", "half", "quarter", "last", "all", "by-halves"] {
        std::fs::remove_file(file(name)).unwrap();
    }
    let again = merge("merged", &["1", "2"]);
    assert!(again.code == 2 && again.stderr.contains("--force"), "{}", again.stderr);
    assert!(!file("twice").exists() && std::fs::read_dir(folder.path()).unwrap().count() == 5);
}

#[test]
fn gradients_are_of_all_windows_or_as_many_as_requested() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let report = |model: &str, extra: &[&str]| {
        let fixed = ["calibrate", model, "--text", TRAIN, "-o", path(&out), "--json", "--force", "--seq-len", "16"];
        lrc(&[&fixed[..], extra].concat())
    };
    let found = |extra: &[&str]| {
        let run = report(FIXTURE, extra);
        assert_eq!(run.code, 0, "{}", run.stderr);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        (report["windows"].as_u64().unwrap(), report["gradient_windows"].as_u64())
    };
    assert_eq!(found(&["--method", "kfac", "--samples", "20"]), (20, None));
    assert_eq!(found(&["--method", "kfac", "--samples", "20", "--gradient-samples", "7"]), (20, Some(7)));
    assert_eq!(found(&["--samples", "20", "--gradient-samples", "20"]), (20, None));
    let experts = folder.path().join("experts");
    copy("fixtures/pico/mixtral", &experts);
    std::fs::copy("fixtures/pico/tokenizer.json", experts.join("tokenizer.json")).unwrap();
    for (model, method, expected) in
        [(FIXTURE, "svd-llm", "no gradients are taken"), (path(&experts), "kfac", "a model with experts")]
    {
        let refused = report(model, &["--method", method, "--gradient-samples", "4"]);
        assert!(refused.code == 2 && refused.stderr.contains(expected), "{}", refused.stderr);
    }
}

#[test]
fn statistics_do_not_depend_on_threads_or_memory_and_serve_compress() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(format!("{name}.safetensors"));
    let run = |name: &str, threads: &str, memory: &str| {
        let out = file(name);
        let args =
            [&["calibrate", FIXTURE, "--text", TRAIN, "-o", path(&out), "-q", "--memory", memory], DRAWN].concat();
        assert_eq!(finish(command(&args).env("RAYON_NUM_THREADS", threads)).code, 0);
        std::fs::read(out).unwrap()
    };
    let first = run("a", "2", "1GiB");
    assert!(first == run("b", "1", "1GiB") && first == run("c", "5", "1B"));
    // Statistics that are measured during the run or in advance give the same weights.
    for method in ["fwsvd", "asvd", "svd-llm", "kfac"] {
        let compress = |name: &str, extra: &[&str]| {
            let out = folder.path().join(format!("{method}-{name}"));
            let args = ["compress", FIXTURE, "-o", path(&out), "-q", "--keep", "0.7", "--method", method];
            ok(&[&args[..], &["--ranks", "uniform", "--sequential=false"], extra].concat());
            std::fs::read(out.join("model.safetensors")).unwrap()
        };
        let measured = compress("measured", &[&["--calibration", TRAIN], DRAWN].concat());
        assert!(measured == compress("kept", &["--statistics", path(&file("a"))]), "{method}");
    }
}

#[test]
fn statistics_that_do_not_belong_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(format!("{name}.safetensors"));
    let out = folder.path().join("out");
    calibrate(&file("llm"), &["--method", "svd-llm"]);
    let compress = |model: &str, extra: &[&str]| {
        let statistics = file("llm");
        let args = ["compress", model, "-o", path(&out), "--keep", "0.8", "--statistics", path(&statistics)];
        let run = lrc(&[&args[..], extra].concat());
        assert!(!out.exists());
        (run.code, run.stderr)
    };
    let check = |(code, stderr): (i32, String), expected_code: i32, expected: &str| {
        assert_eq!(code, expected_code, "{stderr}");
        assert!(stderr.contains(expected) && stderr.contains("hint:"), "{stderr}");
    };
    // Another model, other statistics, another text.
    let changed = folder.path().join("changed");
    common::copy(FIXTURE, &changed);
    let config = std::fs::read_to_string(changed.join("config.json")).unwrap();
    std::fs::write(changed.join("config.json"), config + "\n").unwrap();
    check(compress(path(&changed), &["--method", "svd-llm"]), 4, "belongs to another model (differs in: config.json)");
    check(compress(FIXTURE, &[]), 4, "lacks statistics that this method needs");
    let knapsack = ["--method", "svd-llm", "--ranks", "knapsack", "--sensitivity", "measured"];
    let other_text = [&knapsack[..], &["--calibration", HELD_OUT, "--samples", "2"]].concat();
    check(compress(FIXTURE, &other_text), 4, "was not measured on the text");
    check(compress(FIXTURE, &knapsack), 2, "`--sensitivity measured` needs `--calibration FILE`");
    // Files that are not statistics.
    let args = |statistics: &str| {
        let run = lrc(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "--statistics", statistics]);
        (run.code, run.stderr)
    };
    check(args("no-such-file.safetensors"), 2, "statistics file `no-such-file.safetensors` does not exist");
    check(args("fixtures/pico-llama/model.safetensors"), 4, "it has no header");
    let run = lrc(&["calibrate", FIXTURE, "--text", TRAIN, "-o", "statistics.bin"]);
    check((run.code, run.stderr), 2, "must end in `.safetensors`, not `");
}

#[test]
fn calibrations_that_cannot_serve_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    ok(&["compress", FIXTURE, "-o", path(&at("low-rank")), "-q", "--keep", "0.8"]);
    ok(&["compress", FIXTURE, "-o", path(&at("quantized")), "-q", "--quant", "rtn-int4-g32"]);
    let [low_rank, quantized] = ["low-rank", "quantized"].map(at);
    let common = ["--text", TRAIN, "--samples", "4", "--seq-len", "32"];
    for (model, extra, code, expected, hint) in [
        (FIXTURE, &["--part", "1/9"][..], 2, "4 windows cannot be divided into 9 parts", "raise `--samples`"),
        (
            FIXTURE,
            &["--method", "svd-llm", "--clip-gradients"],
            2,
            "`--clip-gradients` has no effect",
            "`--method kfac`",
        ),
        (FIXTURE, &["--method", "asvd", "--clip-gradients"], 2, "`--clip-gradients` has no effect", "`--method kfac`"),
        (path(&low_rank), &[], 4, "is already of low rank", "calibrate its source"),
        (path(&low_rank), &["--method", "svd-llm"], 4, "is already of low rank", "calibrate its source"),
        (path(&quantized), &[], 4, "is already quantized", "lrc export MODEL --format dense"),
    ] {
        let statistics = at("statistics.safetensors");
        let run = lrc(&[&["calibrate", model, "-o", path(&statistics)][..], &common, extra].concat());
        assert!(run.code == code && run.stderr.contains(expected), "{extra:?}: {}", run.stderr);
        assert!(run.stderr.contains("hint: ") && run.stderr.contains(hint), "{extra:?}: {}", run.stderr);
        assert!(!statistics.exists());
    }
    // A text that is too short for its windows has another way out.
    std::fs::write(at("short.txt"), "A few words, and a few more words, and that is all. ".repeat(4)).unwrap();
    let short = at("short.txt");
    let args = ["calibrate", FIXTURE, "--text", path(&short), "--seq-len", "16", "--part", "1/60"];
    let run = lrc(&[&args[..], &["-o", path(&at("statistics.safetensors"))]].concat());
    assert!(run.code == 2 && run.stderr.contains("hint: give a longer text, or fewer parts"), "{}", run.stderr);
}
