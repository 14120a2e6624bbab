//! The source of a model's tensors: a checkpoint on disk, or variables in training.

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};

use crate::checkpoint::{Checkpoint, Dtype, TensorInfo};
use crate::device::{Device, HOST};
use crate::error::Failure;
use crate::operator::{self, BASE};
use crate::quantize::Scaled;

/// How a family stores dense weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// (out, in), as in most families.
    OutIn,
    /// (in, out), as in GPT-2's Conv1D.
    InOut,
}

impl Order {
    /// The order that a family's table gives.
    pub fn of(is_conv1d: bool) -> Self {
        if is_conv1d { Self::InOut } else { Self::OutIn }
    }
}

/// A source of f32 tensors by name.
pub trait Weights: Sync {
    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// The tensor, in f32.
    ///
    /// # Errors
    /// It is absent, not a float tensor, or not finite.
    fn tensor(&self, name: &str) -> Result<Tensor>;

    /// A permutation (n) of 0..n, in u32.
    ///
    /// # Errors
    /// It is absent, or not a permutation.
    fn indices(&self, name: &str) -> Result<Tensor>;

    /// The weight (out, in) of a linear, from the order in which its family stores it.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    fn matrix(&self, name: &str, _: Order) -> Result<Tensor> {
        self.tensor(name)
    }
}

/// A checkpoint with additional tensors, which take precedence over the checkpoint's.
pub struct Overlay<'a> {
    /// Every tensor that is not replaced.
    pub below: &'a Checkpoint,
    /// The replacements, by the name of the tensor.
    pub above: HashMap<String, Tensor>,
}

/// A checkpoint some of whose tensors are variables, each in the order in which it is stored: values of floats, or
/// scales of codes.
pub struct Trained<'a> {
    /// Every tensor that is not trained.
    pub below: &'a Checkpoint,
    /// The variables, by the name of the tensor; of the shapes of [`Checkpoint::floats`].
    pub variables: &'a HashMap<String, Tensor>,
}

/// Weights that are put on a device as they are loaded.
pub(super) struct Placed<'w> {
    pub weights: &'w dyn Weights,
    pub device: Device,
}

impl<'w> Placed<'w> {
    pub fn on_host(weights: &'w dyn Weights) -> Self {
        Self { weights, device: HOST }
    }
}

impl Weights for Placed<'_> {
    fn contains(&self, name: &str) -> bool {
        self.weights.contains(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(self.weights.tensor(name)?.to_device(&self.device)?)
    }

    fn indices(&self, name: &str) -> Result<Tensor> {
        Ok(self.weights.indices(name)?.to_device(&self.device)?)
    }

    fn matrix(&self, name: &str, order: Order) -> Result<Tensor> {
        Ok(self.weights.matrix(name, order)?.to_device(&self.device)?)
    }
}

impl Weights for Checkpoint {
    fn contains(&self, name: &str) -> bool {
        self.info(name).is_some()
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let values = self.values(name)?;
        let shape = self.require(name)?.shape.clone();
        Ok(Tensor::from_vec(values, shape, &HOST)?)
    }

    fn indices(&self, name: &str) -> Result<Tensor> {
        let values: Vec<u32> = permutation(self, name)?.into_iter().map(|i| i as u32).collect();
        Ok(Tensor::new(values, &HOST)?)
    }

    fn matrix(&self, name: &str, order: Order) -> Result<Tensor> {
        turned(self, name, order, self.tensor(name)?)
    }
}

/// A weight (out, in), from the order in which a checkpoint stores it.
fn turned(checkpoint: &Checkpoint, name: &str, order: Order, weight: Tensor) -> Result<Tensor> {
    let is_transposed = order == Order::InOut && follows_family(checkpoint, name);
    Ok(if is_transposed { weight.t()?.contiguous()? } else { weight })
}

impl Weights for Overlay<'_> {
    fn contains(&self, name: &str) -> bool {
        self.above.contains_key(name) || self.below.contains(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.above.get(name).map_or_else(|| self.below.tensor(name), |tensor| Ok(tensor.clone()))
    }

    fn indices(&self, name: &str) -> Result<Tensor> {
        self.above.get(name).map_or_else(|| self.below.indices(name), |tensor| Ok(tensor.clone()))
    }

    fn matrix(&self, name: &str, order: Order) -> Result<Tensor> {
        self.above.get(name).map_or_else(|| self.below.matrix(name, order), |tensor| Ok(tensor.clone()))
    }
}

