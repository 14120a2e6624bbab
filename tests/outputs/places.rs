//! The places where outputs may be written, under all of their names.

use std::path::Path;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, command, copy, finish, lrc, ok, path, perplexity};

use super::{names, ok_in, refused, report};

#[test]
#[cfg(unix)]
fn an_output_that_cannot_be_is_refused_before_a_model_is_looked_for() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::os::unix::fs::symlink("nowhere", at("dead")).unwrap();
    std::fs::write(at("file"), "theirs").unwrap();
    std::fs::create_dir(at("foreign")).unwrap();
    std::fs::write(at("foreign/thesis.txt"), "all of it").unwrap();
    let commands: [&[&str]; 5] = [
        &["compress", "no/such/model", "--keep", "0.8", "--calibration", TRAIN],
        &["compress", "no/such/model", "--keep", "0.8", "--dry-run"],
        &["truncate", "no/such/model", "--keep", "0.8"],
        &["export", "no/such/model", "--format", "dense"],
        &["sweep", "no/such/model", "--text", HELD_OUT, "--keep", "0.8"],
    ];
    for command in commands {
        for (name, reason) in [
            ("dead", "it is a link that leads nowhere"),
            ("dead/", "it is a link that leads nowhere"),
            ("file", "it is not a folder"),
            ("foreign", "it exists, and is not an output of lrc"),
            ("foreign/.", "it exists, and is not an output of lrc"),
            ("no-such/..", "it does not name a folder"),
            ("no-such/../out", "there is no folder"),
        ] {
            for force in [&[][..], &["--force"]] {
                let out = format!("{}/{name}", path(folder.path()));
                let said =
                    refused(&[command, &["-o", &out], force].concat(), 2, &["cannot be the output", reason, "hint:"]);
                assert!(!said.contains("--force"), "{said}");
            }
        }
    }
    // Files, and the folder of the manual pages.
    for (flag, command) in [
        ("-o", &["calibrate", "no/such/model", "--text", TRAIN][..]),
        ("--spectra", &["inspect", "no/such/model"]),
        ("--html", &["inspect", "no/such/model"]),
    ] {
        for (name, reason) in [
            ("dead.safetensors", "it is a link that leads nowhere"),
            ("there.safetensors", "exists"),
            (
                "folder.safetensors",
                "it is a folder, and a file is to be written\nhint: choose another name for the file",
            ),
            ("slash.safetensors/", "it is a folder"),
            ("no-such/../x.safetensors", "there is no folder"),
            ("file/x.safetensors", "Not a directory"),
        ] {
            let _ = std::os::unix::fs::symlink("nowhere", at("dead.safetensors"));
            std::fs::write(at("there.safetensors"), "theirs").unwrap();
            std::fs::create_dir_all(at("folder.safetensors")).unwrap();
            refused(&[command, &[flag, &format!("{}/{name}", path(folder.path()))]].concat(), 2, &[reason, "hint:"]);
        }
    }
    for name in ["dead", "file"] {
        refused(&["man", "-o", path(&at(name))], 2, &["cannot be the output"]);
    }
    assert_eq!(std::fs::read(at("file")).unwrap(), b"theirs");
    assert_eq!(std::fs::read(at("there.safetensors")).unwrap(), b"theirs");
    assert!(at("foreign/thesis.txt").exists() && !at("nowhere").exists() && !at("no-such").exists());
}

