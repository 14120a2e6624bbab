//! Runs that cannot succeed: wrong arguments, useless texts, a full disk, an output that another run writes.

use std::path::Path;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, copy, lrc, ok, path};
use lrc::checkpoint::{Checkpoint, Existing, OutputFolder};

use super::Broken;

#[test]
fn texts_that_cannot_be_used() {
    let broken = Broken::new();
    let model = broken.model();
    let text = broken.model().join("text.txt");
    let eval = |broken: &Broken, code, parts: &[&str]| {
        broken.check_one(&["eval", path(&model), "--text", path(&text)], code, parts)
    };
    eval(&broken, 2, &["text.txt", "hint: check the path"]);
    std::fs::write(&text, "").unwrap();
    eval(&broken, 4, &["is empty", "hint: give a file that holds text"]);
    std::fs::write(&text, [0xff, 0xfe]).unwrap();
    eval(&broken, 4, &["not UTF-8"]);
    std::fs::write(&text, "Too short.").unwrap();
    eval(&broken, 4, &["tokens, but a window needs 128", "hint: give a longer text"]);
    std::fs::write(&text, "a").unwrap();
    let args = ["eval", path(&model), "--text", path(&text), "--bos", "never"];
    broken.check_one(&args, 4, &[" 1 token, but a window needs 128"]);
    std::fs::write(model.join("tokenizer.json"), "{\"model\": 3}").unwrap();
    eval(&broken, 4, &["tokenizer.json` is not a usable tokenizer", "hint: get it again"]);
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    eval(&broken, 4, &["tokenizer.json` is missing"]);
}

#[test]
fn usage_errors_come_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let recipe = folder.path().join("recipe.toml");
    std::fs::write(&recipe, "kepe = 0.8").unwrap();
    let compress = ["compress", FIXTURE, "-o", path(&out)];
    for (extra, expected) in [
        (&[][..], "`--keep`, `--target-size` or `--bits` is missing"),
        (&["--keep", "1.5"], "outside (0, 1]"),
        (&["--keep", "0.8", "--method", "svd-llm"], "needs `--calibration FILE`"),
        (&["--keep", "0.8", "--ranks", "best"], "welore"),
        (&["--keep", "0.8", "--targets", "*.qproj"], "matches no linear"),
        (&["--keep", "0.8", "--exclude", "*"], "`--exclude` leaves no linear to compress"),
        (&["--keep", "0.8", "--share", "--ranks", "uniform"], "hint: add `--ranks knapsack`"),
        (&["--recipe", path(&recipe)], "kepe"),
        (&["--keep", "0.8", "--recipe", "no-such-file.toml"], "no-such-file.toml"),
        (&["--keep", "0.8", "--calibration", "no-such-file.txt"], "no-such-file.txt"),
        (&["--keep", "0.8", "--calibration", TRAIN, "--seq-len", "1"], "`--seq-len 1` is too short"),
    ] {
        let run = lrc(&[&compress[..], extra].concat());
        assert_eq!(run.code, 2, "{extra:?}: {}", run.stderr);
        assert!(run.stderr.contains(expected), "{extra:?}: {}", run.stderr);
        assert!(!out.exists());
    }
    assert_eq!(lrc(&["eval", FIXTURE, "--text", HELD_OUT, "--seq-len", "1"]).code, 2);
    assert_eq!(lrc(&["compress"]).code, 2);
    assert_eq!(lrc(&["--help"]).code, 0);
}

