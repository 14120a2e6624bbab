//! `tokenizer.json` from the vocabulary of a GGUF file, as Hugging Face's converters make it.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::super::architectures::gguf::{Family, MergeOrder};
use super::splits::{self, SplitSteps, UNNAMED};
use super::tokens::{
    BYTE, BYTE_LEVEL, CONTROL, NORMAL, SENTENCEPIECE, TOKENS, UNKNOWN, UNUSED, USER_DEFINED, WITHOUT, WORDPIECE,
};
use super::{special, wordpiece};
use crate::codecs::gguf::Description;

/// The space of SentencePiece.
const SPACE: &str = "\u{2581}";

/// Tokens longer than this (in bytes) are not taken apart into the pairs that they are merged from.
const LONGEST_MERGED: usize = 1024;

/// The tokenizer of a file; `None` if it has no vocabulary.
///
/// # Errors
/// A clause: the tokenizer is of an unknown kind, or its parts contradict each other.
pub(super) fn of_metadata(description: &Description<'_>, family: &Family) -> Result<Option<Json>, String> {
    let kind = description.text("tokenizer.ggml.model");
    let Some(kind) = kind.filter(|kind| ![WITHOUT, "none"].contains(&kind.as_str())) else { return Ok(None) };
    let tokens = Tokens::read(description)?;
    match kind.as_str() {
        BYTE_LEVEL => byte_level(description, &tokens, family).map(Some),
        SENTENCEPIECE => sentencepiece(description, &tokens, family).map(Some),
        WORDPIECE => of_pieces(description, &tokens).map(Some),
        other => Err(format!(
            "its tokenizer is of kind `{other}` (`tokenizer.ggml.model`), and lrc reads `{BYTE_LEVEL}`, `{SENTENCEPIECE}` and \
             `{WORDPIECE}`"
        )),
    }
}

/// The tokens by id, with their types.
struct Tokens {
    texts: Vec<String>,
    types: Vec<i32>,
}

impl Tokens {
    fn read(description: &Description<'_>) -> Result<Self, String> {
        let texts = description.texts(TOKENS).ok_or_else(|| format!("it has no tokens (`{TOKENS}`)"))?;
        let key = "tokenizer.ggml.token_type";
        let types: Vec<i32> =
            description.numbers(key).unwrap_or_default().into_iter().map(|kind| kind as i32).collect();
        if !types.is_empty() && types.len() != texts.len() {
            return Err(format!("it has {} tokens, and `{key}` has {}", texts.len(), types.len()));
        }
        Ok(Self { texts, types })
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &str, i32)> {
        let kind = |id: usize| self.types.get(id).copied().unwrap_or(NORMAL);
        self.texts.iter().enumerate().map(move |(id, text)| (id, text.as_str(), kind(id)))
    }

    /// The ids by text. Placeholders of ids that no tokenizer has are left out.
    ///
    /// # Errors
    /// Two tokens have the same text.
    fn vocabulary(&self) -> Result<Map<String, Json>, String> {
        let mut vocabulary = Map::new();
        for (id, text, kind) in self.iter() {
            if text.is_empty() || kind == UNUSED && text == format!("[PAD{id}]") {
                continue;
            }
            if let Some(first) = vocabulary.insert(text.into(), id.into()) {
                return Err(format!("its tokens {first} and {id} are both `{text}`"));
            }
        }
        Ok(vocabulary)
    }

    /// Tokens that are found in a text before it is split.
    fn added(&self) -> Json {
        let is_added = |kind: i32| [UNKNOWN, CONTROL, USER_DEFINED].contains(&kind);
        let added = self.iter().filter(|(_, text, kind)| is_added(*kind) && !text.is_empty()).map(|(id, text, kind)| {
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": kind != USER_DEFINED
            })
        });
        added.collect()
    }
}

/// Byte-level byte-pair encoding.
fn byte_level(description: &Description<'_>, tokens: &Tokens, family: &Family) -> Result<Json, String> {
    let named = description.text("tokenizer.ggml.pre").filter(|name| name != UNNAMED);
    let is_silent = !description.keys().any(|key| key == "tokenizer.ggml.pre");
    let named = named.unwrap_or_else(|| family.pre_tokenizer.unwrap_or("gpt-2").into());
    if is_silent {
        tracing::warn!(
            "the GGUF file does not say how its tokenizer splits texts (`tokenizer.ggml.pre`): taken to be as `{named}`"
        );
    }
    let SplitSteps { normalizer, pre_tokenizer, ignores_merges, adds_bos } =
        splits::named(&named).ok_or_else(|| {
            format!("its tokenizer splits texts as `{named}` does (`tokenizer.ggml.pre`), which lrc does not know")
        })?;
    let merges = description
        .texts("tokenizer.ggml.merges")
        .ok_or_else(|| "its tokenizer has no merges (`tokenizer.ggml.merges`)".to_string())?;
    // The left part is not empty, but may begin with a space.
    let split = |merge: &String| -> Option<[String; 2]> {
        let at = merge.char_indices().skip(1).find(|(_, c)| *c == ' ')?.0;
        Some([merge[..at].into(), merge[at + 1..].into()])
    };
    let pairs: Option<Vec<[String; 2]>> = merges.iter().map(split).collect();
    let pairs = pairs.ok_or_else(|| "one of its merges (`tokenizer.ggml.merges`) is not a pair".to_string())?;
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": tokens.added(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(description, tokens, adds_bos),
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignores_merges,
            "vocab": tokens.vocabulary()?, "merges": pairs
        }
    }))
}

