//! The interface of a format: the tensors of a linear, their bytes, the files that they go to, and what describes them.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::checkpoint::{Checkpoint, CheckpointError, Dtype, Stack, TensorInfo, TensorSpec, cast};
use crate::codecs::gguf::{Element, GgufTensor, Value as GgufValue};
use crate::codecs::onnx;
use crate::linalg;
use crate::model::config::{self, native_config};
use crate::model::inventory::LinearInfo;
use crate::operator::{Forms, Operator};

/// The file that a tensor goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The weights of the model.
    Model,
    /// The adapter next to the model.
    Adapter,
}

/// Whether an adapter is beside the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adapter {
    /// The output has no adapter.
    None,
    /// The output has an adapter.
    Written,
}

/// A tensor of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutTensor {
    /// The file that it goes to.
    pub target: Target,
    /// The name in that file.
    pub name: String,
    /// The dtype or block type.
    pub element: Element,
    /// The order of safetensors; GGUF files reverse it.
    pub shape: Vec<usize>,
}

impl OutTensor {
    pub(super) fn plain(name: String, dtype: Dtype, shape: Vec<usize>) -> Self {
        Self { target: Target::Model, name, element: Element::Plain(dtype), shape }
    }

    pub(super) fn gguf(&self) -> GgufTensor {
        GgufTensor { name: self.name.clone(), element: self.element, shape: self.shape.clone() }
    }

    /// Bytes of its values, without header and padding.
    pub fn n_bytes(&self) -> u64 {
        match self.element {
            Element::Plain(_) => self.spec().n_bytes(),
            Element::Block(_) => self.gguf().n_bytes(),
        }
    }

    /// The tensor as safetensors describes it.
    ///
    /// # Panics
    /// If it is made of blocks.
    pub fn spec(&self) -> TensorSpec {
        let Element::Plain(dtype) = self.element else { unreachable!("invariant: blocks are written to GGUF files") };
        TensorSpec { name: self.name.clone(), dtype, shape: self.shape.clone() }
    }
}

/// A tensor with its bytes.
pub struct NamedBytes {
    /// The file that it goes to.
    pub target: Target,
    /// The name of an [`OutTensor`] of that file.
    pub name: String,
    /// Little-endian, as many as [`OutTensor::n_bytes`].
    pub bytes: Vec<u8>,
}

impl NamedBytes {
    pub(super) fn of(name: String, bytes: Vec<u8>) -> Self {
        Self { target: Target::Model, name, bytes }
    }
}

/// The model that is exported.
pub struct Source<'a> {
    /// Dense, or an output of `lrc`.
    pub checkpoint: &'a Checkpoint,
    /// `config.json` without the entries that compression added.
    pub config: Map<String, Value>,
}

impl<'a> Source<'a> {
    /// The source with its config, which is empty if it has none.
    pub fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, config: checkpoint.config().map(native_config).unwrap_or_default() }
    }
}

/// The kind of files that a format writes.
#[derive(Debug, Clone, PartialEq)]
pub enum Container {
    /// Files of safetensors, in shards if they are large.
    Safetensors,
    /// The one file of a PEFT adapter.
    Adapter,
    /// Metadata of the model and of its adapter.
    Gguf {
        /// The metadata of the model.
        model: Vec<(String, GgufValue)>,
        /// The metadata of its LoRA adapter, which is not written if there are no factors.
        adapter: Vec<(String, GgufValue)>,
    },
    /// A graph without its tensors.
    Onnx(Box<onnx::Model>),
}

/// The content of a format in place of a compressed linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// Its operator as it is: every structure, every base, parts of fused matrices and single experts.
    Operators,
    /// Its operator as nodes of a graph, in matrices and codes that a runtime multiplies.
    Nodes,
    /// A weight of the shape and dtype of the source.
    Weights,
    /// The codes of a quantized base; factors over it are an adapter.
    Codes,
    /// The weight that a quantized base represents; factors over it are an adapter.
    DequantizedBases,
    /// Factors of the difference from another model, which has everything else.
    Residuals,
}

/// How a format stores compressed linears and describes them in `config.json`.
pub trait Exporter: Sync {
    /// The content in place of a compressed linear.
    fn holds(&self) -> Holds;

    /// Whether its loaders read an embedding table in codes.
    fn reads_coded_tables(&self) -> bool {
        !matches!(self.holds(), Holds::Codes | Holds::DequantizedBases | Holds::Residuals)
    }

    /// Whether linears of one output may have different quantizers.
    fn mixes_quantizers(&self) -> bool {
        true
    }

