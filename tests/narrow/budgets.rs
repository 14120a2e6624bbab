//! Budgets are met from below, by the widths that err least.

use crate::common::{FIXTURE, HELD_OUT, TRAIN, lrc, ok, path, perplexity};
use lrc::checkpoint::Checkpoint;
use serde_json::Value;

use super::{config, report, widths};

const CALIBRATED: [&str; 6] = ["--calibration", TRAIN, "--samples", "16", "--seq-len", "128"];

fn narrow(out: &std::path::Path, flags: &[&str]) -> Value {
    let own = ["compress", FIXTURE, "-o", path(out), "-q", "--structure", "narrow", "--width-multiple", "16"];
    ok(&[&own[..], flags].concat());
    report(out)
}

#[test]
fn shares_and_sizes_are_met_from_below_and_text_helps() {
    let folder = tempfile::tempdir().unwrap();
    let dense = perplexity(FIXTURE, HELD_OUT, "128");
    let mut perplexities = vec![dense];
    for keep in ["0.9", "0.8", "0.6"] {
        let out = folder.path().join(keep);
        let report = narrow(&out, &[&["--keep", keep][..], &CALIBRATED].concat());
        let (found, most) = (report["sizes"]["keep"].as_f64().unwrap(), keep.parse::<f64>().unwrap());
        // A group of all blocks is a ninth of the linears, and 16 channels are 1/24.
        assert!(found <= most && found > most - 0.05, "{keep}: {found}");
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_eq!(report["sizes"]["bytes_after"], checkpoint.n_bytes());
        assert_eq!(report["sizes"]["parameters_after"], checkpoint.n_elements());
        let before = Checkpoint::open(FIXTURE.as_ref()).unwrap();
        assert_eq!(report["sizes"]["parameters_before"], before.n_elements());
        let [channels, groups] = ["channels", "groups"].map(|kind| widths(&report, kind));
        assert!(
            channels.len() == 4
                && channels.iter().all(|pair| *pair == channels[0])
                && channels[0][1].is_multiple_of(16)
        );
        assert_eq!(config(&out)["intermediate_size"], channels[0][1]);
        let heads = ["num_key_value_heads", "num_attention_heads", "head_dim"].map(|key| config(&out)[key].clone());
        assert_eq!(heads, [groups[0][1], 2 * groups[0][1], 16].map(Value::from));
        perplexities.push(perplexity(path(&out), HELD_OUT, "128"));
    }
    assert!(perplexities.windows(2).all(|pair| pair[0] < pair[1]), "{perplexities:?}");
    let blind = folder.path().join("blind");
    narrow(&blind, &["--keep", "0.8"]);
    assert!(perplexity(path(&blind), HELD_OUT, "128") > perplexities[2], "{perplexities:?}");

    let whole = Checkpoint::open(FIXTURE.as_ref()).unwrap().file_bytes();
    let out = folder.path().join("sized");
    let target = whole * 4 / 5;
    let report = narrow(&out, &[&["--target-size", &format!("{target}B")][..], &CALIBRATED].concat());
    let found = std::fs::metadata(out.join("model.safetensors")).unwrap().len();
    assert_eq!(report["size_bytes"], found);
    assert!(found <= target && found > target * 9 / 10, "{found} of {target}");
}

#[test]
fn greedy_orders_err_less_than_scores() {
    let folder = tempfile::tempdir().unwrap();
    let error = |selection: &str| {
        let flags = ["--keep", "0.6", "--targets", "*.mlp.*", "--selection", selection];
        let report = narrow(&folder.path().join(selection), &[&flags[..], &CALIBRATED].concat());
        let units = report["narrow"]["blocks"].as_array().unwrap();
        assert!(report["narrow"]["notes"][0].as_str().unwrap().contains("not all targeted"));
        units.iter().map(|unit| unit["relative_error"].as_f64().unwrap()).sum::<f64>()
    };
    let [backward, forward, leverage, wanda_sp, lorap] =
        ["backward", "forward", "leverage", "wanda-sp", "lorap"].map(error);
    assert!(
        [leverage, wanda_sp, lorap].iter().all(|score| backward < *score),
        "{backward} {leverage} {wanda_sp} {lorap}"
    );
    assert!(wanda_sp != lorap);
    assert!((backward / forward - 1.0).abs() < 0.2, "{backward} {forward}");
}

