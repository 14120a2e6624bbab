//! Mixtures of experts: which blocks llama.cpp loads, and what the experts of a block must have in common, since each
//! of their linears is one tensor for all of them.

use std::collections::BTreeMap;

use super::super::exporter::{OutTensor, Refusal};
use crate::codecs::gguf::split_matrix;
use crate::model::ModelConfig;
use crate::model::architectures::Architecture;

/// A tensor of the output, under the name of an expert's matrix.
pub(super) struct Piece {
    pub tensor: OutTensor,
    /// The module or tensor of the source that it is made of.
    pub of: String,
    /// Whether it is a module that is compressed.
    pub is_compressed: bool,
}

/// Why llama.cpp would not load the blocks of a mixture.
pub(super) fn unloaded(config: &ModelConfig, architecture: &Architecture) -> Option<String> {
    architecture.experts.as_ref()?;
    let dense = (0..config.num_hidden_layers).find(|&block| config.widths(block).num_experts == 0)?;
    Some(format!("block {dense} has no experts, and llama.cpp expects them in every block of this family"))
}

/// Why the matrices of `n_experts` experts cannot be stacked. Tensors that are in no stack do not count.
pub(super) fn refusal(pieces: impl Iterator<Item = Piece>, n_experts: usize) -> Option<Refusal> {
    let mut stacks: BTreeMap<String, Vec<(usize, Piece)>> = BTreeMap::new();
    for piece in pieces {
        if let Some((stack, index)) = split_matrix(&piece.tensor.name) {
            stacks.entry(stack).or_default().push((index, piece));
        }
    }
    let (mut reason, mut of) = (None, Vec::new());
    for (stack, pieces) in stacks {
        let Some(fault) = fault(&stack, &pieces, n_experts) else { continue };
        reason.get_or_insert(fault);
        of.extend(pieces.into_iter().filter(|(_, piece)| piece.is_compressed).map(|(_, piece)| piece.of));
    }
    of.sort();
    of.dedup();
    Some(Refusal { reason: reason?, of })
}

/// Why these matrices cannot be one tensor.
fn fault(stack: &str, pieces: &[(usize, Piece)], n_experts: usize) -> Option<String> {
    let (_, first) = pieces.first()?;
    let is_like_first =
        |piece: &Piece| piece.tensor.element == first.tensor.element && piece.tensor.shape == first.tensor.shape;
    if let Some((_, other)) = pieces.iter().find(|(_, piece)| !is_like_first(piece)) {
        return Some(format!(
            "`{}` and `{}` are parts of one tensor of llama.cpp, `{stack}`, and would differ in type or shape: \
             all experts of a block need one quantizer and one rank, and a budget chooses for each alone",
            first.of, other.of
        ));
    }
    let is_whole = pieces.len() == n_experts && pieces.iter().all(|(index, _)| *index < n_experts);
    (!is_whole)
        .then(|| format!("`{stack}` needs all {n_experts} experts of its block, and would have {}", pieces.len()))
}
