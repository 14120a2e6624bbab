//! Helpers of the kernels of all operations.

use candle_core::Tensor;

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
