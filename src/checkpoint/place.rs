//! Decides where outputs may be written. Everything is checked before any work, and no link is followed to a file
//! that is written.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use super::error::{CheckpointError, OutputError, Result, io};
use super::paths::folder_of;

/// The folder that a run works in, inside of an output folder that has to stay where it is.
pub(super) const WITHIN: &str = ".lrc-partial";
/// Present in the root of a new file system.
const LOST_AND_FOUND: &str = "lost+found";

pub(super) fn unusable(path: &Path, reason: impl Into<String>) -> CheckpointError {
    OutputError::Unusable { path: path.into(), reason: reason.into() }.into()
}

fn unusable_file(path: &Path, reason: impl Into<String>) -> CheckpointError {
    OutputError::UnusableFile { path: path.into(), reason: reason.into() }.into()
}

/// An output folder by its plain name: without a slash or a `.` at its end. `.` and `..` become
/// the folder that they name.
pub(super) fn named(target: &Path) -> PathBuf {
    let plain: PathBuf = target.components().collect();
    match plain.components().next_back() {
        Some(Component::Normal(_)) => plain,
        _ => fs::canonicalize(&plain).unwrap_or(plain),
    }
}

/// Refuses a path that cannot become an output folder: a dangling link, a file, an empty name, a folder above it that
/// takes no files. Returns whether the folder exists.
///
/// # Errors
/// The path cannot; the error gives the reason.
pub fn expect_folder(target: &Path) -> Result<bool> {
    let exists = exists(target)?;
    if exists && !target.is_dir() {
        return Err(unusable(target, "it is not a folder"));
    }
    if !exists && target.file_name().is_none() {
        return Err(unusable(target, "it does not name a folder"));
    }
    expect_way_down(target)?;
    if !exists {
        expect_writable(target, nearest_folder(target))?;
    }
    Ok(exists)
}

/// Refuses `..` behind a folder that does not exist: missing folders are only made on the way down.
fn expect_way_down(target: &Path) -> Result<()> {
    let mut above = PathBuf::new();
    for part in target.components() {
        if part == Component::ParentDir && !above.as_os_str().is_empty() && !above.is_dir() {
            return Err(unusable(target, format!("there is no folder `{}`", above.display())));
        }
        above.push(part);
    }
    Ok(())
}

/// The nearest folder above a path that exists.
pub(super) fn nearest_folder(path: &Path) -> &Path {
    let above = path.ancestors().skip(1).find(|above| above.exists());
    above.unwrap_or(Path::new(if path.is_absolute() { "/" } else { "." }))
}

/// Refuses an output in a folder that takes no files.
fn expect_writable(output: &Path, folder: &Path) -> Result<()> {
    // A file without a name, which is gone at once.
    tempfile::tempfile_in(folder).map(drop).map_err(not_made(output, folder))
}

/// The error for a file or a folder that cannot be made in `folder`: the fault of the command,
/// if the folder takes none.
pub(super) fn not_made(output: &Path, folder: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    use ErrorKind::{NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem, Unsupported};
    let (path, folder) = (output.to_path_buf(), folder.to_path_buf());
    move |error| match error.kind() {
        NotADirectory | NotFound | PermissionDenied | ReadOnlyFilesystem | Unsupported => {
            OutputError::Unwritable { path, folder, reason: error.to_string() }.into()
        }
        _ => CheckpointError::Io { action: "create a file in", path: folder, source: error },
    }
}

/// Whether the path exists; a dangling link is refused.
fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(unusable(path, e.to_string())),
        Ok(found) if found.is_symlink() && !path.exists() => Err(unusable(path, "it is a link that leads nowhere")),
        Ok(_) => Ok(true),
    }
}

/// The error for an existing folder with files that lrc did not write.
pub(super) fn foreign(target: &Path) -> CheckpointError {
    unusable(target, "it exists, and is not an output of lrc")
}

/// How an existing output is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and its place is refused.
    Refuse,
    /// It is replaced, if lrc wrote it.
    Replace,
}

impl Existing {
    /// The treatment by `--force`.
    pub fn of(force: bool) -> Self {
        if force { Self::Replace } else { Self::Refuse }
    }
}

/// Checks that a file may be written: it is not there or may be replaced, and its folder, or the nearest one above
/// that exists, takes files.
///
/// # Errors
/// It may not; the error gives the reason.
pub fn check_file(path: &Path, existing: Existing) -> Result<()> {
    let is_there = exists(path)?;
    let typed = path.as_os_str().as_encoded_bytes();
    if path.is_dir() || typed.ends_with(b"/") || typed.ends_with(b"/.") {
        return Err(unusable_file(path, "it is a folder, and a file is to be written"));
    }
    if is_there && !path.is_file() {
        return Err(unusable_file(path, "it is a device or a pipe, and a file is to be written"));
    }
    if is_there && existing == Existing::Refuse {
        return Err(OutputError::FileExists { path: path.into() }.into());
    }
    expect_way_down(path)?;
    expect_writable(path, nearest_folder(path))
}

/// Makes the folder of a file that is to be written, with all missing folders above it.
///
/// # Errors
/// The disk is full, or a folder takes no folders.
pub(crate) fn create_folder_of(file: &Path) -> Result<()> {
    let folder = folder_of(file);
    fs::create_dir_all(folder).map_err(io("create", folder))
}

