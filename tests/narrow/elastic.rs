//! `--structure narrow --elastic`: channels and groups in order of importance, which `lrc truncate` makes narrower.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::common::{FIXTURE, HELD_OUT, TRAIN, command, finish, lrc, ok, path, perplexity};
use crate::families::tokenizer;
use lrc::checkpoint::Checkpoint;
use serde_json::Value;

use super::families::check;
use super::{Model, config, report, widths};

const CALIBRATED: [&str; 6] = ["--calibration", TRAIN, "--samples", "16", "--seq-len", "128"];

fn compress(out: &Path, keep: &str, flags: &[&str]) {
    let own = ["compress", FIXTURE, "-o", path(out), "-q", "--structure", "narrow", "--width-multiple", "16"];
    ok(&[&own[..], &CALIBRATED, &["--keep", keep], flags].concat());
}

fn truncate(from: &Path, out: &Path, keep: &str) -> Value {
    ok(&["truncate", path(from), "-o", path(out), "--keep", keep, "--json"]).json()
}

fn tensors(out: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(out).unwrap();
    checkpoint.tensors().map(|info| (info.name.clone(), checkpoint.values(&info.name).unwrap())).collect()
}

/// The largest difference over the largest value, of the tensor where it is largest.
fn distance(one: &Path, other: &Path) -> f32 {
    let (one, other) = (tensors(one), tensors(other));
    assert!(one.keys().eq(other.keys()));
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, |most, value| most.max(value.abs()));
    let of = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        assert_eq!(a.len(), b.len());
        largest(&mut a.iter().zip(b).map(|(a, b)| a - b)) / largest(&mut b.iter().copied())
    };
    one.values().zip(other.values()).map(of).fold(0.0, f32::max)
}

/// Two reports with the same widths and errors, but for rounding.
fn expect_same(one: &Value, other: &Value) {
    for field in ["source", "source_files", "sizes", "keep", "calibration", "passed_through"] {
        assert_eq!(one[field], other[field], "{field}");
    }
    for kind in ["channels", "groups"] {
        assert_eq!(widths(one, kind), widths(other, kind));
    }
    let units = |report: &Value| report["narrow"]["blocks"].as_array().unwrap().clone();
    for (one, other) in units(one).iter().zip(units(other)) {
        for error in ["squared_error", "relative_error"] {
            let [a, b] = [&one[error], &other[error]].map(|error| error.as_f64().unwrap());
            assert!((a - b).abs() < 1e-9 * b.abs().max(1e-9), "{one} {other}");
        }
    }
    let linears = |report: &Value| report["linears"].as_array().unwrap().clone();
    for (one, other) in linears(one).iter().zip(linears(other)) {
        for field in ["module", "shape", "parameters_before", "parameters_after", "note"] {
            assert_eq!(one[field], other[field]);
        }
    }
}

#[test]
fn a_truncated_model_is_the_one_that_the_source_gives_at_that_size() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (rule, name) in [("--uniform-width=true", "uniform"), ("--uniform-width=false", "by-block")] {
        let [large, fresh, small, middle, twice] =
            ["large", "fresh", "small", "middle", "twice"].map(|step| at(&format!("{name}-{step}")));
        let flags = [rule, "--elastic"];
        compress(&large, "0.85", &flags);
        compress(&fresh, "0.55", &flags);
        let truncated = truncate(&large, &small, "0.55");
        expect_same(&truncated, &report(&fresh));
        assert_eq!(truncated["truncated"]["keep"], 0.55);
        assert!(config(&small) == config(&fresh) && distance(&small, &fresh) < 1e-4, "{}", distance(&small, &fresh));
        // Step by step, from what each step kept.
        truncate(&large, &middle, "0.7");
        expect_same(&truncate(&middle, &twice, "0.55"), &report(&fresh));
        assert!(distance(&twice, &fresh) < 1e-4, "{}", distance(&twice, &fresh));
        let [of_fresh, of_small] = [&fresh, &small].map(|out| perplexity(path(out), HELD_OUT, "128"));
        assert!((of_small / of_fresh - 1.0).abs() < 1e-4, "{of_small} {of_fresh}");
        // The refit matters: the bare prefix is another model.
        let reader = "model.layers.1.mlp.down_proj.weight";
        let (wide, narrow) = (&tensors(&large)[reader], &tensors(&small)[reader]);
        let (n, k) = (wide.len() / 96, narrow.len() / 96);
        let moved = (0..96 * k).map(|i| (wide[i / k * n + i % k] - narrow[i]).abs()).fold(0.0, f32::max);
        assert!(k < n && moved > 1e-3, "{n} {k} {moved}");
        // Makers are a prefix.
        let maker = "model.layers.1.mlp.up_proj.weight";
        let (wide, narrow) = (&tensors(&large)[maker], &tensors(&small)[maker]);
        assert!(wide.starts_with(narrow));
    }
}

