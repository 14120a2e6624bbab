//! `lrc compress --structure narrow`: models with fewer channels and heads that every runtime loads.

mod budgets;
mod by_block;
mod depth;
mod dry_run;
mod elastic;
mod families;
mod importance;
mod joint;
mod runs;
mod shown;

use std::path::{Path, PathBuf};

use crate::common::{self, ok, path};
use serde_json::Value;

const TEXT: &str = "once upon a time there was a little dog. it liked to run! ";

/// A copy of a fixture that can be calibrated, and a text.
struct Model {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
}

impl Model {
    /// A fixture under `fixtures/pico`, with a tokenizer beside it.
    fn pico(family: &str, tokenizer: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = (folder.path().join(family), folder.path().join("text.txt"));
        common::copy(&format!("fixtures/pico/{family}"), &model);
        std::fs::remove_file(model.join("expected.json")).unwrap();
        std::fs::copy(tokenizer, model.join("tokenizer.json")).unwrap();
        std::fs::write(&text, TEXT.repeat(40)).unwrap();
        Self { folder, model, text }
    }

    fn arguments<'a>(&'a self, out: &'a Path, flags: &[&'a str]) -> Vec<&'a str> {
        self.of(out, "narrow", flags)
    }

    fn of<'a>(&'a self, out: &'a Path, structure: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
        let own = ["compress", path(&self.model), "-o", path(out), "-q", "--structure", structure];
        let calibration = ["--calibration", path(&self.text), "--samples", "4", "--seq-len", "24"];
        [&own[..], &calibration, flags].concat()
    }

    fn narrow(&self, name: &str, flags: &[&str]) -> PathBuf {
        let out = self.folder.path().join(name);
        ok(&self.arguments(&out, flags));
        out
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn report(out: &Path) -> Value {
    json(&out.join("lrc-report.json"))
}

fn config(out: &Path) -> Value {
    json(&out.join("config.json"))
}

/// Number of channels or groups in a report, before and after, in every block.
fn widths(report: &Value, kind: &str) -> Vec<[u64; 2]> {
    let units = report["narrow"]["blocks"].as_array().unwrap().iter().filter(|unit| unit["kind"] == kind);
    units.map(|unit| ["before", "after"].map(|key| unit[key].as_u64().unwrap())).collect()
}
