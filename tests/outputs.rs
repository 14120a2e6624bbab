//! Where outputs go and where not, what comes along, and that nothing is lost.

use std::path::Path;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, command, copy, finish, lrc, ok, path, perplexity};
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
            ("folder.safetensors", "it is a folder"),
            ("slash.safetensors/", "it is a folder"),
            ("no-such-folder/x.safetensors", "there is no folder"),
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
#[cfg(unix)]
fn no_output_replaces_what_is_read_whatever_is_forced() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.safetensors"));
    copy(FIXTURE, &model);
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(TRAIN), &text).unwrap();
    let link = folder.path().join("link.safetensors");
    std::os::unix::fs::symlink(model.join("model.safetensors"), &link).unwrap();
    let weights = model.join("model.safetensors");
    let before: Vec<_> = [&weights, &text].iter().map(|file| std::fs::read(file).unwrap()).collect();
    let config = model.join("config.json");
    for (file, command) in [
        (&weights, &["inspect", path(&model), "--spectra"][..]),
        (&link, &["inspect", path(&model), "--spectra"]),
        (&config, &["inspect", path(&model), "--html"]),
        (&text, &["inspect", path(&model), "--calibration", path(&text), "--html"]),
        (&weights, &["calibrate", path(&model), "--text", TRAIN, "-o"]),
        (&text, &["calibrate", path(&model), "--text", path(&text), "-o"]),
    ] {
        refused(&[command, &[path(file), "--force"]].concat(), 2, &["is read by the same command"]);
    }
    // A folder that holds what is read, such as a text that came along from the source.
    copy(HELD_OUT.rsplit_once('/').unwrap().0, &model.join("texts"));
    let out = folder.path().join("out");
    ok(&["compress", path(&model), "-o", path(&out), "-q", "--keep", "0.8"]);
    let held_out = out.join("texts/held-out.txt");
    for command in [
        &["truncate", path(&out), "--keep", "0.7"][..],
        &["export", path(&out), "--format", "dense"],
        &["compress", FIXTURE, "--keep", "0.8", "--calibration", path(&held_out)],
        &["sweep", FIXTURE, "--keep", "0.8", "--text", path(&held_out)],
    ] {
        refused(&[command, &["-o", path(&out), "--force"]].concat(), 2, &["is read by the same command"]);
    }
    assert_eq!(before, [&weights, &text].iter().map(|file| std::fs::read(file).unwrap()).collect::<Vec<_>>());
    assert!(held_out.exists());
}

#[test]
fn files_of_inspect_are_replaced_on_request_only() {
    let folder = tempfile::tempdir().unwrap();
    let (html, spectra) = (folder.path().join("a.html"), folder.path().join("b.safetensors"));
    let args = ["inspect", FIXTURE, "-q", "--html", path(&html), "--spectra", path(&spectra)];
    ok(&args);
    let before = std::fs::read(&html).unwrap();
    std::fs::write(&html, "mine").unwrap();
    refused(&args, 2, &["a.html` exists", "hint: choose another name, or replace the file with `--force`"]);
    assert_eq!(std::fs::read(&html).unwrap(), b"mine");
    ok(&[&args[..], &["--force"]].concat());
    assert_eq!(std::fs::read(&html).unwrap(), before);
    refused(&["inspect", FIXTURE, "--html", "x", "--spectra", "x"], 2, &["name the same file"]);
}

#[test]
#[cfg(unix)]
fn links_in_a_work_folder_are_not_followed() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let (victim, out) = (folder.path().join("victim"), folder.path().join("out"));
    let work = folder.path().join("out.partial");
    std::fs::write(&victim, "precious").unwrap();
    let place = |name: &str, to: &Path| {
        let link = work.join(name);
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(to, link).unwrap();
    };
    for name in ["lock", "output/model.safetensors", "output/config.json", "job.json", "pieces/a", "scratch"] {
        for arguments in [&["compress", FIXTURE, "--keep", "0.8"][..], &["export", FIXTURE, "--format", "dense"]] {
            place(name, &victim);
            refused(&[arguments, &["-o", path(&out)]].concat(), 2, &[name, "is neither a file nor a folder", "hint:"]);
            assert_eq!(std::fs::read(&victim).unwrap(), b"precious", "{name}");
            std::fs::remove_dir_all(&work).unwrap();
        }
    }
    let elsewhere = folder.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, &work).unwrap();
    refused(&["compress", FIXTURE, "--keep", "0.8", "-o", path(&out)], 2, &["out.partial", "is neither"]);
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
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
            // Over what is there now, under all names.
            ok_in(here, &[command, &["-o", out, "--force"]].concat());
            seen.push(names(&here.join("out")));
            assert!(seen[0].contains(&"lrc-report.json".to_string()));
            assert_eq!(seen.last(), seen.first(), "{command:?} {out}");
            assert_eq!(names(here), ["compressed", "model", "out", "sub"], "{command:?} {out}");
            std::fs::remove_dir_all(here.join("out")).unwrap();
        }
    }
    // From within the folder, which stays the same one.
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
        // Not other outputs that lie in the folder of the source, and not themselves.
        assert!(
            !names(&out).iter().any(|name| ["out", "out.partial", "dense"].contains(&name.as_str())),
            "{:?}",
            names(&out)
        );
        assert!(out.join("tokenizer.json").exists() && perplexity(path(&out), HELD_OUT, "128") > 1.0);
    }
    // Beside a file without a config nothing belongs to it.
    let alone = folder.path().join("downloads");
    std::fs::create_dir_all(alone.join("private")).unwrap();
    std::fs::write(alone.join("private/letter.txt"), "Dear").unwrap();
    std::fs::copy(model.join("model.safetensors"), alone.join("model.safetensors")).unwrap();
    ok_in(&alone, &["compress", "model.safetensors", "-q", "--keep", "0.8", "-o", "out"]);
    assert!(!alone.join("out/private").exists());
}

