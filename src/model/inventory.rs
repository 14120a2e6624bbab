//! Finds the linears of a checkpoint by name and shape, in known and unknown families.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::architectures::Architecture;
use super::config::{self, ModelConfig};
use super::names::Names;
use super::slot::{LinearId, Role};
use super::weights::{Order, follows_family, permutation};
use crate::checkpoint::{Checkpoint, Dtype, Rows, TensorInfo, cast};
use crate::error::Failure;
use crate::linalg;
use crate::operator::{
    self, BASE, Element, Form, Forms, Kind, Matrix, Operator, Part, Right, Shape, Size, Term, part_name,
};

/// A linear layer of a checkpoint.
#[derive(Debug, Clone)]
pub struct LinearInfo {
    /// Its module name: `model.layers.3.mlp.down_proj`.
    pub module: String,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// The dtype of the stored weight or factors.
    pub dtype: Dtype,
    /// How the checkpoint holds it.
    pub stored: Stored,
    /// The order in which its family stores a dense weight, whatever this checkpoint holds.
    pub order: Order,
    /// The block it belongs to, if its name has a number.
    pub block: Option<usize>,
    /// Its place in the decoder, if the family is known.
    pub id: Option<LinearId>,
    /// Its use, if it is a matrix of the vocabulary that was asked for, or is stored compressed.
    pub vocabulary: Option<VocabularyUse>,
    /// False for heads, routers, and anything outside the blocks of a known family or of the language model; these are
    /// compressed on request only.
    pub is_default_target: bool,
}

/// The use of a matrix of the vocabulary, (vocab_size, width).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VocabularyUse {
    /// Its rows are the embeddings of tokens.
    Table,
    /// It makes logits of states.
    Head,
    /// Both, in a tied model.
    Both,
}

/// How a checkpoint holds a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// `X.weight` (out, in).
    Dense,
    /// `X.weight` (in, out), as in GPT-2's Conv1D.
    DenseTransposed,
    /// A structure of `operator`, with or without a base `X.base.weight` (out, in).
    Structured {
        /// The structure.
        kind: Kind,
        /// Its rank, or the ranks of its blocks.
        size: Size,
        /// Whether there is a base.
        has_base: bool,
    },
}

/// Parts of a name that distinguish a table or a vector from a linear.
const NOT_LINEAR: &[&str] =
    &["embed", "norm", "wte", "wpe", "ln_", "position", "relative_attention_bias", "rotary", "shared.weight"];
/// Last parts of the names of modules that are linears, but are compressed only on request.
const ON_REQUEST: &[&str] =
    &["lm_head", "embed_out", "output", "classifier", "score", "router", "gate", "head", "proj_out"];

impl LinearInfo {
    /// Elements of the matrix.
    pub fn n_parameters(&self) -> u64 {
        self.out_features as u64 * self.in_features as u64
    }

    /// Bytes of the matrix in its dtype.
    pub fn n_bytes(&self) -> u64 {
        self.n_parameters() * self.dtype.bitsize() as u64 / 8
    }

    /// The tensor of its weight, if it is dense.
    pub fn weight_name(&self) -> String {
        format!("{}.weight", self.module)
    }

    /// The tensor of its base, if it has one under a structure.
    pub fn base_name(&self) -> String {
        format!("{}.{BASE}.weight", self.module)
    }

    /// All names that a tensor of its matrix may have, dense or compressed.
    pub fn tensor_names(&self) -> Vec<String> {
        operator::all_parts().into_iter().map(|part| format!("{}.{part}", self.module)).collect()
    }

    /// All names that its bias may have.
    pub fn bias_names(&self) -> Vec<String> {
        operator::bias_parts().map(|part| format!("{}.{part}", self.module)).collect()
    }

    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        (self.out_features, self.in_features)
    }

    /// Rows of the Gram of its output gradients, of which only the diagonal is known for a matrix of the vocabulary.
    pub fn gram_height(&self) -> usize {
        if self.vocabulary.is_some() { 0 } else { self.out_features }
    }

    /// Largest rank at which two factors have fewer parameters than the matrix: r (m + n) < m n.
    pub fn break_even_rank(&self) -> usize {
        Kind::FACTORS.fitting().largest_saving_rank(self.shape())
    }

    /// Parameters of `forms` in its place.
    pub fn parameters_as(&self, forms: &Forms) -> u64 {
        forms.n_parameters(self.shape())
    }

    /// Bytes of the base and the structure of `forms` in its place, in the project's own packing.
    pub fn bytes_as(&self, forms: &Forms) -> (u64, u64) {
        forms.n_bytes(self.shape(), self.dtype)
    }

    /// Whether it is stored as a low-rank structure.
    pub fn is_low_rank(&self) -> bool {
        matches!(self.stored, Stored::Structured { .. })
    }
}