/// SentencePiece as byte-pair encoding: each token is merged from any two that it consists of, the one with
/// the highest score first.
fn sentencepiece(description: &Description<'_>, tokens: &Tokens, family: &Family) -> Result<Json, String> {
    let respelled = |(_, text, kind): (usize, &str, i32)| {
        // Runs of spaces, which some files have as added tokens, are merged from spaces.
        let is_run = kind == USER_DEFINED && !text.is_empty() && text.chars().all(|c| c == ' ');
        if is_run { (SPACE.repeat(text.len()), NORMAL) } else { (text.to_string(), kind) }
    };
    let (texts, types): (Vec<String>, Vec<i32>) = tokens.iter().map(respelled).unzip();
    let tokens = Tokens { texts, types };
    let scores = match family.merge_order {
        MergeOrder::Scores => description.numbers("tokenizer.ggml.scores").unwrap_or_default(),
        MergeOrder::Ids => Vec::new(),
    };
    if !scores.is_empty() && scores.len() != tokens.texts.len() {
        return Err(format!(
            "it has {} tokens and {} scores (`tokenizer.ggml.scores`)",
            tokens.texts.len(),
            scores.len()
        ));
    }
    let prepends = description.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let mut normalizers = vec![spaces];
    if prepends {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = special::id(description, "unknown").and_then(|id| tokens.texts.get(usize::try_from(id).ok()?));
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": tokens.added(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": post_processor(description, &tokens, true),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": tokens.types.contains(&BYTE),
            "ignore_merges": false, "vocab": tokens.vocabulary()?, "merges": merges(&tokens, &scores)
        }
    }))
}

/// WordPiece.
fn of_pieces(description: &Description<'_>, tokens: &Tokens) -> Result<Json, String> {
    let respelled = |(_, text, kind): (usize, &str, i32)| (wordpiece::of_file(text, kind), kind);
    let (texts, types): (Vec<String>, Vec<i32>) = tokens.iter().map(respelled).unzip();
    let tokens = Tokens { texts, types };
    let special = |name: &str| {
        let id = special::id(description, name);
        let text = id.and_then(|id| tokens.texts.get(usize::try_from(id).ok()?));
        text.zip(id).ok_or_else(|| format!("it has no token `tokenizer.ggml.{name}_token_id`"))
    };
    let (first, last) = (special("bos")?, special("seperator")?);
    let normalizer = ["lowercase", "strip_accents"].map(|name| format!("tokenizer.ggml.normalizer.{name}"));
    let mut tokenizer = wordpiece::parts(
        normalizer.map(|key| description.flag(&key)),
        [first, last].map(|(text, id)| (text.as_str(), id)),
    );
    for (name, value) in [("version", json!("1.0")), ("truncation", Json::Null), ("padding", Json::Null)] {
        tokenizer[name] = value;
    }
    tokenizer["added_tokens"] = tokens.added();
    tokenizer["model"] = json!({
        "type": wordpiece::TYPE, "unk_token": special("unknown")?.0, "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100, "vocab": tokens.vocabulary()?
    });
    Ok(tokenizer)
}

/// The pairs that tokens are merged from, best first: by score, or by id if there are no scores.
fn merges(tokens: &Tokens, scores: &[f64]) -> Vec<[String; 2]> {
    let pieces = || {
        let is_piece = |kind| [NORMAL, USER_DEFINED].contains(&kind);
        tokens.iter().filter(move |(_, text, kind)| is_piece(*kind) && text.len() <= LONGEST_MERGED)
    };
    let ids: HashMap<&str, usize> = pieces().map(|(id, text, _)| (text, id)).collect();
    // The id of the token, and the ids of its parts.
    let mut pairs: Vec<(usize, [usize; 2], [&str; 2])> = Vec::new();
    for (id, text, _) in pieces() {
        let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        let parts = cuts.filter_map(|(l, r)| Some((id, [*ids.get(l)?, *ids.get(r)?], [l, r])));
        let before = pairs.len();
        pairs.extend(parts);
        pairs[before..].sort_by_key(|(_, parts, _)| *parts);
    }
    pairs.sort_by(|(a, _, one), (b, _, other)| {
        let [a, b] = [a, b].map(|&id| scores.get(id).copied().unwrap_or(-(id as f64)));
        b.total_cmp(&a).then_with(|| lengths(other).cmp(&lengths(one)))
    });
    pairs.into_iter().map(|(_, _, parts)| parts.map(String::from)).collect()
}

/// Characters of both parts.
fn lengths(parts: &[&str; 2]) -> [usize; 2] {
    parts.map(|part| part.chars().count())
}

/// The tokens around a sequence; null if there are none. `adds_bos` is the default of the kind of tokenizer.
fn post_processor(description: &Description<'_>, tokens: &Tokens, adds_bos: bool) -> Json {
    let [bos, eos] = [("bos", adds_bos), ("eos", false)].map(|(name, default)| {
        let is_added = description.flag(&format!("tokenizer.ggml.add_{name}_token")).unwrap_or(default);
        let id = special::id(description, name).filter(|_| is_added)?;
        Some((tokens.texts.get(usize::try_from(id).ok()?)?.as_str(), id))
    });
    if bos.is_none() && eos.is_none() {
        return Json::Null;
    }
    let token = |token: Option<(&str, u64)>, of: u32| {
        token.map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": of}}))
    };
    let sequence = |name: &str, of: u32| -> Vec<Json> {
        let own = json!({"Sequence": {"id": name, "type_id": of}});
        [token(bos, of), Some(own), token(eos, of)].into_iter().flatten().collect()
    };
    let tokens: Map<String, Json> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(text, id)| (text.to_string(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair = [sequence("A", 0), sequence("B", 1)].concat();
    json!({
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": pair,
        "special_tokens": tokens
    })
}
