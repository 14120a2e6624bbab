//! `--dry-run` of narrower models: sizes without measuring, and widths that are kept for the run.

use std::path::Path;

use crate::common::{FIXTURE, TRAIN, ok, path};
use serde_json::Value;

use super::widths;

const CALIBRATED: [&str; 6] = ["--calibration", TRAIN, "--samples", "16", "--seq-len", "128"];

fn arguments<'a>(out: &'a Path, flags: &[&'a str]) -> Vec<&'a str> {
    let own = ["compress", FIXTURE, "-o", path(out), "-q", "--json"];
    [&own[..], &CALIBRATED, flags].concat()
}

fn number(report: &Value, field: &str) -> f64 {
    report[field].as_f64().unwrap_or_else(|| panic!("{field}: {report}"))
}

#[test]
fn a_plan_spreads_the_budget_evenly_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for (flags, keep, least) in [
        (&["--structure", "narrow", "--keep", "0.75", "--width-multiple", "16"][..], 0.75, 0.72),
        (&["--structure", "narrow", "--keep", "0.75", "--uniform-width=false", "--width-multiple", "16"], 0.75, 0.74),
        (&["--structure", "depth", "--keep", "0.5"], 0.5, 0.499),
        (&["--structure", "narrow,depth", "--keep", "0.6", "--width-multiple", "16"], 0.6, 0.57),
        (&["--structure", "auto", "--keep", "0.6"], 0.6, 0.59),
        (&["--structure", "narrow", "--keep", "0.75", "--quant", "q8_0", "--format", "gguf"], 0.75, 0.65),
    ] {
        let plan = ok(&[&arguments(&out, flags)[..], &["--dry-run"]].concat()).json();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let found = number(&plan["sizes"], "keep");
        assert!(found <= keep && found >= least, "{flags:?}: {found}");
        assert_eq!(plan["ranks"], "even", "{flags:?}");
        for field in ["expected_memory_bytes", "expected_disk_bytes", "expected_seconds"] {
            assert!(number(&plan, field) > 0.0, "{flags:?}: {field}");
        }
        let units = plan["narrow"]["blocks"].as_array().unwrap();
        assert!(units.iter().all(|unit| unit["squared_error"].is_null() && unit["relative_error"].is_null()));
    }
    let narrow = ["--structure", "narrow", "--keep", "0.75", "--width-multiple", "16", "--dry-run"];
    let flags: Vec<&str> = arguments(&out, &narrow).into_iter().filter(|flag| *flag != "--json").collect();
    let shown = ok(&flags).stdout;
    for line in
        ["channels in each of 4 blocks: ", "widths: the budget spread evenly; `--dry-run=full`", "expected disk: "]
    {
        assert!(shown.contains(line), "{shown}");
    }
}

#[test]
fn a_target_size_is_met_by_the_plan_too() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let flags = ["--structure", "narrow", "--target-size", "1200kB", "--width-multiple", "8", "--dry-run"];
    let plan = ok(&arguments(&out, &flags)).json();
    let bytes = number(&plan, "size_bytes");
    assert!(bytes <= 1_200_000.0 && bytes > 1_150_000.0, "{bytes}");
}

#[test]
fn a_full_dry_run_has_the_widths_and_sizes_of_the_run_that_resumes_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let (out, other) = (folder.path().join("out"), folder.path().join("other"));
    for flags in [
        &["--structure", "narrow", "--keep", "0.75", "--width-multiple", "16"][..],
        &["--structure", "narrow", "--keep", "0.75", "--width-multiple", "16", "--elastic"],
        &["--structure", "narrow,depth", "--keep", "0.5", "--width-multiple", "16"],
        &["--structure", "auto", "--keep", "0.5", "--width-multiple", "16"],
        &["--structure", "narrow", "--keep", "0.75", "--quant", "gptq-int4-g32", "--format", "compressed-tensors"],
    ] {
        let arguments = |out| arguments(out, flags);
        let full = ok(&[&arguments(&out)[..], &["--dry-run=full"]].concat()).json();
        assert_eq!(full["kept_in"], path(&folder.path().join("out.partial")));
        assert_eq!(full["ranks"], "exact");
        let done = ok(&arguments(&out)).json();
        let whole = ok(&arguments(&other)).json();
        assert_eq!((&full["sizes"], &full["passed_through"]), (&done["sizes"], &done["passed_through"]), "{flags:?}");
        for kind in ["channels", "groups"] {
            assert_eq!(widths(&full, kind), widths(&done, kind), "{flags:?}");
        }
        assert_eq!(full["narrow"].get("dropped"), done["narrow"].get("dropped"));
        for file in ["model.safetensors", "lrc-curves.arrays"] {
            assert_eq!(done["output_files"].get(file), whole["output_files"].get(file), "{flags:?}: {file}");
        }
        let keeps_curves = flags.contains(&"--elastic") || flags.contains(&"auto");
        assert_eq!(done["output_files"].get("lrc-curves.arrays").is_some(), keeps_curves, "{flags:?}");
        let measuring = |report: &Value| -> f64 {
            ["calibrate_forward", "calibrate_backward", "decompose"]
                .map(|at| number(&report["timings"], at))
                .iter()
                .sum()
        };
        assert!(measuring(&done) < 0.5 * measuring(&whole), "{flags:?}: {} {}", done["timings"], whole["timings"]);
        [&out, &other].iter().for_each(|out| std::fs::remove_dir_all(out).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
