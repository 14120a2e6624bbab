//! Checkpoints named by hub id: downloaded once into the Hugging Face cache, checked, then opened as a folder.
//!
//! `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` and `HF_ENDPOINT` are read by `hf-hub`; `HF_HUB_OFFLINE` is mapped here.

use std::path::{Path, PathBuf};

use super::error::{CheckpointError, Result};

/// Turns what the user typed into a folder: a path as it is, `org/name` downloaded from the hub.
///
/// # Errors
/// The id does not exist, the network fails, or the cache is incomplete while offline.
pub fn resolve(model: &str, revision: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() || !is_hub_id(model) {
        return Ok(path.to_path_buf());
    }
    download(model, revision)
}

/// `org/name` in the characters that the hub allows.
fn is_hub_id(model: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    model.split_once('/').is_some_and(|(org, name)| is_part(org) && is_part(name))
}

#[cfg(not(feature = "hub"))]
fn download(id: &str, _revision: &str) -> Result<PathBuf> {
    Err(CheckpointError::HubDisabled { id: id.into() })
}

#[cfg(feature = "hub")]
fn download(id: &str, revision: &str) -> Result<PathBuf> {
    client::download(id, revision)
}

#[cfg(feature = "hub")]
mod client {
    use std::time::Duration;

    use hf_hub::{HFClient, HFError};

    use super::*;

    /// What a checkpoint needs; other frameworks' weights are not downloaded.
    const WANTED: &[&str] = &["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*"];

    /// A socket without a byte for this long is dead; a transfer may take as long as it wants.
    const READ_TIMEOUT: Duration = Duration::from_secs(60);
    const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

    pub(super) fn download(id: &str, revision: &str) -> Result<PathBuf> {
        let fail = |error: HFError| CheckpointError::Hub {
            id: id.into(),
            revision: revision.into(),
            network: is_network(&error),
            reason: reason(&error),
        };
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(concat!("lrc/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|source| fail(HFError::Request { source, url: None }))?;
        let (org, name) = id.split_once('/').expect("invariant: a hub id has one slash");
        let client = HFClient::builder().client(http).build_sync().map_err(fail)?;
        let is_offline = std::env::var("HF_HUB_OFFLINE")
            .is_ok_and(|v| matches!(v.to_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        client
            .model(org, name)
            .snapshot_download()
            .revision(revision)
            .allow_patterns(WANTED.iter().map(|p| (*p).to_string()).collect())
            .local_files_only(is_offline)
            .send()
            .map_err(fail)
    }

    fn is_network(error: &HFError) -> bool {
        match error {
            HFError::Http { context } => context.status.is_server_error(),
            HFError::Request { .. }
            | HFError::RateLimited { .. }
            | HFError::LocalEntryNotFound { .. }
            | HFError::CacheLockTimeout { .. }
            | HFError::Io(_) => true,
            _ => false,
        }
    }

    /// The error with its causes: a bare «request error» does not say that the connection was refused.
    fn reason(error: &HFError) -> String {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for (model, expected) in [
            ("org/name", true),
            ("HuggingFaceTB/SmolLM2-135M", true),
            ("name", false),
            ("./org/name", false),
            ("../name", false),
            ("a/b/c", false),
            ("/abs", false),
            ("org/", false),
        ] {
            assert_eq!(is_hub_id(model), expected, "{model}");
        }
    }
}
