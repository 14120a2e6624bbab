//! Named tensors that are trained.

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::{Shape, Tensor, Var};

use crate::device::to_host;

/// Named tensors that are trained, in a fixed order.
#[derive(Debug, Default)]
pub struct Variables(Vec<(String, Var)>);

impl Variables {
    /// Variables with these names, shapes and values (row-major), on the device of the model.
    ///
    /// # Errors
    /// A shape does not match its values.
    pub fn new(tensors: Vec<(String, Tensor)>) -> Result<Self> {
        let variable = |(name, tensor): (String, Tensor)| Ok((name, Var::from_tensor(&tensor)?));
        Ok(Self(tensors.into_iter().map(variable).collect::<Result<_>>()?))
    }

    /// Name and variable of each.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.0.iter().map(|(name, variable)| (name.as_str(), variable))
    }

    /// The tensors by name; gradients of what is computed from them can be taken.
    pub fn tensors(&self) -> HashMap<String, Tensor> {
        self.0.iter().map(|(name, variable)| (name.clone(), variable.as_tensor().clone())).collect()
    }

    /// The tensors by name, for work without gradients.
    pub fn detached(&self) -> HashMap<String, Tensor> {
        self.0.iter().map(|(name, variable)| (name.clone(), variable.as_detached_tensor())).collect()
    }

    /// The values of all, row-major.
    ///
    /// # Errors
    /// The device fails.
    pub fn values(&self) -> Result<Vec<Vec<f32>>> {
        self.0.iter().map(|(_, variable)| Ok(to_host(variable.as_tensor())?)).collect()
    }

    /// Sets the values of all.
    ///
    /// # Errors
    /// There are too few, or a shape does not match.
    pub fn set(&self, values: &[Vec<f32>]) -> Result<()> {
        for (i, (name, variable)) in self.0.iter().enumerate() {
            let values = values.get(i).with_context(|| format!("invariant: `{name}` has values"))?;
            let shape: &Shape = variable.shape();
            variable.set(&Tensor::from_slice(values, shape, variable.device())?)?;
        }
        Ok(())
    }
}
