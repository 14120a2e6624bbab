//! Compressed sources: by this version, by a later one, by other tools.

use std::path::{Path, PathBuf};

use crate::common::{FIXTURE, HELD_OUT, TRAIN, lrc, ok, path};
use lrc::checkpoint::Checkpoint;

use super::Broken;

#[test]
fn a_compressed_model_is_not_compressed_again() {
    let broken = Broken { folder: tempfile::tempdir().unwrap() };
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    ok(&["compress", FIXTURE, "-o", path(&model), "-q", "--keep", "0.8"]);
    broken.check_one(
        &["compress", path(&model), "-o", path(&out), "--keep", "0.5"],
        4,
        &["is already of low rank", "hint:"],
    );
    let spectra = ["inspect", path(&model), "--calibration", TRAIN];
    broken.check_one(
        &spectra,
        4,
        &["is compressed: the metric", "hint: leave out `--calibration`", "lrc export MODEL"],
    );
}

#[test]
fn outputs_of_a_later_version_are_refused_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let [out, next] = ["out", "next"].map(|name| folder.path().join(name));
    let coded = folder.path().join("coded");
    ok(&["compress", FIXTURE, "-o", path(&out), "-q", "--keep", "0.8"]);
    ok(&["compress", FIXTURE, "-o", path(&coded), "-q", "--quant", "rtn-int4-g32"]);
    const DOWN: &str = "model.layers.0.mlp.down_proj";
    type Change<'a> = &'a dyn Fn(&mut serde_json::Value);
    let newer = "hint: a newer lrc wrote it: update lrc";
    let changed = "hint: the output was changed";
    let changes: [(&PathBuf, Change<'_>, &str, &str); 6] = [
        (&out, &|lrc| lrc["version"] = 2.into(), "`lrc.version` in", newer),
        (&coded, &|lrc| lrc["version"] = 2.into(), "is 2, but this version supports only 1", newer),
        (&out, &|lrc| lrc["version"] = "1".into(), "`lrc.version` in", changed),
        (&out, &|lrc| drop(lrc.as_object_mut().unwrap().remove("version")), "`lrc.version` in", changed),
        (&out, &|lrc| lrc["modules"][DOWN]["layout"] = "tucker".into(), "supports only `factors`, `pivot`", newer),
        (
            &out,
            &|lrc| lrc["modules"][DOWN]["layout"] = "factors".into(),
            "its tensors are laid out as `pivot`",
            changed,
        ),
    ];
    for (model, change, expected, hint) in changes {
        let config = model.join("config.json");
        let whole = std::fs::read(&config).unwrap();
        let mut fields: serde_json::Value = serde_json::from_slice(&whole).unwrap();
        change(&mut fields["lrc"]);
        std::fs::write(&config, fields.to_string()).unwrap();
        for args in [
            &["inspect", path(model)][..],
            &["eval", path(model), "--text", HELD_OUT],
            &["eval", FIXTURE, "--reference", path(model), "--text", HELD_OUT],
            &["compress", path(model), "-o", path(&next), "--keep", "0.5"],
            &["truncate", path(model), "-o", path(&next), "--keep", "0.5"],
            &["export", path(model), "-o", path(&next), "--format", "dense"],
        ] {
            let run = lrc(args);
            assert_eq!(run.code, 4, "{args:?}: {}", run.stderr);
            for part in ["config.json", expected, hint] {
                assert!(run.stderr.contains(part), "{args:?}: `{part}` is not in {}", run.stderr);
            }
            assert!(!next.exists() && !folder.path().join("next.partial").exists());
        }
        std::fs::write(config, whole).unwrap();
    }
    // The report, which `truncate` reads.
    let report = out.join("lrc-report.json");
    let mut fields: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    fields["schema_version"] = 99.into();
    std::fs::write(&report, fields.to_string()).unwrap();
    let run = lrc(&["truncate", path(&out), "-o", path(&next), "--keep", "0.5"]);
    assert!(
        run.code == 4 && run.stderr.contains("`schema_version` in") && run.stderr.contains(newer),
        "{}",
        run.stderr
    );
}

