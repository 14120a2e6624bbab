//! Low-rank parts multiplied out, in the dtype, names and config of the source: the output loads everywhere, but is no
//! smaller.

use serde_json::{Map, Value};

use super::exporter::{Adapter, Exporter, Holds, NamedBytes, OutTensor, Source, encode};
use crate::checkpoint::CheckpointError;
use crate::linalg;
use crate::model::Order;
use crate::model::inventory::LinearInfo;
use crate::operator::{Forms, Operator};

pub(super) struct Dense;

impl Exporter for Dense {
    fn holds(&self) -> Holds {
        Holds::Weights
    }

    fn refusal(&self, _: &Source<'_>, _: &LinearInfo, _: &Forms) -> Option<String> {
        None
    }

    fn tensors(&self, linear: &LinearInfo, _: &Forms) -> Vec<OutTensor> {
        vec![weight(linear)]
    }

    fn bytes(
        &self,
        _: &Source<'_>,
        linear: &LinearInfo,
        operator: &Operator,
    ) -> Result<Vec<NamedBytes>, CheckpointError> {
        Ok(vec![weight_bytes(linear, operator.product(linear.shape()))?])
    }

    fn joins_stacks(&self) -> bool {
        true
    }

    fn config(&self, source: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Map<String, Value> {
        source.config.clone()
    }

    fn side_files(&self, _: &Source<'_>, _: &[(LinearInfo, Forms)]) -> Vec<(String, String)> {
        Vec::new()
    }

    fn loading(&self, _: Adapter) -> String {
        "Plain weights: it loads wherever the source does (transformers, vLLM, ...).\n\n```python\n\
         from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(\"FOLDER\")\n```\n"
            .into()
    }
}

/// The weight of a linear in the shape that its family stores.
pub(super) fn weight(linear: &LinearInfo) -> OutTensor {
    let (out, input) = linear.shape();
    let shape = if linear.order == Order::InOut { vec![input, out] } else { vec![out, input] };
    OutTensor::plain(linear.weight_name(), linear.dtype, shape)
}

/// `values` (out, in) as the weight of a linear.
pub(super) fn weight_bytes(linear: &LinearInfo, mut values: Vec<f32>) -> Result<NamedBytes, CheckpointError> {
    if linear.order == Order::InOut {
        values = linalg::transpose_row_major(&values, linear.out_features, linear.in_features);
    }
    encode(linear.weight_name(), linear.dtype, &values)
}
