//! Places for outputs, files that are copied, and that nothing is lost.

#[cfg(unix)]
mod beside;
mod places;
mod replaced;

use std::path::Path;

use crate::common::{command, finish, lrc};
use serde_json::Value;

fn report(out: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(out.join("lrc-report.json")).unwrap()).unwrap()
}

/// Runs, and expects a refusal that names `parts`, and no advice to force it.
#[track_caller]
fn refused(args: &[&str], code: i32, parts: &[&str]) -> String {
    let run = lrc(args);
    assert_eq!(run.code, code, "lrc {args:?}: {}", run.stderr);
    for part in parts {
        assert!(run.stderr.contains(part), "lrc {args:?}: `{part}` is not in: {}", run.stderr);
    }
    run.stderr
}

/// Runs in a folder and expects success.
#[track_caller]
fn ok_in(folder: &Path, args: &[&str]) {
    let run = finish(command(args).current_dir(folder));
    assert_eq!(run.code, 0, "lrc {args:?}: {}", run.stderr);
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}