/// Moves the settings of a quantized output from its config to the file that other tools use.
fn move_settings(model: &Path, file: &str, change: impl Fn(&mut serde_json::Value)) {
    let path = model.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut settings = config.as_object_mut().unwrap().shift_remove("quantization_config").unwrap();
    settings.as_object_mut().unwrap().shift_remove("quant_method");
    change(&mut settings);
    std::fs::write(path, config.to_string()).unwrap();
    std::fs::write(model.join(file), settings.to_string()).unwrap();
}

#[test]
fn settings_of_a_quantizer_are_found_where_other_tools_have_them() {
    let quantized = || {
        let broken = Broken { folder: tempfile::tempdir().unwrap() };
        ok(&["compress", FIXTURE, "-o", path(&broken.model()), "-q", "--quant", "rtn-int4-g32", "--format", "gptq"]);
        broken
    };
    // GPTQ as AutoGPTQ writes it is read like our own.
    let broken = quantized();
    let (model, out) = (broken.model(), broken.folder.path().join("out"));
    let eval = ["eval", path(&model), "--text", HELD_OUT, "--max-windows", "4", "--json"];
    let expected = ok(&eval).json()["ppl"].clone();
    move_settings(&model, "quantize_config.json", |_| {});
    assert_eq!(ok(&eval).json()["ppl"], expected);
    ok(&["export", path(&model), "--format", "dense", "-o", path(&out), "-q"]);
    let dense = Checkpoint::open(&out).unwrap();
    assert!(dense.tensors().all(|info| !info.name.ends_with(".qweight") && info.storage().is_none()));
    assert!(!out.join("quantize_config.json").exists(), "settings of codes that are not there any more");
    let eval = ["eval", path(&out), "--text", HELD_OUT, "--max-windows", "4", "--json"];
    assert_eq!(ok(&eval).json()["ppl"], expected);

    let check = |file: &str, change: &dyn Fn(&mut serde_json::Value), parts: &[&str]| {
        let broken = quantized();
        move_settings(&broken.model(), file, change);
        broken.check(4, parts);
        let out = broken.folder.path().join("out");
        broken.check_one(&["export", path(&broken.model()), "--format", "dense", "-o", path(&out)], 4, parts);
    };
    check("quantize_config.json", &|settings| settings["bits"] = 5.into(), &["quantized by gptq, 5 bits", "hint:"]);
    check("quant_config.json", &|_| {}, &["qweight` in", "cannot be decoded", "hint:"]);
    check("hf_quant_config.json", &|_| {}, &["quantized by modelopt", "hint:"]);
    check("elsewhere.json", &|_| {}, &[".qweight`", "packed by a quantizer", "hint: get `quantize_config.json`"]);
}

#[test]
fn reports_of_other_commands_are_not_taken_for_that_of_a_compression() {
    let folder = tempfile::tempdir().unwrap();
    let [out, exported, next] = ["out", "exported", "next"].map(|name| folder.path().join(name));
    ok(&["compress", FIXTURE, "-o", path(&out), "-q", "--keep", "0.8"]);
    ok(&["export", path(&out), "-o", path(&exported), "--format", "dense", "-q"]);
    for args in [
        &["heal", path(&exported), "--teacher", FIXTURE, "--text", TRAIN, "-o", path(&next)][..],
        &["truncate", path(&exported), "-o", path(&next), "--keep", "0.5"],
    ] {
        let run = lrc(args);
        assert_eq!(run.code, 4, "{args:?}: {}", run.stderr);
        for part in ["lrc-report.json", "it is the report of `lrc export`: take the folder that was exported", "hint:"]
        {
            assert!(run.stderr.contains(part), "{args:?}: `{part}` is not in {}", run.stderr);
        }
        assert!(!next.exists());
    }
}
