//! Special tokens: their ids in configs, and the settings of a tokenizer and of generation.

use serde_json::{Map, Value as Json, json};

use super::vocabulary::{TOKENS, is_sentencepiece};
use crate::codecs::gguf::Description;

/// Special tokens: the key of their id in a file, their names in configs and settings, and the id that
/// SentencePiece models have without it.
const SPECIAL: [(&str, &str, Option<u64>); 4] =
    [("bos", "bos", Some(1)), ("eos", "eos", Some(2)), ("unknown", "unk", Some(0)), ("padding", "pad", None)];

/// The id of a special token; `None` if the file has none, or it is beyond the vocabulary.
pub(super) fn id(description: &Description<'_>, name: &str) -> Option<u64> {
    let (_, _, default) = SPECIAL.iter().find(|(theirs, ..)| *theirs == name)?;
    let n_tokens = description.length(TOKENS)?;
    let given = description.count(&format!("tokenizer.ggml.{name}_token_id")).filter(|&id| id < n_tokens);
    given.or(default.filter(|_| is_sentencepiece(description)))
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
    let named = |(theirs, ours, _): &(&str, &str, _)| (format!("{ours}_token_id"), json!(id(description, theirs)));
    Ok(SPECIAL.iter().filter(|(_, ours, _)| *ours != "unk").map(named).collect())
}

/// `tokenizer_config.json`.
pub(super) fn tokenizer_config(description: &Description<'_>, config: &Map<String, Json>) -> Json {
    let tokens = description.texts(TOKENS).unwrap_or_default();
    let mut settings = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    for (theirs, ours, _) in SPECIAL {
        let text = id(description, theirs).and_then(|id| tokens.get(usize::try_from(id).ok()?));
        if let Some(text) = text {
            settings[format!("{ours}_token")] = text.as_str().into();
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
