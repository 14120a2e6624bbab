//! How a compressed model is laid down for a runtime. One format a file, one line in [`Format::exporter`].

mod dense;
mod factored;

use std::collections::BTreeMap;

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::cast;
use crate::checkpoint::{CheckpointError, Dtype, TensorSpec};
use crate::linalg;
use crate::model::Layout;
use crate::model::inventory::LinearInfo;

/// The formats, as a user names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Low-rank parts as they are; loads in transformers with `trust_remote_code`, and in lrc
    #[default]
    Factored,
    /// Multiplied out: loads everywhere, and is no smaller
    Dense,
}

/// A tensor with its bytes.
pub struct NamedBytes {
    pub name: String,
    pub bytes: Vec<u8>,
}

/// A matrix (m, n) of low rank in one of its layouts, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum Parts {
    /// `B` (m, rank) and `A` (rank, n).
    Factors { rank: usize, b: Vec<f32>, a: Vec<f32> },
    /// `pivots` (rank, n), `coefficients` (m − rank, rank) of the other rows in them, and `order` (m): where each row of the
    /// matrix stands among pivots, then others.
    Pivot { rank: usize, pivots: Vec<f32>, coefficients: Vec<f32>, order: Vec<i32> },
}

impl Parts {
    /// The matrix (m, n), row-major.
    pub fn product(&self, m: usize, n: usize) -> Vec<f32> {
        match self {
            Self::Factors { rank, b, a } => linalg::product_row_major(b, a, m, *rank, n),
            Self::Pivot { rank, pivots, coefficients, order } => {
                let others = linalg::product_row_major(coefficients, pivots, m - rank, *rank, n);
                let row = |&place: &i32| {
                    let place = place as usize;
                    match place.checked_sub(*rank) {
                        None => &pivots[place * n..][..n],
                        Some(other) => &others[other * n..][..n],
                    }
                };
                order.iter().flat_map(row).copied().collect()
            }
        }
    }

    /// `L x` (m) of the matrix `L` (m, n), in f64.
    ///
    /// # Panics
    /// When `x` has not n values.
    pub fn times(&self, x: &[f64]) -> Vec<f64> {
        let product = |matrix: &[f32], x: &[f64]| -> Vec<f64> {
            let row = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
            matrix.chunks_exact(x.len().max(1)).map(row).collect()
        };
        match self {
            Self::Factors { b, a, .. } => product(b, &product(a, x)),
            Self::Pivot { pivots, coefficients, order, .. } => {
                let mut y = product(pivots, x);
                y.extend(product(coefficients, &y));
                order.iter().map(|&place| y[place as usize]).collect()
            }
        }
    }

    /// The parts as `dtype` stores them.
    ///
    /// # Errors
    /// A value does not fit; the index of the first.
    pub fn rounded(&self, dtype: Dtype) -> Result<Self, usize> {
        let round = |values: &[f32]| -> Result<Vec<f32>, usize> {
            let bytes = cast::encode(dtype, values)?;
            Ok(cast::decode(dtype, &bytes).expect("invariant: what was encoded is decoded"))
        };
        Ok(match self {
            Self::Factors { rank, b, a } => Self::Factors { rank: *rank, b: round(b)?, a: round(a)? },
            Self::Pivot { rank, pivots, coefficients, order } => Self::Pivot {
                rank: *rank,
                pivots: round(pivots)?,
                coefficients: round(coefficients)?,
                order: order.clone(),
            },
        })
    }
}

/// How a compressed linear is described in `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub rank: usize,
    pub layout: Layout,
}

/// How a format stores one compressed linear, and what it says in `config.json`.
pub trait Exporter: Sync {
    /// The tensors that take the place of the weight of `linear`.
    fn specs(&self, linear: &LinearInfo, entry: Entry) -> Vec<TensorSpec>;

    /// Their bytes.
    ///
    /// # Errors
    /// A value does not fit the dtype.
    fn tensors(&self, linear: &LinearInfo, parts: &Parts) -> Result<Vec<NamedBytes>, CheckpointError>;

    /// Where the bias of a compressed linear goes.
    fn bias_name(&self, linear: &LinearInfo, layout: Layout) -> String;

    /// `config.json` of the output; what became of the linears by module.
    fn config(&self, source: &Map<String, Value>, modules: &BTreeMap<String, Entry>) -> Map<String, Value>;

    /// Files that the runtime needs beside the weights: (name, content).
    fn side_files(&self, source: &Map<String, Value>) -> Vec<(&'static str, String)>;
}

impl Format {
    /// The exporter behind the name.
    pub fn exporter(self) -> &'static dyn Exporter {
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
