//! Hub ids against a local server that speaks the hub's paths.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::common::{self, FIXTURE, Run, command, finish, path};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One repository, `org/tiny`, behind a socket of this machine.
struct Hub {
    address: String,
    state: Arc<State>,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// So far.
    requests: Mutex<Vec<Request>>,
    behaviour: Mutex<Behaviour>,
    lie: Mutex<Lie>,
}

#[derive(Debug, Clone)]
struct Request {
    target: String,
    token: Option<String>,
    /// First byte that is asked for.
    begin: usize,
}

#[derive(Clone, PartialEq)]
enum Behaviour {
    Serve,
    /// Answers 503 to everything.
    Broken,
    /// Cuts the connection in the middle of the weights.
    Drop,
    /// Cuts the connection in the middle of the weights, once; then serves, with lies if there are any.
    DropOnce,
    /// Wants a token.
    Gated,
    /// Listens, and never answers.
    Stall,
    /// Sends everything on, by a path.
    Moved,
    /// Has its files at this address, as large ones are.
    Elsewhere(String),
}

/// What a hostile server says instead of the truth.
#[derive(Clone, Default)]
struct Lie {
    sha: Option<String>,
    commit: Option<String>,
    etag: Option<String>,
    linked_etag: Option<String>,
    sibling: Option<String>,
    listed_sha256: Option<String>,
    listed_size: Option<usize>,
    weights: Option<Vec<u8>>,
    weights_size: Option<usize>,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State {
            files,
            requests: Mutex::default(),
            behaviour: Mutex::new(Behaviour::Serve),
            lie: Mutex::default(),
        });
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
        for name in ["pytorch_model.bin", "onnx/model.safetensors", "onnx/config.json", "fp16/model.safetensors"] {
            files.insert(name.into(), vec![0; 10]);
        }
        files.insert("1_Pooling/config.json".into(), b"{}".to_vec());
        files.insert("2_Dense/pytorch_model.bin".into(), vec![0; 10]);
        Self::start(files)
    }

    fn behave(&self, behaviour: Behaviour) {
        *self.state.behaviour.lock().unwrap() = behaviour;
    }

    fn tell(&self, lie: Lie) {
        *self.state.lie.lock().unwrap() = lie;
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.requests.lock().unwrap())
    }

    /// Names of files that were asked for since the last time.
    fn fetched(&self) -> Vec<String> {
        let prefix = format!("/org/tiny/resolve/{COMMIT}/");
        self.requests().iter().filter_map(|r| r.target.strip_prefix(&prefix).map(String::from)).collect()
    }

    fn inspect(&self, home: &Path, extra: &[(&str, &str)]) -> Run {
        self.inspect_at("main", home, extra)
    }

    fn inspect_at(&self, revision: &str, home: &Path, extra: &[(&str, &str)]) -> Run {
        let mut command = command(&["inspect", "org/tiny", "--json", "--revision", revision]);
        command.env("HF_ENDPOINT", &self.address).env("HF_HOME", home);
        for name in ["HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"] {
            command.env_remove(name);
        }
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
        let Some(target) = line.split_whitespace().nth(1) else { return };
        let mut request = Request { target: target.split('?').next().unwrap().to_string(), token: None, begin: 0 };
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).unwrap_or(0) == 0 || header.trim().is_empty() {
                break;
            }
            let header = header.to_lowercase();
            if let Some(value) = header.strip_prefix("authorization: bearer ") {
                request.token = Some(value.trim().to_string());
            }
            if let Some(range) = header.strip_prefix("range: bytes=") {
                request.begin = range.trim().trim_end_matches('-').parse().unwrap();
            }
        }
        state.requests.lock().unwrap().push(request.clone());
        let behaviour = state.behaviour.lock().unwrap().clone();
        if behaviour == Behaviour::Stall {
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
        let (mut status, mut headers, mut body) = response(state, &behaviour, &request);
        let is_weights = request.target.ends_with("/model.safetensors");
        let is_cut = is_weights && matches!(behaviour, Behaviour::Drop | Behaviour::DropOnce);
        if behaviour == Behaviour::DropOnce && is_weights {
            *state.behaviour.lock().unwrap() = Behaviour::Serve;
        }
        if request.begin > 0 && status.starts_with("200") {
            status = "206 Partial Content";
            headers.push_str(&format!("content-range: bytes {}-{}/{}\r\n", request.begin, body.len() - 1, body.len()));
            body.drain(..request.begin);
        }
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
        let sent = if is_cut { &body[..body.len() / 2] } else { &body };
        let mut out = stream;
        if out.write_all(head.as_bytes()).and_then(|()| out.write_all(sent)).is_err() || is_cut {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return;
        }
    }
}