impl Weights for Trained<'_> {
    fn contains(&self, name: &str) -> bool {
        self.below.contains(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some(variable) = self.variables.get(name) else { return self.below.tensor(name) };
        match self.below.quantized(name)?.and_then(|codes| codes.scaled()) {
            Some(scaled) => scaled_matrix(variable, scaled),
            None => Ok(variable.clone()),
        }
    }

    fn indices(&self, name: &str) -> Result<Tensor> {
        match self.variables.get(name) {
            Some(indices) => Ok(indices.to_dtype(DType::U32)?),
            None => self.below.indices(name),
        }
    }

    fn matrix(&self, name: &str, order: Order) -> Result<Tensor> {
        turned(self.below, name, order, self.tensor(name)?)
    }
}

/// The matrix (rows, cols) of the levels of codes times `scales` (kinds, rows, n_runs), differentiable in these.
fn scaled_matrix(scales: &Tensor, Scaled { shape: [_, rows, n_runs], levels, run, .. }: Scaled) -> Result<Tensor> {
    let mut terms = levels.into_iter().enumerate().map(|(kind, levels)| -> Result<Tensor> {
        let (own, cols) = (scales.get(kind)?, levels.len() / rows.max(1));
        let levels = Tensor::from_vec(levels, (rows, cols), scales.device())?;
        if run * n_runs == cols {
            let runs = levels.reshape((rows, n_runs, run))?;
            return Ok(runs.broadcast_mul(&own.unsqueeze(2)?)?.reshape((rows, cols))?);
        }
        let runs: Vec<u32> = (0..cols).map(|col| (col / run) as u32).collect();
        Ok((own.index_select(&Tensor::new(runs, scales.device())?, 1)? * levels)?)
    });
    let first = terms.next().context("invariant: codes have scales")?;
    terms.try_fold(first?, |sum, term| Ok((sum + term?)?))
}

impl Weights for HashMap<String, Tensor> {
    fn contains(&self, name: &str) -> bool {
        self.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.get(name).cloned().with_context(|| format!("tensor `{name}` is absent"))
    }

    fn indices(&self, name: &str) -> Result<Tensor> {
        self.tensor(name)
    }
}

/// Whether a matrix is stored in the order of its family, (in, out) for a Conv1D. Codes are presented as (out, in) in
/// every family, and the factored format stores bases like that.
pub(super) fn follows_family(checkpoint: &Checkpoint, name: &str) -> bool {
    let is_out_in = checkpoint.info(name).is_some_and(TensorInfo::is_out_in);
    let is_base = || name.strip_suffix(".weight").is_some_and(|stem| stem.ends_with(&format!(".{BASE}")));
    let is_factored = || checkpoint.config().is_some_and(|config| config.contains_key("lrc"));
    !is_out_in && (!is_base() || !is_factored())
}

/// A stored permutation: the position of every row.
///
/// # Errors
/// The tensor is absent, or not a permutation.
pub(super) fn permutation(checkpoint: &Checkpoint, name: &str) -> Result<Vec<usize>> {
    let info = checkpoint.require(name)?;
    let broken = || Failure::unsupported(format!("tensor `{name}` is not a permutation of rows"));
    let (&[m], Dtype::I32) = (info.shape.as_slice(), info.dtype) else { return Err(broken().into()) };
    let permutation: Vec<usize> = checkpoint.with_bytes(name, |bytes| {
        bytes.as_chunks::<4>().0.iter().map(|&b| usize::try_from(i32::from_le_bytes(b)).unwrap_or(usize::MAX)).collect()
    })?;
    let mut seen = vec![false; m];
    let is_new = |&i: &usize| i < m && !std::mem::replace(&mut seen[i], true);
    if permutation.iter().all(is_new) { Ok(permutation) } else { Err(broken().into()) }
}

/// Whether a fused module is stored as its split parts.
pub(super) fn is_split(weights: &dyn Weights, module: &str) -> bool {
    let has = |part: &str| operator::first_parts().any(|stored| weights.contains(&format!("{module}.{part}.{stored}")));
    has("q") || has("gate")
}
