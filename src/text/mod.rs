//! From text to tokens: reads the documents of a file, tokenizes them with the model's tokenizer, and cuts
//! the stream into windows.

mod chat;
mod document;
mod kind;
#[cfg(feature = "parquet")]
mod parquet;
mod prompt;
mod reader;
mod shape;
mod source;

use std::path::{Path, PathBuf};

use anyhow::Result;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::checkpoint::{Beside, hex, json};
use crate::error::Failure;
use chat::ChatTemplate;
pub use document::DEFAULT_FIELD;
use document::Document;
pub use prompt::Prompt;
pub use source::read_recipe;

/// The file of a tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Separator of documents in one stream, as in GPTQ's scripts for WikiText.
const BETWEEN_DOCUMENTS: &str = "\n\n";

/// A text.
#[derive(Debug, Clone)]
pub struct Text {
    /// The file as the user named it.
    pub path: PathBuf,
    /// At least one, none empty.
    pub documents: Vec<String>,
    /// SHA-256 of the file, before decompression.
    pub sha256: String,
}

/// Whether the token stream begins with a begin-of-sequence token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Bos {
    /// If the tokenizer adds one; never twice, as with texts from chat templates that include it
    #[default]
    Auto,
    /// Never
    Never,
}

/// The tokenizer of a checkpoint.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// SHA-256 of `tokenizer.json`.
    pub sha256: String,
    /// Tokens that the tokenizer adds before and after a sequence.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// The mask token.
    mask: Option<u32>,
    /// The BOS token, or EOS if there is none, whether the tokenizer adds it or not.
    boundary: Option<u32>,
}

/// A token stream.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// Token ids, with BOS if one was asked for.
    pub ids: Vec<u32>,
    /// For each token, the bytes of the text that it and all tokens before it cover.
    pub bytes_covered: Vec<usize>,
}

impl Text {
    /// The error for a text with fewer tokens than a window.
    pub fn too_short(&self, n_tokens: usize, seq_len: usize) -> Failure {
        let tokens = if n_tokens == 1 { "1 token".into() } else { format!("{n_tokens} tokens") };
        let message = format!("`{}` has {tokens}, but a window needs {seq_len}", self.path.display());
        Failure::unsupported(message).hint("give a longer text, or a smaller `--seq-len`")
    }

    /// All documents as one text.
    pub fn joined(&self) -> String {
        self.documents.join(BETWEEN_DOCUMENTS)
    }

