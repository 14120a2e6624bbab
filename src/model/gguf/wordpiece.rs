//! WordPiece vocabularies, both ways. Files spell tokens as llama.cpp looks them up: `▁` begins a word, and what continues
//! a word has no `##`. Its words are those of BERT's own tokenizer: Devlin et al. 2019, arXiv:1810.04805.

use serde_json::{Value as Json, json};

use super::super::architectures::gguf::Family;
use super::splits::UNNAMED;
use super::tokens::{CONTROL, Token, UNKNOWN, WORDPIECE, key};
use crate::codecs::gguf::Value;

/// `model.type` of a `tokenizer.json`.
pub(super) const TYPE: &str = "WordPiece";
/// The beginning of a token that continues a word, in a `tokenizer.json`.
const CONTINUES: &str = "##";
/// The beginning of a token that begins a word, in a file.
const BEGINS: char = '\u{2581}';

/// Special tokens besides those around a text: their names in files and in settings, and their usual text.
const SPECIAL: [(&str, &str, &str); 3] =
    [("unknown", "unk", "[UNK]"), ("padding", "pad", "[PAD]"), ("mask", "mask", "[MASK]")];

/// Why llama.cpp would split texts differently from this `tokenizer.json` of a family with WordPiece vocabularies.
pub fn other_splits(tokenizer: &Json) -> Option<String> {
    let expected = [
        ("model.type", json!(TYPE)),
        ("model.continuing_subword_prefix", json!(CONTINUES)),
        ("normalizer.type", json!("BertNormalizer")),
        ("normalizer.clean_text", json!(true)),
        ("normalizer.handle_chinese_chars", json!(true)),
        ("pre_tokenizer.type", json!("BertPreTokenizer")),
    ];
    let found = |path: &str| path.split('.').fold(tokenizer, |at, name| &at[name]);
    if let Some((path, value)) = expected.iter().find(|(path, value)| found(path) != value) {
        let found = found(path);
        return Some(format!("`{path}` of its tokenizer is {found}, and llama.cpp splits as if it were {value}"));
    }
    let is_unframed = ends(tokenizer).is_none();
    is_unframed.then(|| "its tokenizer does not put one token before a text and one after, as llama.cpp does".into())
}

/// Whether a `tokenizer.json` lowercases texts.
pub fn lowercases(tokenizer: &Json) -> bool {
    tokenizer["normalizer"]["lowercase"] == true
}

/// The vocabulary of a `tokenizer.json` with these `settings` (`tokenizer_config.json`), whose tokens are `tokens`.
pub(super) fn to_metadata(
    tokenizer: &Json,
    settings: &Json,
    tokens: Vec<Token>,
    family: &Family,
) -> Vec<(String, Value)> {
    let id = |text: &str| tokens.iter().position(|(token, _)| token == text).map(|id| id as u64);
    let special = SPECIAL.iter().filter_map(|(theirs, ours, usual)| {
        let given = &settings[format!("{ours}_token")];
        let text = given.as_str().or(given["content"].as_str()).unwrap_or(usual);
        Some((*theirs, id(text)?))
    });
    let [first, last] = ends(tokenizer).unwrap_or_default();
    let around = [("bos", first), ("eos", last), ("seperator", last)];
    let ids = around.into_iter().chain(special).map(|(name, id)| (format!("{name}_token_id"), Value::U32(id as u32)));
    let flags = [("add_bos_token", true), ("add_eos_token", true), ("add_sep_token", false)];
    let given = |name: &str| tokenizer["normalizer"][name].as_bool();
    let normalizer = ["lowercase", "strip_accents"].map(|name| Some((format!("normalizer.{name}"), given(name)?)));
    let flags = flags.map(|(name, flag)| (name.to_string(), flag)).into_iter().chain(normalizer.into_iter().flatten());
    let mut vocabulary: Vec<(String, Value)> = vec![
        ("model".into(), Value::Text(WORDPIECE.into())),
        ("pre".into(), Value::Text(family.pre_tokenizer.unwrap_or(UNNAMED).into())),
    ];
    vocabulary.extend(ids);
    vocabulary.extend(flags.map(|(name, flag)| (name, Value::Bool(flag))));
    let (texts, types) = tokens.into_iter().map(to_file).unzip();
    vocabulary.extend([("tokens".into(), Value::Texts(texts)), ("token_type".into(), Value::I32s(types))]);
    vocabulary.into_iter().map(|(name, value)| (key(&name), value)).collect()
}

