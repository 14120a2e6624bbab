//! Encoders: what llama.cpp would compute differently from their modules of sentence-transformers, and the metadata with
//! which it computes embeddings.

use serde_json::Value as Json;

use super::super::exporter::Source;
use crate::checkpoint::{Beside, json};
use crate::codecs::gguf::Value;
use crate::model::architectures::Architecture;
use crate::model::architectures::gguf::Family;
use crate::model::gguf::{pooling, wordpiece};
use crate::model::{ModelConfig, SentenceModules};

/// The GGUF name of the table of token types.
const TOKEN_TYPES: &str = "token_types.weight";

/// Why llama.cpp would give other embeddings than the modules beside the model.
pub(super) fn misread(source: &Source<'_>, config: &ModelConfig, architecture: &Architecture) -> Option<String> {
    architecture.encoder.as_ref()?;
    let tokenizer = tokenizer(source);
    if let Some(reason) = tokenizer.as_ref().and_then(wordpiece::other_splits) {
        return Some(reason);
    }
    let has_list = || source.checkpoint.read("vocab.txt").ok().flatten().is_some();
    if tokenizer.is_none() && has_list() {
        return Some("its vocabulary is in `vocab.txt`, and lrc reads `tokenizer.json`".into());
    }
    let modules = match SentenceModules::read(source.checkpoint, config.hidden_size) {
        Ok(modules) => modules?,
        Err(error) => return Some(format!("{error:#}")),
    };
    if modules.lowercases && !tokenizer.as_ref().is_none_or(wordpiece::lowercases) {
        return Some("its texts are lowercased before the tokenizer, which llama.cpp does not do".into());
    }
    let is_known = modules.sole_pooling().is_some_and(|mode| pooling::number(mode.name()).is_some());
    let known = pooling::names().collect::<Vec<_>>().join("`, `");
    (!is_known).then(|| {
        format!("its embedding is `{}`, and llama.cpp has one of `{known}`, normalized or not", modules.name())
    })
}

/// What an encoder has besides what every model has; nothing for other models.
pub(super) fn metadata(source: &Source<'_>, architecture: &Architecture, family: &Family) -> Vec<(String, Value)> {
    let key = |name: &str| format!("{}.{name}", family.architecture);
    if architecture.encoder.is_none() {
        return Vec::new();
    }
    let mut metadata = vec![(key("attention.causal"), Value::Bool(false))];
    let width = ModelConfig::of(source.checkpoint).map_or(0, |(config, _)| config.hidden_size);
    let modules = SentenceModules::read(source.checkpoint, width).ok().flatten();
    let number = modules.and_then(|modules| pooling::number(modules.sole_pooling()?.name()));
    metadata.extend(number.map(|number| (key(pooling::KEY), Value::U32(number))));
    let is_types = |name: &str| family.to_gguf(name).as_deref() == Some(TOKEN_TYPES);
    let types = source.checkpoint.tensors().find(|info| is_types(&info.name));
    let n_types = types.and_then(|info| info.shape.first().copied()).unwrap_or(1);
    metadata.push(("tokenizer.ggml.token_type_count".into(), Value::U32(n_types as u32)));
    metadata
}

fn tokenizer(source: &Source<'_>) -> Option<Json> {
    json::parse(&source.checkpoint.read("tokenizer.json").ok()??).ok()
}
