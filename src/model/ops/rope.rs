//! Rotations of queries and keys by their positions.

use anyhow::Result;
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, Tensor};
use candle_nn::rotary_emb::rope_slow;
use pulp::Arch;

use super::kernel::has_kernel;
use crate::device::{host_slice, like, to_host};

/// Rotates the halves of `x` (batch, heads, n_tokens, head_dim) by `cos` and `sin` (n_tokens, head_dim / 2).
pub(in crate::model) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if !has_kernel(x) {
        return portable_rope(x, cos, sin);
    }
    Ok(x.contiguous()?.apply_op3(&cos.contiguous()?, &sin.contiguous()?, Rotation)?)
}

/// The same in candle's operations.
pub(super) fn portable_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    Ok(rope_slow(x, cos, sin)?)
}

/// The rotary embedding (Su et al. 2021) in halves: `(x₁ c − x₂ s, x₁ s + x₂ c)`.
struct Rotation;

impl Rotation {
    /// Rotates `x` (heads, n_tokens, head_dim) by angles (n_tokens, head_dim / 2), against their sign if `sign` is −1.
    fn apply(x: &[f32], cos: &[f32], sin: &[f32], head_dim: usize, sign: f32) -> Vec<f32> {
        let half = head_dim / 2;
        let mut y = vec![0f32; x.len()];
        let tokens = 2 * cos.len();
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for (x, y) in x.chunks_exact(tokens).zip(y.chunks_exact_mut(tokens)) {
                    let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
                    let rows = x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)).zip(angles);
                    for ((x, y), (cos, sin)) in rows {
                        let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
                        for i in 0..half {
                            y1[i] = x1[i] * cos[i] - x2[i] * sign * sin[i];
                            y2[i] = x1[i] * sign * sin[i] + x2[i] * cos[i];
                        }
                    }
                }
            },
        );
        y
    }
}

impl CustomOp3 for Rotation {
    fn name(&self) -> &'static str {
        "rotary-embedding"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (_, _, _, head_dim) = x_layout.shape().dims4()?;
        let (x, cos, sin) = (host_slice(x, x_layout)?, host_slice(cos, cos_layout)?, host_slice(sin, sin_layout)?);
        Ok((CpuStorage::F32(Self::apply(x, cos, sin, head_dim, 1.0)), x_layout.shape().clone()))
    }

    /// The rotation back; angles are constants.
    fn bwd(
        &self,
        x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dx = Self::apply(&to_host(gradient)?, &to_host(cos)?, &to_host(sin)?, x.dim(3)?, -1.0);
        Ok((like(x, dx)?, None, None))
    }
}
