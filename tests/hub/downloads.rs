//! Downloads from a server that is honest, redirects, is slow, or is down.

use crate::common::{self, FIXTURE, Run, command, finish, path};

use super::{Behavior, COMMIT, Hub, Request};

#[test]
fn files_of_pytorch_are_downloaded_where_there_are_no_safetensors() {
    let oracle = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracles/pytorch.bin");
    let files = [("pytorch_model.bin", std::fs::read(oracle).unwrap()), ("config.json", b"{}".to_vec())];
    let others = ["training_args.bin", "optimizer.bin", "onnx/model.onnx"].map(|name| (name, vec![0; 9]));
    let hub = Hub::start(files.into_iter().chain(others).map(|(name, bytes)| (name.to_string(), bytes)).collect());
    let home = tempfile::tempdir().unwrap();
    let run = hub.inspect(home.path(), &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let mut fetched = hub.fetched();
    fetched.sort();
    assert_eq!(fetched, ["config.json", "pytorch_model.bin"]);
}

#[test]
fn a_model_is_downloaded_once_and_used_offline() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    let local = common::ok(&["inspect", FIXTURE, "--json"]).json();
    let first = hub.inspect(home.path(), &[("HF_TOKEN", "secret")]);
    assert_eq!(first.code, 0, "{}", first.stderr);
    assert_eq!(first.json()["linears"], local["linears"]);
    let requests = hub.requests();
    assert!(requests.iter().all(|request| request.token.as_deref() == Some("secret")), "{requests:?}");
    let asked = |name: &str| requests.iter().any(|request| request.target.ends_with(name));
    assert!(asked("tokenizer.json") && asked("/model.safetensors"));
    // Modules beside the model are downloaded, with weights of their own.
    assert!(asked("1_Pooling/config.json") && asked("2_Dense/pytorch_model.bin"), "{requests:?}");
    // Other formats, and second copies in subfolders, are not.
    let at_top = format!("{COMMIT}/pytorch_model.bin");
    let others = [at_top.as_str(), "onnx/model.safetensors", "onnx/config.json", "fp16/model.safetensors"];
    assert!(!others.iter().any(|name| asked(name)), "{requests:?}");
    let root = home.path().join("hub/models--org--tiny");
    let snapshot = root.join("snapshots").join(COMMIT);
    for name in ["config.json", "1_Pooling/config.json", "model.safetensors"] {
        let blob = snapshot.join(name).canonicalize().unwrap();
        assert_eq!(blob.parent().unwrap(), root.canonicalize().unwrap().join("blobs"), "Python's layout");
        assert!(std::fs::read_link(snapshot.join(name)).unwrap().is_relative(), "a cache can be moved");
        assert_eq!(std::fs::read(&blob).unwrap(), hub.state.files[name]);
    }
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);

    // Again: nothing is fetched.
    assert_eq!(hub.inspect(home.path(), &[]).code, 0);
    assert!(hub.fetched().is_empty());
    // Offline: nothing at all.
    let offline = hub.inspect(home.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.code, 0, "{}", offline.stderr);
    assert!(hub.requests().is_empty());
    // The hub is down, and the cache serves.
    hub.behave(Behavior::Broken);
    let cached = hub.inspect(home.path(), &[]);
    assert_eq!(cached.code, 0, "{}", cached.stderr);
    assert!(cached.stderr.contains("cannot be reached"), "{}", cached.stderr);
}

#[test]
fn blobs_that_are_there_are_linked_and_a_branch_may_have_a_slash() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    assert_eq!(hub.inspect(home.path(), &[]).code, 0);
    let root = home.path().join("hub/models--org--tiny");
    std::fs::remove_dir_all(root.join("snapshots")).unwrap();
    hub.requests();
    let again = hub.inspect_at("feature/x", home.path(), &[]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(!hub.fetched().contains(&"model.safetensors".to_string()));
    assert_eq!(std::fs::read_to_string(root.join("refs/feature/x")).unwrap(), COMMIT);
}

#[test]
fn the_variables_of_huggingface_hub_are_obeyed() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    hub.behave(Behavior::Gated);
    std::fs::write(home.path().join("token"), "secret\n").unwrap();
    let cache = home.path().join("elsewhere");
    let run = hub.inspect(home.path(), &[("HF_HUB_CACHE", path(&cache))]);
    assert_eq!(run.code, 0, "the token of the file: {}", run.stderr);
    assert!(cache.join("models--org--tiny/refs/main").exists() && !home.path().join("hub").exists());
    let refused = hub.inspect(home.path(), &[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]);
    assert!(refused.code == 4 && refused.stderr.contains("Access to org/tiny is restricted."), "{}", refused.stderr);
}

