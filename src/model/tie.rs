//! Determines whether the head of a model is tied to its embedding table.
//!
//! The rule follows transformers 5: the config decides if only one of the two is stored, or if both are equal. A
//! head stored with other values is not tied, whatever the config says; earlier versions overwrote it.

use anyhow::Result;

use super::architectures::Architecture;
use super::config;
use super::names::{self, Names};
use crate::checkpoint::{Asked, Checkpoint, Comparison};

/// The modules of the two vocabulary matrices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vocabulary {
    /// The module of the embedding table.
    pub table: String,
    /// The module that computes logits; `None` if it is the table.
    pub head: Option<String>,
}

impl Vocabulary {
    pub fn native(architecture: &Architecture, is_tied: bool) -> Self {
        let names = Names::native(architecture);
        let head = (!is_tied).then(|| names.lm_head(architecture));
        Self { table: names.embeddings(architecture), head }
    }

    /// The embedding table of a checkpoint that may lack its head.
    pub fn without_head(
        checkpoint: &Checkpoint,
        tie: Option<bool>,
        architecture: &Architecture,
        names: &Names,
    ) -> Self {
        let (table, head) = (names.embeddings(architecture), names.lm_head(architecture));
        let [has_table, has_head] = [&table, &head].map(|module| names::is_stored(checkpoint, module));
        let is_head = tie == Some(true) && has_head && !has_table;
        Self { table: if is_head { head } else { table }, head: None }
    }

    /// Compares the two if both are stored and the config ties them.
    ///
    /// # Errors
    /// A tensor is damaged.
    pub fn of(checkpoint: &Checkpoint, tie: Option<bool>, architecture: &Architecture, names: &Names) -> Result<Self> {
        let (table, head) = (names.embeddings(architecture), names.lm_head(architecture));
        let [has_table, has_head] = [&table, &head].map(|module| names::is_stored(checkpoint, module));
        // If the config does not say, a model without a head is tied.
        let is_tied = tie.unwrap_or(!has_head);
        Ok(match (is_tied, has_table, has_head) {
            (true, true, true) if !are_equal(checkpoint, &table, &head)? => Self { table, head: Some(head) },
            (true, false, true) => Self { table: head, head: None },
            (true, ..) => Self { table, head: None },
            (false, ..) => Self { table, head: Some(head) },
        })
    }
}

/// Whether the two are equal; warns if they are not.
fn are_equal(checkpoint: &Checkpoint, table: &str, head: &str) -> Result<bool> {
    let [first, second] = [table, head].map(|module| format!("{module}.weight"));
    // A low-rank head is not the table.
    if checkpoint.info(&second).is_none() {
        return Ok(false);
    }
    let Comparison { is_equal, asked } = checkpoint.compare(&first, &second)?;
    if asked == Asked::First && !is_equal {
        tracing::warn!(
            "`tie_word_embeddings` is true, and `{second}` differs from `{first}`: they are not tied, as in transformers 5"
        );
    }
    Ok(is_equal)
}

/// The tensors of the table of embeddings and of the head, for a language model that may have one for both.
pub fn tensors(checkpoint: &Checkpoint) -> Option<[String; 2]> {
    let architecture = config::architecture(checkpoint).filter(|architecture| architecture.encoder.is_none())?;
    let names = Names::of(checkpoint, architecture);
    Some([names.embeddings(architecture), names.lm_head(architecture)].map(|module| format!("{module}.weight")))
}

/// Whether a module has the name of a head in its family; `lm_head` if the family is unknown.
pub fn is_head(checkpoint: &Checkpoint, module: &str) -> bool {
    let name = config::architecture(checkpoint).map_or("lm_head", |architecture| architecture.lm_head);
    module.ends_with(name)
}

/// Whether a module is a head without its own matrix: the embedding table under another name, or a copy of it.
///
/// # Errors
/// A tensor is damaged.
pub fn is_tied_head(checkpoint: &Checkpoint, module: &str) -> Result<bool> {
    if !is_head(checkpoint, module) {
        return Ok(false);
    }
    let architecture = config::architecture(checkpoint);
    let tie = config::tie(checkpoint);
    let Some(architecture) = architecture else { return Ok(tie == Some(true)) };
    let names = Names::of(checkpoint, architecture);
    let vocabulary = Vocabulary::of(checkpoint, tie, architecture, &names)?;
    Ok(vocabulary.head.is_none() && module == names.lm_head(architecture))
}