fn response(state: &State, behaviour: &Behaviour, request: &Request) -> (&'static str, String, Vec<u8>) {
    let target = request.target.as_str();
    match behaviour {
        Behaviour::Broken => ("503 Service Unavailable", String::new(), Vec::new()),
        Behaviour::Gated if request.token.as_deref() != Some("secret") => {
            ("401 Unauthorized", "x-error-message: Access to org/tiny is restricted.\r\n".into(), Vec::new())
        }
        Behaviour::Moved if !target.starts_with("/new/") => {
            ("307 Temporary Redirect", format!("location: /new{target}?x=1\r\n"), Vec::new())
        }
        Behaviour::Moved => resource(state, &target["/new".len()..]),
        Behaviour::Elsewhere(address) if target.contains("/resolve/") => {
            let (_, headers, body) = resource(state, target);
            let size = format!("x-linked-size: {}\r\n", body.len());
            let headers = headers.replace("etag:", "x-linked-etag:") + &size;
            ("302 Found", format!("location: {address}{target}?signature=1\r\n{headers}"), Vec::new())
        }
        _ => resource(state, target),
    }
}

fn resource(state: &State, target: &str) -> (&'static str, String, Vec<u8>) {
    let is_honest = *state.behaviour.lock().unwrap() == Behaviour::DropOnce;
    let lie = if is_honest { Lie::default() } else { state.lie.lock().unwrap().clone() };
    if let Some(revision) = target.strip_prefix("/api/models/org/tiny/revision/") {
        if ![COMMIT, "main", "feature%2Fx"].contains(&revision) {
            return ("404 Not Found", "x-error-code: RevisionNotFound\r\n".into(), Vec::new());
        }
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let mut sibling =
                serde_json::json!({"rfilename": name, "blobId": &sha256(bytes)[..40], "size": bytes.len()});
            if is_large(name) {
                let size = lie.listed_size.unwrap_or(bytes.len());
                let sha256 = lie.listed_sha256.clone().unwrap_or_else(|| sha256(bytes));
                sibling["lfs"] = serde_json::json!({"sha256": sha256, "size": size, "pointerSize": 130});
            }
            sibling
        };
        let mut siblings: Vec<serde_json::Value> = state.files.iter().map(sibling).collect();
        siblings.extend(lie.sibling.iter().map(|name| serde_json::json!({"rfilename": name, "size": 2})));
        let sha = lie.sha.as_deref().unwrap_or(COMMIT);
        let record = serde_json::json!({"id": "org/tiny", "sha": sha, "siblings": siblings});
        return ("200 OK", "content-type: application/json\r\n".into(), record.to_string().into_bytes());
    }
    let prefix = format!("/org/tiny/resolve/{COMMIT}/");
    let Some((name, bytes)) = target.strip_prefix(&prefix).and_then(|name| state.files.get_key_value(name)) else {
        return ("404 Not Found", "x-error-code: EntryNotFound\r\n".into(), Vec::new());
    };
    let etag = if is_large(name) { sha256(bytes) } else { sha256(bytes)[..40].to_string() };
    let etag = lie.etag.unwrap_or_else(|| format!("\"{etag}\""));
    let commit = lie.commit.as_deref().unwrap_or(COMMIT);
    let mut headers = format!("etag: {etag}\r\nx-repo-commit: {commit}\r\n");
    if let Some(etag) = lie.linked_etag {
        headers.push_str(&format!("x-linked-etag: {etag}\r\n"));
    }
    let mut body = bytes.clone();
    if is_large(name) {
        body = lie.weights.unwrap_or(body);
        if let Some(size) = lie.weights_size {
            body.resize(size, 0);
        }
    }
    ("200 OK", headers, body)
}

