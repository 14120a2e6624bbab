//! Gates of feed-forward layers.

use anyhow::Result;
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};
use pulp::Arch;

use super::kernel::has_kernel;
use crate::device::{host_slice, like, to_host};
use crate::model::activation::Activation;
use crate::model::softmax::exp;

/// `activation(gate) ⊙ up` of two tensors of one shape.
pub(in crate::model) fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    match Sigmoidal::of(activation).filter(|_| has_kernel(gate)) {
        Some(kind) => Ok(gate.contiguous()?.apply_op2(&up.contiguous()?, Gated(kind))?),
        None => portable_gated(activation, gate, up),
    }
}

/// The same in candle's operations.
pub(super) fn portable_gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok((activation.apply(gate)? * up)?)
}

/// Activations of the form `x σ(z(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sigmoidal {
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
    pub(super) fn value(self, x: f32) -> (f32, f32) {
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
        let (gate, up) = (host_slice(gate, gate_layout)?, host_slice(up, up_layout)?);
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
        let (mut of_gate, mut of_up, g) = (to_host(gate)?, to_host(up)?, to_host(gradient)?);
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
