//! Text to tokens: a model's own tokenizer over the documents of a file, and windows cut from the stream.

mod chat;
mod documents;
mod kind;
#[cfg(feature = "parquet")]
mod parquet;
mod shape;
mod source;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::checkpoint::{hex, json, read_file};
use crate::error::Failure;
use chat::ChatTemplate;
pub use documents::DEFAULT_FIELD;
use documents::Document;
pub use source::read_recipe;

/// What separates documents that are read as one stream, as GPTQ's scripts join WikiText.
const BETWEEN_DOCUMENTS: &str = "\n\n";

/// A text.
#[derive(Debug, Clone)]
pub struct Text {
    pub path: PathBuf,
    /// At least one, none empty.
    pub documents: Vec<String>,
    /// Of the bytes that were read, before they were unpacked.
    pub sha256: String,
}

/// Whether a begin-of-sequence token is put at the start of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Bos {
    /// Once, at the start of the stream, where the tokenizer adds one and the text, as that of a chat template, has none.
    #[default]
    Auto,
    /// Never.
    Never,
}

/// The tokenizer of a checkpoint.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pub sha256: String,
    /// What the tokenizer puts in front of a sequence, and behind it.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// The token that stands for one that is hidden.
    mask: Option<u32>,
    /// Its token for the beginning of a text, or else for the end of one, whether it adds it or not.
    boundary: Option<u32>,
}

/// A token stream.
#[derive(Debug, Clone)]
pub struct Tokens {
    pub ids: Vec<u32>,
    /// For each token, bytes of the text that it and all before it cover.
    pub bytes_covered: Vec<usize>,
}

impl Text {
    /// The error of a text whose tokens do not fill one window.
    pub fn too_short(&self, n_tokens: usize, seq_len: usize) -> Failure {
        let message = format!("`{}` has {} tokens, a window needs {seq_len}", self.path.display(), n_tokens);
        Failure::unsupported(message).hint("give more text, or a smaller `--seq-len`")
    }

    /// All documents as one stream.
    pub fn joined(&self) -> String {
        self.documents.join(BETWEEN_DOCUMENTS)
    }