    /// Why the runtime could not read this linear as intended. Every linear is checked before any work.
    fn refusal(&self, source: &Source<'_>, linear: &LinearInfo, forms: &Forms) -> Option<String>;

    /// Why the runtime could not read these linears together.
    fn refusal_of_all(&self, _: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Option<Refusal> {
        None
    }

    /// The tensors that replace the weight of `linear`.
    fn tensors(&self, linear: &LinearInfo, forms: &Forms) -> Vec<OutTensor>;

    /// The bytes of [`Self::tensors`].
    ///
    /// # Errors
    /// A value does not fit the dtype.
    fn bytes(
        &self,
        source: &Source<'_>,
        linear: &LinearInfo,
        operator: &Operator,
    ) -> Result<Vec<NamedBytes>, CheckpointError>;

    /// The name of the bias of a compressed linear.
    fn bias_name(&self, linear: &LinearInfo, _: &Forms) -> String {
        format!("{}.bias", linear.module)
    }

    /// The tensors that are read of those that are not compressed, by their names in the output; `None`: all.
    fn reads(&self, _: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Option<BTreeSet<String>> {
        None
    }

    /// How an uncompressed tensor is stored: under its own name with its own bytes, unless the format has its own name
    /// for it, or none.
    fn other(&self, source: &Source<'_>, info: &TensorInfo) -> Option<OutTensor> {
        let mut shape = info.shape.clone();
        if is_turned(source, info) {
            shape.reverse();
        }
        Some(OutTensor::plain(info.name.clone(), info.dtype, shape))
    }

    /// The bytes of [`Self::other`].
    ///
    /// # Errors
    /// The tensor is damaged.
    fn other_bytes(&self, source: &Source<'_>, info: &TensorInfo) -> Result<Vec<u8>, CheckpointError> {
        if !info.is_encoded() {
            return source.checkpoint.with_bytes(&info.name, <[u8]>::to_vec);
        }
        self.encode_other(source, info, source.checkpoint.values(&info.name)?)
    }

    /// The bytes of [`Self::other`] with these values in the order of the source.
    ///
    /// # Errors
    /// A value does not fit the dtype.
    fn encode_other(
        &self,
        source: &Source<'_>,
        info: &TensorInfo,
        mut values: Vec<f32>,
    ) -> Result<Vec<u8>, CheckpointError> {
        if let (true, &[out, input]) = (is_turned(source, info), info.shape.as_slice()) {
            values = linalg::transpose_row_major(&values, out, input);
        }
        Ok(encode(info.name.clone(), info.dtype, &values)?.bytes)
    }

    /// Whether expert stacks are written whole, even if the source presents them as separate matrices.
    fn joins_stacks(&self) -> bool {
        false
    }

    /// Tensors that the source does not have, with their bytes.
    fn extras(&self, _: &Source<'_>) -> Vec<(OutTensor, Vec<u8>)> {
        Vec::new()
    }

    /// The kind of files, with the metadata that they need.
    fn container(&self, _: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Container {
        Container::Safetensors
    }

    /// `config.json` of the output.
    fn config(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Map<String, Value>;

    /// Other files that the runtime needs: (path in the folder, content).
    fn side_files(&self, source: &Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<(String, String)>;

    /// How each runtime loads the output, for the model card.
    fn loading(&self, adapter: Adapter) -> String;

    /// The hub's name for the library that loads the output.
    fn library(&self) -> &'static str {
        "transformers"
    }
}

/// Whether a weight is made of codes, and so presented as (out, in), in a family that stores (in, out).
fn is_turned(source: &Source<'_>, info: &TensorInfo) -> bool {
    let module = info.name.strip_suffix(".weight").filter(|_| info.is_coded() && !info.is_picked());
    let architecture = module.and_then(|_| config::architecture(source.checkpoint));
    module.zip(architecture).is_some_and(|(module, architecture)| architecture.stores_transposed(module))
}

/// Why a format cannot store linears together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// A clause for the error: what the format cannot store.
    pub reason: String,
    /// The modules that cause it; without them the format could store the rest.
    pub of: Vec<String>,
}

impl Refusal {
    /// A refusal that no particular linear causes.
    pub(super) fn whole(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), of: Vec::new() }
    }
}

/// Expert stacks with a compressed matrix: low-rank formats store them unstacked; the rest are written whole.
pub(super) fn stacks_apart<'a>(source: &'a Source<'_>, modules: &[(LinearInfo, Forms)]) -> Vec<&'a Stack> {
    let compressed: BTreeSet<&str> = modules.iter().map(|(linear, _)| linear.module.as_str()).collect();
    let is_apart = |stack: &&Stack| (0..stack.shape[0]).any(|i| compressed.contains(stack.module(i).as_str()));
    source.checkpoint.stacks().iter().filter(is_apart).collect()
}

/// `values` in `dtype`; the error names the tensor.
pub(super) fn encode(name: String, dtype: Dtype, values: &[f32]) -> Result<NamedBytes, CheckpointError> {
    match cast::encode(dtype, values) {
        Ok(bytes) => Ok(NamedBytes::of(name, bytes)),
        Err(first) => Err(CheckpointError::Overflow { tensor: name, dtype: format!("{dtype:?}"), first }),
    }
}
