//! The row-wise operations of a model, each in one pass over memory and with a backward pass of its own.
//!
//! candle's own fused kernels have no backward pass and silently stop gradients; composed of its element-wise
//! operations, a norm reads and writes its input a dozen times. Each operation here has a CPU kernel and, for other
//! devices, the form in candle's operations, which is also what tests compare the kernel with. Rows are computed in a
//! fixed order with a fixed number of lanes, so that results depend on neither threads nor vector width.

use anyhow::Result;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor, bail};
use candle_nn::{ops, rotary_emb};
use pulp::Arch;

use super::activation::Activation;
use super::softmax::exp;

/// Whether all values are finite, including large values whose squares overflow.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(x.flatten_all()?.to_vec1::<f32>()?.iter().all(|v| v.is_finite()))
}

/// RMSNorm (Zhang & Sennrich 2019) over the last dimension of `x` (..., n), times `weight` (n).
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(ops::rms_norm_slow(x, weight, eps as f32)?);
    }
    Ok(x.contiguous()?.apply_op2(weight, RmsNorm { eps: eps as f32 })?)
}

/// Layer norm (Ba et al. 2016) over the last dimension of `x` (..., n), times `weight` (n), plus `bias` (n).
pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(ops::layer_norm_slow(x, weight, bias, eps as f32)?);
    }
    Ok(x.contiguous()?.apply_op3(weight, bias, LayerNorm { eps: eps as f32 })?)
}

/// Rotates the halves of `x` (batch, heads, n_tokens, head_dim) by `cos` and `sin` (n_tokens, head_dim / 2).
pub(super) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(rotary_emb::rope_slow(x, cos, sin)?);
    }
    Ok(x.contiguous()?.apply_op3(&cos.contiguous()?, &sin.contiguous()?, Rotation)?)
}

/// `activation(gate) ⊙ up` of two tensors of one shape.
pub(super) fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    match Sigmoidal::of(activation).filter(|_| gate.device().is_cpu()) {
        Some(kind) => Ok(gate.contiguous()?.apply_op2(&up.contiguous()?, Gated(kind))?),
        None => Ok((activation.apply(gate)? * up)?),
    }
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
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let Some((begin, end)) = layout.contiguous_offsets() else { bail!("this operation needs contiguous tensors") };
    Ok(&storage.as_slice::<f32>()?[begin..end])
}

/// A copy of the values of a tensor, row-major.
pub(super) fn values(x: &Tensor) -> candle_core::Result<Vec<f32>> {
    x.flatten_all()?.to_vec1::<f32>()
}

/// A gradient with respect to `x`: a tensor of its shape, on its device.
pub(super) fn like(x: &Tensor, values: Vec<f32>) -> candle_core::Result<Option<Tensor>> {
    Tensor::from_vec(values, x.shape(), x.device()).map(Some)
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
        let (x, weight) = (slice(x, x_layout)?, slice(weight, weight_layout)?);
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
        let (x_values, w, g) = (values(x)?, values(weight)?, values(gradient)?);
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
        let (x, weight, bias) = (slice(x, x_layout)?, slice(weight, weight_layout)?, slice(bias, bias_layout)?);
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
        let (x_values, w, g) = (values(x)?, values(weight)?, values(gradient)?);
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
        let (x, cos, sin) = (slice(x, x_layout)?, slice(cos, cos_layout)?, slice(sin, sin_layout)?);
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
        let dx = Self::apply(&values(gradient)?, &values(cos)?, &values(sin)?, x.dim(3)?, -1.0);
        Ok((like(x, dx)?, None, None))
    }
}

/// Activations of the form `x σ(z(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sigmoidal {
    /// z = x.
    Silu,
    /// z = √(8/π) (x + 0.044715 x³): GELU's approximation by tanh, since `(1 + tanh u) / 2 = σ(2u)`.
    GeluNew,
}

impl Sigmoidal {
    fn of(activation: Activation) -> Option<Self> {
        match activation {
            Activation::Silu => Some(Self::Silu),
            Activation::GeluNew => Some(Self::GeluNew),
            Activation::Gelu | Activation::Relu => None,
        }
    }

    /// `x σ(z)` and its derivative `σ(z) + x σ(z) (1 − σ(z)) z'`.
    #[inline(always)]
    fn value(self, x: f32) -> (f32, f32) {
        const SCALE: f32 = 1.595_769; // √(8/π)
        let (z, slope) = match self {
            Self::Silu => (x, 1.0),
            Self::GeluNew => (SCALE * (x + 0.044_715 * x * x * x), SCALE * (1.0 + 3.0 * 0.044_715 * x * x)),
        };
        let e = exp(-z.abs());
        let near = 1.0 / (1.0 + e);
        let (sigmoid, other) = if z >= 0.0 { (near, e * near) } else { (e * near, near) };
        (x * sigmoid, sigmoid + x * sigmoid * other * slope)
    }
}

