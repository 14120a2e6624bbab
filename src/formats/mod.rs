//! How a compressed model is laid down for a runtime. One format a file, one line in [`Format::layout`].

mod dense;
mod factored;

use std::collections::BTreeMap;

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::cast;
use crate::checkpoint::{CheckpointError, Dtype, TensorSpec};
use crate::model::inventory::LinearInfo;

/// The formats, as a user names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Factors as they are; loads in transformers with `trust_remote_code`, and in lrc
    #[default]
    Factored,
    /// Factors multiplied out: loads everywhere, and is no smaller
    Dense,
}

/// A tensor with its bytes.
pub struct NamedBytes {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// A pair of factors: `B` (out, rank), `A` (rank, in), row-major.
pub struct FactorPair<'a> {
    pub rank: usize,
    pub b: &'a [f32],
    pub a: &'a [f32],
}

/// How a format stores one factored linear, and what it says in `config.json`.
pub trait Layout: Sync {
    /// The tensors that take the place of the weight of `linear`.
    fn specs(&self, linear: &LinearInfo, rank: usize) -> Vec<TensorSpec>;

    /// Their bytes.
    ///
    /// # Errors
    /// A value does not fit the dtype.
    fn tensors(&self, linear: &LinearInfo, factors: &FactorPair<'_>) -> Result<Vec<NamedBytes>, CheckpointError>;

    /// Where the bias of a factored linear goes.
    fn bias_name(&self, linear: &LinearInfo) -> String;

    /// `config.json` of the output; `ranks` by module.
    fn config(&self, source: &Map<String, Value>, ranks: &BTreeMap<String, usize>) -> Map<String, Value>;

    /// Files that the runtime needs beside the weights: (name, content).
    fn side_files(&self, source: &Map<String, Value>) -> Vec<(&'static str, String)>;
}

impl Format {
    /// The layout behind the name.
    pub fn layout(self) -> &'static dyn Layout {
        match self {
            Self::Factored => &factored::Factored,
            Self::Dense => &dense::Dense,
        }
    }
}

/// `values` in `dtype`; the error names the tensor.
fn encode(name: String, dtype: Dtype, values: &[f32]) -> Result<NamedBytes, CheckpointError> {
    match cast::encode(dtype, values) {
        Ok(bytes) => Ok(NamedBytes { name, bytes }),
        Err(first) => Err(CheckpointError::Overflow { tensor: name, dtype: format!("{dtype:?}"), first }),
    }
}
