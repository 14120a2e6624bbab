//! Norms over rows: RMSNorm and layer norm.

use anyhow::Result;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use candle_nn::ops::{layer_norm_slow, rms_norm_slow};
use pulp::Arch;

use super::kernel::{has_kernel, sum};
use crate::device::{host_slice, like, to_host};

/// RMSNorm (Zhang & Sennrich 2019) over the last dimension of `x` (..., n), times `weight` (n).
pub(in crate::model) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !has_kernel(x) {
        return portable_rms_norm(x, weight, eps);
    }
    Ok(x.contiguous()?.apply_op2(weight, RmsNorm { eps: eps as f32 })?)
}

/// The same in candle's operations.
pub(super) fn portable_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(rms_norm_slow(x, weight, eps as f32)?)
}

/// Layer norm (Ba et al. 2016) over the last dimension of `x` (..., n), times `weight` (n), plus `bias` (n).
pub(in crate::model) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if !has_kernel(x) {
        return portable_layer_norm(x, weight, bias, eps);
    }
    Ok(x.contiguous()?.apply_op3(weight, bias, LayerNorm { eps: eps as f32 })?)
}

/// The same in candle's operations.
pub(super) fn portable_layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(layer_norm_slow(x, weight, bias, eps as f32)?)
}

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    /// `1 / √(mean x² + ε)`.
    #[inline(always)]
    fn scale(&self, x: &[f32]) -> f32 {
        1.0 / (sum(x, x, |a, b| a * b) / x.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, weight) = (host_slice(x, x_layout)?, host_slice(weight, weight_layout)?);
        let mut y = vec![0f32; x.len()];
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for (x, y) in x.chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len())) {
                    let scale = self.scale(x);
                    y.iter_mut().zip(x).zip(weight).for_each(|((y, x), w)| *y = x * scale * w);
                }
            },
        );
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    /// With `s = 1 / √(mean x² + ε)`: `dx = s (w ⊙ g) − x s³ mean(w ⊙ g ⊙ x)`, `dw = Σ g ⊙ x s`.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (x_values, w, g) = (to_host(x)?, to_host(weight)?, to_host(gradient)?);
        let n = w.len();
        let (mut dx, mut dw, mut wg) = (vec![0f32; x_values.len()], vec![0f32; n], vec![0f32; n]);
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let rows = x_values.chunks_exact(n).zip(g.chunks_exact(n)).zip(dx.chunks_exact_mut(n));
                for ((x, g), dx) in rows {
                    wg.iter_mut().zip(&w).zip(g).for_each(|((wg, w), g)| *wg = w * g);
                    let s = self.scale(x);
                    let shift = s * s * s * sum(&wg, x, |a, b| a * b) / n as f32;
                    dx.iter_mut().zip(x).zip(&wg).for_each(|((dx, x), wg)| *dx = s * wg - x * shift);
                    dw.iter_mut().zip(x).zip(g).for_each(|((dw, x), g)| *dw += g * x * s);
                }
            },
        );
        Ok((like(x, dx)?, like(weight, dw)?))
    }
}

struct LayerNorm {
    eps: f32,
}

impl LayerNorm {
    /// `mean x` and `1 / √(var x + ε)`.
    #[inline(always)]
    fn moments(&self, x: &[f32]) -> (f32, f32) {
        let n = x.len() as f32;
        let mean = sum(x, x, |a, _| a) / n;
        let variance = sum(x, x, |a, _| (a - mean) * (a - mean)) / n;
        (mean, 1.0 / (variance + self.eps).sqrt())
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, weight, bias) =
            (host_slice(x, x_layout)?, host_slice(weight, weight_layout)?, host_slice(bias, bias_layout)?);
        let mut y = vec![0f32; x.len()];
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for (x, y) in x.chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len())) {
                    let (mean, scale) = self.moments(x);
                    let row = y.iter_mut().zip(x).zip(weight.iter().zip(bias));
                    row.for_each(|((y, x), (w, b))| *y = (x - mean) * scale * w + b);
                }
            },
        );
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    /// With `z = (x − mean) s`: `dx = s (w ⊙ g − mean(w ⊙ g) − z mean(w ⊙ g ⊙ z))`, `dw = Σ g ⊙ z`, `db = Σ g`.
    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x_values, w, g) = (to_host(x)?, to_host(weight)?, to_host(gradient)?);
        let n = w.len();
        let (mut dx, mut dw, mut db) = (vec![0f32; x_values.len()], vec![0f32; n], vec![0f32; n]);
        let (mut wg, mut z) = (vec![0f32; n], vec![0f32; n]);
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let rows = x_values.chunks_exact(n).zip(g.chunks_exact(n)).zip(dx.chunks_exact_mut(n));
                for ((x, g), dx) in rows {
                    let (mean, scale) = self.moments(x);
                    z.iter_mut().zip(x).for_each(|(z, x)| *z = (x - mean) * scale);
                    wg.iter_mut().zip(&w).zip(g).for_each(|((wg, w), g)| *wg = w * g);
                    let shift = sum(&wg, &wg, |a, _| a) / n as f32;
                    let along = sum(&wg, &z, |a, b| a * b) / n as f32;
                    dx.iter_mut().zip(&z).zip(&wg).for_each(|((dx, z), wg)| *dx = scale * (wg - shift - z * along));
                    dw.iter_mut().zip(&z).zip(g).for_each(|((dw, z), g)| *dw += g * z);
                    db.iter_mut().zip(g).for_each(|(db, g)| *db += g);
                }
            },
        );
        Ok((like(x, dx)?, like(weight, dw)?, like(bias, db)?))
    }
}
