//! Files of an output folder under construction, except weights.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use rayon::prelude::*;

use super::error::{OutputError, Result, io};
use super::folder::OutputFolder;
use super::hash::{Fingerprint, sha256_file};
use super::place::{create_file, names_in, nearest_folder};
use super::reader::expect_file;

impl OutputFolder {
    /// Fails early if the disk cannot hold `needed` more bytes.
    ///
    /// # Errors
    /// [`OutputError::NoSpace`].
    pub fn require_space(&self, needed: u64) -> Result<()> {
        require(&self.partial, &self.target, needed)
    }

    /// The same for a folder that is not begun, and may not exist.
    ///
    /// # Errors
    /// [`OutputError::NoSpace`].
    pub fn check_space(target: &Path, needed: u64) -> Result<()> {
        require(if target.is_dir() { target } else { nearest_folder(target) }, target, needed)
    }

    /// Writes and syncs one small file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path().join(name);
        let mut file = create_file(&path).map_err(io("create", &path))?;
        file.write_all(bytes).map_err(io("write", &path))?;
        file.sync_all().map_err(io("sync", &path))
    }

    /// Copies a file of the source to `name`, which may be in folders.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn copy(&self, source: &Path, name: &Path) -> Result<()> {
        let path = self.path().join(name);
        self.create_folder(name.parent().unwrap_or(Path::new("")))?;
        expect_file(source)?;
        let mut from = File::open(source).map_err(io("open", source))?;
        let mut to = create_file(&path).map_err(io("create", &path))?;
        std::io::copy(&mut from, &mut to).map_err(io("write", &path))?;
        to.sync_all().map_err(io("sync", &path))
    }

    /// Makes a folder of the output.
    pub fn create_folder(&self, name: &Path) -> Result<()> {
        let path = self.path().join(name);
        fs::create_dir_all(&path).map_err(io("create", &path))
    }

    /// SHA-256 of every file so far except `report`, including those in folders. The report lists the others, and a run
    /// that was killed at its end may have left one.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn hashes(&self, report: &str) -> Result<Fingerprint> {
        let output = self.path();
        let mut files = Vec::new();
        let mut folders = vec![output.clone()];
        while let Some(at) = folders.pop() {
            for path in names_in(&at)?.into_iter().map(|name| at.join(name)) {
                if path.is_dir() { folders.push(path) } else { files.push(path) }
            }
        }
        files.retain(|path| *path != output.join(report));
        let name = |path: &Path| path.strip_prefix(&output).unwrap_or(path).to_string_lossy().into_owned();
        files.par_iter().map(|path| Ok((name(path), sha256_file(path)?))).collect()
    }
}

/// Checks that the disk of `folder` has `needed` free bytes for the output `target`.
fn require(folder: &Path, target: &Path, needed: u64) -> Result<()> {
    let available = fs4::available_space(folder).map_err(io("measure the disk of", folder))?;
    if available < needed {
        return Err(OutputError::NoSpace { path: target.into(), needed, available }.into());
    }
    Ok(())
}