    /// Reads a UTF-8 text, or the documents of a `.jsonl`, `.ndjson`, `.json` or `.parquet` file: their field `field`,
    /// or their `messages` rendered with the chat template of `model`.
    ///
    /// # Errors
    /// The file cannot be read, is empty, does not match its name, or has messages that the chat template rejects.
    pub fn read(path: &Path, field: &str, model: &(impl Beside + ?Sized)) -> Result<Self> {
        let (documents, sha256) = reader::read(path, field)?;
        let n_documents = documents.len();
        let mut documents = match documents.iter().any(|document| matches!(document, Document::Chat(..))) {
            true => ChatTemplate::open(model)?.render_all(documents)?,
            false => documents.into_iter().filter_map(Document::text).collect(),
        };
        documents.retain(|document| !document.is_empty());
        let path_shown = path.display();
        if documents.is_empty() {
            if n_documents == 0 {
                let message = format!("text file `{path_shown}` is empty");
                return Err(Failure::unsupported(message).hint("give a file that holds text").into());
            }
            let message = format!("`{path_shown}` has no text: `{field}` is empty or null in every document");
            return Err(Failure::unsupported(message).hint(document::FIELD_HINT).into());
        }
        let n_blank = n_documents - documents.len();
        if n_blank > 0 {
            tracing::warn!("{n_blank} of {n_documents} documents of `{path_shown}` are empty or null, and are skipped");
        }
        Ok(Self { path: path.into(), documents, sha256 })
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder or a checkpoint.
    ///
    /// # Errors
    /// The file is missing or cannot be parsed.
    pub fn open(model: &(impl Beside + ?Sized)) -> Result<Self> {
        let path = model.path(TOKENIZER_FILE);
        let Some(bytes) = model.read(TOKENIZER_FILE)? else {
            let is_file = path.ends_with(TOKENIZER_FILE);
            let what = if is_file { "is missing" } else { "has no tokenizer in its metadata" };
            return Err(Failure::unsupported(format!("`{}` {what}", path.display()))
                .hint("the model's fast tokenizer is required; save it with transformers: `AutoTokenizer.from_pretrained(..., use_fast=True)`")
                .into());
        };
        let unusable = |e| {
            Failure::unsupported(format!("`{}` is not a usable tokenizer: {e}", path.display()))
                .hint("get it again from the original repository, or save it with transformers")
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(unusable)?;
        // Padding and truncation are for single inputs; here a stream is cut into windows.
        inner.with_padding(None).with_truncation(None).map_err(unusable)?;
        let sha256 = hex(&Sha256::digest(&bytes));
        let (prefix, suffix) = added(&inner)?;
        let boundary = boundary(model, &inner);
        let mask = mask(model, &inner);
        Ok(Self { inner, sha256, prefix, suffix, mask, boundary })
    }

    /// The BOS token, or EOS if there is none, whether the tokenizer adds it or not.
    pub fn boundary(&self) -> Option<u32> {
        self.boundary.or(self.bos())
    }

    /// The BOS token, if the tokenizer adds one.
    pub fn bos(&self) -> Option<u32> {
        self.prefix.first().copied()
    }

    /// The mask token.
    ///
    /// # Errors
    /// The tokenizer has none.
    pub fn mask(&self) -> Result<u32> {
        let absent = || {
            Failure::unsupported("the tokenizer has no mask token")
                .hint("name it as `mask_token` in `tokenizer_config.json`")
        };
        Ok(self.mask.ok_or_else(absent)?)
    }

    /// The tokens that end a text: those of `generation_config.json`, else of `config.json`, else EOS.
    pub fn ends(&self, model: &(impl Beside + ?Sized)) -> Vec<u32> {
        let of = |file: &str| {
            let config = fields(model, file)?;
            let own = config.get("eos_token_id").or_else(|| config.get("text_config")?.get("eos_token_id"))?;
            let list = own.as_array().cloned().unwrap_or_else(|| vec![own.clone()]);
            let ids: Vec<u32> = list.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect();
            (!ids.is_empty()).then_some(ids)
        };
        let in_tokenizer = || {
            let fields = fields(model, "tokenizer_config.json")?;
            Some(vec![self.inner.token_to_id(text_of(fields.get("eos_token")?)?)?])
        };
        of("generation_config.json").or_else(|| of("config.json")).or_else(in_tokenizer).unwrap_or_default()
    }

    /// Decodes tokens one after another: the text that a token completes, without special tokens; `None` if it is not
    /// whole before the next.
    ///
    /// # Errors
    /// The decoder fails.
    pub fn decoding(&self) -> impl FnMut(u32) -> Result<Option<String>> + '_ {
        let mut stream = self.inner.decode_stream(true);
        move |token| {
            let piece = stream.step(token);
            piece.map_err(|e| Failure::unsupported(format!("cannot decode token {token}: {e}")).into())
        }
    }

    /// Number of tokens that the tokenizer adds to a sequence.
    pub fn n_added(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }

    /// A piece of text as an encoder reads it, `[CLS] … [SEP]`, and the range of the piece in it.
    pub fn wrap(&self, ids: &[u32]) -> (Vec<u32>, std::ops::Range<usize>) {
        let first = self.prefix.len();
        ([&self.prefix, ids, &self.suffix].concat(), first..first + ids.len())
    }

    /// Tokenizes a text as one stream.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode(&self, text: &str, bos: Bos) -> Result<Tokens> {
        let encoding =
            self.inner.encode(text, false).map_err(|e| Failure::unsupported(format!("cannot tokenize: {e}")))?;
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

/// `bos_token` or `eos_token` of `tokenizer_config.json`; without either, the ids in `config.json`.
fn boundary(model: &(impl Beside + ?Sized), tokenizer: &tokenizers::Tokenizer) -> Option<u32> {
    let in_tokenizer = fields(model, "tokenizer_config.json").and_then(|fields| {
        let token = |key: &str| tokenizer.token_to_id(text_of(fields.get(key)?)?);
        token("bos_token").or_else(|| token("eos_token"))
    });
    in_tokenizer.or_else(|| {
        let config = fields(model, "config.json")?;
        // Multimodal models have them in the config of their language model.
        boundary_id(&config).or_else(|| boundary_id(config.get("text_config")?))
    })
}

/// `bos_token_id` or `eos_token_id` of a config; the first of a list.
fn boundary_id(config: &Value) -> Option<u32> {
    let number = |key: &str| {
        let id = config.get(key)?;
        u32::try_from(id.get(0).unwrap_or(id).as_u64()?).ok()
    };
    number("bos_token_id").or_else(|| number("eos_token_id"))
}

/// The fields of a JSON file of a model; none if it cannot be read.
fn fields(model: &(impl Beside + ?Sized), name: &str) -> Option<Value> {
    json::parse(&model.read(name).ok()??).ok()
}

/// The text of a special token, which is a string or a record.
fn text_of(token: &Value) -> Option<&str> {
    token.get("content").unwrap_or(token).as_str()
}

/// `mask_token` of `tokenizer_config.json`, or one of its usual names.
fn mask(model: &(impl Beside + ?Sized), tokenizer: &tokenizers::Tokenizer) -> Option<u32> {
    let fields = fields(model, "tokenizer_config.json");
    let named = fields.as_ref().and_then(|fields| text_of(fields.get("mask_token")?));
    named.into_iter().chain(["[MASK]", "<mask>"]).find_map(|name| tokenizer.token_to_id(name))
}

/// Tokens that the tokenizer adds before and after a sequence.
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
    /// Draws `n_windows` of the disjoint windows, which leave out the tail, without replacement, with a seeded
    /// generator, and returns them in text order; all of them if there are fewer.
    pub fn sample(&self, seq_len: usize, n_windows: usize, seed: u64) -> Vec<Vec<u32>> {
        let windows: Vec<&[u32]> = self.ids.chunks_exact(seq_len).collect();
        let mut drawn = draw(windows.len(), n_windows, seed);
        drawn.sort_unstable();
        drawn.into_iter().map(|i| windows[i].to_vec()).collect()
    }
}

/// Draws `n_drawn` of the numbers below `n` without replacement, with a seeded generator; all of
/// them if there are fewer.
pub fn draw(n: usize, n_drawn: usize, seed: u64) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..n).collect();
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let n_drawn = n_drawn.min(n);
    for i in 0..n_drawn {
        let rest = (n - i) as u64;
        numbers.swap(i, i + (generator.next_u64() % rest) as usize);
    }
    numbers.truncate(n_drawn);
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(n: u32) -> Tokens {
        Tokens { ids: (0..n).collect(), bytes_covered: (1..=n as usize).collect() }
    }

    #[test]
    fn windows_are_disjoint_and_the_tail_is_dropped() {
        assert_eq!(tokens(7).sample(3, 9, 0), [[0, 1, 2], [3, 4, 5]]);
    }

    #[test]
    fn samples_depend_only_on_the_seed() {
        let tokens = tokens(1000);
        let sample = tokens.sample(10, 20, 7);
        assert_eq!(sample, tokens.sample(10, 20, 7));
        assert_ne!(sample, tokens.sample(10, 20, 8));
        assert!(sample.windows(2).all(|w| w[0][0] + 10 <= w[1][0]), "distinct and in order");
        assert_eq!(tokens.sample(10, 1000, 7).len(), 100);
    }
}
