//! Runs that are killed, interrupted, and resumed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{self, FIXTURE, TRAIN, command, copy, lrc, ok, path};
use serde_json::Value;

/// Every file of an output, without times and memory.
pub fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(at) = folders.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let mut bytes = std::fs::read(&path).unwrap();
            if path.ends_with("lrc-report.json") {
                let mut report: Value = serde_json::from_slice(&bytes).unwrap();
                for field in ["timings", "elapsed_seconds", "peak_memory_bytes"] {
                    report[field].take();
                }
                report["linears"].as_array_mut().unwrap().iter_mut().for_each(|l| drop(l["seconds"].take()));
                let narrowed = report.pointer_mut("/narrow/blocks").and_then(Value::as_array_mut);
                narrowed.into_iter().flatten().for_each(|unit| drop(unit["seconds"].take()));
                bytes = serde_json::to_vec(&report).unwrap();
            }
            files.insert(path.strip_prefix(folder).unwrap().to_path_buf(), bytes);
        }
    }
    files
}

/// The differences of two JSON documents, for the message of a failure; nothing for other files.
pub fn difference(found: &[u8], expected: &[u8]) -> String {
    fn walk(path: &str, found: &Value, expected: &Value, said: &mut String) {
        match (found, expected) {
            (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
                a.iter().for_each(|(key, value)| walk(&format!("{path}.{key}"), value, &b[key], said));
            }
            (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
                (0..a.len()).for_each(|i| walk(&format!("{path}[{i}]"), &a[i], &b[i], said));
            }
            _ if found != expected => *said += &format!("\n{path}: {found}, expected {expected}"),
            _ => {}
        }
    }
    let mut said = String::new();
    if let (Ok(found), Ok(expected)) = (serde_json::from_slice(found), serde_json::from_slice(expected)) {
        walk("", &found, &expected, &mut said);
    }
    said
}

/// Well-spread numbers that are the same in every run of the test: a Weyl sequence in [0, 1).
struct Moments(f64);

impl Iterator for Moments {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        self.0 = (self.0 + 0.618_033_988_749_894_9).fract();
        Some(self.0)
    }
}

/// Kills `child` after `delay` if it still runs, and returns whether it did.
fn kill_after(mut child: Child, out: &Path, delay: Duration) -> bool {
    let started = Instant::now();
    while started.elapsed() < delay {
        if let Some(status) = child.try_wait().unwrap() {
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            // A run that was killed after its last step was complete.
            let was_done = said.contains(&format!("output folder `{}` exists", path(out)));
            assert!(status.success() || was_done, "a resumed run ends well: {status}\n{said}");
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

/// Fifty SIGKILLs in total: anchored low rank, anchored codes, and quantized bases with factors, an equal-bytes baseline and an adapter.
#[test]
fn runs_killed_at_any_moment_resume_to_the_same_bytes() {
    const KILLS: usize = 50;
    let calibrated = ["--calibration", TRAIN, "--samples", "8", "-q"];
    let recipes: [&[&str]; 4] = [
        &["--keep", "0.8", "--sequential", "--elastic", "--max-shard-size", "500kB", "--gradient-samples", "3"],
        &["--quant", "cd-int3-g32", "--sequential"],
        &[
            "--quant",
            "gptq-int4-g32",
            "--compensate",
            "kfac",
            "--compensate-rank",
            "4",
            "--format",
            "compressed-tensors",
        ],
        &["--quant", "rtn-int4-g32,rtn-int8-g32", "--compensate", "eora", "--bits", "5.5", "--format", "gguf"],
    ];
    let folder = tempfile::tempdir().unwrap();
    let mut moments = Moments(0.0);
    let mut n_kills = 0;
    for (i, recipe) in recipes.into_iter().enumerate() {
        let arguments = |out: &Path| {
            let mut arguments: Vec<String> = ["compress", FIXTURE, "-o", path(out)].map(String::from).into();
            arguments.extend(recipe.iter().chain(&calibrated).map(|&a| String::from(a)));
            arguments
        };
        let run = |out: &Path| {
            let arguments = arguments(out);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut command = command(&arguments);
            command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
        };
        let whole = folder.path().join(format!("whole-{i}"));
        let started = Instant::now();
        assert!(run(&whole).wait().unwrap().success());
        let seconds = started.elapsed().as_secs_f64();
        let expected = content(&whole);
        let mut round = 0;
        while n_kills < KILLS * (i + 1) / recipes.len() {
            round += 1;
            let out = folder.path().join(format!("killed-{i}-{round}"));
            // An existing folder is filled in place, with the work folder inside.
            if round % 2 == 0 {
                std::fs::create_dir(&out).unwrap();
            }
            // Delays are drawn over the length of a whole run, so a resumed run may end before it is killed.
            while n_kills < 2 * KILLS
                && kill_after(run(&out), &out, Duration::from_secs_f64(seconds * moments.next().unwrap()))
            {
                n_kills += 1;
            }
            let found = content(&out);
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
            for (name, bytes) in &found {
                let differs = || {
                    format!(
                        "recipe {i}, round {round}: `{}` differs{}",
                        name.display(),
                        difference(bytes, &expected[name])
                    )
                };
                assert!(bytes == &expected[name], "{}", differs());
            }
            assert!(!out.with_extension("partial").exists() && !out.join(".lrc-partial").exists());
        }
    }
    assert!(n_kills >= KILLS, "{n_kills} kills");
}

/// Starts a run, and waits until it has finished a new piece.
fn spawn_and_wait(command: &mut Command, out: &Path) -> Child {
    let pieces = PathBuf::from(format!("{}.partial/pieces", path(out)));
    let names = || -> BTreeSet<PathBuf> {
        std::fs::read_dir(&pieces).map_or(BTreeSet::new(), |entries| entries.map(|e| e.unwrap().path()).collect())
    };
    let before = names();
    let mut child = command.spawn().unwrap();
    while !names().iter().any(|name| !before.contains(name)) {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "ended ({ended:?}) without a new piece in `{}`", pieces.display());
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

/// Biases that take up the mean of inputs are in the pieces of linears that were fitted or written before.
#[test]
fn centered_runs_resume_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("gpt2"), folder.path().join("text.txt"));
    copy("fixtures/pico/gpt2", &model);
    std::fs::copy("fixtures/pico/tokenizer.json", model.join("tokenizer.json")).unwrap();
    std::fs::write(&text, "once upon a time there was a little dog. it liked to run! ".repeat(40)).unwrap();
    for (i, mode) in ["--sequential", "--sequential=false"].into_iter().enumerate() {
        let compress = |out: &Path| {
            let own = ["compress", path(&model), "-o", path(out), "--calibration", path(&text), "--seq-len", "24"];
            let mut command = command(&[&own[..], &["--keep", "0.6", "--center", mode, "-q"]].concat());
            command.stderr(Stdio::piped());
            command
        };
        let (whole, killed) = (folder.path().join(format!("whole-{i}")), folder.path().join(format!("killed-{i}")));
        assert!(compress(&whole).status().unwrap().success());
        let pieces = PathBuf::from(format!("{}.partial/pieces", path(&killed)));
        let names = || -> BTreeSet<PathBuf> {
            std::fs::read_dir(&pieces).map_or(BTreeSet::new(), |found| found.flatten().map(|e| e.path()).collect())
        };
        let mut n_kills = 0;
        loop {
            let (before, mut child) = (names(), compress(&killed).spawn().unwrap());
            while names().is_subset(&before) && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_micros(300));
            }
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "{mode}");
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            n_kills += 1;
        }
        assert!(n_kills > 3, "{n_kills} kills");
        assert!(content(&killed) == content(&whole), "{mode}");
    }
}

