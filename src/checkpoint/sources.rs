//! The files that a checkpoint reads besides its own, and their hashes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::Result;
use super::hash::{Fingerprint, sha256_file};
use super::joined::{ADAPTER, Joined};
use super::open::Checkpoint;
use super::paths::file_name;
use super::reader::Shard;

impl Checkpoint {
    /// Appends the shards of another checkpoint.
    pub(super) fn join(&mut self, joined: Joined, shards: Vec<Arc<Shard>>) {
        self.joined.push(joined);
        self.shards.extend(shards);
    }

    /// The name of a shard in fingerprints.
    pub(super) fn shard_name(&self, shard_idx: usize) -> String {
        let path = self.shards[shard_idx].path();
        let owner = self.joined.iter().rev().find(|joined| shard_idx >= joined.first_shard);
        owner.map_or_else(|| file_name(path), |joined| joined.named(path))
    }

    /// The folder of the adapter that is merged into the model, if there is one.
    pub fn adapter(&self) -> Option<&Path> {
        self.joined.iter().find(|joined| joined.label == ADAPTER).map(|joined| joined.root.as_path())
    }

    /// SHA-256 of the files of the adapter, by file name.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn adapter_files(&self) -> Result<Fingerprint> {
        let Some(at) = self.joined.iter().position(|joined| joined.label == ADAPTER) else {
            return Ok(Fingerprint::new());
        };
        let end = self.joined.get(at + 1).map_or(self.shards.len(), |next| next.first_shard);
        let shards = self.shards[self.joined[at].first_shard..end].iter().map(|shard| shard.path());
        let files = shards.chain(self.joined[at].files.iter().map(PathBuf::as_path));
        files.map(|file| Ok((file_name(file), sha256_file(file)?))).collect()
    }

    /// The folders that are read: its own, and the folders of an adapter or a base.
    pub fn roots(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.root.as_path()).chain(self.joined.iter().map(|joined| joined.root.as_path()))
    }
}