#[test]
#[cfg(unix)]
fn everything_beside_the_weights_comes_along_or_is_named() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    // The cache of the hub: a snapshot is a folder of links into `blobs`.
    let (blobs, source) = (folder.path().join("blobs"), folder.path().join("snapshots/main"));
    std::fs::create_dir_all(&source).unwrap();
    copy(FIXTURE, &blobs);
    for name in names(&blobs) {
        symlink(Path::new("../../blobs").join(&name), source.join(name)).unwrap();
    }
    let write = |name: &str, text: &str| {
        let path = source.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("modules.json", r#"[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Normalize"}]"#);
    std::fs::write(blobs.join("pooling"), "{}").unwrap();
    std::fs::create_dir(source.join("1_Pooling")).unwrap();
    symlink("../../../blobs/pooling", source.join("1_Pooling/config.json")).unwrap();
    std::fs::create_dir(source.join("3_Normalize")).unwrap();
    let copied = [
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "assets/deep/a.txt",
        "LICENSE",
        "vocab.bin",
        "original/params.json",
        "original/config.json",
        "assets/coreml/weights/README.md",
        "onnx/tokenizer.json",
    ];
    copied.iter().for_each(|name| write(name, name));
    let left = [
        ("pytorch_model.bin", "weights in another format"),
        ("tf_model.h5", "weights in another format"),
        ("model-q4.gguf", "weights in another format"),
        ("consolidated.safetensors", "weights that this model is not made of"),
        ("onnx/model.onnx", "weights in another format"),
        ("openvino/openvino_model.bin", "weights in another format"),
        ("original/consolidated.safetensors", "weights that this model is not made of"),
        ("assets/coreml/weights/weight.bin", "weights in another format"),
        ("earlier/lrc-report.json", "another output of lrc"),
        ("optimizer.pt", "the state of a training"),
        (".gitattributes", "hidden"),
        (".git/config", "hidden"),
    ];
    left.iter().for_each(|(name, _)| write(name, "x"));
    let secret = folder.path().join("secret.txt");
    std::fs::write(&secret, "key").unwrap();
    symlink(&secret, source.join("notes.txt")).unwrap();
    symlink(folder.path(), source.join("up")).unwrap();
    symlink("..", source.join("assets/loop")).unwrap();
    symlink("nowhere", source.join("dead.txt")).unwrap();
    let links = [
        ("notes.txt", "a link out of the checkpoint"),
        ("up/", "a link out of the checkpoint"),
        ("assets/loop/", "a link to a folder that is there already"),
        ("dead.txt", "a link that leads nowhere"),
    ];

    let at = |name: &str| folder.path().join(name);
    let (compressed, shorter, dense) = (at("compressed"), at("shorter"), at("dense"));
    let table =
        ok(&["compress", path(&source), "-o", path(&compressed), "--keep", "0.8", "--layout", "factors"]).stdout;
    assert!(
        table.contains(
            "left out (weights in another format): assets/coreml/weights/weight.bin, model-q4.gguf, onnx/model.onnx, \
             openvino/openvino_model.bin, pytorch_model.bin, tf_model.h5"
        ),
        "{table}"
    );
    ok(&["truncate", path(&compressed), "-o", path(&shorter), "-q", "--keep", "0.7"]);
    ok(&["export", path(&source), "-o", path(&dense), "-q", "--format", "dense"]);
    for out in [&compressed, &shorter, &dense] {
        for name in copied {
            assert_eq!(std::fs::read(out.join(name)).unwrap(), name.as_bytes());
        }
        assert!(out.join("1_Pooling/config.json").is_file() && !out.join("1_Pooling/config.json").is_symlink());
        assert!(out.join("3_Normalize").is_dir() && out.join("tokenizer.json").is_file());
        for name in left.iter().chain(&links).map(|(name, _)| *name) {
            assert!(!out.join(name).exists(), "{name} is in {}", out.display());
        }
    }
    let top = |name: &str| name.split_inclusive('/').next().unwrap_or(name).to_string();
    let other = at("other");
    let dry = ["compress", path(&source), "-o", path(&other), "--keep", "0.8", "--dry-run"];
    assert!(ok(&dry).stdout.contains("left out (another output of lrc): earlier/"));
    let dry = ok(&[&dry[..], &["--json"]].concat()).json();
    for listed in [report(&compressed), report(&dense), dry].map(|report| report["left_out"].clone()) {
        let reason =
            |path: &str| listed.as_array().unwrap().iter().find(|l| l["path"] == path).map(|l| l["reason"].clone());
        for (name, expected) in left.iter().chain(&links) {
            let path = match *name {
                name if [".git/", "earlier/"].iter().any(|folder| name.starts_with(folder)) => top(name),
                name => name.to_string(),
            };
            assert_eq!(reason(&path), Some(Value::from(*expected)), "{name} in {listed}");
        }
        assert_eq!(listed.as_array().unwrap().len(), left.len() + links.len(), "{listed}");
    }
}

/// Commands that write a folder, each with what it writes there from.
fn writers(source: &Path, compressed: &Path) -> [Vec<String>; 4] {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_string()).collect();
    [
        words(&["compress", path(source), "--keep", "0.8", "--layout", "factors", "-q"]),
        words(&["truncate", path(compressed), "--keep", "0.7", "-q"]),
        words(&["export", path(source), "--format", "dense", "-q"]),
        words(&["sweep", path(source), "--keep", "0.8", "--text", HELD_OUT, "--max-windows", "2"]),
    ]
}