/// Whatever is wrong with the line that was typed: the flag, the value, what is allowed, and a hint.
#[test]
fn errors_of_the_command_line_name_the_flag_and_what_it_takes() {
    let compress = ["compress", FIXTURE, "-o", "OUT"];
    let help = "hint: `lrc compress --help` explains `--";
    for (extra, expected, hint) in [
        (&["--target-size", "10XB"][..], "`--target-size 10XB`: expected a size, such as 350MiB", help),
        (&["--keep", "0.8", "--memory", "x"], "`--memory x`: expected a size", help),
        (&["--keep", "x"], "`--keep x`: expected a number", help),
        (&["--keep", "-0.5"], "`--keep -0.5` is outside (0, 1]", "hint: `--keep 0.8` keeps"),
        (&["--samples", "-3"], "`--samples -3`: expected a whole number, at least 0", help),
        (&["--samples"], "`--samples` needs a value", help),
        (&["--method", "foo"], "`--method foo` is not one of svd, fwsvd, asvd, svd-llm, kfac", help),
        (&["--method", "svd-ll"], "`--method svd-ll` is not one of svd", "hint: did you mean `svd-llm`?"),
        (&["--ranks", "foo"], "`--ranks foo` is not one of uniform", help),
        (&["--ranks", "fixed:0"], "fixed:RANK, with RANK at least 1", help),
        (&["--ranks", "energy:2"], "`--ranks energy:2` is not one of uniform", help),
        (&["--quant", "foo"], "`--quant foo` is not a quantizer: expected", help),
        (&["--kep", "0.8"], "there is no flag `--kep`", "hint: did you mean `--keep`?"),
        (&["--keep", "0.8", "--dry-run", "full"], "unexpected argument `full`", "hint: did you mean `--dry-run=full`?"),
        (&["--keep", "0.8", "--targets", "["], "is not a glob: unclosed character class", "as in `*.mlp.*`"),
        (&["--keep", "0.8", "--revision", "v2"], "`--revision v2` has no effect", "hint: only models of the hub"),
        (
            &["--keep", "0.8", "--dry-run", "--restart"],
            "`--restart` has no effect with `--dry-run`",
            "hint: remove it; `--dry-run=full --restart`",
        ),
        (
            &["--quant", "rtn-int4-g32", "--layout", "factors"],
            "`--layout factors` has no effect on quantized bases without factors",
            "hint: remove it, or add factors with `--compensate`",
        ),
        (
            &["--keep", "0.8", "--ranks", "uniform", "--rank-floor", "0.5"],
            "`--rank-floor` has no effect with `--ranks uniform`",
            "hint: remove it",
        ),
        (&["--keep", "0.8", "--rank-multiple", "0"], "`--rank-multiple` must be at least 1", "hint: remove it"),
        (&["--keep", "0.8", "--max-shard-size", "0"], "`--max-shard-size` is 0", "hint: remove it"),
        (&["--keep", "0.8", "--bits", "3"], "cannot be combined with", "hint: remove one of the two"),
        (&["--keep", "0.8", "--keep", "0.7"], "`--keep` is given twice", "hint: remove one of the two"),
    ] {
        let run = lrc(&[&compress[..], extra].concat());
        assert_eq!(run.code, 2, "{extra:?}: {}", run.stderr);
        assert!(run.stderr.starts_with("error: ") && run.stderr.contains(expected), "{extra:?}: {}", run.stderr);
        assert!(run.stderr.contains(hint) && run.stderr.lines().count() == 2, "{extra:?}: {}", run.stderr);
    }
}

#[test]
fn errors_of_any_command_have_one_form() {
    for (line, expected) in [
        (&["compress", FIXTURE][..], "error: `--output` is missing\nhint: usage: lrc compress "),
        (&["calibrate", "-o", "x"], "error: `--text`, `MODEL` are missing\nhint: usage: lrc calibrate "),
        (
            &["calibrate", FIXTURE, "--merge", "a", "b", "-o", "c"],
            "error: `MODEL` cannot be combined with `--merge`\nhint: remove one of the two",
        ),
        (&["calibrate", "--merge", "a", "b", "-o", "c", "--memory", "1GiB"], "`--merge` cannot be combined with"),
        (&["calibrate", "--merge", "a", "b", "-o", "c", "--device", "cpu"], "`--merge` cannot be combined with"),
        (&["calibrate", "--merge", "a", "b", "-o", "c", "--revision", "v2"], "`--merge` cannot be combined with"),
        (
            &["truncate", FIXTURE, "-o", "x", "--keep", "0.5", "--max-shard-size", "0"],
            "error: `--max-shard-size` is 0\nhint: remove it",
        ),
        (
            &["export", FIXTURE, "-o", "x", "--format", "dense", "--max-shard-size", "0"],
            "error: `--max-shard-size` is 0\nhint: remove it",
        ),
        (&["compres"], "error: there is no command `compres`\nhint: did you mean `compress`?\n"),
        (
            &["eval", FIXTURE, "--text", TRAIN, "--max-windows", "0"],
            "`--max-windows 0`: expected a whole number, at least 1",
        ),
    ] {
        let run = lrc(line);
        assert!(run.code == 2 && run.stderr.contains(expected), "{line:?}: {}", run.stderr);
    }
    let run = lrc(&["compress", FIXTURE, "-o", "OUT", "--log-format", "json", "--target-size", "10XB"]);
    let line: serde_json::Value = serde_json::from_str(&run.stderr).unwrap();
    assert!(line["exit_code"] == 2 && line["hint"].as_str().unwrap().contains("--target-size"), "{line}");
}