/// All linears of a checkpoint, in the order of its files.
pub fn linears(checkpoint: &Checkpoint) -> Vec<LinearInfo> {
    let places = Places::of(checkpoint);
    let architecture = places.architecture;
    let of_stacks: Vec<String> =
        checkpoint.stacks().iter().map(|s| format!("{}.", s.tensor.trim_end_matches(".weight"))).collect();
    let mut linears = Vec::new();
    for info in checkpoint.tensors() {
        let &[rows, columns] = info.shape.as_slice() else { continue };
        let Some(stem) = info.name.strip_suffix(".weight") else { continue };
        if !cast::is_float(info.dtype) || operator::is_second_part(stem) {
            continue;
        }
        let found = structured(checkpoint, stem);
        let module = found.map_or(stem, |(module, ..)| module);
        let order = Order::of(architecture.is_some_and(|a| a.stores_transposed(module)));
        let (module, stored, out_features, in_features) = if let Some(found) = found {
            found
        } else if order == Order::InOut && !info.is_out_in() {
            (stem, Stored::DenseTransposed, columns, rows)
        } else {
            (stem, Stored::Dense, rows, columns)
        };
        if out_features < 2 || in_features < 2 {
            continue;
        }
        let is_compressed = found.is_some() || info.storage().is_some();
        let is_table = is_compressed && places.is_table(module);
        if !is_table && is_named_otherwise(&info.name, module) {
            continue;
        }
        let id = places.linear_id(module);
        let is_on_request = || ON_REQUEST.contains(&last_part(module)) || places.is_besides(module);
        linears.push(LinearInfo {
            module: module.to_string(),
            out_features,
            in_features,
            dtype: info.dtype,
            stored,
            order,
            block: block_of(module, &of_stacks),
            id,
            vocabulary: is_table.then_some(VocabularyUse::Table),
            is_default_target: id.is_some() || architecture.is_none() && !is_on_request(),
        });
    }
    linears
}

/// Whether a name is the name of a table or a vector. The last part of a head may sound like one: `embed_out`.
fn is_named_otherwise(tensor: &str, module: &str) -> bool {
    let last = last_part(module);
    let named = if ON_REQUEST.contains(&last) { module.strip_suffix(last).unwrap_or(module) } else { tensor };
    NOT_LINEAR.iter().any(|part| named.contains(part))
}

/// The block that a module's name belongs to. The index of an expert in a stack is not a block.
fn block_of(module: &str, of_stacks: &[String]) -> Option<usize> {
    let stack = of_stacks.iter().find(|stack| module.starts_with(stack.as_str()));
    stack.map_or(module, |stack| stack.as_str()).split('.').find_map(|part| part.parse().ok())
}

/// The module whose first part is stored as `stem`, how it is stored, and its shape (out, in).
fn structured<'n>(checkpoint: &Checkpoint, stem: &'n str) -> Option<(&'n str, Stored, usize, usize)> {
    let (module, first) = stem.rsplit_once('.')?;
    let kind = Kind::stored(|part| part.strip_suffix(".weight") == Some(first))?;
    let (size, (m, n)) = stored_size(checkpoint, module, kind)?;
    let has_base = checkpoint.info(&format!("{module}.{BASE}.weight")).is_some();
    Some((module, Stored::Structured { kind, size, has_base }, m, n))
}

/// Size and shape of a module, from the shapes of its parts; `None` if a part is absent or they do not fit one matrix.
pub(super) fn stored_size(checkpoint: &Checkpoint, module: &str, kind: Kind) -> Option<(Size, Shape)> {
    let shape = |&(suffix, element): &(&str, Element)| match (
        element,
        checkpoint.info(&format!("{module}.{}", part_name(suffix, element)))?.shape.as_slice(),
    ) {
        (Element::Float, &[rows, columns]) => Some([rows, columns]),
        (Element::Index, &[length]) => Some([length, 1]),
        _ => None,
    };
    let shapes = kind.structure().suffixes().iter().map(shape).collect::<Option<Vec<_>>>()?;
    kind.structure().measure(&shapes)
}

/// The first and the last block that a checkpoint has beyond `num_hidden_layers` of its config: the config was
/// truncated, or the blocks predict further tokens (MTP).
pub fn blocks_behind(checkpoint: &Checkpoint) -> Option<(usize, usize)> {
    let places = Places::of(checkpoint);
    let behind = |block: &usize| places.n_blocks.is_some_and(|n_blocks| *block >= n_blocks);
    let blocks = || checkpoint.tensors().filter_map(|info| places.block_of(&info.name)).filter(behind);
    blocks().min().zip(blocks().max())
}

/// The location of the language model in a checkpoint.
struct Places {
    architecture: Option<&'static Architecture>,
    is_multimodal: bool,
    n_blocks: Option<usize>,
    /// The prefixes of its module names; for an unknown family, the prefixes of any embeddings.
    prefixes: BTreeSet<String>,
}

