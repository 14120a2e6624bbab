//! Reads the bytes of a text once, hashes and decompresses them. A text may be a file, a pipe or a named pipe.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::kind::Packing;
use crate::checkpoint::hex;
use crate::error::{ExitClass, Failure};

/// Time limit for a writer to open a named pipe.
const PATIENCE: Duration = Duration::from_secs(5);

type Result<T, E = Failure> = std::result::Result<T, E>;

/// Content of pipes by path: a pipe can be read only once, and a command may need the text for several conventions.
static PIPES: Mutex<BTreeMap<PathBuf, Source>> = Mutex::new(BTreeMap::new());

/// A text as stored.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub bytes: Vec<u8>,
    /// SHA-256 of these bytes.
    pub sha256: String,
    /// Whether the path does not reveal the kind of the text.
    pub is_pipe: bool,
}

impl Source {
    /// Reads a file or a pipe to its end; errors call it `what`.
    ///
    /// # Errors
    /// The path does not exist, is neither a file nor a pipe, or cannot be read, or the pipe has no writer.
    pub fn read(path: &Path, what: &'static str) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| unreadable(what, path, &e))?;
        let is_pipe = is_pipe(&metadata);
        if !metadata.is_file() && !is_pipe {
            let message = format!("`{}` is {}, expected a {what}", path.display(), other_kind(&metadata));
            return Err(Failure::usage(message).hint("give a file or a pipe, such as `/dev/stdin`"));
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
        let is_nameless = is_pipe || is_descriptor(path);
        let source = Self { bytes, sha256, is_pipe: is_nameless };
        if is_pipe {
            pipes().insert(path.into(), source.clone());
        }
        Ok(source)
    }
}

/// Whether a path is an open file by its number, which reveals as little as a pipe: `/dev/stdin`, `/dev/fd/3`. There are
/// files under `/dev` with names of their own, as in `/dev/shm`.
fn is_descriptor(path: &Path) -> bool {
    let is_of_system = path.starts_with("/dev") || path.starts_with("/proc");
    path == "/dev/stdin" || is_of_system && path.parent().is_some_and(|folder| folder.ends_with("fd"))
}

/// Reads a recipe from a file or a pipe.
///
/// # Errors
/// It cannot be read, is not UTF-8, or the pipe has no writer.
pub fn read_recipe(path: &Path) -> Result<String> {
    let source = Source::read(path, "recipe")?;
    let not_utf8 = |_| Failure::unsupported(format!("`{}` is not UTF-8", path.display())).hint("save it as UTF-8");
    String::from_utf8(source.bytes).map_err(not_utf8)
}

/// Decompresses `bytes`.
///
/// # Errors
/// They are compressed differently, or corrupt.
pub(super) fn unpacked(path: &Path, bytes: Vec<u8>, packing: Packing) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let result = match packing {
        Packing::None => return Ok(bytes),
        Packing::Gzip => flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut out),
        Packing::Zstd => zstd::stream::read::Decoder::new(bytes.as_slice()).and_then(|mut d| d.read_to_end(&mut out)),
    };
    result.map_err(|e| Failure::unsupported(format!("`{}` cannot be decompressed: {e}", path.display())))?;
    Ok(out)
}

fn unreadable(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    let (class, hint) = match error.kind() {
        ErrorKind::NotFound => (ExitClass::Usage, "check the path; a relative one begins in the current folder"),
        ErrorKind::PermissionDenied => (ExitClass::Resources, "change its permissions, or give another file"),
        _ => (ExitClass::Resources, "check the disk, or give another file"),
    };
    Failure::new(class, format!("cannot read {what} `{}`: {error}", path.display())).hint(hint)
}

/// Opens a named pipe. That blocks until there is a writer, so it runs on a thread, which is abandoned if none comes.
fn open_pipe(what: &str, path: &Path) -> Result<File> {
    let (sender, receiver) = mpsc::channel();
    let own = path.to_path_buf();
    std::thread::spawn(move || {
        // After the time limit there is no receiver.
        let _ = sender.send(File::open(own));
    });
    match receiver.recv_timeout(PATIENCE) {
        Ok(file) => file.map_err(|e| unreadable(what, path, &e)),
        Err(_) => Err(Failure::unsupported(format!("the pipe `{}` has no writer", path.display()))
            .hint("start the writer first, or give a file")),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_have_no_names_and_files_in_memory_do() {
        for (path, expected) in [
            ("/dev/stdin", true),
            ("/dev/fd/3", true),
            ("/proc/self/fd/0", true),
            ("/dev/shm/a.jsonl", false),
            ("/dev/shm/fd.txt", false),
            ("fd/a.txt", false),
        ] {
            assert_eq!(is_descriptor(path.as_ref()), expected, "{path}");
        }
    }
}
