//! Low-rank parts multiplied out, in the dtype, names and config of the source: loads everywhere, and is no smaller.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{CheckpointError, Entry, Exporter, Layout, LinearInfo, NamedBytes, Parts, TensorSpec, encode};
use crate::linalg;
use crate::model::inventory::Stored;

pub(super) struct Dense;

impl Exporter for Dense {
    fn specs(&self, linear: &LinearInfo, _: Entry) -> Vec<TensorSpec> {
        let (out, input) = linear.shape();
        let shape = if linear.stored == Stored::DenseTransposed { vec![input, out] } else { vec![out, input] };
        vec![TensorSpec { name: linear.weight_name(), dtype: linear.dtype, shape }]
    }

    fn tensors(&self, linear: &LinearInfo, parts: &Parts) -> Result<Vec<NamedBytes>, CheckpointError> {
        let (m, n) = linear.shape();
        let mut values = parts.product(m, n);
        if linear.stored == Stored::DenseTransposed {
            values = linalg::transpose_row_major(&values, m, n);
        }
        Ok(vec![encode(linear.weight_name(), linear.dtype, &values)?])
    }

    fn bias_name(&self, linear: &LinearInfo, _: Layout) -> String {
        format!("{}.bias", linear.module)
    }

    fn config(&self, source: &Map<String, Value>, _: &BTreeMap<String, Entry>) -> Map<String, Value> {
        source.clone()
    }

    fn side_files(&self, _: &Map<String, Value>) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}
