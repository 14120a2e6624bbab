//! Budgets in parameters of the whole output.

use std::path::Path;

use crate::common::{FIXTURE, lrc, ok, path};
use serde_json::Value;

fn compress(out: &Path, extra: &[&str]) -> Value {
    ok(&[&["compress", FIXTURE, "-o", path(out), "-q", "--json"], extra].concat()).json()
}

fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("model.safetensors")).unwrap()
}

/// Elements of the floats in a file.
fn parameters(folder: &Path) -> u64 {
    let (_, header) = safetensors::SafeTensors::read_metadata(&weights(folder)).unwrap();
    let floats = header.tensors().into_values().filter(|tensor| tensor.dtype != safetensors::Dtype::I32);
    floats.map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum()
}

#[test]
fn every_structure_meets_them_from_below() {
    let folder = tempfile::tempdir().unwrap();
    let all = parameters(FIXTURE.as_ref());
    for (name, target, least, flags) in [
        ("low-rank", "300K", 297_000, &[][..]),
        ("factors", "250K", 245_000, &["--layout", "factors", "--ranks", "uniform"]),
        ("embeddings", "0.2m", 198_000, &["--embeddings", "factor", "--ranks", "knapsack"]),
        ("narrow", "300000", 270_000, &["--structure", "narrow", "--width-multiple", "8"]),
        ("in-codes", "300K", 270_000, &["--structure", "narrow", "--width-multiple", "8", "--quant", "int8"]),
    ] {
        let out = folder.path().join(name);
        let report = compress(&out, &[&["--params", target][..], flags].concat());
        let found = report["sizes"]["parameters_after"].as_u64().unwrap();
        let most = target.parse::<lrc::compress::recipe::Parameters>().unwrap().0;
        assert!((least..=most).contains(&found), "{name}: {found} of {target}");
        assert_eq!(report["sizes"]["parameters_before"], all);
        assert!(name == "in-codes" || parameters(&out) == found, "{name}");
    }
}

#[test]
fn they_are_the_share_that_leaves_so_many() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("recipe.toml"), "params = \"0.3M\"\n").unwrap();
    let report = compress(&at("file"), &["--recipe", path(&at("recipe.toml"))]);
    let keep = report["recipe"]["keep"].as_f64().unwrap();
    compress(&at("share"), &["--keep", &keep.to_string()]);
    compress(&at("flag"), &["--params", "300K"]);
    assert!(weights(&at("file")) == weights(&at("share")) && weights(&at("file")) == weights(&at("flag")));
    assert_eq!(compress(&at("whole"), &["--params", "1B"])["sizes"]["keep"], 1.0);
    let plan = ok(&["plan", FIXTURE, "-o", path(&at("plan")), "--params", "300K", "--tasks", "2", "--json"]).json();
    assert_eq!(plan["job"]["recipe"]["keep"], keep);
}

#[test]
fn what_they_cannot_be_combined_with_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let [out, recipe] = ["out", "recipe.toml"].map(|name| folder.path().join(name));
    std::fs::write(&recipe, "params = 300000\nbits = 3\n").unwrap();
    for (flags, expected) in [
        (&["--params", "1K"][..], "`--params 1000` cannot be reached: "),
        (&["--params", "0"], "`--params` is 0"),
        (&["--params", "1Q"], "`--params 1Q`: expected a number of parameters"),
        (&["--params", "300K", "--keep", "0.5"], "`--params` cannot be combined with `--keep`"),
        (&["--params", "300K", "--quant", "int8"], "`--params` cannot be combined with `--quant`"),
        (&["--params", "300K", "--format", "dense"], "`--params` cannot be combined with `--format dense`"),
        (&["--params", "300K", "--embeddings", "auto"], "`--params` cannot be combined with `--embeddings auto`"),
        (&["--params", "60K", "--structure", "narrow"], "or raise `--params 60000`, which is this `--keep`"),
        (&["--params", "60K", "--structure", "depth"], "hint: raise `--params 60000`"),
        (&["--params", "300K", "--ranks", "fixed:4"], "`--params` cannot be combined with `--ranks`"),
        (&["--recipe", path(&recipe)], "`--params` cannot be combined with `--bits`"),
    ] {
        let run = lrc(&[&["compress", FIXTURE, "-o", path(&out)], flags].concat());
        assert!(run.code == 2 && run.stderr.contains(expected), "{flags:?}: {} {}", run.code, run.stderr);
        assert!(run.stderr.contains("hint: ") && !out.exists(), "{flags:?}: {}", run.stderr);
    }
}
