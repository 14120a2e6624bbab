//! Shared by the integration tests: the binary, the fixture, and larger models beside the repository.

#![allow(dead_code)] // every test file uses its part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub const FIXTURE: &str = "fixtures/tiny-llama";
pub const TRAIN: &str = "fixtures/text/train.txt";
pub const HELD_OUT: &str = "fixtures/text/held-out.txt";

/// Exit code and output of one run of the binary.
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code().unwrap_or(-1), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {}\n{}", self.stdout, self.stderr))
    }
}

/// Threads per run: tests run in parallel and fill the cores, and no bytes depend on the number of threads.
pub const THREADS: [&str; 2] = ["RAYON_NUM_THREADS", "1"];

/// The binary with arguments, ready to run in the project's folder.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lrc"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.env(THREADS[0], THREADS[1]);
    command
}

pub fn lrc(args: &[&str]) -> Run {
    Run::of(&command(args).output().unwrap())
}

/// Runs and expects success.
pub fn ok(args: &[&str]) -> Run {
    let run = lrc(args);
    assert_eq!(run.code, 0, "lrc {args:?}: {}", run.stderr);
    run
}

/// Runs a prepared command.
pub fn finish(command: &mut Command) -> Run {
    Run::of(&command.output().unwrap())
}

pub fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Perplexity of a model on the first 96 windows of `seq_len` tokens of a text.
pub fn perplexity(model: &str, text: &str, seq_len: &str) -> f64 {
    let first = ["--seq-len", seq_len, "--max-windows", "96", "--json"];
    ok(&[&["eval", model, "--text", text], &first[..]].concat()).json()["ppl"].as_f64().unwrap()
}

/// A model or a text in `../shared` beside this repository. Tests that use one are ignored.
pub fn beside(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    assert!(path.exists(), "this test needs `../shared/{name}`");
    path
}

/// Copies a folder of plain files.
pub fn copy(from: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(from)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Changes the values of an f32 tensor of a model in one file; `change` gets the place of each and its value.
pub fn edit(model: &Path, tensor: &str, change: impl Fn(usize, f32) -> f32) {
    let info = lrc::checkpoint::Checkpoint::open(model).unwrap().info(tensor).unwrap().clone();
    let file = model.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    for (i, value) in bytes[info.begin..info.end].as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *value = change(i, f32::from_le_bytes(*value)).to_le_bytes();
    }
    std::fs::write(file, bytes).unwrap();
}
