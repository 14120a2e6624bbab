//! The module names of the language model in the files of a checkpoint.
//!
//! A family has its own prefix (`model.`), which early files leave out. Wrappers add more in front: multimodal models
//! have `language_model.model.` and `model.language_model.`, models that were saved inside their training wrapper
//! `module.` and `_orig_mod.`. Names are used as they are found, and nothing is renamed.

use std::collections::BTreeMap;

use super::architectures::table::Architecture;
use crate::checkpoint::Checkpoint;
use crate::operator;

/// The prefixes of the names of a family's modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The prefix of all module names except the head's.
    pub prefix: String,
    /// The prefix of the head's name.
    pub head: String,
}

impl Names {
    /// The prefixes of the family itself.
    pub fn native(architecture: &Architecture) -> Self {
        Self { prefix: architecture.prefix.into(), head: String::new() }
    }

    /// The prefixes in a checkpoint, found by its blocks. Among several places it takes the one that has embeddings or
    /// a final norm, which image and audio towers lack.
    pub fn of(checkpoint: &Checkpoint, architecture: &Architecture) -> Self {
        let mut places: BTreeMap<&str, usize> = BTreeMap::new();
        for info in checkpoint.tensors() {
            if let Some((prefix, ..)) = architecture.split_name(&info.name) {
                *places.entry(prefix).or_default() += 1;
            }
        }
        let has = |prefix: &str, module: &str| {
            let base = format!("{prefix}{module}");
            is_stored(checkpoint, &base) || checkpoint.info(&format!("{base}.gamma")).is_some()
        };
        let rank = |(prefix, n_tensors): (&&str, &usize)| {
            let has_ends = has(prefix, architecture.embed_tokens) || architecture.norm.is_some_and(|n| has(prefix, n));
            let known = architecture.prefixes().position(|own| own == *prefix).unwrap_or(usize::MAX);
            (!has_ends, known, std::cmp::Reverse(*n_tensors), prefix.len())
        };
        let best = places.iter().min_by_key(|(prefix, count)| rank((prefix, count)));
        let Some((prefix, _)) = best else { return Self::native(architecture) };
        let head = head_of(checkpoint, architecture, prefix).unwrap_or_else(|| outer(architecture, prefix));
        Self { prefix: (*prefix).into(), head: head.into() }
    }

    /// The module of the embedding table.
    pub fn embeddings(&self, architecture: &Architecture) -> String {
        format!("{}{}", self.prefix, architecture.embed_tokens)
    }

    /// The module of the matrix that computes logits.
    pub fn lm_head(&self, architecture: &Architecture) -> String {
        format!("{}{}", self.head, architecture.lm_head)
    }
}

/// The prefix of the head: some of the leading words of the blocks' prefix. `None` if no head is stored.
fn head_of<'p>(checkpoint: &Checkpoint, architecture: &Architecture, prefix: &'p str) -> Option<&'p str> {
    let is_stored = |words: &&str| match &architecture.encoder {
        Some(encoder) => checkpoint.info(&format!("{words}{}", encoder.masked_head.bias)).is_some(),
        None => is_stored(checkpoint, &format!("{words}{}", architecture.lm_head)),
    };
    let ends = prefix.match_indices('.').map(|(at, _)| at + 1).rev();
    ends.chain([0]).map(|end| &prefix[..end]).find(is_stored)
}

/// Whether the weight of a linear is stored, dense or compressed.
pub(super) fn is_stored(checkpoint: &Checkpoint, module: &str) -> bool {
    operator::first_parts().any(|part| checkpoint.info(&format!("{module}.{part}")).is_some())
}

/// The part of a prefix before the family's own prefix.
fn outer<'p>(architecture: &Architecture, prefix: &'p str) -> &'p str {
    let outer = |own: &'static str| prefix.strip_suffix(own).filter(|outer| outer.is_empty() || outer.ends_with('.'));
    architecture.prefixes().find_map(outer).unwrap_or("")
}
