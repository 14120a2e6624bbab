//! Checkpoints named by hub id: downloaded once into the Hugging Face cache, checked, then opened as a folder.
//!
//! The cache has the layout of `huggingface_hub`, through `hf-hub`: blobs by hash, snapshots of links to them, refs.
//! Requests and files are handled here, because strings of a server become parts of paths: `names` checks each before
//! anything is written.

#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod environment;
mod names;
#[cfg(feature = "hub")]
mod snapshot;

use std::path::{Path, PathBuf};

use super::error::{CheckpointError, Result};
use super::paths::{file_name, is_weight_file};
use crate::progress::Progress;

/// The folder that the user named: a path is taken as it is, `org/name` is downloaded from the hub.
///
/// # Errors
/// The revision is not a valid name, the id does not exist, the network fails, the server sends names that are not
/// safe, or the cache is incomplete while offline.
pub fn resolve(model: &str, revision: &str, progress: &dyn Progress) -> Result<PathBuf> {
    if !names::is_revision(revision) {
        return Err(CheckpointError::Revision { revision: names::shown(revision) });
    }
    let path = Path::new(model);
    // A name that ends like a file of weights is a path: it is not looked for on the hub.
    if path.exists() || !names::is_hub_id(model) || is_weight_file(&file_name(path)) {
        return Ok(path.to_path_buf());
    }
    download(model, revision, progress)
}

#[cfg(not(feature = "hub"))]
fn download(id: &str, _revision: &str, _progress: &dyn Progress) -> Result<PathBuf> {
    Err(CheckpointError::HubDisabled { id: id.into() })
}

/// Without a network an earlier download serves as well; opening it shows whether it is complete.
#[cfg(feature = "hub")]
fn download(id: &str, revision: &str, progress: &dyn Progress) -> Result<PathBuf> {
    use client::{Client, Fault};

    let cache = environment::cache();
    let repo = hf_hub::Repo::with_revision(id.into(), hf_hub::RepoType::Model, revision.into());
    let fail = |fault: Fault| {
        let (id, revision) = (id.to_string(), revision.to_string());
        match fault {
            Fault::Network(reason) => CheckpointError::Hub { id, revision, reason, network: true },
            Fault::Refused(reason) => CheckpointError::Hub { id, revision, reason, network: false },
            Fault::Untrusted(reason) => CheckpointError::HubUntrusted { id, server: environment::endpoint(), reason },
            Fault::Local(error) => error,
        }
    };
    if environment::is_offline() {
        return snapshot::cached(&repo, &cache).map_err(fail);
    }
    let client = Client::new(environment::endpoint(), environment::token(), environment::timeout()).map_err(fail)?;
    match snapshot::download(&repo, &cache, &client, progress) {
        Ok(folder) => Ok(folder),
        Err(Fault::Network(reason)) => match snapshot::cached(&repo, &cache) {
            Ok(folder) => {
                tracing::warn!("the hub cannot be reached ({reason}): using the cached `{id}`");
                Ok(folder)
            }
            Err(_) => Err(fail(Fault::Network(reason))),
        },
        Err(fault) => Err(fail(fault)),
    }
}
