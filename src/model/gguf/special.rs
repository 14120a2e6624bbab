//! Special tokens: their ids in configs, and the settings of a tokenizer and of generation.

use serde_json::{Map, Value as Json, json};

use super::tokens::{SENTENCEPIECE, TOKENS, WORDPIECE};
use crate::codecs::gguf::Description;

/// A special token.
struct Special {
    /// The key of its id in a file.
    key: &'static str,
    /// Its name in configs and settings.
    name: &'static str,
    /// The id that SentencePiece models and WordPiece models have without it.
    defaults: [Option<u64>; 2],
}

const SPECIAL: [Special; 6] = [
    Special { key: "bos", name: "bos", defaults: [Some(1), Some(101)] },
    Special { key: "eos", name: "eos", defaults: [Some(2), Some(102)] },
    Special { key: "unknown", name: "unk", defaults: [Some(0), Some(100)] },
    Special { key: "padding", name: "pad", defaults: [None, Some(0)] },
    Special { key: "seperator", name: "sep", defaults: [None, Some(102)] },
    Special { key: "mask", name: "mask", defaults: [None, Some(103)] },
];

/// The special tokens whose ids are in `config.json`.
const IN_CONFIG: [&str; 3] = ["bos", "eos", "pad"];

/// The id of a special token; `None` if the file has none, or it is beyond the vocabulary.
pub(super) fn id(description: &Description<'_>, name: &str) -> Option<u64> {
    let special = SPECIAL.iter().find(|special| special.key == name)?;
    let n_tokens = description.length(TOKENS)?;
    let given = description.count(&format!("tokenizer.ggml.{name}_token_id"));
    let kind = description.text("tokenizer.ggml.model");
    let kinds = [SENTENCEPIECE, WORDPIECE].into_iter().zip(special.defaults);
    let default = kinds.into_iter().find(|(own, _)| kind.as_deref() == Some(*own)).and_then(|(_, default)| default);
    given.filter(|&id| id < n_tokens).or(default)
}

/// The ids of special tokens in `config.json`; null where a class would have its own.
///
/// # Errors
/// A clause: a sequence would begin or end with something that is no token.
pub(super) fn ids(description: &Description<'_>) -> Result<Map<String, Json>, String> {
    for key in ["bos", "eos"].map(|name| format!("tokenizer.ggml.{name}_token_id")) {
        let Some(n_tokens) = description.length(TOKENS).filter(|_| description.keys().any(|other| other == key)) else {
            continue;
        };
        match description.count(&key) {
            Some(id) if id < n_tokens => {}
            Some(id) => return Err(format!("`{key}` is {id}, and it has {n_tokens} tokens (`{TOKENS}`)")),
            None => return Err(format!("`{key}` is not the id of a token")),
        }
    }
    let named = |special: &Special| (format!("{}_token_id", special.name), json!(id(description, special.key)));
    Ok(SPECIAL.iter().filter(|special| IN_CONFIG.contains(&special.name)).map(named).collect())
}

/// `tokenizer_config.json`.
pub(super) fn tokenizer_config(description: &Description<'_>, config: &Map<String, Json>) -> Json {
    let tokens = description.texts(TOKENS).unwrap_or_default();
    let mut settings = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    for Special { key, name, .. } in SPECIAL {
        let text = id(description, key).and_then(|id| tokens.get(usize::try_from(id).ok()?));
        if let Some(text) = text {
            settings[format!("{name}_token")] = text.as_str().into();
        }
    }
    if let Some(context) = config.get("max_position_embeddings").or(config.get("n_positions")) {
        settings["model_max_length"] = context.clone();
    }
    if let Some(template) = chat_template(description) {
        settings["chat_template"] = template;
    }
    settings
}

/// The chat template, or a list of templates by name if there are several.
fn chat_template(description: &Description<'_>) -> Option<Json> {
    let key = "tokenizer.chat_template";
    let default = description.text(key)?;
    let prefix = format!("{key}.");
    let others = description.keys().filter_map(|key| Some((key.strip_prefix(&prefix)?, description.text(key)?)));
    let others: Vec<(&str, String)> = others.collect();
    if others.is_empty() {
        return Some(default.into());
    }
    let named = std::iter::once(("default", default)).chain(others);
    Some(named.map(|(name, template)| json!({"name": name, "template": template})).collect())
}

/// `generation_config.json`. Turns and messages of some models have ends of their own.
pub(super) fn generation_config(description: &Description<'_>, config: &Map<String, Json>) -> Json {
    let mut generation = json!({});
    let given = |name: &str| config.get(name).filter(|id| !id.is_null()).cloned();
    for name in ["bos_token_id", "pad_token_id"] {
        if let Some(id) = given(name) {
            generation[name] = id;
        }
    }
    let mut ends: Vec<u64> = id(description, "eos").into_iter().collect();
    for name in ["eot", "eom"] {
        let id = description.count(&format!("tokenizer.ggml.{name}_token_id"));
        ends.extend(id.filter(|id| !ends.contains(id)));
    }
    match ends.as_slice() {
        [] => {}
        [one] => generation["eos_token_id"] = (*one).into(),
        _ => generation["eos_token_id"] = ends.into(),
    }
    generation
}
