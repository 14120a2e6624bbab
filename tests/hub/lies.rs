//! A server that lies, and revisions and refs that lead out of the cache: nothing is written where it should not be.

use std::path::Path;

use crate::common::{FIXTURE, path};

use super::{Behavior, COMMIT, Hub, Lie};

/// Paths of all files below a folder.
fn files_below(folder: &Path) -> Vec<String> {
    let (mut folders, mut files) = (vec![folder.to_path_buf()], Vec::new());
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else {
                files.push(entry.path().strip_prefix(folder).unwrap().to_str().unwrap().to_string());
            }
        }
    }
    files.sort();
    files
}

/// Runs against a lying hub, in a folder that shows every file that is written.
fn refused(lie: Lie, behavior: Behavior, expected: &[&str]) {
    let (hub, store, jail) = (Hub::of_folder(FIXTURE), Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    store.tell(lie.clone());
    hub.tell(lie);
    let is_elsewhere = matches!(behavior, Behavior::Elsewhere(_));
    hub.behave(if is_elsewhere { Behavior::Elsewhere(store.address.clone()) } else { behavior });
    let home = jail.path().join("a/b/home");
    std::fs::create_dir_all(&home).unwrap();
    let run = hub.inspect(&home, &[]);
    assert_eq!(run.code, 4, "{expected:?}: {}", run.stderr);
    assert!(
        run.stderr.contains(&format!("error: `{}` cannot be trusted with `org/tiny`", hub.address)),
        "{}",
        run.stderr
    );
    assert!(expected.iter().all(|text| run.stderr.contains(text)), "{expected:?}: {}", run.stderr);
    assert!(run.stderr.contains("hint: ") && run.stderr.lines().filter(|l| l.starts_with("error:")).count() == 1);
    // Every file is named by a hash or by a name that was requested.
    let repo = "a/b/home/hub/models--org--tiny";
    for file in files_below(jail.path()) {
        let is_hash = |name: &str| name.len() >= 40 && name.bytes().all(|b| b.is_ascii_hexdigit());
        let is_fine =
            file.strip_prefix(&format!("{repo}/blobs/")).is_some_and(|n| is_hash(n.trim_end_matches(".incomplete")))
                || file
                    .strip_prefix("a/b/home/hub/.locks/models--org--tiny/")
                    .is_some_and(|n| is_hash(n.trim_end_matches(".lock")))
                || file
                    .strip_prefix(&format!("{repo}/snapshots/{COMMIT}/"))
                    .is_some_and(|n| hub.state.files.contains_key(n));
        assert!(is_fine, "{expected:?}: `{file}` was written");
    }
}

/// Names that lead out of a folder; `inside` is an absolute path.
fn hostile_names(inside: &str) -> Vec<String> {
    [
        inside,
        "../../../../../escape",
        "..",
        ".",
        "a/../../../../../../escape",
        "..\\..\\escape",
        "C:\\escape",
        "escape",
        "%2e%2e%2fescape",
    ]
    .map(String::from)
    .to_vec()
}

#[test]
fn names_of_a_hostile_server_are_refused_before_anything_is_written() {
    let outside = tempfile::tempdir().unwrap();
    let absolute = path(&outside.path().join("escape")).to_string();
    for name in hostile_names(&absolute) {
        let quoted = format!("\"{name}\"");
        refused(
            Lie { etag: Some(quoted.clone()), ..Lie::default() },
            Behavior::Serve,
            &["ETag", "`1_Pooling/config.json`"],
        );
        refused(Lie { etag: Some(format!("W/{quoted}")), ..Lie::default() }, Behavior::Serve, &["ETag"]);
        refused(Lie { linked_etag: Some(quoted.clone()), ..Lie::default() }, Behavior::Serve, &["ETag"]);
        refused(Lie { etag: Some(quoted), ..Lie::default() }, Behavior::Elsewhere(String::new()), &["ETag"]);
        refused(Lie { commit: Some(name.clone()), ..Lie::default() }, Behavior::Serve, &["at commit"]);
        refused(
            Lie { sha: Some(name.clone()), ..Lie::default() },
            Behavior::Serve,
            &["it calls the commit", "40 hex digits"],
        );
        let lie = Lie { listed_sha256: Some(name.clone()), ..Lie::default() };
        refused(lie, Behavior::Serve, &["sha256", "model.safetensors"]);
    }
    for name in [
        absolute.as_str(),
        "../../../../../escape.json",
        "a/../../escape.json",
        "",
        "a//b.json",
        "..\\escape.json",
        "a/./b.json",
        "a\n.json",
    ] {
        refused(Lie { sibling: Some(name.into()), ..Lie::default() }, Behavior::Serve, &["its listing has a file"]);
    }
    refused(Lie { etag: Some("\"\"".into()), ..Lie::default() }, Behavior::Serve, &["ETag"]);
    assert!(files_below(outside.path()).is_empty());
}

#[test]
fn a_server_that_lies_only_the_second_time_is_refused() {
    let etag = Some("\"/tmp/lrc-escape\"".to_string());
    refused(Lie { etag, ..Lie::default() }, Behavior::DropOnce, &["ETag"]);
}

#[test]
fn bodies_that_are_not_what_was_listed_are_refused() {
    let weights = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE).join("model.safetensors")).unwrap();
    let n = weights.len();
    let mut other = weights;
    other[n - 1] ^= 1;
    refused(Lie { weights: Some(other), ..Lie::default() }, Behavior::Serve, &["sha256", "`model.safetensors`"]);
    refused(Lie { listed_size: Some(n + 1), ..Lie::default() }, Behavior::Serve, &["bytes for `model.safetensors`"]);
    refused(Lie { weights_size: Some(n - 1), ..Lie::default() }, Behavior::Serve, &["bytes for `model.safetensors`"]);
    // The server has a hash of another file.
    let etag = Some(format!("\"{}\"", "0".repeat(64)));
    refused(Lie { etag, ..Lie::default() }, Behavior::Serve, &["with the sha256"]);
}

#[test]
fn a_revision_that_leads_out_of_the_cache_is_a_usage_error() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    for revision in ["../../x", "/abs", "a..b", "", "a//b", "x/", "a b", "..", "main\\x"] {
        for offline in ["0", "1"] {
            let run = hub.inspect_at(revision, home.path(), &[("HF_HUB_OFFLINE", offline)]);
            assert_eq!(run.code, 2, "{revision}: {}", run.stderr);
            assert!(run.stderr.contains(&format!("error: `--revision {}`", revision.escape_debug())), "{}", run.stderr);
        }
    }
    assert!(hub.requests().is_empty() && files_below(home.path()).is_empty());
}

#[test]
fn a_ref_that_another_tool_wrote_is_no_path() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    let refs = home.path().join("hub/models--org--tiny/refs");
    std::fs::create_dir_all(&refs).unwrap();
    std::fs::write(refs.join("main"), env!("CARGO_MANIFEST_DIR").to_string() + "/" + FIXTURE).unwrap();
    assert_eq!(hub.inspect(home.path(), &[("HF_HUB_OFFLINE", "1")]).code, 6);
}