impl Places {
    fn of(checkpoint: &Checkpoint) -> Self {
        const EMBEDDINGS: &[&str] = &["embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight"];
        let architecture = config::architecture(checkpoint);
        let before_embeddings = |info: &TensorInfo| {
            let prefix = EMBEDDINGS.iter().find_map(|table| info.name.strip_suffix(table))?;
            (prefix.is_empty() || prefix.ends_with('.')).then(|| prefix.to_string())
        };
        Self {
            architecture,
            is_multimodal: checkpoint.config().is_some_and(config::is_multimodal),
            n_blocks: config::n_blocks(checkpoint),
            prefixes: match architecture {
                Some(architecture) => [Names::of(checkpoint, architecture).prefix].into(),
                None => checkpoint.tensors().filter_map(before_embeddings).collect(),
            },
        }
    }

    /// Whether a module is the embedding table of a known family.
    fn is_table(&self, module: &str) -> bool {
        self.prefixes.iter().any(|prefix| {
            self.architecture.is_some_and(|a| module.strip_prefix(prefix.as_str()) == Some(a.embed_tokens))
        })
    }

    /// The linear of a block of a known family for a module.
    fn linear_id(&self, module: &str) -> Option<LinearId> {
        let id = self.prefixes.iter().find_map(|prefix| self.architecture?.linear_id(prefix, module))?;
        self.n_blocks.is_none_or(|n_blocks| id.block < n_blocks).then_some(id)
    }

    /// Whether a module of an unknown family is outside its language model: in a tower or a projector, in blocks that
    /// predict further tokens, or after the last block.
    fn is_besides(&self, module: &str) -> bool {
        self.is_multimodal && config::is_of_tower(module)
            || module.split('.').any(|part| part == "mtp" || part.starts_with("mtp_"))
            || self.block_of(module).is_some_and(|block| self.n_blocks.is_some_and(|n_blocks| block >= n_blocks))
    }

    /// The block of the language model for a module or tensor: 61 for `model.layers.61.mlp.gate.weight`.
    fn block_of(&self, name: &str) -> Option<usize> {
        let of = |prefix: &String| {
            let rest = name.strip_prefix(prefix.as_str())?;
            let rest = match self.architecture {
                Some(architecture) => rest.strip_prefix(architecture.layers)?.strip_prefix('.')?,
                None => rest.split_once('.')?.1,
            };
            rest.split('.').next()?.parse().ok()
        };
        self.prefixes.iter().find_map(of)
    }
}

/// The number of blocks in the config of a known family, and the blocks in the files.
pub(super) fn blocks(checkpoint: &Checkpoint) -> Option<(usize, BTreeSet<usize>)> {
    let places = Places::of(checkpoint);
    let count = places.architecture.and(places.n_blocks)?;
    Some((count, checkpoint.tensors().filter_map(|info| places.block_of(&info.name)).collect()))
}

/// Float matrices that cannot be read, by dtype, in words: `F64 (12)`; `None` if all can be read.
pub fn unread(checkpoint: &Checkpoint) -> Option<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for info in checkpoint.tensors() {
        let dtype = format!("{:?}", info.dtype);
        let is_matrix = info.shape.len() >= 2 && info.n_elements() > 0;
        if is_matrix && dtype.starts_with('F') && !cast::is_float(info.dtype) {
            *counts.entry(dtype).or_default() += 1;
        }
    }
    let listed: Vec<String> = counts.iter().map(|(dtype, count)| format!("{dtype} ({count})")).collect();
    (!listed.is_empty()).then(|| listed.join(", "))
}

/// Whether a tensor is a stack of expert matrices. Files do not say which side is the output, so shapes are taken as
/// stored.
pub fn is_stack(info: &TensorInfo) -> bool {
    matches!(info.shape.as_slice(), &[n, rows, columns] if n > 0 && rows > 1 && columns > 1)
        && cast::is_float(info.dtype)
        && info.name.contains("expert")
}

/// Presents every expert stack as separate matrices.
///
/// # Errors
/// Only an invalid call fails.
pub fn split_stacks(mut checkpoint: Checkpoint) -> Result<Checkpoint> {
    let stacks = checkpoint.tensors().filter(|info| is_stack(info) && info.is_divisible());
    for tensor in stacks.map(|info| info.name.clone()).collect::<Vec<_>>() {
        checkpoint = checkpoint.split_stack(&tensor)?;
    }
    Ok(checkpoint)
}

