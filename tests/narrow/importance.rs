//! `lrc inspect --importance`: the errors by which widths and blocks are chosen.

use std::path::Path;

use crate::common::{FIXTURE, TRAIN, command, finish, lrc, ok, path};
use crate::families::tokenizer;
use serde_json::Value;

use super::{Model, report};

const CALIBRATED: [&str; 6] = ["--calibration", TRAIN, "--samples", "16", "--seq-len", "128"];

fn inspect(flags: &[&str]) -> Value {
    let run = ok(&[&["inspect", FIXTURE, "--json", "--importance", "-q"], flags].concat());
    serde_json::from_str::<Value>(&run.stdout).unwrap()["importance"].take()
}

fn errors<'v>(importance: &'v Value, kind: &str) -> impl Iterator<Item = (usize, &'v Value, f64)> {
    let parts = importance[kind].as_array().unwrap().iter();
    parts.map(|part| (part["block"].as_u64().unwrap() as usize, part, part["squared_error"].as_f64().unwrap()))
}

fn is_close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs())
}

/// The units of a run that makes one kind of them narrower.
fn narrowed(out: &Path, targets: &str, flags: &[&str]) -> Vec<Value> {
    let own = ["compress", FIXTURE, "-o", path(out), "-q", "--force", "--structure", "narrow", "--targets", targets];
    ok(&[&own[..], &CALIBRATED, flags].concat());
    report(out)["narrow"]["blocks"].as_array().unwrap().clone()
}

#[test]
fn the_errors_are_those_of_narrower_and_shallower_models() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let importance = inspect(&CALIBRATED);
    assert_eq!(importance.get("notes"), None);
    let half = narrowed(&out, "*.mlp.*", &["--keep", "0.5", "--width-multiple", "1"]);
    let groups = narrowed(&out, "*.self_attn.*", &["--keep", "0.67"]);
    let number = |unit: &Value, field: &str| unit[field].as_f64().unwrap();
    for (channels, groups) in half.iter().zip(&groups) {
        let block = channels["block"].as_u64().unwrap() as usize;
        let of_block = |kind| errors(&importance, kind).filter(move |(own, ..)| *own == block);
        // The half that goes, and the one of three groups that goes.
        assert_eq!([&channels["before"], &channels["after"]], [256, 128]);
        assert_eq!([&groups["before"], &groups["after"]], [3, 2]);
        let (_, part, found) = of_block("channels").find(|(_, part, _)| part["share"] == 0.5).unwrap();
        assert!(is_close(found, number(channels, "squared_error")) && part["dropped"] == 128, "{part} {channels}");
        assert_eq!(part["parameters"], 128 * 3 * 96);
        let least = of_block("groups").map(|(.., error)| error).fold(f64::INFINITY, f64::min);
        assert!(is_close(least, number(groups, "squared_error")), "{least} {groups}");
        // All channels and all groups are the block.
        let all = |unit| number(unit, "squared_error") / number(unit, "relative_error").powi(2);
        let (_, part, found) = of_block("blocks").next().unwrap();
        assert!(is_close(found, all(channels) + all(groups)), "{part} {channels} {groups}");
        assert_eq!(part["parameters"], 3 * 256 * 96 + 2 * 96 * 96 + 2 * 48 * 96);
    }
    let mut by_error: Vec<(usize, f64)> =
        errors(&importance, "blocks").map(|(block, _, error)| (block, error)).collect();
    by_error.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    let mut expected: Vec<usize> = by_error[..2].iter().map(|(block, _)| *block).collect();
    expected.sort_unstable();
    let own = ["compress", FIXTURE, "-o", path(&out), "-q", "--force", "--structure", "depth", "--keep", "0.5"];
    ok(&[&own[..], &CALIBRATED].concat());
    assert_eq!(report(&out)["narrow"]["dropped"], serde_json::to_value(expected).unwrap());
}

#[test]
fn errors_are_the_same_from_a_file_of_statistics_and_at_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let stats = folder.path().join("stats.safetensors");
    ok(&["calibrate", FIXTURE, "--text", TRAIN, "-o", path(&stats), "--samples", "16", "--seq-len", "128"]);
    let from_file = inspect(&["--statistics", path(&stats)]);
    let run = |threads: &str| {
        let own = ["inspect", FIXTURE, "--json", "--importance", "-q"];
        let mut command = command(&[&own[..], &CALIBRATED].concat());
        let run = finish(command.env("RAYON_NUM_THREADS", threads));
        serde_json::from_str::<Value>(&run.stdout).unwrap()["importance"].take()
    };
    assert!(run("1") == from_file && run("3") == from_file);
    // Errors in the metric of another method are others.
    assert!(inspect(&["--statistics", path(&stats), "--method", "svd-llm"]) != from_file);
}

#[test]
fn maps_are_in_the_table_and_in_the_page() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let flags = ["inspect", FIXTURE, "--importance", "-q", "--html", path(&page)];
    let (table, page) = (ok(&[&flags[..], &CALIBRATED].concat()).stdout, page);
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("<h2>Importance</h2>"));
    for part in ["without a block", "without a group of heads", "without a share of the channels", "group 1", "25 %"] {
        assert!(table.contains(part) && page.contains(part), "{part}: {table}");
    }
    let without = ok(&[&["inspect", FIXTURE, "-q"], &CALIBRATED[..]].concat()).stdout;
    assert!(!without.contains("without a block"));
}

#[test]
fn parts_that_stay_are_named_and_other_flags_refused() {
    let mixture = Model::pico("mixtral", &tokenizer("mixtral"));
    let text = ["--calibration", path(&mixture.text), "--samples", "4", "--seq-len", "24"];
    let run = ok(&[&["inspect", path(&mixture.model), "--importance", "--json", "-q"], &text[..]].concat());
    let importance = &serde_json::from_str::<Value>(&run.stdout).unwrap()["importance"];
    assert!(importance["groups"].as_array().is_some_and(|groups| !groups.is_empty()), "{importance}");
    assert_eq!([&importance["blocks"], &importance["channels"]], [&Value::Array(Vec::new()); 2]);
    let notes = importance["notes"].to_string();
    assert!(notes.contains("blocks with experts stay"), "{notes}");
    assert_eq!(importance["experts"].as_array().map(Vec::len), Some(2 * 4), "{importance}");
    for (flags, expected) in [
        (&["--importance"][..], "`--importance` needs a calibration metric"),
        (&["--importance", "--csv", "--calibration", TRAIN], "cannot be combined with"),
        (&["--fail-if", "importance.blocks.squared_error > 1"], "this run does not measure"),
    ] {
        let run = lrc(&[&["inspect", FIXTURE], flags].concat());
        assert!(run.code == 2 && run.stderr.contains(expected), "{flags:?}: {} {}", run.code, run.stderr);
    }
    let gated = ["inspect", FIXTURE, "-q", "--importance", "--fail-if", "importance.blocks.squared_error > 0"];
    assert_eq!(lrc(&[&gated[..], &CALIBRATED].concat()).code, 3);
}
