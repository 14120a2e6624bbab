//! Low-rank parts multiplied out, in the dtype, names and config of the source: loads everywhere, and is no smaller.

use serde_json::{Map, Value};

use super::{CheckpointError, Entry, Exporter, LinearInfo, Module, NamedBytes, OutTensor, Source, encode};
use crate::linalg;
use crate::model::inventory::Stored;

pub(super) struct Dense;

impl Exporter for Dense {
    fn refusal(&self, _: &Source<'_>, _: &LinearInfo, _: &Entry) -> Option<String> {
        None
    }

    fn tensors(&self, linear: &LinearInfo, _: &Entry) -> Vec<OutTensor> {
        vec![weight(linear)]
    }

    fn bytes(&self, _: &Source<'_>, linear: &LinearInfo, module: &Module) -> Result<Vec<NamedBytes>, CheckpointError> {
        let (m, n) = linear.shape();
        Ok(vec![weight_bytes(linear, module.product(m, n))?])
    }

    fn joins_stacks(&self) -> bool {
        true
    }

    fn config(&self, source: &Source<'_>, _: &[(LinearInfo, Entry)]) -> Map<String, Value> {
        source.config.clone()
    }

    fn side_files(&self, _: &Source<'_>, _: &[(LinearInfo, Entry)]) -> Vec<(String, String)> {
        Vec::new()
    }

    fn loading(&self, _: bool) -> String {
        "The weights are multiplied out: it loads wherever the original does (transformers, vLLM, ...).\n\n```python\n\
         from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(\"FOLDER\")\n```\n"
            .into()
    }
}

/// The weight of a linear in the shape of the source.
pub(super) fn weight(linear: &LinearInfo) -> OutTensor {
    let (out, input) = linear.shape();
    let shape = if linear.stored == Stored::DenseTransposed { vec![input, out] } else { vec![out, input] };
    OutTensor::plain(linear.weight_name(), linear.dtype, shape)
}

/// `values` (out, in) as the weight of a linear.
pub(super) fn weight_bytes(linear: &LinearInfo, mut values: Vec<f32>) -> Result<NamedBytes, CheckpointError> {
    if linear.stored == Stored::DenseTransposed {
        values = linalg::transpose_row_major(&values, linear.out_features, linear.in_features);
    }
    encode(linear.weight_name(), linear.dtype, &values)
}
