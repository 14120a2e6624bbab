//! Absurd input, and systems that refuse: an error that says what is wrong, in time, with the documented exit code.

mod damage;
mod descriptions;
mod files;
mod formats;
mod system;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{FIXTURE, Run, copy, finish};
use serde_json::Value;

/// Runs `lrc` after a line of bash.
fn under(shell: &str, args: &[&str]) -> Run {
    let words: Vec<String> = args.iter().map(|arg| format!("'{arg}'")).collect();
    let script = shell.replace("LRC", &format!("'{}' {}", env!("CARGO_BIN_EXE_lrc"), words.join(" ")));
    finish(Command::new("bash").args(["-c", &script]).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null()))
}

#[track_caller]
fn refused(run: &Run, code: i32, parts: &[&str]) {
    assert_eq!(run.code, code, "{}", run.stderr);
    assert_eq!(run.stderr.matches("error: ").count(), 1, "{}", run.stderr);
    for part in parts {
        assert!(run.stderr.contains(part), "`{part}` is not in: {}", run.stderr);
    }
}

/// A copy of the fixture.
fn model(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    copy(FIXTURE, &model);
    model
}

/// Changes a JSON file.
fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}
