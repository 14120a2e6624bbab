//! Helpers of the kernels of all operations.

use candle_core::{CpuStorage, Layout, Tensor, bail};

use crate::device::is_host;

/// Whether operations have kernels where their input is.
pub(super) fn has_kernel(x: &Tensor) -> bool {
    is_host(x.device())
}

/// Number of partial sums of a row.
const LANES: usize = 16;

/// `Σ f(a, b)` over two rows of one length.
#[inline(always)]
pub(super) fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
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
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let Some((begin, end)) = layout.contiguous_offsets() else { bail!("this operation needs contiguous tensors") };
    Ok(&storage.as_slice::<f32>()?[begin..end])
}

/// A gradient with respect to `x`: a tensor of its shape, on its device.
pub(super) fn like(x: &Tensor, values: Vec<f32>) -> candle_core::Result<Option<Tensor>> {
    Tensor::from_vec(values, x.shape(), x.device()).map(Some)
}