#[test]
fn force_replaces_what_lrc_wrote_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let [source, compressed, out] = ["source", "compressed", "out"].map(|name| folder.path().join(name));
    copy(FIXTURE, &source);
    std::fs::create_dir_all(source.join("1_Pooling/deep")).unwrap();
    std::fs::create_dir_all(source.join("2_Empty")).unwrap();
    std::fs::write(source.join("1_Pooling/deep/config.json"), "{}").unwrap();
    let writers = writers(&source, &compressed);
    ok(&writers[0].iter().map(String::as_str).chain(["-o", path(&compressed)]).collect::<Vec<_>>());
    for writer in &writers {
        let args: Vec<&str> = writer.iter().map(String::as_str).chain(["-o", path(&out)]).collect();
        let forced = [&args[..], &["--force"]].concat();
        ok(&args);
        // Side files of the source are ours too.
        ok(&forced);
        let before = names(&out);
        for (stranger, told) in [
            ("notes.txt", "holds `notes.txt`,"),
            (".git/HEAD", "holds `.git/`,"),
            ("photos/2024/a.jpg", "holds `photos/`,"),
            ("1_Pooling/mine.txt", "holds `1_Pooling/"),
        ] {
            let stranger = out.join(stranger);
            let is_new = !stranger.parent().unwrap().exists();
            std::fs::create_dir_all(stranger.parent().unwrap()).unwrap();
            std::fs::write(&stranger, "precious").unwrap();
            refused(&forced, 2, &[told, "which lrc did not write", "hint: move it elsewhere"]);
            assert_eq!(std::fs::read(&stranger).unwrap(), b"precious");
            std::fs::remove_file(&stranger).unwrap();
            if is_new {
                std::fs::remove_dir_all(out.join(stranger.strip_prefix(&out).unwrap().iter().next().unwrap())).unwrap();
            }
        }
        // Where the earlier output would wait.
        let waiting = folder.path().join("out.partial-replaced");
        std::fs::create_dir(&waiting).unwrap();
        std::fs::write(waiting.join("thesis.txt"), "all of it").unwrap();
        refused(&forced, 2, &["out.partial-replaced` is where the earlier output would wait", "hint: "]);
        assert!(waiting.join("thesis.txt").exists() && names(&out) == before);
        std::fs::remove_dir_all(waiting).unwrap();
        ok(&forced);
        assert_eq!(names(folder.path()), ["compressed", "out", "source"]);
        std::fs::remove_dir_all(&out).unwrap();
    }
}

/// What is named as a run's work folder would be is somebody's, and stays; so does a model of that name.
#[test]
fn a_folder_in_the_place_of_the_work_is_never_removed() {
    let folder = tempfile::tempdir().unwrap();
    let (out, stranger) = (folder.path().join("out"), folder.path().join("out.partial"));
    std::fs::create_dir_all(stranger.join("photos")).unwrap();
    std::fs::write(stranger.join("photos/a.jpg"), "precious").unwrap();
    copy(FIXTURE, &stranger);
    for args in [
        &["compress", FIXTURE, "-o", path(&out), "--keep", "0.8"][..],
        &["compress", path(&stranger), "-o", path(&out), "--keep", "0.8", "--dry-run"],
        &["compress", path(&stranger), "-o", path(&out), "--keep", "0.8", "--restart", "--force"],
        &["export", path(&stranger), "-o", path(&out), "--format", "dense"],
    ] {
        let run = lrc(args);
        assert!(run.code == 2 && run.stderr.contains("out.partial` is where its run would work"), "{}", run.stderr);
        assert!(stranger.join("photos/a.jpg").is_file() && stranger.join("model.safetensors").is_file());
    }
    assert!(!out.exists());
}

#[test]
fn a_device_is_no_file_to_replace() {
    let run = lrc(&["inspect", FIXTURE, "--html", "/dev/null", "--force"]);
    assert!(run.code == 2 && run.stderr.contains("it is a device or a pipe"), "{}", run.stderr);
}
