//! The operations of a model that are not products with its weights, each with a backward pass of its own.
//!
//! candle's own fused kernels have no backward pass and silently stop gradients; composed of its element-wise
//! operations, a norm reads and writes its input a dozen times. Each operation here has a CPU kernel of one pass over
//! memory, and a portable form in candle's operations, for other devices and as the reference in tests. Rows are
//! computed in a fixed order with a fixed number of lanes, so that results depend on neither threads nor vector
//! width.

mod attention;
mod gate;
mod kernel;
mod norm;
mod rope;

use anyhow::Result;
use candle_core::Tensor;

use crate::device::to_host;
pub(super) use attention::{Scoring, attend};
pub(super) use gate::gated;
pub(super) use norm::{layer_norm, rms_norm};
pub(super) use rope::rope;

/// Whether all values are finite, including large values whose squares overflow.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(to_host(x)?.iter().all(|v| v.is_finite()))
}

/// The first window of a batch, `values` of the shape of `y` (batch, n_tokens, width), with a value that is not finite.
pub(super) fn non_finite_window(values: &[f32], y: &Tensor) -> Result<Option<usize>> {
    let n_values = (y.dim(1)? * y.dim(2)?).max(1);
    Ok(values.iter().position(|value| !value.is_finite()).map(|at| at / n_values))
}

#[cfg(test)]
mod tests;
