//! The vocabulary of a GGUF file: its keys, and what is written of the `tokenizer.json` of a byte-pair model. The
//! way back is `tokenizer.rs`.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json};

use super::super::architectures::gguf::Family;
use super::splits;
use crate::checkpoint::{Beside, json};
use crate::codecs::gguf::{Description, Value};

/// The key of the tokens.
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
/// The kinds of tokenizers that are written and read: byte-level byte-pair encoding, and SentencePiece.
pub(super) const BYTE_LEVEL: &str = "gpt2";
/// SentencePiece, which llama.cpp runs as byte-pair encoding with scores.
pub(super) const SENTENCEPIECE: &str = "llama";
/// Files without a vocabulary, for token ids only.
pub(super) const WITHOUT: &str = "no_vocab";

/// Whether a file has a SentencePiece vocabulary.
pub(super) fn is_sentencepiece(description: &Description<'_>) -> bool {
    description.text("tokenizer.ggml.model").as_deref() == Some(SENTENCEPIECE)
}

/// Token types, as llama.cpp numbers them.
pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;
pub(super) const BYTE: i32 = 6;

/// A token and its type.
type Token = (String, i32);

/// The vocabulary of the tokenizer of a model with this config. Without a tokenizer it is empty, and the file
/// works with token ids only.
pub fn to_metadata(model: &dyn Beside, config: &Map<String, Json>, family: &Family) -> Vec<(String, Value)> {
    let read = |name: &str| -> Option<Json> { json::parse(&model.read(name).ok()??).ok() };
    let Some(tokenizer) = read("tokenizer.json").filter(|t| t["model"]["vocab"].is_object()) else {
        return vec![(key("model"), Value::Text(WITHOUT.into()))];
    };
    let is_spm = tokenizer["model"]["byte_fallback"] == true;
    let size = config.get("vocab_size").and_then(Json::as_u64).unwrap_or(0) as usize;
    let tokens = tokens(&tokenizer, size, is_spm);
    let merges: Vec<String> = tokenizer["model"]["merges"].as_array().into_iter().flatten().filter_map(merge).collect();
    let mut vocabulary = vec![
        (key("model"), Value::Text(if is_spm { SENTENCEPIECE } else { BYTE_LEVEL }.into())),
        (key("token_type"), Value::I32s(tokens.iter().map(|(_, kind)| *kind).collect())),
    ];
    if is_spm {
        vocabulary.push((key("scores"), Value::F32s(scores(&tokens, &merges))));
    } else {
        let pre = splits::named_as(&tokenizer).or(family.pre_tokenizer).unwrap_or(splits::UNNAMED);
        vocabulary.push((key("pre"), Value::Text(pre.into())));
        vocabulary.push((key("merges"), Value::Texts(merges)));
    }
    vocabulary.push((key("tokens"), Value::Texts(tokens.into_iter().map(|(text, _)| text).collect())));
    for name in ["bos_token_id", "eos_token_id"] {
        let id = config.get(name).map(|id| id.get(0).unwrap_or(id)).and_then(Json::as_u64);
        vocabulary.extend(id.map(|id| (key(name), Value::U32(id as u32))));
    }
    let adds_bos = tokenizer["post_processor"]["single"][0].get("SpecialToken").is_some();
    vocabulary.push((key("add_bos_token"), Value::Bool(adds_bos)));
    if is_spm {
        let prepends = tokenizer["normalizer"].to_string().contains("Prepend")
            || tokenizer["pre_tokenizer"]["prepend_scheme"].as_str().is_some_and(|scheme| scheme != "never");
        vocabulary.push((key("add_space_prefix"), Value::Bool(prepends)));
    }
    if let Some(template) =
        read("tokenizer_config.json").and_then(|s| s.get("chat_template")?.as_str().map(String::from))
    {
        vocabulary.push(("tokenizer.chat_template".into(), Value::Text(template)));
    }
    vocabulary
}

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

/// The tokens by id; unused ids get placeholders.
fn tokens(tokenizer: &Json, size: usize, is_spm: bool) -> Vec<Token> {
    let model = &tokenizer["model"];
    let mut tokens: Vec<Token> = (0..size).map(|i| (format!("[PAD{i}]"), UNUSED)).collect();
    let mut set = |id: &Json, text: &str, kind: i32| {
        if let Some(slot) = id.as_u64().and_then(|id| tokens.get_mut(id as usize)) {
            *slot = (text.to_string(), kind);
        }
    };
    for (text, id) in model["vocab"].as_object().into_iter().flatten() {
        let is_byte = is_spm && text.len() == 6 && text.starts_with("<0x");
        set(id, text, if is_byte { BYTE } else { NORMAL });
    }
    for token in tokenizer["added_tokens"].as_array().into_iter().flatten() {
        let text = token["content"].as_str().unwrap_or_default();
        let is_unknown = model["unk_token"] == text;
        let kind = if is_unknown {
            UNKNOWN
        } else if token["special"] == true {
            CONTROL
        } else {
            USER_DEFINED
        };
        set(&token["id"], text, kind);
    }
    tokens
}

/// A merge, which older files write as `left right` and newer ones as a pair.
fn merge(merge: &Json) -> Option<String> {
    match merge {
        Json::String(pair) => Some(pair.clone()),
        pair => Some(format!("{} {}", pair.get(0)?.as_str()?, pair.get(1)?.as_str()?)),
    }
}

/// llama.cpp joins the pair whose token has the highest score: the earlier the merge, the higher.
fn scores(tokens: &[Token], merges: &[String]) -> Vec<f32> {
    let ranks: BTreeMap<String, usize> =
        merges.iter().enumerate().rev().map(|(i, pair)| (pair.replacen(' ', "", 1), i)).collect();
    tokens.iter().map(|(text, _)| ranks.get(text).map_or(-1e6, |&rank| -(rank as f32))).collect()
}
