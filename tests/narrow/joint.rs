//! Several structures in one run: widths, blocks and ranks under one budget.

use std::path::Path;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, lrc, ok, path, perplexity};
use lrc::checkpoint::Checkpoint;
use serde_json::Value;

use super::{config, report, widths};

const CALIBRATED: [&str; 6] = ["--calibration", TRAIN, "--samples", "16", "--seq-len", "128"];

fn compress(out: &Path, flags: &[&str]) -> Value {
    let own = ["compress", FIXTURE, "-o", path(out), "-q", "--width-multiple", "16"];
    ok(&[&own[..], flags].concat());
    report(out)
}

#[test]
fn ranks_spend_what_widths_and_blocks_leave_of_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let stats = at("stats.safetensors");
    ok(&["calibrate", FIXTURE, "--text", TRAIN, "-o", path(&stats), "--samples", "16", "--seq-len", "128"]);
    for (name, structure, keep) in
        [("two", "narrow,low-rank", 0.6), ("all", "auto", 0.4), ("deep", "low-rank,depth", 0.5)]
    {
        let text = keep.to_string();
        let flags = ["--structure", structure, "--keep", &text];
        let depth_only = structure == "low-rank,depth";
        let out = at(name);
        let report = if depth_only {
            ok(&[&["compress", FIXTURE, "-o", path(&out), "-q"], &flags[..], &CALIBRATED].concat());
            report(&out)
        } else {
            compress(&out, &[&flags[..], &CALIBRATED].concat())
        };
        let found = report["sizes"]["keep"].as_f64().unwrap();
        assert!(found <= keep && found > keep - 0.005, "{name}: {found}");
        let linears = report["linears"].as_array().unwrap();
        assert!(linears.iter().any(|linear| linear["rank"].is_number()), "{name}");
        assert!(report["linear"]["max_error"].as_f64().is_some_and(|error| error > 0.0 && error < 1.0), "{name}");
        let lrc = &config(&out)["lrc"];
        assert!(lrc["modules"].as_object().is_some_and(|modules| !modules.is_empty()), "{name}");
        assert!(perplexity(path(&out), HELD_OUT, "128").is_finite());
        // The same from statistics of a file.
        if !depth_only {
            compress(&at(&format!("{name}-s")), &[&flags[..], &["--statistics", path(&stats)]].concat());
            let weights = |name: &str| std::fs::read(at(name).join("model.safetensors")).unwrap();
            assert!(weights(name) == weights(&format!("{name}-s")), "{name}");
        }
        let recipe = out.join("lrc-recipe.toml");
        ok(&["compress", FIXTURE, "-o", path(&at("remade")), "-q", "--force", "--recipe", path(&recipe)]);
        let weights = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
        assert!(weights(&out) == weights(&at("remade")), "{name}");
    }
    let channels = widths(&report(&at("two")), "channels");
    let lrc = &config(&at("two"))["lrc"];
    assert_eq!(channels.iter().any(|[before, after]| after < before), lrc.get("shapes").is_some());
    let whole = Checkpoint::open(FIXTURE.as_ref()).unwrap().file_bytes();
    let target = format!("{}B", whole * 7 / 10);
    let sized = compress(&at("sized"), &[&["--structure", "auto", "--target-size", &target], &CALIBRATED[..]].concat());
    let found = sized["size_bytes"].as_u64().unwrap();
    assert!(found <= whole * 7 / 10 && found > whole * 69 / 100, "{found} of {whole}");
}

#[test]
fn what_ranks_and_widths_do_not_have_together_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let check = |flags: &[&str], expected: &str| {
        let own = ["compress", FIXTURE, "-o", path(&out), "--keep", "0.7", "--structure", "auto"];
        let run = lrc(&[&own[..], flags].concat());
        assert!(run.code == 2 && run.stderr.contains(expected), "{flags:?}: {} {}", run.code, run.stderr);
        assert!(run.stderr.contains("hint: ") && !out.exists(), "{}", run.stderr);
    };
    check(&[], "cannot be weighed in the metric of `svd`");
    check(&["--calibration", TRAIN, "--method", "svd-llm"], "cannot be weighed in the metric of `svd-llm`");
    check(&["--calibration", TRAIN, "--quant", "nf4"], "`--quant` cannot be combined with `--structure auto`");
    check(&["--calibration", TRAIN, "--uniform-width"], "`--uniform-width` cannot be combined with");
    check(&["--calibration", TRAIN, "--format", "gguf"], "`--format gguf` cannot store low-rank factors");
}
