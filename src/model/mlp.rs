//! The gated feed-forward layer (SwiGLU, Shazeer 2020).

use anyhow::Result;
use candle_core::Tensor;

use super::linear::Linear;

#[derive(Debug, Clone)]
pub struct Mlp {
    pub(super) gate_proj: Linear,
    pub(super) up_proj: Linear,
    pub(super) down_proj: Linear,
}

impl Mlp {
    /// Everything before `down_proj`: (..., hidden_size) to (..., intermediate_size).
    ///
    /// # Errors
    /// Shapes that do not match.
    pub(super) fn gate(&self, x: &Tensor) -> Result<Tensor> {
        Ok((self.gate_proj.forward(x)?.silu()? * self.up_proj.forward(x)?)?)
    }
}