/// Whether a file is kept by its sha256, beside the repository.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Everything below a folder, by path.
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
    // Modules beside the model come along, with weights of their own.
    assert!(asked("1_Pooling/config.json") && asked("2_Dense/pytorch_model.bin"), "{requests:?}");
    // Other formats, and second copies in subfolders, do not.
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
    // The hub is down: the cache is as good.
    hub.behave(Behaviour::Broken);
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
    hub.behave(Behaviour::Gated);
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
    hub.behave(Behaviour::Elsewhere(store.address.clone()));
    let run = hub.inspect(home.path(), &token);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(hub.requests().iter().all(|request| request.token.is_some()));
    let elsewhere = store.requests();
    assert!(elsewhere.len() > 3 && elsewhere.iter().all(|request| request.token.is_none()), "{elsewhere:?}");

    let home = tempfile::tempdir().unwrap();
    hub.behave(Behaviour::Moved);
    let run = hub.inspect(home.path(), &token);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(hub.requests().iter().all(|request| request.token.is_some()), "by a path it is the same server");
}

/// Runs against a hub that lies, in a folder where everything that is written is seen.
fn refused(lie: Lie, behaviour: Behaviour, expected: &[&str]) {
    let (hub, store, jail) = (Hub::of_folder(FIXTURE), Hub::of_folder(FIXTURE), tempfile::tempdir().unwrap());
    store.tell(lie.clone());
    hub.tell(lie);
    let is_elsewhere = matches!(behaviour, Behaviour::Elsewhere(_));
    hub.behave(if is_elsewhere { Behaviour::Elsewhere(store.address.clone()) } else { behaviour });
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
    // What is there is called by hashes, and by names that were asked for.
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

/// What a path is made of, when it is to lead out of a folder; `inside` is one that is absolute.
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
            Behaviour::Serve,
            &["ETag", "`1_Pooling/config.json`"],
        );
        refused(Lie { etag: Some(format!("W/{quoted}")), ..Lie::default() }, Behaviour::Serve, &["ETag"]);
        refused(Lie { linked_etag: Some(quoted.clone()), ..Lie::default() }, Behaviour::Serve, &["ETag"]);
        refused(Lie { etag: Some(quoted), ..Lie::default() }, Behaviour::Elsewhere(String::new()), &["ETag"]);
        refused(Lie { commit: Some(name.clone()), ..Lie::default() }, Behaviour::Serve, &["at commit"]);
        refused(
            Lie { sha: Some(name.clone()), ..Lie::default() },
            Behaviour::Serve,
            &["it calls the commit", "40 hex digits"],
        );
        let lie = Lie { listed_sha256: Some(name.clone()), ..Lie::default() };
        refused(lie, Behaviour::Serve, &["sha256", "model.safetensors"]);
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
        refused(Lie { sibling: Some(name.into()), ..Lie::default() }, Behaviour::Serve, &["its listing has a file"]);
    }
    refused(Lie { etag: Some("\"\"".into()), ..Lie::default() }, Behaviour::Serve, &["ETag"]);
    assert!(files_below(outside.path()).is_empty());
}

#[test]
fn a_server_that_lies_only_the_second_time_is_refused() {
    let etag = Some("\"/tmp/lrc-escape\"".to_string());
    refused(Lie { etag, ..Lie::default() }, Behaviour::DropOnce, &["ETag"]);
}

#[test]
fn bodies_that_are_not_what_was_listed_are_refused() {
    let weights = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(FIXTURE).join("model.safetensors")).unwrap();
    let n = weights.len();
    let mut other = weights;
    other[n - 1] ^= 1;
    refused(Lie { weights: Some(other), ..Lie::default() }, Behaviour::Serve, &["sha256", "`model.safetensors`"]);
    refused(Lie { listed_size: Some(n + 1), ..Lie::default() }, Behaviour::Serve, &["bytes for `model.safetensors`"]);
    refused(Lie { weights_size: Some(n - 1), ..Lie::default() }, Behaviour::Serve, &["bytes for `model.safetensors`"]);
    // Another file that the server has a hash for.
    let etag = Some(format!("\"{}\"", "0".repeat(64)));
    refused(Lie { etag, ..Lie::default() }, Behaviour::Serve, &["with the sha256"]);
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
    assert_eq!(dropped.code, 6);
    assert!(dropped.stderr.contains("error: ") && dropped.stderr.contains("ended after"), "{}", dropped.stderr);
    hub.requests();
    hub.behave(Behaviour::Serve);
    let run = hub.inspect(home.path(), &[]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let requests = hub.requests();
    let weights: Vec<&Request> = requests.iter().filter(|r| r.target.ends_with("/model.safetensors")).collect();
    assert!(weights.len() == 1 && weights[0].begin > 0, "it goes on where it was: {weights:?}");

    // What is on disk may have been damaged in the meantime: that is found, and the file is fetched anew.
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
