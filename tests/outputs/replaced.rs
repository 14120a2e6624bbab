//! Files that an output replaces on request, and files that are never replaced.

use std::path::Path;

use crate::common::{FIXTURE, HELD_OUT, TRAIN, copy, lrc, ok, path};

use super::{names, refused};

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
    // A folder that contains an input, such as a text that was copied from the source.
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

/// Commands that write a folder, each with the files that it writes there.
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
        // Side files that were copied from the source belong to the output too.
        ok(&forced);
        let before = names(&out);
        for (stranger, named) in [
            ("notes.txt", "holds `notes.txt`,"),
            (".git/HEAD", "holds `.git/`,"),
            ("photos/2024/a.jpg", "holds `photos/`,"),
            ("1_Pooling/mine.txt", "holds `1_Pooling/"),
        ] {
            let stranger = out.join(stranger);
            let is_new = !stranger.parent().unwrap().exists();
            std::fs::create_dir_all(stranger.parent().unwrap()).unwrap();
            std::fs::write(&stranger, "precious").unwrap();
            refused(&forced, 2, &[named, "which lrc did not write", "hint: move it elsewhere"]);
            assert_eq!(std::fs::read(&stranger).unwrap(), b"precious");
            std::fs::remove_file(&stranger).unwrap();
            if is_new {
                std::fs::remove_dir_all(out.join(stranger.strip_prefix(&out).unwrap().iter().next().unwrap())).unwrap();
            }
        }
        // The folder where the earlier output would wait.
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

/// A folder with the name of a work folder belongs to somebody and stays; so does a model of that name.
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