/// Refuses an output that is, or holds, something that the same command reads, whatever may be replaced.
///
/// # Errors
/// The output is, or contains, such a path.
pub fn expect_apart<'a>(output: &Path, reads: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    // A path that does not exist holds nothing.
    let Ok(own) = fs::canonicalize(output) else { return Ok(()) };
    match reads.into_iter().find(|read| fs::canonicalize(read).is_ok_and(|read| read.starts_with(&own))) {
        Some(read) => Err(unusable(output, format!("`{}` is read by the same command", read.display()))),
        None => Ok(()),
    }
}

/// Names in a folder, in order.
pub(super) fn names_in(folder: &Path) -> Result<Vec<std::ffi::OsString>> {
    let entries = fs::read_dir(folder).map_err(io("list", folder))?;
    let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
    let mut names = names.collect::<std::io::Result<Vec<_>>>().map_err(io("list", folder))?;
    names.sort();
    Ok(names)
}

/// Names in an output folder, except those that are never part of an output.
pub(super) fn output_names(target: &Path) -> Result<Vec<std::ffi::OsString>> {
    let mut names = names_in(target)?;
    names.retain(|name| name != WITHIN && name != LOST_AND_FOUND);
    Ok(names)
}

/// Whether a folder exists and is empty, except for names that no output has.
pub(super) fn is_vacant(target: &Path) -> bool {
    target.is_dir() && output_names(target).is_ok_and(|names| names.is_empty())
}

/// The work folder for a target: beside it, and renamed at the end; or inside it, if the folder exists and has to stay
/// because it is mounted, or a link, or may be in use.
pub(super) fn work_of(target: &Path) -> PathBuf {
    let within = target.join(WITHIN);
    let mut beside = target.as_os_str().to_owned();
    beside.push(".partial");
    let beside = PathBuf::from(beside);
    let has_to_stay = || target.is_symlink() || is_vacant(target) || is_mounted(target);
    if within.is_dir() || (target.is_dir() && !beside.exists() && has_to_stay()) { within } else { beside }
}

#[cfg(unix)]
fn is_mounted(folder: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(path) = fs::canonicalize(folder) else { return false };
    let device = |path: &Path| fs::metadata(path).ok().map(|found| found.dev());
    if path.parent().is_none_or(|parent| device(parent) != device(&path)) {
        return true;
    }
    // A folder of the same device may be a bind mount; Linux lists it, with octal escapes for blanks.
    let Some(name) = path.to_str() else { return false };
    let escaped = [('\\', r"\134"), (' ', r"\040"), ('\t', r"\011"), ('\n', r"\012")]
        .iter()
        .fold(name.to_string(), |name, (blank, number)| name.replace(*blank, number));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(escaped.as_str()))
}

#[cfg(not(unix))]
fn is_mounted(_: &Path) -> bool {
    false
}

/// Refuses a work folder that contains anything but files and folders: lrc makes no links there, so another program
/// did.
pub(super) fn refuse_links(work: &Path) -> Result<()> {
    let mut paths = vec![work.to_path_buf()];
    while let Some(path) = paths.pop() {
        let found = match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            found => found.map_err(io("look at", &path))?,
        };
        if found.is_dir() {
            paths.extend(names_in(&path)?.into_iter().map(|name| path.join(name)));
        } else if !found.is_file() {
            return Err(OutputError::StrangeWork { path, work: work.into() }.into());
        }
    }
    Ok(())
}

/// How files are opened for writing: a link in their place is an error.
fn to_write() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW);
    options
}

/// Opens a file to write parts of it; the rest keeps its content.
pub(crate) fn open_to_write(path: &Path) -> Result<File> {
    to_write().truncate(false).open(path).map_err(io("create", path))
}

/// Creates a file, or empties it.
pub(crate) fn create_file(path: &Path) -> std::io::Result<File> {
    to_write().truncate(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_what_says_nothing() {
        for (given, expected) in [("out/", "out"), ("./out/.", "./out"), ("a//b/./", "a/b"), ("a/../b/", "a/../b")] {
            assert_eq!(named(Path::new(given)).as_os_str(), expected, "{given}");
        }
        let here = std::env::current_dir().unwrap();
        assert_eq!(named(Path::new(".")), here.canonicalize().unwrap());
        assert_eq!(Some(named(Path::new("..")).as_path()), here.canonicalize().unwrap().parent());
        assert_eq!((folder_of(Path::new("x")), folder_of(Path::new("a/x"))), (Path::new("."), Path::new("a")));
    }

    #[test]
    #[cfg(unix)]
    fn no_link_is_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "kept").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(create_file(&link).is_err() && open_to_write(&link).is_err());
        assert_eq!(fs::read(&file).unwrap(), b"kept");
        assert!(matches!(refuse_links(folder.path()), Err(CheckpointError::Output(OutputError::StrangeWork { .. }))));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn mounted_folders_are_known() {
        assert!(is_mounted(Path::new("/proc")) && is_mounted(Path::new("/")));
        assert!(!is_mounted(tempfile::tempdir().unwrap().path()));
    }
}
