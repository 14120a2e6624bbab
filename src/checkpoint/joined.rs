//! Files of others that a checkpoint reads with its own: an adapter over it, or the base that it is compared with.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::paths::file_name;

/// The label of the files of an adapter.
pub(super) const ADAPTER: &str = "adapter";

/// Files of another checkpoint.
#[derive(Debug, Clone)]
pub(super) struct Joined {
    /// Distinguishes its files from the checkpoint's in fingerprints.
    pub label: &'static str,
    /// Its folder.
    pub root: PathBuf,
    /// Its shards are those from this index up to the next one's.
    pub first_shard: usize,
    /// Its files besides the shards, which fingerprints cover too.
    pub files: Vec<PathBuf>,
}

impl Joined {
    /// The name of one of its files in a fingerprint.
    pub fn named(&self, file: &Path) -> String {
        format!("{}/{}", self.label, file_name(file))
    }
}

/// How tensors that are not presented as differences compare with the base.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// The base, as the user names it.
    pub base: String,
    /// Tensors with the same shape and other values.
    pub changed: BTreeSet<String>,
    /// Tensors with another shape, or absent from one of the two, with a clause that says so.
    pub unmatched: BTreeMap<String, String>,
}
