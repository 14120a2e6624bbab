//! Norms over the last dimension, of the kinds that families use.

use anyhow::Result;
use candle_core::Tensor;

use super::architectures::table::NormKind;
use super::ops;
use super::weights::Weights;

/// RMSNorm or LayerNorm over the last dimension.
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f64,
}

/// Names of the weight and the bias of a norm; files converted from TensorFlow have `gamma` and `beta`.
pub(super) fn names(module: &str, contains: impl Fn(&str) -> bool) -> [String; 2] {
    let old = ["gamma", "beta"].map(|part| format!("{module}.{part}"));
    if contains(&old[0]) { old } else { ["weight", "bias"].map(|part| format!("{module}.{part}")) }
}

impl Norm {
    /// # Errors
    /// A tensor is absent or damaged.
    pub fn load(weights: &dyn Weights, module: &str, kind: NormKind, eps: f64) -> Result<Self> {
        let [weight, bias] = names(module, |name| weights.contains(name));
        let weight = weights.tensor(&weight)?;
        Ok(Self {
            weight: if kind == NormKind::RmsPlusOne { (weight + 1.0)? } else { weight },
            bias: (kind == NormKind::Layer).then(|| weights.tensor(&bias)).transpose()?,
            eps,
        })
    }

    /// Normalizes `x` (..., width).
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match &self.bias {
            None => ops::rms_norm(x, &self.weight, self.eps),
            Some(bias) => ops::layer_norm(x, &self.weight, bias, self.eps),
        }
    }
}