#[test]
fn another_job_is_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    copy(FIXTURE, &source);
    let out = folder.path().join("out");
    let run = |more: &[&str]| {
        let args = ["compress", path(&source), "-o", path(&out), "--calibration", TRAIN, "--samples", "8", "-q"];
        command(&[&args[..], more].concat())
    };
    let mut child = spawn_and_wait(&mut run(&["--keep", "0.8"]), &out);
    child.kill().unwrap();
    child.wait().unwrap();

    let check = |more: &[&str], expected: &str| {
        let found = common::finish(&mut run(more));
        assert_eq!(found.code, 2, "{}", found.stderr);
        assert!(found.stderr.contains(expected) && found.stderr.contains("`--restart`"), "{}", found.stderr);
    };
    check(&["--keep", "0.7"], "`recipe.keep` was 0.8, is 0.7");
    check(&["--keep", "0.8", "--seed", "1"], "`recipe.seed` was 0, is 1");
    let other = lrc(&["export", path(&source), "--format", "dense", "-o", path(&out)]);
    assert!(other.code == 2 && other.stderr.contains("holds an unfinished compression"), "{}", other.stderr);

    // One byte of the last weight changes.
    let weights = source.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    check(&["--keep", "0.8"], "`source_files.model.safetensors` was");
    bytes[last] ^= 1;
    std::fs::write(&weights, &bytes).unwrap();

    // The same job resumes without repeating finished blocks. A run that was killed while it wrote its report left
    // one, which is not among the files that the new report lists.
    std::fs::write(PathBuf::from(format!("{}.partial/output/lrc-report.json", path(&out))), "{").unwrap();
    let on = common::finish(run(&["--keep", "0.8"]).arg("-v"));
    assert_eq!(on.code, 0, "{}", on.stderr);
    let report: Value = serde_json::from_slice(&std::fs::read(out.join("lrc-report.json")).unwrap()).unwrap();
    let listed: BTreeSet<&String> = report["output_files"].as_object().unwrap().keys().collect();
    let files = content(&out);
    let others = files.keys().map(|name| name.to_str().unwrap()).filter(|name| *name != "lrc-report.json");
    assert!(listed.into_iter().map(String::as_str).eq(others));
    let anew = common::finish(&mut run(&["--keep", "0.7", "--force", "--restart"]));
    assert_eq!(anew.code, 0, "{}", anew.stderr);
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_cleanly_and_says_how_to_resume() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args = ["compress", FIXTURE, "-o", path(&out), "--calibration", TRAIN, "--samples", "16", "--keep", "0.8"];
    for signal in ["-INT", "-TERM"] {
        let child = spawn_and_wait(command(&args).stderr(Stdio::piped()).stdout(Stdio::piped()), &out);
        let sent = std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(130), "{stderr}");
        assert!(stderr.contains("interrupted") && stderr.contains("run the same command again"), "{stderr}");
        assert!(!out.exists());
    }
    ok(&args);
    // Files that cannot be resumed are removed.
    let statistics = folder.path().join("statistics.safetensors");
    let args = ["calibrate", FIXTURE, "--text", TRAIN, "-o", path(&statistics), "--samples", "400"];
    let child = command(&args).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(400));
    std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["out"]);
}
