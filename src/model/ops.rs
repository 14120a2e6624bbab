//! The few operations for which evaluation and training need different candle functions.
//!
//! candle's fused kernels have no backward pass and silently stop gradients, so only evaluation uses them.

use anyhow::Result;
use candle_core::Tensor;
use candle_nn::{ops, rotary_emb};

/// Whether all values are finite, including large values whose squares overflow.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(x.flatten_all()?.to_vec1::<f32>()?.iter().all(|v| v.is_finite()))
}

/// The kernels of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// Fast, no gradients.
    Fused,
    /// Gradients flow through every operation.
    Differentiable,
}

impl Kernels {
    /// RMSNorm (Zhang & Sennrich 2019) over the last dimension.
    pub fn rms_norm(self, x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
        Ok(match self {
            Self::Fused => ops::rms_norm(x, weight, eps as f32)?,
            Self::Differentiable => ops::rms_norm_slow(x, weight, eps as f32)?,
        })
    }

    /// Layer norm (Ba et al. 2016) over the last dimension.
    pub fn layer_norm(self, x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        Ok(match self {
            Self::Fused => ops::layer_norm(&x.contiguous()?, weight, bias, eps as f32)?,
            Self::Differentiable => ops::layer_norm_slow(x, weight, bias, eps as f32)?,
        })
    }

    /// Rotates the halves of `x` (batch, heads, n_tokens, head_dim) by `cos` and `sin` (n_tokens, head_dim / 2).
    pub fn rope(self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Fused => rotary_emb::rope(x, cos, sin)?,
            Self::Differentiable => rotary_emb::rope_slow(x, cos, sin)?,
        })
    }
}
