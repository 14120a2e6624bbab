//! Values that are not finite, which no result may contain.

use anyhow::Result;
use candle_core::{D, Tensor};

use super::kernel::has_kernel;
use crate::device::to_host;

/// Whether all values are finite, including large values whose squares overflow.
///
/// # Errors
/// The device fails.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    if has_kernel(x) {
        return Ok(to_host(x)?.iter().all(|v| v.is_finite()));
    }
    // 0 · ∞ is not a number. Only the sum leaves the device. It is taken by rows first, because candle sums to a scalar
    // in a single block of threads.
    Ok(to_host(&(x * 0.0)?.sum(D::Minus1)?.sum_all()?)?.iter().all(|v| v.is_finite()))
}

/// The first window of a batch, `values` of the shape of `y` (batch, n_tokens, width), with a value that is not finite.
pub(in crate::model) fn non_finite_window(values: &[f32], y: &Tensor) -> Result<Option<usize>> {
    let n_values = (y.dim(1)? * y.dim(2)?).max(1);
    Ok(values.iter().position(|value| !value.is_finite()).map(|at| at / n_values))
}
