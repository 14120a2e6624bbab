//! The vocabulary of a GGUF file, as it is written from a `tokenizer.json`. The way back is `tokenizer.rs`.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json};

use super::super::architectures::gguf::Family;
use super::splits;
use super::tokens::{self, BYTE_LEVEL, SENTENCEPIECE, Token, WITHOUT, key};
use super::wordpiece;
use crate::checkpoint::{Beside, json};
use crate::codecs::gguf::Value;

/// The vocabulary of the tokenizer of a model with this config. Without a tokenizer it is empty, and the file
/// works with token ids only.
pub fn to_metadata(model: &dyn Beside, config: &Map<String, Json>, family: &Family) -> Vec<(String, Value)> {
    let read = |name: &str| -> Option<Json> { json::parse(&model.read(name).ok()??).ok() };
    let Some(tokenizer) = read("tokenizer.json").filter(|t| t["model"]["vocab"].is_object()) else {
        return vec![(key("model"), Value::Text(WITHOUT.into()))];
    };
    let is_spm = tokenizer["model"]["byte_fallback"] == true;
    let size = config.get("vocab_size").and_then(Json::as_u64).unwrap_or(0) as usize;
    let tokens = tokens::of_tokenizer(&tokenizer, size, is_spm);
    if tokenizer["model"]["type"] == wordpiece::TYPE {
        let settings = read("tokenizer_config.json").unwrap_or_default();
        return wordpiece::to_metadata(&tokenizer, &settings, tokens, family);
    }
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
