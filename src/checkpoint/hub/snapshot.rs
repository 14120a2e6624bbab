//! One revision of a repository in the cache: `blobs` by hash, a folder of links in `snapshots`, a commit in `refs`.
//!
//! The commit is requested once, and everything else by its hash. No string of the server reaches a path before
//! [`names`] has checked it. Each answer is checked by itself, so a server gains nothing by changing its answers.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use globset::{Glob, GlobSet, GlobSetBuilder};
use hf_hub::{Cache, Repo};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::super::error::{CheckpointError, io};
use super::super::hash::hex;
use super::client::{Answer, Client, Fault, Result};
use super::names;
use super::names::shown;
use crate::progress::{Progress, Stage};

/// The files of a checkpoint and those that its users need with it, such as `1_Pooling/config.json` of
/// sentence-transformers; other frameworks' weights are not downloaded.
const WANTED: &[&str] = &[
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "lrc-curves.arrays",
    "[0-9]*_*/*",
];
/// Weights of a repository without safetensors.
const TORCH: [&str; 2] = ["pytorch_model.bin", "pytorch_model-*.bin"];
/// Exports to other runtimes, training states, and second copies of the weights: in folders other than numbered
/// modules, or in the form of their publisher.
const UNWANTED: &[&str] = &[
    "onnx/*",
    "openvino/*",
    "original/*",
    "metal/*",
    "coreml/*",
    "runs/*",
    "checkpoint-*/*",
    "[!0-9]*/*.safetensors",
    "[!0-9]*/*.safetensors.index.json",
    "consolidated*",
    ".*",
];

/// Files on the way at a time.
const N_WORKERS: usize = 8;
/// Attempts per file, and the pause after the first of them.
const N_TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(200);

#[derive(Deserialize)]
struct Listing {
    sha: Option<String>,
    siblings: Option<Vec<Sibling>>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// A file to be downloaded.
struct Wanted {
    name: String,
    size: Option<u64>,
    /// SHA-256 of its content; the listing has one for large files, which the cache uses as their names.
    sha256: Option<String>,
}

/// The folder of a revision that was downloaded before.
///
/// # Errors
/// No revision was downloaded before.
pub(super) fn cached(repo: &Repo, cache: &Cache) -> Result<PathBuf> {
    let root = cache.path().join(repo.folder_name());
    let commit = if names::is_commit(repo.revision()) {
        Some(repo.revision().to_string())
    } else {
        fs::read_to_string(root.join("refs").join(repo.revision())).ok().map(|commit| commit.trim().to_string())
    };
    let folder = commit.filter(|commit| names::is_commit(commit)).map(|c| root.join("snapshots").join(c));
    folder
        .filter(|folder| folder.is_dir())
        .ok_or_else(|| Fault::Network(format!("it is not in the cache `{}`", cache.path().display())))
}

/// Downloads the files that are not in the cache yet.
///
/// # Errors
/// The hub cannot be reached, has no such revision, or sends what cannot be trusted; or the cache cannot be written.
pub(super) fn download(repo: &Repo, cache: &Cache, client: &Client, progress: &dyn Progress) -> Result<PathBuf> {
    let listing: Listing = retried(|| client.record(&format!("{}?blobs=true", repo.api_url())))?;
    let commit = listing.sha.ok_or_else(|| Fault::Refused("its listing names no commit".into()))?;
    if !names::is_commit(&commit) {
        return Err(Fault::Untrusted(format!("it calls the commit `{}`, expected 40 hex digits", shown(&commit))));
    }
    let repo_cache = cache.repo(repo.clone());
    let folder = repo_cache.pointer_path(&commit);
    let mut files = wanted(listing.siblings.unwrap_or_default())?;
    files.retain(|file| !folder.join(&file.name).exists());

    let n_bytes = files.iter().filter_map(|file| file.size).sum();
    let transfer = Transfer {
        repo,
        root: cache.path().join(repo.folder_name()),
        locks: cache.path().join(".locks").join(repo.folder_name()),
        commit: &commit,
        client,
        stage: progress.stage("download", n_bytes, "bytes"),
    };
    transfer.all(files)?;
    fs::create_dir_all(&folder).map_err(local("create", &folder))?;
    if repo.revision() != commit {
        // The ref is written last: until then, runs without a network use the earlier download.
        repo_cache.create_ref(&commit).map_err(local("write the ref of", &folder))?;
    }
    Ok(folder)
}

/// The files of a listing that a checkpoint needs, all names checked.
fn wanted(siblings: Vec<Sibling>) -> Result<Vec<Wanted>> {
    if let Some(sibling) = siblings.iter().find(|sibling| !names::is_file(&sibling.rfilename)) {
        let name = shown(&sibling.rfilename);
        return Err(Fault::Untrusted(format!("its listing has a file `{name}`, which is not a path in a repository")));
    }
    let mut names = siblings.iter().map(|sibling| sibling.rfilename.as_str());
    let has_safetensors = names.any(|name| name.ends_with(".safetensors") && !name.contains('/'));
    let of_torch = if has_safetensors { &[][..] } else { &TORCH };
    let (wanted, unwanted) = (globs([WANTED, of_torch].concat()), globs(UNWANTED.to_vec()));
    let needed = |sibling: &Sibling| wanted.is_match(&sibling.rfilename) && !unwanted.is_match(&sibling.rfilename);
    let checked = |Sibling { rfilename: name, size, lfs }: Sibling| {
        let (sha256, lfs_size) = lfs.map_or((None, None), |lfs| (lfs.sha256, lfs.size));
        if let Some(sha256) = sha256.as_deref().filter(|hash| !names::is_sha256(hash)) {
            let reason = format!("its listing has the sha256 `{}` for `{name}`, expected 64 hex digits", shown(sha256));
            return Err(Fault::Untrusted(reason));
        }
        Ok(Wanted { name, size: lfs_size.or(size), sha256 })
    };
    siblings.into_iter().filter(needed).map(checked).collect()
}

fn globs(patterns: Vec<&str>) -> GlobSet {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        set.add(Glob::new(pattern).expect("invariant: the patterns of this file are globs"));
    }
    set.build().expect("invariant: the patterns of this file are globs")
}