struct Gated(Sigmoidal);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated-activation"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(gate, gate_layout)?, slice(up, up_layout)?);
        let mut y = vec![0f32; gate.len()];
        Arch::new().dispatch(
            #[inline(always)]
            || y.iter_mut().zip(gate).zip(up).for_each(|((y, &gate), up)| *y = self.0.value(gate).0 * up),
        );
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut of_gate, mut of_up, g) = (values(gate)?, values(up)?, values(gradient)?);
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for ((gate, up), g) in of_gate.iter_mut().zip(&mut of_up).zip(&g) {
                    let (value, slope) = self.0.value(*gate);
                    (*gate, *up) = (g * *up * slope, g * value);
                }
            },
        );
        Ok((like(gate, of_gate)?, like(up, of_up)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn variable(shape: &[usize], seed: usize, largest: f32) -> Var {
        let n = shape.iter().product();
        let values: Vec<f32> =
            (0..n).map(|i| (((i * 7919 + seed * 104_729) % 10_007) as f32 / 5003.5 - 1.0) * largest).collect();
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn distance(x: &Tensor, y: &Tensor) -> f32 {
        let max = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        max(&(x - y).unwrap()) / max(y).max(1.0)
    }

    /// Holds values and gradients of a kernel against those of candle's operations.
    fn expect_alike(variables: &[Var], kernel: impl Fn() -> Result<Tensor>, in_candle: impl Fn() -> Result<Tensor>) {
        let (own, candle) = (kernel().unwrap(), in_candle().unwrap());
        assert!(distance(&own, &candle) < 3e-6, "{}", distance(&own, &candle));
        let upstream = variable(own.dims(), 9, 1.0);
        let gradients = |y: Tensor| (y * upstream.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let (own, candle) = (gradients(own), gradients(candle));
        for variable in variables {
            let distance = distance(own.get(variable).unwrap(), candle.get(variable).unwrap());
            assert!(distance < 1e-5, "{distance}");
        }
    }

    #[test]
    fn norms_and_their_gradients_are_those_of_candle() {
        for n in [1, 7, 16, 100] {
            let [x, w, b] = [variable(&[2, 5, n], 1, 3.0), variable(&[n], 2, 1.5), variable(&[n], 3, 1.0)];
            let (rms, layer) = (|| rms_norm(&x, &w, 1e-5), || layer_norm(&x, &w, &b, 1e-2));
            expect_alike(&[x.clone(), w.clone()], rms, || Ok(ops::rms_norm_slow(&x, &w, 1e-5)?));
            expect_alike(&[x.clone(), w.clone(), b.clone()], layer, || Ok(ops::layer_norm_slow(&x, &w, &b, 1e-2)?));
        }
    }

    #[test]
    fn rotations_and_their_gradients_are_those_of_candle() {
        let x = variable(&[2, 3, 5, 8], 1, 2.0);
        let angles = variable(&[5, 4], 2, 3.0);
        let (cos, sin) = (angles.cos().unwrap().detach(), angles.sin().unwrap().detach());
        expect_alike(std::slice::from_ref(&x), || rope(&x, &cos, &sin), || Ok(rotary_emb::rope_slow(&x, &cos, &sin)?));
    }

    #[test]
    fn gates_and_their_gradients_are_those_of_candle() {
        for activation in [Activation::Silu, Activation::GeluNew, Activation::Gelu, Activation::Relu] {
            for largest in [0.01, 3.0, 200.0] {
                let [gate, up] = [1, 2].map(|seed| variable(&[3, 37], seed, largest));
                let in_candle = || Ok((activation.apply(&gate)? * up.as_tensor())?);
                // Far out candle's derivative of GELU is 0 · ∞.
                if largest < 200.0 || activation == Activation::Relu {
                    expect_alike(&[gate.clone(), up.clone()], || gated(activation, &gate, &up), in_candle);
                } else {
                    assert!(distance(&gated(activation, &gate, &up).unwrap(), &in_candle().unwrap()) < 1e-6);
                }
            }
        }
    }

    #[test]
    fn gates_have_their_closed_forms_far_out() {
        for kind in [Sigmoidal::Silu, Sigmoidal::GeluNew] {
            assert_eq!(kind.value(0.0), (0.0, 0.5));
            assert_eq!(kind.value(100.0), (100.0, 1.0));
            let (value, slope) = kind.value(-100.0);
            assert!(value.abs() < 1e-30 && slope.abs() < 1e-30);
            assert!(kind.value(f32::NAN).0.is_nan());
        }
    }
}