#[test]
fn redirects_are_followed_and_the_token_stays_with_the_hub() {
    let (hub, store) = (Hub::of_folder(FIXTURE), Hub::of_folder(FIXTURE));
    let token = [("HF_TOKEN", "secret")];
    let home = tempfile::tempdir().unwrap();
    hub.behave(Behavior::Elsewhere(store.address.clone()));
    let run = hub.inspect(home.path(), &token);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(hub.requests().iter().all(|request| request.token.is_some()));
    let elsewhere = store.requests();
    assert!(elsewhere.len() > 3 && elsewhere.iter().all(|request| request.token.is_none()), "{elsewhere:?}");

    let home = tempfile::tempdir().unwrap();
    hub.behave(Behavior::Moved);
    let run = hub.inspect(home.path(), &token);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(hub.requests().iter().all(|request| request.token.is_some()), "by a path it is the same server");
}

#[test]
fn failures_have_their_exit_codes() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    let check = |run: Run, code: i32, expected: &str| {
        assert_eq!(run.code, code, "{}", run.stderr);
        assert!(run.stderr.contains("error: cannot get `org/tiny`") && run.stderr.contains(expected), "{}", run.stderr);
        assert!(run.stderr.contains("hint:"));
    };
    check(hub.inspect(home.path(), &[("HF_HUB_OFFLINE", "1")]), 6, "cache");
    hub.behave(Behavior::Broken);
    check(hub.inspect(home.path(), &[]), 6, "503");
    hub.behave(Behavior::Gated);
    check(hub.inspect(home.path(), &[]), 4, "HF_TOKEN");
    assert_eq!(hub.inspect(home.path(), &[("HF_TOKEN", "secret")]).code, 0);
    let nobody = tempfile::tempdir().unwrap();
    check(hub.inspect(nobody.path(), &[("HF_ENDPOINT", "http://127.0.0.1:9")]), 6, "network");
    let mut other = command(&["inspect", "org/tiny", "--revision", "nope"]);
    hub.behave(Behavior::Serve);
    check(finish(other.env("HF_ENDPOINT", &hub.address).env("HF_HOME", nobody.path())), 4, "nope");
}

#[test]
fn a_server_that_never_answers_is_given_up() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    hub.behave(Behavior::Stall);
    let run = hub.inspect(home.path(), &[("HF_HUB_DOWNLOAD_TIMEOUT", "1")]);
    assert_eq!(run.code, 6, "{}", run.stderr);
    assert!(run.stderr.contains("error: cannot get `org/tiny`"), "{}", run.stderr);
}

#[test]
fn a_dropped_transfer_is_an_error_and_is_made_good_by_the_next() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    hub.behave(Behavior::Drop);
    let dropped = hub.inspect(home.path(), &[]);
    assert_eq!(dropped.code, 6);
    assert!(dropped.stderr.contains("error: ") && dropped.stderr.contains("ended after"), "{}", dropped.stderr);
    hub.requests();
    hub.behave(Behavior::Serve);
    let run = hub.inspect(home.path(), &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let requests = hub.requests();
    let weights: Vec<&Request> = requests.iter().filter(|r| r.target.ends_with("/model.safetensors")).collect();
    assert!(weights.len() == 1 && weights[0].begin > 0, "it resumes where it was: {weights:?}");

    // Files on disk may have been damaged in the meantime: that is detected, and the file is fetched again.
    let root = home.path().join("hub/models--org--tiny");
    let blob = root.join("snapshots").join(COMMIT).join("model.safetensors").canonicalize().unwrap();
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(format!("{}.incomplete", blob.display()), b"something else").unwrap();
    let run = hub.inspect(home.path(), &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(std::fs::read(&blob).unwrap(), hub.state.files["model.safetensors"]);
}

#[test]
fn an_incomplete_snapshot_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("sharded");
    common::ok(&["compress", FIXTURE, "-o", path(&model), "-q", "--keep", "1.0", "--max-shard-size", "600kB"]);
    let hub = Hub::of_folder(path(&model));
    let home = tempfile::tempdir().unwrap();
    assert_eq!(hub.inspect(home.path(), &[]).code, 0);
    let snapshot = home.path().join("hub/models--org--tiny/snapshots").join(COMMIT);
    std::fs::remove_file(snapshot.join("model-00003-of-00004.safetensors")).unwrap();
    let run = hub.inspect(home.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(run.code, 4);
    assert!(
        run.stderr.contains("model-00003-of-00004.safetensors") && run.stderr.contains("incomplete"),
        "{}",
        run.stderr
    );
}
