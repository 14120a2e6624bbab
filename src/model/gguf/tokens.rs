//! The tokens of a GGUF file: their keys, the kinds of vocabularies, and the types of tokens.

use serde_json::Value as Json;

/// The key of the tokens.
pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
/// Byte-level byte-pair encoding.
pub(super) const BYTE_LEVEL: &str = "gpt2";
/// SentencePiece, which llama.cpp runs as byte-pair encoding with scores.
pub(super) const SENTENCEPIECE: &str = "llama";
/// The longest token first.
pub(super) const WORDPIECE: &str = "bert";
/// Files without a vocabulary, for token ids only.
pub(super) const WITHOUT: &str = "no_vocab";

/// Token types, as llama.cpp numbers them.
pub(super) const NORMAL: i32 = 1;
pub(super) const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;
pub(super) const BYTE: i32 = 6;

/// A token and its type.
pub(super) type Token = (String, i32);

/// The key of a field of the vocabulary.
pub(super) fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

/// The tokens by id; unused ids get placeholders.
pub(super) fn of_tokenizer(tokenizer: &Json, size: usize, is_spm: bool) -> Vec<Token> {
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
