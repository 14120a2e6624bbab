//! The matrices of the vocabulary: the embedding table, and the head if it has a matrix of its own.

use anyhow::Result;

use super::decoder::Decoder;
use super::inventory::{LinearInfo, Stored, VocabularyUse};
use crate::checkpoint::{Checkpoint, cast};

/// The dense matrices of the vocabulary of a known family, (vocab_size, width).
///
/// # Errors
/// The family is unknown, or the config is invalid.
pub fn matrices(checkpoint: &Checkpoint) -> Result<Vec<LinearInfo>> {
    let decoder = Decoder::unchecked(checkpoint)?;
    let (table, head) = (&decoder.vocabulary.table, decoder.vocabulary.head.as_ref());
    // A table that serves a head which encoders may lack is only read.
    let of_table = if head.is_none() && decoder.has_head() { VocabularyUse::Both } else { VocabularyUse::Table };
    let of_head = head.filter(|_| decoder.has_head()).map(|head| (head, VocabularyUse::Head));
    let matrix = |(module, of): (&String, VocabularyUse)| {
        let info = checkpoint.info(&format!("{module}.weight"))?;
        let &[out_features, in_features] = info.shape.as_slice() else { return None };
        (cast::is_float(info.dtype) && info.is_plain()).then(|| LinearInfo {
            module: module.clone(),
            out_features,
            in_features,
            dtype: info.dtype,
            stored: Stored::Dense,
            block: None,
            id: None,
            vocabulary: Some(of),
            is_default_target: false,
        })
    };
    Ok([(table, of_table)].into_iter().chain(of_head).filter_map(matrix).collect())
}