#[test]
fn an_elastic_model_is_the_other_in_another_order() {
    let folder = tempfile::tempdir().unwrap();
    let [plain, elastic] = ["plain", "elastic"].map(|name| folder.path().join(name));
    compress(&plain, "0.75", &[]);
    compress(&elastic, "0.75", &["--elastic"]);
    let sorted = |out: &Path, name: &str| {
        let mut rows: Vec<Vec<u32>> =
            tensors(out)[name].chunks(96).map(|row| row.iter().map(|v| v.to_bits()).collect()).collect();
        rows.sort();
        rows
    };
    for name in ["model.layers.0.mlp.gate_proj.weight", "model.layers.2.self_attn.k_proj.weight"] {
        assert!(sorted(&plain, name) == sorted(&elastic, name), "{name}");
    }
    assert!(tensors(&plain) != tensors(&elastic));
    let [a, b] = [&plain, &elastic].map(|out| perplexity(path(out), HELD_OUT, "128"));
    assert!((a / b - 1.0).abs() < 1e-5, "{a} {b}");
    assert_eq!(report(&plain)["sizes"], report(&elastic)["sizes"]);
    // A unit that keeps its width is in order too, so that it may become narrower later.
    let channels = folder.path().join("channels");
    compress(&channels, "0.9", &["--elastic", "--targets", "*.mlp.*"]);
    let groups = folder.path().join("groups");
    let keep = 0.6 * report(&channels)["keep"].as_f64().unwrap();
    truncate(&channels, &groups, &keep.to_string());
}

#[test]
fn in_every_family_an_elastic_model_and_its_truncation_are_the_source_without_some_channels() {
    let with_groups = ["llama", "qwen2", "qwen3", "phi3", "gemma2"];
    for family in with_groups.into_iter().chain(["gpt2", "gpt_neox", "opt", "olmo2"]) {
        let model = Model::pico(family, &tokenizer(family));
        let at = |name: &str| model.folder.path().join(name);
        let (large, small): (PathBuf, PathBuf) = (at("large"), at("small"));
        ok(&model.arguments(&large, &["--keep", "0.9", "--width-multiple", "2", "--elastic"]));
        // Less than attention has.
        let has_groups = with_groups.contains(&family);
        let keep = if has_groups { "0.35" } else { "0.65" };
        ok(&["truncate", path(&large), "-o", path(&small), "--keep", keep]);
        for out in [&large, &small] {
            check(family, &model, out);
        }
        let [before, after] = [&large, &small].map(|out| report(out)["sizes"]["keep"].as_f64().unwrap());
        assert!(before <= 0.9 && after <= keep.parse().unwrap() && after < before, "{family}: {before} {after}");
        if has_groups {
            assert!(widths(&report(&small), "groups").iter().all(|pair| *pair == [2, 1]), "{family}");
        }
    }
}

