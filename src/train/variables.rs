//! Named tensors that are trained.

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Shape, Tensor, Var};

use crate::device::to_host;

/// Named tensors that are trained, in a fixed order.
#[derive(Debug, Default)]
pub struct Variables {
    trained: Vec<Variable>,
    constants: HashMap<String, Tensor>,
}

#[derive(Debug)]
struct Variable {
    name: String,
    values: Var,
    /// What its learning rate is divided by.
    reach: Option<Tensor>,
}

/// A tensor before its training.
#[derive(Debug, Clone)]
pub struct Start {
    /// Its name.
    pub name: String,
    /// Its values, on the device of the model.
    pub values: Tensor,
    /// What a change of one changes in the model, where that is not the same: scales of codes move all weights of a
    /// group by their levels. Its learning rate is divided by this, and it has no decay. Of a shape that spreads to
    /// that of the values.
    pub reach: Option<Tensor>,
}

impl Start {
    /// Of floats that are weights of the model.
    pub fn plain(name: impl Into<String>, values: Tensor) -> Self {
        Self { name: name.into(), values, reach: None }
    }
}

impl Variables {
    /// Variables that begin with these values.
    ///
    /// # Errors
    /// The device fails.
    pub fn new(tensors: Vec<Start>) -> Result<Self> {
        let variable = |Start { name, values, reach }: Start| -> Result<Variable> {
            Ok(Variable { name, values: Var::from_tensor(&values)?, reach })
        };
        Ok(Self { trained: tensors.into_iter().map(variable).collect::<Result<_>>()?, constants: HashMap::new() })
    }

    /// With tensors that stay and that the model is made with all the same.
    #[must_use]
    pub fn with_constants(self, constants: HashMap<String, Tensor>) -> Self {
        Self { constants, ..self }
    }

    /// The tensors that stay.
    pub fn constants(&self) -> &HashMap<String, Tensor> {
        &self.constants
    }

    /// Name and variable of each.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.trained.iter().map(|variable| (variable.name.as_str(), &variable.values))
    }

    /// Each variable, and what its learning rate is divided by.
    pub(super) fn with_reaches(&self) -> impl Iterator<Item = (&Var, Option<&Tensor>)> {
        self.trained.iter().map(|variable| (&variable.values, variable.reach.as_ref()))
    }

    /// The tensors by name, with the constants; gradients of what is computed from them can be taken.
    pub fn tensors(&self) -> HashMap<String, Tensor> {
        let trained = self.iter().map(|(name, variable)| (name.to_string(), variable.as_tensor().clone()));
        self.constants.clone().into_iter().chain(trained).collect()
    }

    /// The tensors by name, with the constants, for work without gradients.
    pub fn detached(&self) -> HashMap<String, Tensor> {
        let trained = self.iter().map(|(name, variable)| (name.to_string(), variable.as_detached_tensor()));
        self.constants.clone().into_iter().chain(trained).collect()
    }

    /// Adds to `sums` the gradients of these variables in a store. What a backward pass leaves in its store holds on to
    /// the graph of that pass, and to the gradients of constants; sums do not.
    ///
    /// # Errors
    /// The device fails.
    pub fn add_gradients(&self, sums: &mut GradStore, store: &GradStore) -> Result<()> {
        for (_, variable) in self.iter() {
            let Some(gradient) = store.get(variable) else { continue };
            let sum = match sums.get(variable) {
                Some(sum) => (sum + gradient)?,
                None => gradient.clone(),
            };
            sums.insert(variable, sum.detach());
        }
        Ok(())
    }

    /// The values of all, row-major.
    ///
    /// # Errors
    /// The device fails.
    pub fn values(&self) -> Result<Vec<Vec<f32>>> {
        self.iter().map(|(_, variable)| Ok(to_host(variable.as_tensor())?)).collect()
    }

    /// Sets the values of all.
    ///
    /// # Errors
    /// There are too few, or a shape does not match.
    pub fn set(&self, values: &[Vec<f32>]) -> Result<()> {
        for (i, (name, variable)) in self.iter().enumerate() {
            let values = values.get(i).with_context(|| format!("invariant: `{name}` has values"))?;
            let shape: &Shape = variable.shape();
            variable.set(&Tensor::from_slice(values, shape, variable.device())?)?;
        }
        Ok(())
    }
}
