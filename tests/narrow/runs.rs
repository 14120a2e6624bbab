//! Runs: the same bytes however they go, quantizers in the same run, and outputs as sources.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, command, finish, ok, path, perplexity};
use lrc::checkpoint::Checkpoint;
use serde_json::Value;

use super::{config, report};

const FLAGS: [&str; 8] = ["--structure", "narrow", "--width-multiple", "32", "--calibration", TRAIN, "--samples", "8"];

fn arguments<'a>(out: &'a Path, flags: &[&'a str]) -> Vec<&'a str> {
    let keep: &[&str] = if flags.contains(&"--keep") { &[] } else { &["--keep", "0.75"] };
    [&["compress", FIXTURE, "-o", path(out), "-q"], &FLAGS[..], keep, flags].concat()
}

/// Every file of an output, without times and memory.
fn content(out: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(out).unwrap().map(|entry| entry.unwrap());
    let file = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        let mut bytes = std::fs::read(entry.path()).unwrap();
        if name == "lrc-report.json" {
            let mut report: Value = serde_json::from_slice(&bytes).unwrap();
            for field in ["timings", "elapsed_seconds", "peak_memory_bytes"] {
                report[field].take();
            }
            let units = report["narrow"]["blocks"].as_array_mut().unwrap();
            units.iter_mut().for_each(|unit| drop(unit["seconds"].take()));
            report["linears"].as_array_mut().unwrap().iter_mut().for_each(|l| drop(l["seconds"].take()));
            bytes = serde_json::to_vec(&report).unwrap();
        }
        (name, bytes)
    };
    entries.map(file).collect()
}

fn weights(out: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(out).unwrap();
    checkpoint.tensors().map(|info| (info.name.clone(), checkpoint.values(&info.name).unwrap())).collect()
}

#[test]
fn the_same_bytes_come_out_at_any_thread_count_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, threads: &str, memory: &str| {
        let out = folder.path().join(name);
        let run = finish(command(&arguments(&out, &["--memory", memory])).env("RAYON_NUM_THREADS", threads));
        assert_eq!(run.code, 0, "{}", run.stderr);
        content(&out)
    };
    let first = run("a", "1", "1GiB");
    assert!(first == run("b", "3", "1GiB") && first == run("c", "2", "1B"));
}

#[test]
fn killed_runs_resume_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    // The quantizer measures the narrower model, so that both halves of the run have pieces.
    let quantized = ["--quant", "gptq-int4-g32", "--format", "compressed-tensors"];
    let compress = |out: &Path| {
        let mut command = command(&arguments(out, &quantized));
        command.stderr(Stdio::piped());
        command
    };
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    assert!(compress(&whole).status().unwrap().success());
    let pieces = PathBuf::from(format!("{}.partial/pieces", path(&killed)));
    let names = || -> BTreeSet<PathBuf> {
        std::fs::read_dir(&pieces).map_or(BTreeSet::new(), |found| found.flatten().map(|e| e.path()).collect())
    };
    // Pieces from one kill to the next.
    const STEP: usize = 6;
    let (mut n_kills, mut seen) = (0, BTreeSet::new());
    loop {
        let (before, mut child) = (names(), compress(&killed).spawn().unwrap());
        while names().difference(&before).count() < STEP && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_micros(300));
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        seen.extend(names().into_iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()));
        n_kills += 1;
    }
    let has = |start: &str| seen.iter().any(|name| name.starts_with(start));
    assert!(n_kills > 5 && has("narrow-") && has("refit-") && has("narrowed-"), "{n_kills} kills, {seen:?}");
    assert!(content(&killed) == content(&whole));
}

#[test]
fn the_whole_width_is_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    ok(&arguments(&out, &["--keep", "1"]));
    assert!(weights(Path::new(FIXTURE)) == weights(&out) && config(Path::new(FIXTURE)) == config(&out));
}

#[test]
fn quantizers_in_the_same_run_are_those_of_a_second_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    ok(&arguments(&at("narrow"), &[]));
    let narrow = at("narrow");
    for (name, quantized) in [
        ("ct", &["--quant", "gptq-int4-g32", "--format", "compressed-tensors", "--method", "kfac"][..]),
        ("gguf", &["--quant", "q8_0", "--format", "gguf"]),
    ] {
        let (together, apart) = (at(name), at(&format!("{name}-apart")));
        ok(&arguments(&together, quantized));
        let calibration: &[&str] = if name == "ct" { &FLAGS[4..] } else { &[] };
        ok(&[&["compress", path(&narrow), "-o", path(&apart), "-q"], quantized, calibration].concat());
        if name == "ct" {
            assert!(weights(&together) == weights(&apart), "{name}");
        } else {
            let [one, other] = [&together, &apart].map(|out| std::fs::read(out.join("model.gguf")).unwrap());
            assert!(one == other, "{name}");
        }
        let sizes = &report(&together)["sizes"];
        let keep = sizes["keep"].as_f64().unwrap();
        assert!(keep <= 0.75 && sizes["bits_per_weight_after"].as_f64().unwrap() < 0.75 * 32.0, "{sizes}");
    }
}

#[test]
fn outputs_are_plain_models_and_sources_of_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let out = at("out");
    ok(&arguments(&out, &[]));
    let config = config(&out);
    for key in ["lrc", "auto_map", "quantization_config", "per_layer_config"] {
        assert!(config.get(key).is_none(), "{key}");
    }
    assert_eq!(config["architectures"][0], "LlamaForCausalLM");
    let dense = perplexity(path(&out), HELD_OUT, "128");
    let out = path(&out).to_string();
    ok(&["export", &out, "--format", "gguf", "-o", path(&at("gguf"))]);
    let gguf = perplexity(path(&at("gguf")), HELD_OUT, "128");
    assert!((gguf / dense - 1.0).abs() < 0.01, "{gguf} {dense}");
    ok(&["calibrate", &out, "--text", TRAIN, "--samples", "2", "-o", path(&at("stats.safetensors"))]);
    ok(&["compress", &out, "-o", path(&at("again")), "-q", "--keep", "0.8"]);
    let narrower = ["--structure", "narrow", "--width-multiple", "16", "--keep", "0.8"];
    ok(&[&["compress", &out, "-o", path(&at("twice")), "-q"], &narrower[..]].concat());
    ok(&["inspect", &out]);
    // The recipe beside an output makes the same output again.
    let recipe = Path::new(&out).join("lrc-recipe.toml");
    ok(&["compress", FIXTURE, "-o", path(&at("remade")), "-q", "--recipe", path(&recipe)]);
    assert!(content(Path::new(&out)) == content(&at("remade")));
}