#[test]
fn blocks_that_were_left_out_stay_out_and_bytes_do_not_depend_on_threads() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let deep = at("deep");
    let own = ["compress", FIXTURE, "-o", path(&deep), "-q", "--structure", "narrow,depth", "--elastic"];
    ok(&[&own[..], &CALIBRATED, &["--keep", "0.45", "--width-multiple", "128"]].concat());
    let before = report(&deep);
    let dropped = &before["narrow"]["dropped"];
    assert!(dropped.as_array().is_some_and(|blocks| !blocks.is_empty()), "{}", before["narrow"]);
    let run = |name: &str, threads: &str| {
        let out = at(name);
        let args = ["truncate", path(&deep), "-o", path(&out), "--keep", "0.36", "--json"];
        let run = finish(command(&args).env("RAYON_NUM_THREADS", threads));
        assert_eq!(run.code, 0, "{}", run.stderr);
        let bytes = ["model.safetensors", "lrc-curves.arrays"].map(|file| std::fs::read(out.join(file)).unwrap());
        (run.json(), bytes)
    };
    let ((one, bytes), (_, other)) = (run("one", "1"), run("three", "3"));
    assert!(bytes == other);
    assert_eq!(&one["narrow"]["dropped"], dropped);
    let in_source = |report: &Value| -> Vec<(u64, u64)> {
        let units = report["narrow"]["blocks"].as_array().unwrap().iter();
        units.map(|unit| ["block", "before"].map(|field| unit[field].as_u64().unwrap()).into()).collect()
    };
    assert_eq!(in_source(&one), in_source(&before));
    let moved = one["linears"].as_array().unwrap().iter().filter_map(|linear| linear["note"].as_str());
    assert!(moved.into_iter().any(|note| note.contains("in the source")));
    assert!(perplexity(path(&at("one")), HELD_OUT, "128").is_finite());
    ok(&["export", path(&at("one")), "--format", "gguf", "-o", path(&at("gguf"))]);
    assert!(!at("gguf").join("lrc-curves.arrays").exists());
}

#[test]
fn what_cannot_become_narrower_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    compress(&at("plain"), "0.75", &[]);
    compress(&at("elastic"), "0.75", &["--elastic"]);
    let refused = |from: &str, keep: &str, code: i32, expected: &str| {
        let run = lrc(&["truncate", path(&at(from)), "-o", path(&at("out")), "--keep", keep]);
        assert!(run.code == code && run.stderr.contains(expected), "{from} {keep}: {} {}", run.code, run.stderr);
        assert!(run.stderr.contains("hint: ") && !at("out").exists(), "{}", run.stderr);
    };
    refused("plain", "0.5", 4, "lrc-curves.arrays` is missing");
    refused("elastic", "0.75", 2, "is not less than the 0.7");
    refused("elastic", "0.01", 2, "`--keep 0.01` cannot be reached: the minimum is 0.");
    let curves = at("elastic").join("lrc-curves.arrays");
    std::fs::remove_file(&curves).unwrap();
    compress(&at("other"), "0.6", &["--elastic"]);
    std::fs::copy(at("other").join("lrc-curves.arrays"), &curves).unwrap();
    refused("elastic", "0.5", 4, "does not belong to `model.layers.0.mlp.down_proj`");
    for (flags, expected) in [
        (&["--structure", "depth", "--elastic"][..], "`--elastic` cannot be combined with `--structure depth`"),
        (&["--structure", "auto", "--elastic"], "`--elastic` cannot be combined with `--structure auto`"),
        (&["--structure", "narrow", "--elastic", "--keep", "1"], "`--elastic` has no effect with `--keep 1`"),
        (&["--structure", "narrow", "--elastic", "--format", "gguf"], "`--elastic` has no effect with"),
        (&["--structure", "narrow", "--elastic", "--quant", "rtn-int8"], "`--elastic` has no effect with"),
    ] {
        let out = at("out");
        let own = ["compress", FIXTURE, "-o", path(&out)];
        let keep: &[&str] = if flags.contains(&"--keep") { &[] } else { &["--keep", "0.7"] };
        let run = lrc(&[&own[..], &CALIBRATED, keep, flags].concat());
        assert!(run.code == 2 && run.stderr.contains(expected), "{flags:?}: {} {}", run.code, run.stderr);
    }
}