#[test]
fn errors_of_a_recipe_name_its_line_and_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.toml");
    for (text, expected) in [
        (
            "seed = 1\nkeep = \"a\"",
            "line 2: `keep = \"a\"`: expected a number\nhint: `lrc compress --help` explains `--keep`",
        ),
        ("keep = 0.8\nkep = 0.8", "line 2: there is no option `kep`\nhint: the keys are the long flags"),
        ("keep = ", "line 1: "),
        ("keep = 2", "/recipe.toml`: `--keep 2` is outside (0, 1]\nhint: "),
    ] {
        std::fs::write(&recipe, text).unwrap();
        let run = lrc(&["compress", FIXTURE, "-o", path(&folder.path().join("out")), "--recipe", path(&recipe)]);
        assert_eq!(run.code, 2, "{}", run.stderr);
        assert!(run.stderr.contains(expected) && run.stderr.lines().count() == 2, "{}", run.stderr);
    }
    std::fs::write(&recipe, [0xff, 0xfe]).unwrap();
    for (file, expected) in [
        (path(&recipe), "/recipe.toml` is not UTF-8\nhint: save it as UTF-8"),
        (
            "no-such.toml",
            "error: cannot read recipe `no-such.toml`: No such file or directory (os error 2)\nhint: check",
        ),
    ] {
        let run = lrc(&["compress", FIXTURE, "-o", path(&folder.path().join("out")), "--recipe", file]);
        assert!(run.code == 2 && run.stderr.contains(expected), "{}", run.stderr);
    }
}

#[test]
fn a_dry_run_refuses_what_the_run_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    // A head has no calibration statistics.
    let model = folder.path().join("model");
    copy("fixtures/pico-llama", &model);
    std::fs::copy(Path::new(FIXTURE).join("tokenizer.json"), model.join("tokenizer.json")).unwrap();
    let args =
        ["compress", path(&model), "-o", path(&out), "--keep", "0.8", "--targets", "*lm_head", "--calibration", TRAIN];
    for extra in [&[][..], &["--dry-run"]] {
        let run = lrc(&[&args[..], extra].concat());
        assert_eq!(run.code, 4, "{}", run.stderr);
        assert!(run.stderr.contains("`lm_head` is outside of the blocks"), "{}", run.stderr);
        assert!(!out.exists());
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_noticed_and_gone_on_from() {
    // /dev/full cannot be a folder, so a limit on the size of files simulates a disk that fills up.
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let script = format!(
        "ulimit -f 500; trap '' XFSZ; exec {} compress {FIXTURE} -o {} --keep 0.8 -q",
        env!("CARGO_BIN_EXE_lrc"),
        path(&out)
    );
    let output = std::process::Command::new("bash")
        .args(["-c", &script])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(6), "{stderr}");
    assert!(
        stderr.contains("error: stopped: ")
            && stderr.contains("cannot write `")
            && stderr.contains("model.safetensors"),
        "{stderr}"
    );
    assert!(stderr.contains("run the same command again to resume"), "{stderr}");
    assert!(!out.exists());
    ok(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "-q"]);
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["out"]);
}

#[test]
fn logits_that_overflow_are_an_error_and_not_a_number() {
    let broken = Broken::new();
    // Finite weights whose products overflow: the last norm times 1e38.
    let checkpoint = Checkpoint::open(&broken.model()).unwrap();
    let info = checkpoint.info("model.norm.weight").unwrap().clone();
    broken.edit_weights(|bytes| {
        for value in bytes[info.begin..info.end].chunks_exact_mut(4) {
            value.copy_from_slice(&3e38f32.to_le_bytes());
        }
    });
    let model = broken.model();
    broken.check_one(&["eval", path(&model), "--text", HELD_OUT], 5, &["logits are not finite"]);
}

#[test]
fn a_folder_under_construction_is_left_to_its_owner() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let owner = OutputFolder::create(&out, Existing::Refuse, "x").unwrap();
    let run = lrc(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8"]);
    assert_eq!(run.code, 6, "{}", run.stderr);
    assert!(run.stderr.contains("being written by another run"));
    assert!(owner.path().exists());
    drop(owner);
    ok(&["compress", FIXTURE, "-o", path(&out), "--keep", "0.8", "-q"]);
}
