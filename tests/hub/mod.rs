//! Hub ids, against a local server with the hub's paths.

mod downloads;
mod lies;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use crate::common::{Run, command, finish};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A server on this machine with one repository, `org/tiny`.
struct Hub {
    address: String,
    state: Arc<State>,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// All requests so far.
    requests: Mutex<Vec<Request>>,
    behavior: Mutex<Behavior>,
    lie: Mutex<Lie>,
}

#[derive(Debug, Clone)]
struct Request {
    target: String,
    token: Option<String>,
    /// First byte that is requested.
    begin: usize,
}

#[derive(Clone, PartialEq)]
enum Behavior {
    Serve,
    /// Answers 503 to everything.
    Broken,
    /// Cuts the connection in the middle of the weights.
    Drop,
    /// Cuts the connection in the middle of the weights once; then serves, with the lies if there are any.
    DropOnce,
    /// Requires a token.
    Gated,
    /// Accepts connections and never answers.
    Stall,
    /// Redirects everything to another path.
    Moved,
    /// Redirects to files at this address, as the hub does for large ones.
    Elsewhere(String),
}

/// False answers of a hostile server.
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
            behavior: Mutex::new(Behavior::Serve),
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

    fn behave(&self, behavior: Behavior) {
        *self.state.behavior.lock().unwrap() = behavior;
    }

    fn tell(&self, lie: Lie) {
        *self.state.lie.lock().unwrap() = lie;
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.requests.lock().unwrap())
    }

    /// Names of files that were requested since the last call.
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
        let behavior = state.behavior.lock().unwrap().clone();
        if behavior == Behavior::Stall {
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
        let (mut status, mut headers, mut body) = response(state, &behavior, &request);
        let is_weights = request.target.ends_with("/model.safetensors");
        let is_cut = is_weights && matches!(behavior, Behavior::Drop | Behavior::DropOnce);
        if behavior == Behavior::DropOnce && is_weights {
            *state.behavior.lock().unwrap() = Behavior::Serve;
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

fn response(state: &State, behavior: &Behavior, request: &Request) -> (&'static str, String, Vec<u8>) {
    let target = request.target.as_str();
    match behavior {
        Behavior::Broken => ("503 Service Unavailable", String::new(), Vec::new()),
        Behavior::Gated if request.token.as_deref() != Some("secret") => {
            ("401 Unauthorized", "x-error-message: Access to org/tiny is restricted.\r\n".into(), Vec::new())
        }
        Behavior::Moved if !target.starts_with("/new/") => {
            ("307 Temporary Redirect", format!("location: /new{target}?x=1\r\n"), Vec::new())
        }
        Behavior::Moved => resource(state, &target["/new".len()..]),
        Behavior::Elsewhere(address) if target.contains("/resolve/") => {
            let (_, headers, body) = resource(state, target);
            let size = format!("x-linked-size: {}\r\n", body.len());
            let headers = headers.replace("etag:", "x-linked-etag:") + &size;
            ("302 Found", format!("location: {address}{target}?signature=1\r\n{headers}"), Vec::new())
        }
        _ => resource(state, target),
    }
}

fn resource(state: &State, target: &str) -> (&'static str, String, Vec<u8>) {
    let is_honest = *state.behavior.lock().unwrap() == Behavior::DropOnce;
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

/// Whether the hub stores a file by its sha256, outside the git repository.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
