//! Addends of activations and gradients on another device than the host, in candle's operations: what leaves the device
//! is sums, never rows of tokens. On the host, `addend.rs` has the same in loops.

use anyhow::Result;
use candle_core::{DType, Tensor};

use crate::device::{column_sums, to_host_f64};

/// `xᵀ x` (n, n) of rows `x` (n_tokens, n), in f32.
pub(super) fn gram(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    Ok(x.t()?.matmul(&x)?)
}

/// `Σ |x|` (n) over the rows of `x` (n_tokens, n).
pub(super) fn magnitudes(x: &Tensor) -> Result<Vec<f64>> {
    Ok(column_sums(&x.abs()?)?)
}

/// Column sums (n) and row sums (m) of the squares of a weight gradient (m, n).
pub(super) fn squares(gradient: &Tensor) -> Result<[Vec<f64>; 2]> {
    let squares = gradient.to_dtype(DType::F64)?.sqr()?;
    Ok([to_host_f64(&squares.sum(0)?)?, to_host_f64(&squares.sum(1)?)?])
}

/// Rows of gradients with less than this share of the mean norm are rounding errors.
pub(super) const ROUNDING: f64 = 1e-5;

/// Gradients (n_tokens, m) whose rows have norms between 0.1 and 10 times the mean norm. Rows that are zero but for
/// rounding are kept.
pub(super) fn clipped(gradients: &Tensor) -> Result<Tensor> {
    // Squares of small gradients underflow in f32.
    let norms = gradients.to_dtype(DType::F64)?.sqr()?.sum_keepdim(1)?.sqrt()?; // (n_tokens, 1)
    let mean = norms.mean_all()?;
    let bounded = norms.broadcast_maximum(&(&mean * 0.1)?)?.broadcast_minimum(&(&mean * 10.0)?)?;
    let ones = norms.ones_like()?;
    let is_zero = norms.broadcast_le(&(&mean * ROUNDING)?)?;
    let scales = (is_zero.where_cond(&ones, &bounded)? / is_zero.where_cond(&ones, &norms)?)?;
    Ok(gradients.broadcast_mul(&scales.to_dtype(DType::F32)?)?)
}