/// A token as files spell it. The unknown token is one of the special tokens there.
fn to_file((text, kind): Token) -> Token {
    match (kind, text.strip_prefix(CONTINUES)) {
        (CONTROL | UNKNOWN, _) => (text, CONTROL),
        (_, Some(rest)) => (rest.to_string(), kind),
        (_, None) => (format!("{BEGINS}{text}"), kind),
    }
}

/// The inverse of [`to_file`].
pub(super) fn of_file(text: &str, kind: i32) -> String {
    match text.strip_prefix(BEGINS) {
        _ if kind == CONTROL || kind == UNKNOWN => text.to_string(),
        Some(rest) => rest.to_string(),
        None => format!("{CONTINUES}{text}"),
    }
}

/// The parts of a `tokenizer.json` besides its tokens, for a text between two tokens with these texts and ids.
pub(super) fn parts([lowercase, strip_accents]: [Option<bool>; 2], [first, last]: [(&str, u64); 2]) -> Json {
    // A file that does not say so lowercases in llama.cpp.
    let lowercase = lowercase.unwrap_or(true);
    let sequence = |name: &str, of: u32| json!({"Sequence": {"id": name, "type_id": of}});
    let token = |(text, _): (&str, u64), of: u32| json!({"SpecialToken": {"id": text, "type_id": of}});
    let one = [token(first, 0), sequence("A", 0), token(last, 0)];
    let two = [&one[..], &[sequence("B", 1), token(last, 1)]].concat();
    let mut special = json!({});
    for (text, id) in [first, last] {
        special[text] = json!({"id": text, "ids": [id], "tokens": [text]});
    }
    json!({
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": strip_accents,
            "lowercase": lowercase
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": one, "pair": two, "special_tokens": special},
        "decoder": {"type": "WordPiece", "prefix": CONTINUES, "cleanup": true}
    })
}

/// The ids of the tokens around a text; `None` unless there is one on each side.
fn ends(tokenizer: &Json) -> Option<[u64; 2]> {
    let processor = &tokenizer["post_processor"];
    if processor["type"] == "BertProcessing" {
        return Some([processor["cls"][1].as_u64()?, processor["sep"][1].as_u64()?]);
    }
    let [first, text, last] = processor["single"].as_array()?.as_slice() else { return None };
    text.get("Sequence")?;
    let id = |token: &Json| {
        let ids = processor["special_tokens"][token["SpecialToken"]["id"].as_str()?]["ids"].as_array()?;
        if let [id] = ids.as_slice() { id.as_u64() } else { None }
    };
    Some([id(first)?, id(last)?])
}

#[cfg(test)]
mod tests {
    use super::super::tokens::NORMAL;
    use super::*;

    #[test]
    fn tokens_are_spelled_as_files_have_them_and_back() {
        for (ours, kind, theirs) in [
            ("dog", NORMAL, "\u{2581}dog"),
            ("##s", NORMAL, "s"),
            ("##", NORMAL, ""),
            ("[unused0]", NORMAL, "\u{2581}[unused0]"),
            ("[CLS]", CONTROL, "[CLS]"),
            ("[UNK]", UNKNOWN, "[UNK]"),
        ] {
            let (found, found_kind) = to_file((ours.into(), kind));
            assert_eq!((found.as_str(), found_kind), (theirs, if kind == NORMAL { NORMAL } else { CONTROL }));
            assert_eq!(of_file(theirs, found_kind), ours);
        }
    }

    #[test]
    fn other_tokenizers_are_named_by_what_differs() {
        let usual = parts([Some(true), None], [("[CLS]", 2), ("[SEP]", 3)]);
        let with = |path: &str, value: Json| {
            let mut tokenizer = usual.clone();
            tokenizer["model"] = json!({"type": TYPE, "continuing_subword_prefix": CONTINUES});
            if let Some(place) = tokenizer.pointer_mut(path) {
                *place = value;
            }
            tokenizer
        };
        assert_eq!(ends(&usual), Some([2, 3]));
        assert_eq!(other_splits(&with("/none", Json::Null)), None);
        let processing = json!({"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]});
        assert_eq!(ends(&with("/post_processor", processing)), Some([2, 3]));
        for (path, value, expected) in [
            ("/model/type", json!("Unigram"), "`model.type` of its tokenizer is \"Unigram\""),
            ("/normalizer", Json::Null, "`normalizer.type` of its tokenizer is null"),
            ("/normalizer/clean_text", json!(false), "`normalizer.clean_text`"),
            ("/post_processor", Json::Null, "one token before a text and one after"),
            ("/post_processor/single", json!([]), "one token before a text and one after"),
        ] {
            let reason = other_splits(&with(path, value)).unwrap_or_default();
            assert!(reason.contains(expected), "{path}: {reason}");
        }
    }
}
