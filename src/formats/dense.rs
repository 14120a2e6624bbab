//! Factors multiplied out, in the dtype, names and config of the source: loads everywhere, and is no smaller.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{CheckpointError, FactorPair, Layout, LinearInfo, NamedBytes, TensorSpec, encode};
use crate::linalg;
use crate::model::inventory::Stored;

pub(super) struct Dense;

impl Layout for Dense {
    fn specs(&self, linear: &LinearInfo, _: usize) -> Vec<TensorSpec> {
        let (out, input) = (linear.out_features, linear.in_features);
        let shape = if linear.stored == Stored::DenseTransposed { vec![input, out] } else { vec![out, input] };
        vec![TensorSpec { name: linear.weight_name(), dtype: linear.dtype, shape }]
    }

    fn tensors(&self, linear: &LinearInfo, factors: &FactorPair<'_>) -> Result<Vec<NamedBytes>, CheckpointError> {
        let (m, n) = (linear.out_features, linear.in_features);
        let mut values = linalg::product_row_major(factors.b, factors.a, m, factors.rank, n);
        if linear.stored == Stored::DenseTransposed {
            values = linalg::transpose_row_major(&values, m, n);
        }
        Ok(vec![encode(linear.weight_name(), linear.dtype, &values)?])
    }

    fn bias_name(&self, linear: &LinearInfo) -> String {
        format!("{}.bias", linear.module)
    }

    fn config(&self, source: &Map<String, Value>, _: &BTreeMap<String, usize>) -> Map<String, Value> {
        source.clone()
    }

    fn side_files(&self, _: &Map<String, Value>) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}
