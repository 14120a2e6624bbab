//! Checkpoints named by hub id: downloaded once into the Hugging Face cache, checked, then opened as a folder.
//!
//! `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` and `HF_ENDPOINT` are read by `hf-hub`; `HF_HUB_OFFLINE` is mapped here.

use std::path::{Path, PathBuf};

use super::error::{CheckpointError, Result};
use crate::progress::Progress;

/// Turns what the user typed into a folder: a path as it is, `org/name` downloaded from the hub.
///
/// # Errors
/// The id does not exist, the network fails, or the cache is incomplete while offline.
pub fn resolve(model: &str, revision: &str, progress: &dyn Progress) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() || !is_hub_id(model) {
        return Ok(path.to_path_buf());
    }
    download(model, revision, progress)
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
fn download(id: &str, _revision: &str, _progress: &dyn Progress) -> Result<PathBuf> {
    Err(CheckpointError::HubDisabled { id: id.into() })
}

#[cfg(feature = "hub")]
use client::download;

#[cfg(feature = "hub")]
mod client {
    use std::collections::BTreeMap;
    use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
    use std::sync::{Arc, Mutex, MutexGuard};
    use std::time::{Duration, Instant};

    use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
    use hf_hub::{HFClient, HFError};

    use super::*;

    /// What a checkpoint needs, in all its folders (`*` goes over `/`), and whatever is in those of modules of
    /// sentence-transformers, `1_Pooling` say; weights of other frameworks are not downloaded.
    const WANTED: &[&str] =
        &["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "[0-9]*_*/*"];
    /// Second copies of the weights, in folders that are no modules or in Mistral's own form, and what lies beside those of others.
    const UNWANTED: &[&str] = &[
        "[!0-9]*/*.safetensors*",
        "consolidated*",
        "onnx/*",
        "openvino/*",
        "original/*",
        "metal/*",
        "coreml/*",
        "checkpoint-*/*",
        "runs/*",
        ".*",
    ];

    /// A socket without a byte for this long is dead, unless `HF_HUB_DOWNLOAD_TIMEOUT` says otherwise; a transfer may
    /// take as long as it wants.
    const READ_TIMEOUT: Duration = Duration::from_secs(60);
    /// Read timeouts without any sign of life until the whole transfer is given up: retries have had their chance.
    const PATIENCE: u32 = 5;
    const POLL: Duration = Duration::from_millis(200);

    pub(super) fn download(id: &str, revision: &str, progress: &dyn Progress) -> Result<PathBuf> {
        let fail = |network: bool, reason: String| {
            Err(CheckpointError::Hub { id: id.into(), revision: revision.into(), network, reason })
        };
        let is_offline = std::env::var("HF_HUB_OFFLINE")
            .is_ok_and(|v| matches!(v.to_lowercase().as_str(), "1" | "true" | "yes" | "on"));
        let seconds = std::env::var("HF_HUB_DOWNLOAD_TIMEOUT").ok().and_then(|v| v.parse().ok());
        let read_timeout = seconds.map_or(READ_TIMEOUT, Duration::from_secs);

        // On a thread of its own: parts of the transfer have no timeout, and then it is left behind.
        let counter = Arc::new(Counter::default());
        let (sender, receiver) = mpsc::channel();
        let (own_id, own_revision, own_counter) = (id.to_string(), revision.to_string(), Arc::clone(&counter));
        std::thread::spawn(move || {
            // The receiver is gone when the transfer was given up.
            let _ = sender.send(snapshot(&own_id, &own_revision, is_offline, read_timeout, &own_counter));
        });
        let (is_cut_off, reason) = match watch(&receiver, &counter, progress, PATIENCE * read_timeout) {
            Some(Ok(folder)) => return Ok(folder),
            Some(Err(error)) => (is_network(&error), reason(&error)),
            None => (true, "the server does not answer".to_string()),
        };
        if is_cut_off && !is_offline {
            // What was downloaded before is as good; whether it is whole is seen when it is opened.
            if let Ok(folder) = snapshot(id, revision, true, read_timeout, &counter) {
                tracing::warn!("the hub cannot be reached ({reason}): using the cached `{id}`");
                return Ok(folder);
            }
        }
        fail(is_cut_off, reason)
    }

    fn snapshot(
        id: &str,
        revision: &str,
        is_offline: bool,
        read_timeout: Duration,
        counter: &Arc<Counter>,
    ) -> Result<PathBuf, HFError> {
        let http = reqwest::Client::builder()
            .connect_timeout(read_timeout)
            .read_timeout(read_timeout)
            .user_agent(concat!("lrc/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|source| HFError::Request { source, url: None })?;
        let (org, name) = id.split_once('/').expect("invariant: a hub id has one slash");
        let patterns = |list: &[&str]| list.iter().map(|p| (*p).to_string()).collect::<Vec<_>>();
        HFClient::builder()
            .client(http)
            .build_sync()?
            .model(org, name)
            .snapshot_download()
            .revision(revision)
            .allow_patterns(patterns(WANTED))
            .ignore_patterns(patterns(UNWANTED))
            .local_files_only(is_offline)
            .progress(Arc::clone(counter))
            .send()
    }

    /// Bytes that have arrived, summed over files.
    #[derive(Default)]
    struct Counter(Mutex<Counts>);

    #[derive(Default)]
    struct Counts {
        n_events: u64,
        total: u64,
        files: BTreeMap<String, u64>,
        /// Of the hub's chunked store, which counts a batch of files together.
        batch: u64,
    }

    impl Counter {
        fn counts(&self) -> MutexGuard<'_, Counts> {
            self.0.lock().expect("invariant: counting does not panic")
        }
    }

    impl ProgressHandler for Counter {
        fn on_progress(&self, event: &ProgressEvent) {
            let ProgressEvent::Download(event) = event else { return };
            let mut counts = self.counts();
            counts.n_events += 1;
            match event {
                DownloadEvent::Start { total_bytes, .. } => counts.total = counts.total.max(*total_bytes),
                DownloadEvent::Progress { files } => {
                    counts.files.extend(files.iter().map(|f| (f.filename.clone(), f.bytes_completed)));
                }
                DownloadEvent::AggregateProgress { bytes_completed, .. } => counts.batch = *bytes_completed,
                DownloadEvent::Complete => {}
            }
        }
    }

    /// Waits for the transfer and tells `progress` of the bytes that arrive; none when nothing happens for `patience`.
    fn watch<T>(receiver: &Receiver<T>, counter: &Counter, progress: &dyn Progress, patience: Duration) -> Option<T> {
        let (mut stage, mut told) = (None, 0);
        let (mut last_event, mut alive) = (0, Instant::now());
        loop {
            match receiver.recv_timeout(POLL) {
                Ok(result) => return Some(result),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let counts = counter.counts();
            if counts.n_events > last_event {
                (last_event, alive) = (counts.n_events, Instant::now());
            } else if alive.elapsed() > patience {
                return None;
            }
            if counts.total > 0 {
                let stage = stage.get_or_insert_with(|| progress.stage("download", counts.total, "bytes"));
                let arrived = counts.files.values().sum::<u64>() + counts.batch;
                stage.advance(arrived.saturating_sub(told));
                told = told.max(arrived);
            }
        }
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