    /// Reads a UTF-8 text, or the documents of a `.jsonl`, `.ndjson`, `.json` or `.parquet` file: their field `field`, or their `messages`
    /// in the chat template of `model`.
    ///
    /// # Errors
    /// It cannot be read, is not what it says, is empty, or the model takes no such messages.
    pub fn read(path: &Path, field: &str, model: &Path) -> Result<Self> {
        let (documents, sha256) = documents::read(path, field)?;
        let n_documents = documents.len();
        let mut documents = match documents.iter().any(|document| matches!(document, Document::Chat(..))) {
            true => ChatTemplate::open(model)?.render_all(documents)?,
            false => documents.into_iter().filter_map(Document::text).collect(),
        };
        documents.retain(|document| !document.is_empty());
        let path_shown = path.display();
        if documents.is_empty() {
            let empty = || Failure::unsupported(format!("text file `{path_shown}` is empty"));
            let blank = || {
                let message = format!("`{path_shown}` has no text: `{field}` is empty or null in every document");
                Failure::unsupported(message).hint(documents::FIELD_HINT)
            };
            return Err(if n_documents == 0 { empty() } else { blank() }.into());
        }
        let n_blank = n_documents - documents.len();
        if n_blank > 0 {
            tracing::warn!(
                "{n_blank} of the {n_documents} documents of `{path_shown}` are empty or null, and are left out"
            );
        }
        Ok(Self { path: path.into(), documents, sha256 })
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder.
    ///
    /// # Errors
    /// It is absent or cannot be parsed.
    pub fn open(model: &Path) -> Result<Self> {
        let path = model.join("tokenizer.json");
        if !path.exists() {
            return Err(Failure::unsupported(format!("`{}` is missing", path.display()))
                .hint("text needs the model's fast tokenizer; save it with transformers' `AutoTokenizer(..., use_fast=True)`")
                .into());
        }
        let unusable = |e| Failure::unsupported(format!("`{}` cannot be used: {e}", path.display()));
        let bytes = read_file(&path)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(unusable)?;
        // A stream is cut into windows here, whatever the file says of single inputs.
        inner.with_padding(None).with_truncation(None).map_err(unusable)?;
        let sha256 = hex(&Sha256::digest(&bytes));
        let (prefix, suffix) = added(&inner)?;
        let boundary = boundary(model, &inner);
        let mask = mask(model, &inner);
        Ok(Self { inner, sha256, prefix, suffix, mask, boundary })
    }

    /// The token that stands for the beginning of a text, or else for the end of one, whether the tokenizer adds it or not.
    pub fn boundary(&self) -> Option<u32> {
        self.boundary.or(self.bos())
    }

    /// The token that the tokenizer puts in front of a sequence, if it does.
    pub fn bos(&self) -> Option<u32> {
        self.prefix.first().copied()
    }

    /// The token that stands for one that is hidden.
    ///
    /// # Errors
    /// There is none.
    pub fn mask(&self) -> Result<u32> {
        let absent = || {
            Failure::unsupported("the tokenizer has no token for what is hidden")
                .hint("name it as `mask_token` in `tokenizer_config.json`")
        };
        Ok(self.mask.ok_or_else(absent)?)
    }

    /// Tokens that an encoder gets besides those of the text.
    pub fn n_added(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }

    /// A piece of a text as an encoder gets it, `[CLS] … [SEP]`, and where in that the piece is.
    pub fn wrap(&self, ids: &[u32]) -> (Vec<u32>, std::ops::Range<usize>) {
        let first = self.prefix.len();
        ([&self.prefix, ids, &self.suffix].concat(), first..first + ids.len())
    }

    /// Tokenises a whole text as one stream.
    ///
    /// # Errors
    /// The tokenizer refuses.
    pub fn encode(&self, text: &str, bos: Bos) -> Result<Tokens> {
        let encoding =
            self.inner.encode(text, false).map_err(|e| Failure::unsupported(format!("cannot tokenise: {e}")))?;
        let is_added = bos == Bos::Auto && !encoding.get_ids().starts_with(&self.prefix);
        let prefix = if is_added { self.prefix.as_slice() } else { &[] };
        let ids = [prefix, encoding.get_ids()].concat();
        let mut bytes_covered = vec![0; prefix.len()];
        let mut covered = 0;
        for &(_, end) in encoding.get_offsets() {
            covered = end.max(covered);
            bytes_covered.push(covered);
        }
        Ok(Tokens { ids, bytes_covered })
    }
}

/// `bos_token`, else `eos_token`, of `tokenizer_config.json`; where neither is named, the ids of `config.json`.
fn boundary(model: &Path, tokenizer: &tokenizers::Tokenizer) -> Option<u32> {
    let json = |name: &str| -> Option<Value> { json::parse(&read_file(&model.join(name)).ok()?).ok() };
    let named = |fields: &Value, key: &str| {
        let token = fields.get(key)?;
        let text = token.get("content").unwrap_or(token).as_str()?;
        tokenizer.token_to_id(text)
    };
    let numbered = |fields: &Value, key: &str| {
        let id = fields.get(key)?;
        u32::try_from(id.get(0).unwrap_or(id).as_u64()?).ok()
    };
    let from_tokenizer = json("tokenizer_config.json").and_then(|f| named(&f, "bos_token").or(named(&f, "eos_token")));
    from_tokenizer.or_else(|| {
        let of = |fields: &Value| numbered(fields, "bos_token_id").or_else(|| numbered(fields, "eos_token_id"));
        // Multimodal models have them in the config of their language model.
        json("config.json").and_then(|f| of(&f).or_else(|| of(f.get("text_config")?)))
    })
}

/// `mask_token` of `tokenizer_config.json`, or one of its usual names.
fn mask(model: &Path, tokenizer: &tokenizers::Tokenizer) -> Option<u32> {
    let file = read_file(&model.join("tokenizer_config.json")).ok();
    let fields: Option<Value> = file.and_then(|bytes| json::parse(&bytes).ok());
    let named = fields.as_ref().and_then(|fields| fields.get("mask_token"));
    let named = named.and_then(|token| token.get("content").unwrap_or(token).as_str());
    named.into_iter().chain(["[MASK]", "<mask>"]).find_map(|name| tokenizer.token_to_id(name))
}

/// What is put in front of a sequence, and behind it.
fn added(tokenizer: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let ids = |special: bool| -> Result<Vec<u32>> {
        let encoding =
            tokenizer.encode("a", special).map_err(|e| Failure::unsupported(format!("the tokenizer fails: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    };
    let (bare, full) = (ids(false)?, ids(true)?);
    let at = full.windows(bare.len().max(1)).position(|w| w == bare).unwrap_or(0);
    Ok((full[..at].to_vec(), full[at + bare.len()..].to_vec()))
}

impl Tokens {
    /// Disjoint windows from the start; the tail is dropped.
    pub fn disjoint(&self, seq_len: usize) -> Vec<Vec<u32>> {
        self.ids.chunks_exact(seq_len).map(<[u32]>::to_vec).collect()
    }

    /// `n_windows` of the disjoint windows, drawn without replacement by a seeded generator, in text order; all of
    /// them if there are fewer.
    pub fn sample(&self, seq_len: usize, n_windows: usize, seed: u64) -> Vec<Vec<u32>> {
        let windows: Vec<&[u32]> = self.ids.chunks_exact(seq_len).collect();
        let mut order = draw(windows.len(), n_windows, seed);
        order.sort_unstable();
        order.into_iter().map(|i| windows[i].to_vec()).collect()
    }
}

/// `n_drawn` of the numbers below `n`, or all of them if there are fewer, drawn without replacement by a seeded generator.
pub fn draw(n: usize, n_drawn: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let n_drawn = n_drawn.min(n);
    for i in 0..n_drawn {
        let rest = (n - i) as u64;
        order.swap(i, i + (generator.next_u64() % rest) as usize);
    }
    order.truncate(n_drawn);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(n: u32) -> Tokens {
        Tokens { ids: (0..n).collect(), bytes_covered: (1..=n as usize).collect() }
    }

    #[test]
    fn windows_are_disjoint_and_the_tail_is_dropped() {
        assert_eq!(tokens(7).disjoint(3), [[0, 1, 2], [3, 4, 5]]);
    }

    #[test]
    fn samples_depend_on_the_seed_alone() {
        let tokens = tokens(1000);
        let sample = tokens.sample(10, 20, 7);
        assert_eq!(sample, tokens.sample(10, 20, 7));
        assert_ne!(sample, tokens.sample(10, 20, 8));
        assert!(sample.windows(2).all(|w| w[0][0] + 10 <= w[1][0]), "distinct and in order");
        assert_eq!(tokens.sample(10, 1000, 7).len(), 100);
    }
}
