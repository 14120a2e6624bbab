//! The operations of a model that are not products with its weights, each with a backward pass of its own.
//!
//! candle's own fused kernels have no backward pass and silently stop gradients; composed of its element-wise
//! operations, a norm reads and writes its input a dozen times. Each operation here has a CPU kernel of one pass over
//! memory, and a portable form in candle's operations, for other devices and as the reference in tests. Rows are
//! computed in a fixed order with a fixed number of lanes, so that results depend on neither threads nor vector
//! width.

mod attention;
mod gate;
mod norm;
mod rope;

use anyhow::Result;
use candle_core::{CpuStorage, Layout, Tensor, bail};

use crate::device::to_host;
pub(super) use attention::{Scoring, attend};
pub(super) use gate::gated;
pub(super) use norm::{layer_norm, rms_norm};
pub(super) use rope::rope;

/// Whether all values are finite, including large values whose squares overflow.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(to_host(x)?.iter().all(|v| v.is_finite()))
}

/// Whether operations have kernels where their input is.
fn has_kernel(x: &Tensor) -> bool {
    #[cfg(test)]
    if tests::ARE_PORTABLE.get() {
        return false;
    }
    x.device().is_cpu()
}

/// Number of partial sums of a row.
const LANES: usize = 16;

/// `Σ f(a, b)` over two rows of one length.
#[inline(always)]
fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(&a, &b)| f(a, b)).sum();
    for (a, b) in a.zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f(a, b);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// The values of a contiguous tensor.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let Some((begin, end)) = layout.contiguous_offsets() else { bail!("this operation needs contiguous tensors") };
    Ok(&storage.as_slice::<f32>()?[begin..end])
}

/// A gradient with respect to `x`: a tensor of its shape, on its device.
fn like(x: &Tensor, values: Vec<f32>) -> candle_core::Result<Option<Tensor>> {
    Tensor::from_vec(values, x.shape(), x.device()).map(Some)
}

#[cfg(test)]
mod tests;
