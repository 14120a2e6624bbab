//! Hub ids against a local server that speaks the hub's paths.
#![cfg(feature = "hub")]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{FIXTURE, Run, command, finish, path};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One repository, `org/tiny`, behind a socket of this machine.
struct Hub {
    address: String,
    state: Arc<State>,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Requests so far: method, path and the token.
    requests: Mutex<Vec<(String, String, Option<String>)>>,
    behaviour: Mutex<Behaviour>,
}

#[derive(Clone, Copy, PartialEq)]
enum Behaviour {
    Serve,
    /// Answers 503 to everything.
    Broken,
    /// Cuts the connection in the middle of the weights.
    Drop,
    /// Wants a token.
    Gated,
    /// Listens, and never answers.
    Stall,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State { files, requests: Mutex::default(), behaviour: Mutex::new(Behaviour::Serve) });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || answer(&stream, &state));
            }
        });
        Self { address, state }
    }

    fn of_folder(folder: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let read = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        };
        let mut files: BTreeMap<String, Vec<u8>> = std::fs::read_dir(folder).unwrap().map(read).collect();
        files.insert("pytorch_model.bin".into(), vec![0; 10]);
        files.insert("onnx/model.safetensors".into(), vec![0; 10]);
        files.insert("onnx/config.json".into(), vec![0; 10]);
        files.insert("1_Pooling/config.json".into(), b"{}".to_vec());
        files.insert("2_Dense/pytorch_model.bin".into(), vec![0; 10]);
        Self::start(files)
    }

    fn behave(&self, behaviour: Behaviour) {
        *self.state.behaviour.lock().unwrap() = behaviour;
    }

    fn requests(&self) -> Vec<(String, String, Option<String>)> {
        std::mem::take(&mut self.state.requests.lock().unwrap())
    }

    fn inspect(&self, home: &Path, extra: &[(&str, &str)]) -> Run {
        let mut command = command(&["inspect", "org/tiny", "--json"]);
        command
            .env("HF_ENDPOINT", &self.address)
            .env("HF_HOME", home)
            .env_remove("HF_TOKEN")
            .env_remove("HF_HUB_OFFLINE");
        for (key, value) in extra {
            command.env(key, value);
        }
        finish(&mut command)
    }
}

/// Answers requests on one connection until it closes.
fn answer(stream: &TcpStream, state: &State) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let mut words = line.split_whitespace().map(String::from);
        let (Some(method), Some(target)) = (words.next(), words.next()) else { return };
        let mut token = None;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).unwrap_or(0) == 0 || header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.to_lowercase().strip_prefix("authorization: bearer ") {
                token = Some(value.trim().to_string());
            }
        }
        let target = target.split('?').next().unwrap().to_string();
        state.requests.lock().unwrap().push((method.clone(), target.clone(), token.clone()));
        let behaviour = *state.behaviour.lock().unwrap();
        if behaviour == Behaviour::Stall {
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
        let (status, headers, body) = match behaviour {
            Behaviour::Broken => ("503 Service Unavailable", String::new(), Vec::new()),
            Behaviour::Gated if token.as_deref() != Some("secret") => ("401 Unauthorized", String::new(), Vec::new()),
            _ => resource(state, &target),
        };
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
        let mut out = stream;
        let is_cut = behaviour == Behaviour::Drop && method == "GET" && target.ends_with(".safetensors");
        let body = match method.as_str() {
            "HEAD" => &[][..],
            _ if is_cut => &body[..body.len() / 2],
            _ => &body,
        };
        if out.write_all(head.as_bytes()).and_then(|()| out.write_all(body)).is_err() || is_cut {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return;
        }
    }
}

fn resource(state: &State, target: &str) -> (&'static str, String, Vec<u8>) {
    let json = |value: serde_json::Value| {
        ("200 OK", "content-type: application/json\r\n".to_string(), value.to_string().into_bytes())
    };
    if let Some(revision) = target.strip_prefix("/api/models/org/tiny/revision/") {
        if revision == "main" || revision == COMMIT {
            return json(serde_json::json!({"id": "org/tiny", "sha": COMMIT}));
        }
        return ("404 Not Found", "x-error-code: RevisionNotFound\r\n".into(), Vec::new());
    }
    if target == format!("/api/models/org/tiny/tree/{COMMIT}") {
        let entry = |(name, bytes): (&String, &Vec<u8>)| serde_json::json!({"type": "file", "oid": "0", "size": bytes.len(), "path": name});
        return json(state.files.iter().map(entry).collect());
    }
    let prefix = format!("/org/tiny/resolve/{COMMIT}/");
    match target.strip_prefix(&prefix).and_then(|name| state.files.get_key_value(name)) {
        Some((name, bytes)) => {
            ("200 OK", format!("etag: \"{}\"\r\nx-repo-commit: {COMMIT}\r\n", name.replace('/', "-")), bytes.clone())
        }
        None => ("404 Not Found", "x-error-code: RepoNotFound\r\n".into(), Vec::new()),
    }
}

