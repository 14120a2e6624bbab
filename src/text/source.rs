//! The bytes of a text: read once, hashed as they are read, and unpacked. A text may be a file, a pipe or a named pipe.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::kind::Packing;
use crate::checkpoint::hex;
use crate::error::{ExitClass, Failure};

/// How long a named pipe is waited for that nobody writes to.
const PATIENCE: Duration = Duration::from_secs(5);

type Result<T, E = Failure> = std::result::Result<T, E>;

/// What was read of pipes, by path: there is no second time, and a command may want a text in several conventions.
static PIPES: Mutex<BTreeMap<PathBuf, Source>> = Mutex::new(BTreeMap::new());

/// A text as it came.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub bytes: Vec<u8>,
    /// Of these bytes.
    pub sha256: String,
    /// Its path says nothing of what it holds.
    pub is_pipe: bool,
}

impl Source {
    /// Reads a file or a pipe to its end; `what` it is, for errors.
    ///
    /// # Errors
    /// There is none, it is neither, it cannot be read, or nobody writes to the pipe.
    pub fn read(path: &Path, what: &'static str) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| unreadable(what, path, &e))?;
        let is_pipe = is_pipe(&metadata);
        if !metadata.is_file() && !is_pipe {
            let message = format!("`{}` is {}, expected a {what}", path.display(), other_kind(&metadata));
            return Err(Failure::usage(message).hint("give a file, or pipe it in: `… | lrc eval --text /dev/stdin`"));
        }
        let pipes = || PIPES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = pipes().get(path).filter(|_| is_pipe) {
            return Ok(source.clone());
        }
        let file =
            if is_pipe { open_pipe(what, path) } else { File::open(path).map_err(|e| unreadable(what, path, &e)) };
        let mut bytes = Vec::new();
        file?.read_to_end(&mut bytes).map_err(|e| unreadable(what, path, &e))?;
        let sha256 = hex(&Sha256::digest(&bytes));
        // `/dev/stdin` may be a file, under a name that says as little.
        let is_nameless = is_pipe || path.starts_with("/dev") || path.starts_with("/proc");
        let source = Self { bytes, sha256, is_pipe: is_nameless };
        if is_pipe {
            pipes().insert(path.into(), source.clone());
        }
        Ok(source)
    }
}

/// Reads a recipe; it may be a pipe.
///
/// # Errors
/// It cannot be read, is not UTF-8, or nobody writes to the pipe.
pub fn read_recipe(path: &Path) -> Result<String> {
    let source = Source::read(path, "recipe")?;
    String::from_utf8(source.bytes).map_err(|_| Failure::unsupported(format!("`{}` is not UTF-8", path.display())))
}

/// Unpacks `bytes`.
///
/// # Errors
/// They are not packed in that way, or damaged.
pub(super) fn unpacked(path: &Path, bytes: Vec<u8>, packing: Packing) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let result = match packing {
        Packing::None => return Ok(bytes),
        Packing::Gzip => flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut out),
        Packing::Zstd => zstd::stream::read::Decoder::new(bytes.as_slice()).and_then(|mut d| d.read_to_end(&mut out)),
    };
    result.map_err(|e| Failure::unsupported(format!("`{}` cannot be unpacked: {e}", path.display())))?;
    Ok(out)
}

fn unreadable(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    let class = if error.kind() == std::io::ErrorKind::NotFound { ExitClass::Usage } else { ExitClass::Resources };
    Failure::new(class, format!("cannot read {what} `{}`: {error}", path.display()))
}

/// Opening a named pipe lasts until somebody writes to it: on a thread, which is left behind where nobody does.
fn open_pipe(what: &str, path: &Path) -> Result<File> {
    let (sender, receiver) = mpsc::channel();
    let own = path.to_path_buf();
    std::thread::spawn(move || {
        // The receiver is gone when nobody came in time.
        let _ = sender.send(File::open(own));
    });
    match receiver.recv_timeout(PATIENCE) {
        Ok(file) => file.map_err(|e| unreadable(what, path, &e)),
        Err(_) => Err(Failure::unsupported(format!("nobody writes to the pipe `{}`", path.display()))
            .hint("start what writes to it first, or give a file")),
    }
}

#[cfg(unix)]
fn is_pipe(metadata: &Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_fifo(&metadata.file_type())
}

#[cfg(not(unix))]
fn is_pipe(_: &Metadata) -> bool {
    false
}

fn other_kind(metadata: &Metadata) -> &'static str {
    if metadata.is_dir() { "a folder" } else { "a device" }
}