/// What a GGUF file cannot hold is refused before any work, though nothing of it is in codes.
#[test]
fn gguf_files_of_other_families_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let flags = ["--structure", "narrow", "--keep", "0.8", "--width-multiple", "4", "--format", "gguf"];
    let by_block = ["--uniform-width=false"];
    for (family, more, expected) in [
        ("opt", &[][..], "lrc has no table of GGUF names"),
        ("distilbert", &[], "lrc has no table of GGUF names"),
        ("phi3", &by_block, "llama.cpp reads one for all blocks in its family"),
        ("mistral", &by_block, "llama.cpp reads one for all blocks in its family"),
    ] {
        let source = format!("fixtures/pico/{family}");
        let run = lrc(&[&["compress", &source, "-o", path(&out)], &flags[..], more].concat());
        assert!(run.code == 4 && run.stderr.contains(expected), "{family}: {} {}", run.code, run.stderr);
        assert!(run.stderr.contains("hint: ") && !out.exists(), "{family}: {}", run.stderr);
    }
}

#[test]
fn what_has_no_meaning_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let check = |flags: &[&str], code: i32, expected: &str| {
        let run = lrc(&[&["compress", FIXTURE, "-o", path(&out)], flags].concat());
        assert!(run.code == code && run.stderr.contains(expected), "{flags:?}: {} {}", run.code, run.stderr);
        assert!(run.stderr.contains("hint: ") && !out.exists(), "{flags:?}: {}", run.stderr);
    };
    let narrow = |flags: &[&'static str]| [&["--structure", "narrow"], flags].concat();
    check(&narrow(&[]), 2, "`--keep` or `--target-size` is missing");
    check(&narrow(&["--keep", "0.01"]), 2, "`--keep 0.01` cannot be reached: the minimum is 0.2728");
    check(&narrow(&["--target-size", "1kB"]), 2, "cannot be reached: the minimum is ");
    check(
        &narrow(&["--keep", "0.8", "--ranks", "uniform"]),
        2,
        "`--ranks` cannot be combined with `--structure narrow`",
    );
    check(&narrow(&["--keep", "0.8", "--quant", "nf4,rtn-int8"]), 2, "takes one quantizer");
    check(&narrow(&["--keep", "0.8", "--format", "gptq"]), 2, "`--format gptq` needs a quantizer");
    check(&narrow(&["--keep", "0.01", "--dry-run"]), 2, "`--keep 0.01` cannot be reached: the minimum is 0.2728");
    check(&narrow(&["--keep", "0.8", "--targets", "*.up_proj", "--dry-run"]), 4, "nothing can become narrower");
    let gate = ["--keep", "0.8", "--dry-run", "--fail-if", "narrow.blocks.squared_error > 1"];
    check(&narrow(&gate), 2, "this run does not measure `narrow.blocks.squared_error`");
    check(&narrow(&["--keep", "0.8", "--width-multiple", "0"]), 2, "`--width-multiple` must be at least 1");
    check(&narrow(&["--keep", "0.8", "--targets", "*.up_proj"]), 4, "nothing can become narrower");
    check(
        &narrow(&["--keep", "0.8", "--uniform-width=false", "--format", "dense"]),
        2,
        "`--uniform-width=false` cannot be combined with `--format dense`",
    );
    check(&["--keep", "0.8", "--uniform-width"], 2, "`--uniform-width` has no effect without `--structure narrow`");
    check(&["--keep", "0.8", "--selection", "forward"], 2, "`--selection` has no effect without `--structure narrow`");
    check(&narrow(&["--keep", "0.8", "--method", "kfac"]), 2, "`--method kfac` needs `--calibration FILE`");
}