/// Presents every fused matrix of a known family as its slices, each with its rows.
///
/// # Errors
/// The config is invalid.
pub fn split_fused(mut checkpoint: Checkpoint) -> Result<Checkpoint> {
    let (config, architecture) = ModelConfig::of(&checkpoint)?;
    let whole =
        |id: LinearId| architecture.linears.iter().find(|(role, _)| *role == id.slot.role).map(|l| l.0.slices());
    for linear in linears(&checkpoint) {
        let Some(slices) = linear.id.and_then(whole).filter(|slices| !slices.is_empty()) else { continue };
        let name = linear.weight_name();
        let info = checkpoint.require(&name)?;
        let is_dequantized = info.is_dequantized();
        if linear.is_low_rank() || !info.is_plain() && !is_dequantized {
            continue;
        }
        let (widths, slot) = linear.id.map(|id| (config.widths(id.block), id.slot)).expect("invariant: it has a role");
        let (expected, fields) = widths.shape(slot);
        if linear.shape() != expected.into() {
            let (path, (m, n)) = (checkpoint.file_of(checkpoint.require(&name)?).display().to_string(), linear.shape());
            let message = format!("tensor `{name}` in `{path}` has {m} outputs and {n} inputs, and cannot be split");
            return Err(Failure::unsupported(message)
                .hint(format!("check {fields}, or leave it `--fused joint`"))
                .into());
        }
        let slice = |&(role, name): &(Role, &str)| {
            let rows = architecture.rows_of(role, &widths).expect("invariant: a slice has rows");
            // Codes are presented as (out, in) in every family.
            let rows = Rows { is_transposed: rows.is_transposed && !is_dequantized, ..rows };
            (format!("{}.{name}.weight", linear.module), rows)
        };
        checkpoint = checkpoint.split(&name, &slices.iter().map(slice).collect::<Vec<_>>())?;
    }
    Ok(checkpoint)
}

/// Whether a linear is a part of a fused matrix of its family.
pub fn is_part(checkpoint: &Checkpoint, linear: &LinearInfo) -> bool {
    let architecture = config::architecture(checkpoint);
    let role = linear.id.filter(|id| id.slot.expert.is_none()).map(|id| id.slot.role);
    architecture.zip(role).is_some_and(|(architecture, role)| architecture.whole(role).is_some())
}

fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// The matrix of a linear, (out, in) row-major, multiplied out if necessary; all values are finite.
///
/// # Errors
/// A tensor is absent or damaged.
pub fn weight(checkpoint: &Checkpoint, linear: &LinearInfo) -> Result<Vec<f32>> {
    match linear.stored {
        Stored::Dense => Ok(checkpoint.values(&linear.weight_name())?),
        Stored::DenseTransposed => {
            let values = checkpoint.values(&linear.weight_name())?;
            Ok(linalg::transpose_row_major(&values, linear.in_features, linear.out_features))
        }
        Stored::Structured { .. } => {
            let mut operator = Operator { base: None, over: Some(term(checkpoint, linear)?) };
            if let Stored::Structured { has_base: true, .. } = linear.stored {
                operator.base = Some(Term::base(base_values(checkpoint, linear)?.into(), None));
            }
            Ok(operator.product(linear.shape()))
        }
    }
}

/// The base (out, in) under the factors of a linear, row-major.
///
/// # Errors
/// The tensor is absent or damaged.
pub fn base_values(checkpoint: &Checkpoint, linear: &LinearInfo) -> Result<Vec<f32>> {
    let name = linear.base_name();
    let values = checkpoint.values(&name)?;
    let is_conv1d = config::architecture(checkpoint).is_some_and(|a| a.stores_transposed(&linear.module));
    let is_transposed = is_conv1d && follows_family(checkpoint, &name);
    let (m, n) = linear.shape();
    Ok(if is_transposed { linalg::transpose_row_major(&values, n, m) } else { values })
}

/// The structure of a linear with its values, dequantized.
///
/// # Errors
/// A tensor is absent or damaged.
///
/// # Panics
/// If the linear is dense.
pub fn term(checkpoint: &Checkpoint, linear: &LinearInfo) -> Result<Term> {
    let Stored::Structured { kind, size, .. } = linear.stored else { panic!("invariant: the linear is a structure") };
    let form = Form { kind, size, storage: None, right: Right::Own };
    let part = |Part { suffix, element, shape: [rows, columns] }: Part| -> Result<Matrix> {
        let name = format!("{}.{}", linear.module, part_name(suffix, element));
        if element == Element::Index {
            checkpoint.expect_shape(&name, &[rows], "the shape of the linear")?;
            return Ok(Matrix::Indices(
                permutation(checkpoint, &name)?.into_iter().map(|place| place as i32).collect(),
            ));
        }
        checkpoint.expect_shape(&name, &[rows, columns], "the ranks under `lrc`")?;
        Ok(checkpoint.values(&name)?.into())
    };
    Ok(Term { form, parts: form.parts(linear.shape()).into_iter().map(part).collect::<Result<_>>()? })
}

#[cfg(test)]
mod tests;
