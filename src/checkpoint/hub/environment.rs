//! The variables that `huggingface_hub` documents; `hf-hub` 0.5 reads `HF_HOME` alone.

use std::path::PathBuf;
use std::time::Duration;

use hf_hub::Cache;

const ENDPOINT: &str = "https://huggingface.co";

/// A connection that transfers no byte for this long is dead, unless `HF_HUB_DOWNLOAD_TIMEOUT` says otherwise. A
/// transfer may take as long as it needs.
const TIMEOUT: Duration = Duration::from_secs(60);

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
}

/// `HF_ENDPOINT`, without the slash at its end.
pub(super) fn endpoint() -> String {
    variable("HF_ENDPOINT").map_or_else(|| ENDPOINT.into(), |endpoint| endpoint.trim_end_matches('/').into())
}

/// `HF_HUB_CACHE`, else `hub` in [`home`].
pub(super) fn cache() -> Cache {
    let named = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
    named.map_or_else(home, |path| Cache::new(path.into()))
}

/// The cache in `HF_HOME`, else in `huggingface` below `XDG_CACHE_HOME`, else below `~/.cache`.
fn home() -> Cache {
    let hidden = || std::env::home_dir().unwrap_or_else(std::env::temp_dir).join(".cache");
    let caches = || variable("XDG_CACHE_HOME").map_or_else(hidden, PathBuf::from);
    let home = variable("HF_HOME").map_or_else(|| caches().join("huggingface"), PathBuf::from);
    Cache::new(home.join("hub"))
}

/// `HF_TOKEN`, else the file that `hf auth login` writes.
pub(super) fn token() -> Option<String> {
    if variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return None;
    }
    let in_file = || {
        let named = variable("HF_TOKEN_PATH").and_then(|path| std::fs::read_to_string(path).ok());
        let token = named.map(|token| token.trim().to_string()).filter(|token| !token.is_empty());
        token.or_else(|| home().token())
    };
    variable("HF_TOKEN").or_else(in_file)
}

pub(super) fn is_offline() -> bool {
    variable("HF_HUB_OFFLINE").is_some_and(|v| matches!(v.to_lowercase().as_str(), "1" | "true" | "yes" | "on"))
}

pub(super) fn timeout() -> Duration {
    let seconds = variable("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|v| v.parse().ok()).filter(|&seconds| seconds > 0);
    seconds.map_or(TIMEOUT, Duration::from_secs)
}
