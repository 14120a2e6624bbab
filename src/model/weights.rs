//! Where a model's tensors come from: a checkpoint on disk, or variables under training.

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};

use crate::checkpoint::Checkpoint;

/// A source of f32 tensors by name.
pub trait Weights {
    fn contains(&self, name: &str) -> bool;

    /// The tensor, in f32.
    ///
    /// # Errors
    /// It is absent, not a float tensor, or not finite.
    fn tensor(&self, name: &str) -> Result<Tensor>;
}

impl Weights for Checkpoint {
    fn contains(&self, name: &str) -> bool {
        self.info(name).is_some()
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let values = self.values(name)?;
        let shape = self.require(name)?.shape.clone();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

impl Weights for HashMap<String, Tensor> {
    fn contains(&self, name: &str) -> bool {
        self.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.get(name).cloned().with_context(|| format!("tensor `{name}` is absent"))
    }
}
