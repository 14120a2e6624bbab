//! The matrices to inspect: linears of the inventory, and each expert of a stack.

use anyhow::Result;

use crate::checkpoint::{Checkpoint, Dtype, TensorInfo};
use crate::model::inventory::{self, LinearInfo, Stored};
use crate::operator::Kind;

/// A matrix of a checkpoint.
pub(super) struct Matrix {
    /// The module; for an expert, the module of the stack with the index of the expert.
    pub module: String,
    /// `linear`, or the roles of a fused or stacked matrix.
    pub kind: String,
    pub block: Option<usize>,
    /// (out, in).
    pub shape: (usize, usize),
    pub dtype: Dtype,
    pub stored_rank: Option<usize>,
    source: Source,
}

enum Source {
    Linear(LinearInfo),
    /// The `index`-th matrix of a tensor with three dimensions.
    Slice {
        tensor: String,
        index: usize,
    },
}

/// Names of fused matrices, with the roles that are stacked in their rows.
const FUSED: [(&str, &str); 8] = [
    ("qkv_proj", "q, k, v"),
    ("query_key_value", "q, k, v"),
    ("c_attn", "q, k, v"),
    ("Wqkv", "q, k, v"),
    ("qkv", "q, k, v"),
    ("in_proj", "q, k, v"),
    ("gate_up_proj", "gate, up"),
    ("kv_b_proj", "k, v"),
];

impl Matrix {
    pub fn break_even_rank(&self) -> usize {
        Kind::FACTORS.fitting().largest_saving_rank(self.shape)
    }

    /// Names of the tensors that store it.
    pub fn tensor_names(&self) -> Vec<String> {
        match &self.source {
            Source::Linear(linear) => linear.tensor_names(),
            Source::Slice { tensor, .. } => vec![tensor.clone()],
        }
    }

    /// Its values, (out, in) row-major.
    ///
    /// # Errors
    /// A tensor is broken, or a value is not finite.
    pub fn values(&self, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
        match &self.source {
            Source::Linear(linear) => inventory::weight(checkpoint, linear),
            Source::Slice { tensor, index } => Ok(checkpoint.slice_values(tensor, *index)?),
        }
    }
}

#[cfg(test)]
impl Matrix {
    pub fn of_shape(m: usize, n: usize) -> Self {
        let source = Source::Slice { tensor: "m".into(), index: 0 };
        let (module, kind) = ("m".to_string(), "linear".to_string());
        Self { module, kind, block: None, shape: (m, n), dtype: Dtype::F32, stored_rank: None, source }
    }
}

/// All matrices, in file order.
pub(super) fn of(checkpoint: &Checkpoint) -> Vec<Matrix> {
    let linears = inventory::linears(checkpoint).into_iter().map(|linear| Matrix {
        module: linear.module.clone(),
        kind: fused(&linear.module).map_or("linear".into(), |roles| format!("fused {roles}")),
        block: linear.block,
        shape: linear.shape(),
        dtype: linear.dtype,
        stored_rank: match linear.stored {
            Stored::Structured { size, .. } => size.rank(),
            Stored::Dense | Stored::DenseTransposed => None,
        },
        source: Source::Linear(linear),
    });
    linears.chain(checkpoint.tensors().flat_map(stack)).collect()
}

/// The experts of a stack; empty for other tensors.
fn stack(info: &TensorInfo) -> Vec<Matrix> {
    let &[n, rows, columns] = info.shape.as_slice() else { return Vec::new() };
    let name = info.name.strip_suffix(".weight").unwrap_or(&info.name);
    if !inventory::is_stack(info) {
        return Vec::new();
    }
    let roles = fused(name).map_or(String::new(), |roles| format!(", fused {roles}"));
    let expert = |index: usize| Matrix {
        module: format!("{name}[{index}]"),
        kind: format!("expert {index} of {n}{roles}"),
        block: name.split('.').find_map(|part| part.parse().ok()),
        shape: (rows, columns),
        dtype: info.dtype,
        stored_rank: None,
        source: Source::Slice { tensor: info.name.clone(), index },
    };
    (0..n).map(expert).collect()
}

fn fused(module: &str) -> Option<&'static str> {
    let last = module.rsplit('.').next().unwrap_or(module);
    FUSED.iter().find(|(name, _)| *name == last).map(|(_, roles)| *roles)
}
