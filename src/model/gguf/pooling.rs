//! The pooling of an encoder: a number in GGUF files, and modules of sentence-transformers beside a checkpoint.

use serde_json::{Value as Json, json};

use super::super::architectures::gguf::Family;
use crate::checkpoint::MadeFiles;
use crate::codecs::gguf::Description;

/// The key of the pooling, below the architecture.
pub const KEY: &str = "pooling_type";

/// Poolings that llama.cpp has: the name in `1_Pooling/config.json`, the flag of older files there, and the number.
const POOLINGS: [(&str, &str, u32); 3] = [
    ("mean", "pooling_mode_mean_tokens", 1),
    ("cls", "pooling_mode_cls_token", 2),
    ("lasttoken", "pooling_mode_lasttoken", 3),
];

/// The number of a pooling; `None` if llama.cpp has no such pooling.
pub fn number(name: &str) -> Option<u32> {
    POOLINGS.iter().find(|(own, ..)| *own == name).map(|(.., number)| *number)
}

/// The names of all poolings that llama.cpp has.
pub fn names() -> impl Iterator<Item = &'static str> {
    POOLINGS.iter().map(|(name, ..)| *name)
}

/// The modules that pool states as a file says, and scale embeddings to length 1, as tools of llama.cpp do by
/// default; none if the file does not pool.
///
/// # Errors
/// A clause: the pooling is not known.
pub(super) fn files(description: &Description<'_>, family: &Family) -> Result<MadeFiles, String> {
    let key = format!("{}.{KEY}", family.architecture);
    let Some(number) = description.number(&key).filter(|&number| number != 0.0) else { return Ok(MadeFiles::new()) };
    let (_, flag, _) = POOLINGS.iter().find(|(.., own)| f64::from(*own) == number).ok_or_else(|| {
        format!("it pools states in the way {number} (`{key}`), and lrc knows 1 (mean), 2 (first) and 3 (last)")
    })?;
    let module = |(idx, path, class): (usize, &str, &str)| {
        let class = format!("sentence_transformers.models.{class}");
        json!({"idx": idx, "name": idx.to_string(), "path": path, "type": class})
    };
    let modules = [(0, "", "Transformer"), (1, "1_Pooling", "Pooling"), (2, "2_Normalize", "Normalize")].map(module);
    let mut config = json!({});
    if let Some(width) = description.count(&format!("{}.embedding_length", family.architecture)) {
        config["word_embedding_dimension"] = width.into();
    }
    for (_, other, _) in POOLINGS {
        config[other] = (other == *flag).into();
    }
    let file = |(name, json): (&str, Json)| {
        serde_json::to_vec_pretty(&json).map(|bytes| (name.to_string(), bytes)).map_err(|e| e.to_string())
    };
    [("modules.json", json!(modules)), ("1_Pooling/config.json", config)].into_iter().map(file).collect()
}