#[test]
fn an_output_folder_has_many_names_and_may_be_there_if_it_is_empty() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    copy(FIXTURE, &here.join("model"));
    std::fs::create_dir(here.join("sub")).unwrap();
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join(HELD_OUT);
    ok_in(here, &["compress", "model", "-o", "compressed/", "-q", "--keep", "0.8", "--layout", "factors"]);
    let sweep = ["sweep", "model", "--text", path(&text), "--max-windows", "2", "--keep", "0.8"];
    let commands: [&[&str]; 4] = [
        &["compress", "model", "-q", "--keep", "0.9"],
        &["truncate", "compressed/", "-q", "--keep", "0.7"],
        &["export", "compressed/.", "-q", "--format", "dense"],
        &sweep,
    ];
    for command in commands {
        let mut seen = Vec::new();
        for (out, is_there) in [
            ("out", false),
            ("out/", false),
            ("out/.", false),
            ("./sub/../out//", false),
            ("out", true),
            ("out/", true),
        ] {
            if is_there {
                std::fs::create_dir(here.join("out")).unwrap();
            }
            ok_in(here, &[command, &["-o", out]].concat());
            // Over the existing output, under all of its names.
            ok_in(here, &[command, &["-o", out, "--force"]].concat());
            seen.push(names(&here.join("out")));
            assert!(seen[0].contains(&"lrc-report.json".to_string()));
            assert_eq!(seen.last(), seen.first(), "{command:?} {out}");
            assert_eq!(names(here), ["compressed", "model", "out", "sub"], "{command:?} {out}");
            std::fs::remove_dir_all(here.join("out")).unwrap();
        }
    }
    // From within the folder, which is not replaced by another one.
    ok_in(&here.join("sub"), &["compress", "../model", "-o", ".", "-q", "--keep", "0.9"]);
    assert!(perplexity(path(&here.join("sub")), HELD_OUT, "128") > 1.0);
    let again =
        finish(command(&["compress", "../model", "-o", ".", "-q", "--keep", "0.9"]).current_dir(here.join("sub")));
    assert!(again.code == 2 && again.stderr.contains("exists"), "{}", again.stderr);
}

#[test]
#[cfg(unix)]
fn a_folder_behind_a_link_is_filled_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (volume, out) = (folder.path().join("volume"), folder.path().join("out"));
    std::fs::create_dir(&volume).unwrap();
    std::os::unix::fs::symlink(&volume, &out).unwrap();
    for (keep, force) in [("0.9", &[][..]), ("0.5", &["--force"])] {
        ok(&[&["compress", FIXTURE, "-o", path(&out), "-q", "--keep", keep], force].concat());
        assert!(out.is_symlink() && report(&volume)["sizes"]["keep"].as_f64().unwrap() <= keep.parse().unwrap());
        assert_eq!(names(folder.path()), ["out", "volume"]);
        assert!(!volume.join(".lrc-partial").exists());
    }
}

#[test]
fn models_are_named_by_bare_files_from_their_own_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (model, here) = (folder.path().join("model"), folder.path().join("gguf"));
    copy(FIXTURE, &model);
    ok(&["export", FIXTURE, "--format", "gguf", "-q", "-o", path(&here)]);
    let text = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let (train, held_out) = (text(TRAIN), text(HELD_OUT));
    for (folder, file) in [(&model, "model.safetensors"), (&here, "model.gguf")] {
        ok_in(folder, &["eval", file, "--text", path(&held_out), "--max-windows", "2"]);
        ok_in(
            folder,
            &["inspect", file, "-q", "--html", "page.html", "--spectra", "../spectra.safetensors", "--force"],
        );
        ok_in(folder, &["calibrate", file, "-q", "--text", path(&train), "--samples", "2", "-o", "stats.safetensors"]);
        ok_in(folder, &["export", file, "-q", "--format", "dense", "-o", "dense"]);
        assert!(folder.join("dense/tokenizer.json").exists());
    }
    ok_in(&model, &["compress", "model.safetensors", "-q", "--keep", "0.8", "-o", "out"]);
    let sweep = ["sweep", "model.safetensors", "--keep", "0.8", "--text", path(&held_out), "--max-windows", "2"];
    ok_in(&model, &[&sweep[..], &["-o", "swept"]].concat());
    let out = model.join("out");
    ok_in(&out, &["truncate", "model.safetensors", "-q", "--keep", "0.7", "-o", "../shorter"]);
    for out in [out, model.join("shorter")] {
        // Neither other outputs in the folder of the source, nor the output itself.
        assert!(
            !names(&out).iter().any(|name| ["out", "out.partial", "dense"].contains(&name.as_str())),
            "{:?}",
            names(&out)
        );
        assert!(out.join("tokenizer.json").exists() && perplexity(path(&out), HELD_OUT, "128") > 1.0);
    }
    // Files beside a single file without a config do not belong to it.
    let alone = folder.path().join("downloads");
    std::fs::create_dir_all(alone.join("private")).unwrap();
    std::fs::write(alone.join("private/letter.txt"), "Dear").unwrap();
    std::fs::copy(model.join("model.safetensors"), alone.join("model.safetensors")).unwrap();
    ok_in(&alone, &["compress", "model.safetensors", "-q", "--keep", "0.8", "-o", "out"]);
    assert!(!alone.join("out/private").exists());
}