/// Calls `action` again where the network failed.
fn retried<T>(mut action: impl FnMut() -> Result<T>) -> Result<T> {
    for n_failed in 1..N_TRIES {
        match action() {
            Err(Fault::Network(reason)) => tracing::debug!("try {n_failed} of {N_TRIES}: {reason}"),
            result => return result,
        }
        std::thread::sleep(PAUSE * n_failed);
    }
    action()
}

fn local(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Fault {
    let error = io(action, path);
    move |source| Fault::Local(error(source))
}

struct Transfer<'a> {
    repo: &'a Repo,
    /// The folder of the repository in the cache.
    root: PathBuf,
    locks: PathBuf,
    commit: &'a str,
    client: &'a Client,
    stage: Box<dyn Stage>,
}

impl Transfer<'_> {
    /// Downloads several files at a time. A failure stops the rest. If several fail, the failure of the earliest
    /// file is reported: the files before it had begun, and are waited for.
    fn all(&self, files: Vec<Wanted>) -> Result<()> {
        let n_workers = N_WORKERS.min(files.len());
        let queue = Mutex::new(VecDeque::from_iter(files.into_iter().enumerate()));
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let work = || {
            while let Some((at, file)) = next() {
                let mut reported = 0;
                if let Err(fault) = retried(|| self.one(&file, &mut reported)) {
                    queue.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    return Some((at, fault));
                }
            }
            None
        };
        let faults = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..n_workers).map(|_| scope.spawn(work)).collect();
            let ends = workers.into_iter().map(|worker| worker.join().expect("invariant: a transfer does not panic"));
            ends.collect::<Vec<_>>()
        });
        faults.into_iter().flatten().min_by_key(|(at, _)| *at).map_or(Ok(()), |(_, fault)| Err(fault))
    }

    /// Brings one file into the cache; `reported` are its bytes that are already counted as progress.
    fn one(&self, file: &Wanted, reported: &mut u64) -> Result<()> {
        let known =
            file.sha256.as_deref().map(|name| self.lock(name).map(|lock| (name.to_string(), lock))).transpose()?;
        let partial = known.as_ref().map(|(name, _)| self.partial(name));
        if let Some((name, _)) = known.as_ref().filter(|(name, _)| self.has_blob(name, file.size)) {
            return self.link(&file.name, name);
        }
        // The remains of an earlier run are continued only if a hash can verify the result.
        let begun = partial.as_ref().and_then(|path| fs::metadata(path).ok()).map_or(0, |metadata| metadata.len());
        let begin = if file.size.is_some_and(|size| begun < size) { begun } else { 0 };
        let mut answer = self.client.file(&self.repo.url(), self.commit, &file.name, begin)?;
        let etag = self.checked(&answer, file)?;
        let (name, _lock) = match known {
            Some(known) => known,
            None => (etag.clone(), self.lock(&etag)?),
        };
        if !self.has_blob(&name, file.size.or(answer.size)) {
            let begin = answer.begin;
            if let Err(fault) = self.write(&mut answer, file, (&name, &etag), reported) {
                let Fault::Untrusted(reason) = fault else { return Err(fault) };
                // It cannot be continued. A missing file is not an error.
                let _ = fs::remove_file(self.partial(&name));
                let is_ours = begin > 0;
                return Err(if is_ours {
                    Fault::Network(format!("after a restart {reason}"))
                } else {
                    Fault::Untrusted(reason)
                });
            }
        }
        self.link(&file.name, &name)
    }

    /// The ETag of an answer, checked so that it may be part of a path.
    fn checked(&self, answer: &Answer, file: &Wanted) -> Result<String> {
        let name = &file.name;
        if let Some(commit) = answer.commit.as_deref().filter(|&commit| commit != self.commit) {
            let reason =
                format!("it has `{name}` at commit `{}`, not at `{}` as asked for", shown(commit), self.commit);
            return Err(Fault::Untrusted(reason));
        }
        if let (Some(listed), Some(size)) = (file.size, answer.size)
            && listed != size
        {
            return Err(Fault::Untrusted(format!("its listing has {listed} bytes for `{name}`, its answer {size}")));
        }
        let etag = answer.etag.as_deref().ok_or_else(|| Fault::Refused(format!("`{name}` comes without an ETag")))?;
        let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
        if !names::is_etag(etag) {
            return Err(Fault::Untrusted(format!("it sends the ETag `{}` for `{name}`, expected a hash", shown(etag))));
        }
        Ok(etag.to_string())
    }

    /// Writes a body beside its blob, and makes it the blob when its size and its hashes are right.
    fn write(&self, answer: &mut Answer, file: &Wanted, (name, etag): (&str, &str), reported: &mut u64) -> Result<()> {
        let (path, blob) = (self.partial(name), self.blob(name));
        let folder = path.parent().expect("invariant: a blob lies in a folder");
        fs::create_dir_all(folder).map_err(local("create", folder))?;
        let mut hasher = Sha256::new();
        let mut chunk = vec![0; 1 << 18];
        let mut out = OpenOptions::new();
        out.read(true).write(true).create(true).truncate(answer.begin == 0);
        let mut out = out.open(&path).map_err(local("open", &path))?;
        let mut at = 0;
        while at < answer.begin {
            let n = (&out).take(answer.begin - at).read(&mut chunk).map_err(local("read", &path))?;
            if n == 0 {
                return Err(Fault::Network(format!("`{}` has become shorter", path.display())));
            }
            hasher.update(&chunk[..n]);
            at += n as u64;
        }
        let size = file.size.or(answer.size);
        loop {
            let cut = |e| Fault::Network(format!("`{}` ended after {at} bytes: {e}", file.name));
            let n = answer.read(&mut chunk).map_err(cut)?;
            if n == 0 {
                break;
            }
            at += n as u64;
            if let Some(size) = size.filter(|&size| at > size) {
                return Err(Fault::Untrusted(format!("it sends more than the {size} bytes of `{}`", file.name)));
            }
            hasher.update(&chunk[..n]);
            out.write_all(&chunk[..n]).map_err(local("write", &path))?;
            self.stage.advance(at.saturating_sub(*reported));
            *reported = at.max(*reported);
        }
        if let Some(size) = size.filter(|&size| at < size) {
            return Err(Fault::Network(format!("`{}` ended after {at} of {size} bytes", file.name)));
        }
        let found = hex(&hasher.finalize());
        let promised = file.sha256.as_deref().into_iter().chain(names::is_sha256(etag).then_some(etag));
        if let Some(expected) = promised.into_iter().find(|&expected| expected != found) {
            let reason = format!("it sends `{}` with the sha256 `{found}`, expected `{expected}`", file.name);
            return Err(Fault::Untrusted(reason));
        }
        drop(out);
        fs::rename(&path, &blob).map_err(local("write", &blob))
    }

    fn blob(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(name)
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{name}.incomplete"))
    }

    fn has_blob(&self, name: &str, size: Option<u64>) -> bool {
        fs::metadata(self.blob(name)).is_ok_and(|metadata| size.is_none_or(|size| metadata.len() == size))
    }

    /// Waits for others who download the same content, `huggingface_hub` among them.
    fn lock(&self, name: &str) -> Result<File> {
        fs::create_dir_all(&self.locks).map_err(local("create", &self.locks))?;
        let path = self.locks.join(format!("{name}.lock"));
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(local("open", &path))?;
        file.lock().map_err(local("lock", &path))?;
        Ok(file)
    }

    /// Shows a blob under its name in the snapshot.
    fn link(&self, name: &str, blob: &str) -> Result<()> {
        let link = self.root.join("snapshots").join(self.commit).join(name);
        let folder = link.parent().expect("invariant: a link lies in a folder");
        fs::create_dir_all(folder).map_err(local("create", folder))?;
        // One whose blob was removed.
        let _ = fs::remove_file(&link);
        let up = "../".repeat(2 + name.matches('/').count());
        let linked = link_or_copy(Path::new(&format!("{up}blobs/{blob}")), &self.blob(blob), &link);
        linked.or_else(|e| if link.exists() { Ok(()) } else { Err(e) }).map_err(local("write", &link))
    }
}

#[cfg(unix)]
fn link_or_copy(relative: &Path, _blob: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(relative, link)
}

/// Creating links on Windows needs a privilege that few users have, so the blob is copied.
#[cfg(not(unix))]
fn link_or_copy(_relative: &Path, blob: &Path, link: &Path) -> std::io::Result<()> {
    fs::copy(blob, link).map(|_| ())
}

impl From<CheckpointError> for Fault {
    fn from(error: CheckpointError) -> Self {
        Self::Local(error)
    }
}