#[test]
fn a_model_is_downloaded_once_and_used_offline() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    let local = common::ok(&["inspect", FIXTURE, "--json"]).json();
    let first = hub.inspect(home.path(), &[("HF_TOKEN", "secret")]);
    assert_eq!(first.code, 0, "{}", first.stderr);
    assert_eq!(first.json()["linears"], local["linears"]);
    let requests = hub.requests();
    assert!(requests.iter().all(|(_, _, token)| token.as_deref() == Some("secret")), "{requests:?}");
    let fetched = |name: &str| requests.iter().any(|(method, target, _)| method == "GET" && target.ends_with(name));
    assert!(fetched("tokenizer.json") && fetched("/model.safetensors"));
    // Other formats, and second copies in folders, are not.
    let at_top = format!("{COMMIT}/pytorch_model.bin");
    let of_others = [at_top.as_str(), "onnx/model.safetensors", "onnx/config.json"];
    assert!(!of_others.iter().any(|name| fetched(name)), "{requests:?}");
    // Modules beside the model are, with weights of their own.
    assert!(fetched("1_Pooling/config.json") && fetched("2_Dense/pytorch_model.bin"), "{requests:?}");
    assert!(
        home.path().join("hub/models--org--tiny/snapshots").join(COMMIT).join("config.json").exists(),
        "Python's layout"
    );

    // Again: nothing large is fetched.
    assert_eq!(hub.inspect(home.path(), &[]).code, 0);
    assert!(!hub.requests().iter().any(|(method, target, _)| method == "GET" && target.ends_with(".safetensors")));
    // Offline: nothing at all.
    let offline = hub.inspect(home.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(offline.code, 0, "{}", offline.stderr);
    assert!(hub.requests().is_empty());
    // The hub is down: the cache is as good.
    hub.behave(Behaviour::Broken);
    let cached = hub.inspect(home.path(), &[]);
    assert_eq!(cached.code, 0, "{}", cached.stderr);
    assert!(cached.stderr.contains("cannot be reached"), "{}", cached.stderr);
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
    hub.behave(Behaviour::Broken);
    check(hub.inspect(home.path(), &[]), 6, "503");
    hub.behave(Behaviour::Gated);
    check(hub.inspect(home.path(), &[]), 4, "HF_TOKEN");
    assert_eq!(hub.inspect(home.path(), &[("HF_TOKEN", "secret")]).code, 0);
    let nobody = tempfile::tempdir().unwrap();
    check(hub.inspect(nobody.path(), &[("HF_ENDPOINT", "http://127.0.0.1:9")]), 6, "network");
    let mut other = command(&["inspect", "org/tiny", "--revision", "nope"]);
    hub.behave(Behaviour::Serve);
    check(finish(other.env("HF_ENDPOINT", &hub.address).env("HF_HOME", nobody.path())), 4, "nope");
}

#[test]
fn a_server_that_never_answers_is_given_up() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    hub.behave(Behaviour::Stall);
    let run = hub.inspect(home.path(), &[("HF_HUB_DOWNLOAD_TIMEOUT", "1")]);
    assert_eq!(run.code, 6, "{}", run.stderr);
    assert!(run.stderr.contains("error: cannot get `org/tiny`"), "{}", run.stderr);
}

#[test]
fn a_dropped_transfer_is_an_error_and_is_made_good_by_the_next() {
    let (hub, home) = (Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    hub.behave(Behaviour::Drop);
    let dropped = hub.inspect(home.path(), &[]);
    assert_ne!(dropped.code, 0);
    assert!(dropped.stderr.contains("error: "), "{}", dropped.stderr);
    hub.behave(Behaviour::Serve);
    let run = hub.inspect(home.path(), &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
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