#[test]
fn a_device_is_no_file_to_replace() {
    let run = lrc(&["inspect", FIXTURE, "--html", "/dev/null", "--force"]);
    assert!(run.code == 2 && run.stderr.contains("it is a device or a pipe"), "{}", run.stderr);
}

#[test]
#[cfg(target_os = "linux")]
fn a_folder_that_takes_no_files_is_refused_before_a_model_is_looked_for() {
    // Nobody can write there, not even root.
    for out in ["/proc/x", "/proc/x.safetensors"] {
        let commands: [&[&str]; 6] = [
            &["compress", "no/such/model", "--keep", "0.8"],
            &["truncate", "no/such/model", "--keep", "0.8"],
            &["export", "no/such/model", "--format", "dense"],
            &["sweep", "no/such/model", "--text", HELD_OUT, "--keep", "0.8"],
            &["calibrate", "no/such/model", "--text", TRAIN],
            &["man"],
        ];
        for command in commands.iter().filter(|command| command[0] != "calibrate" || out.ends_with(".safetensors")) {
            let parts = ["`/proc/x", "nothing can be written to `/proc`", "hint: choose a folder that takes files"];
            refused(&[command, &["-o", out][..]].concat(), 2, &parts);
        }
    }
}

/// An output inside of another keeps that one from being replaced, and is named; none is lost.
#[test]
fn an_output_within_another_is_safe_from_its_replacement() {
    let folder = tempfile::tempdir().unwrap();
    let (out, within) = (folder.path().join("out"), folder.path().join("out/within"));
    for out in [&out, &within] {
        ok(&["compress", FIXTURE, "-o", path(out), "-q", "--keep", "0.9"]);
    }
    refused(&["compress", FIXTURE, "-o", path(&out), "-q", "--keep", "0.8", "--force"], 2, &["within", "hint:"]);
    for out in [&out, &within] {
        assert!(perplexity(path(out), HELD_OUT, "128") > 1.0);
    }
}

#[test]
fn missing_folders_are_made_for_files_and_for_folders() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let [statistics, html, spectra, out, swept] =
        ["a/b/stats.safetensors", "c/d/page.html", "e/f/spectra.safetensors", "g/h/out", "i/j/out"].map(at);
    let [window, few] = [["--samples", "2", "--seq-len", "16"], ["--keep", "0.9", "--max-windows", "2"]];
    ok(&[&["calibrate", FIXTURE, "-q", "--text", TRAIN, "-o", path(&statistics)][..], &window].concat());
    ok(&["inspect", FIXTURE, "-q", "--html", path(&html), "--spectra", path(&spectra)]);
    ok(&["compress", FIXTURE, "-q", "--keep", "0.9", "-o", path(&out)]);
    ok(&[&["sweep", FIXTURE, "-q", "--text", HELD_OUT, "-o", path(&swept)][..], &few].concat());
    assert!([statistics, html, spectra, out, swept].iter().all(|path| path.exists()));
}
