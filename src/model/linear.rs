//! A linear layer `y = base·x + L·x + bias`, of which `base` or the low-rank part `L` may be absent.

use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Shape, Storage, Tensor, bail};

use super::weights::Weights;
use crate::error::Failure;

/// Suffixes of the tensors of a compressed linear; see `formats::factored`.
pub const LR_A: &str = "lr_a";
pub const LR_B: &str = "lr_b";
pub const LR_PIVOT: &str = "lr_p";
pub const LR_COEFFICIENTS: &str = "lr_t";
pub const LR_ORDER: &str = "lr_order";
pub const BASE: &str = "base";

#[derive(Debug, Clone)]
pub struct Linear {
    /// (out, in)
    base: Option<Tensor>,
    low_rank: Option<LowRank>,
    /// (out)
    bias: Option<Tensor>,
    tap: Option<GradientTap>,
}

#[derive(Debug, Clone)]
enum LowRank {
    /// `b` (out, r), `a` (r, in).
    Factors { b: Tensor, a: Tensor },
    /// `pivots` (r, in), `coefficients` (out − r, r), `order` (out).
    Pivot { pivots: Tensor, coefficients: Tensor, order: Tensor },
}

/// Keeps the gradient at the output of a linear when the backward pass comes by.
#[derive(Debug, Clone, Default)]
pub struct GradientTap(Arc<Mutex<Option<Tensor>>>);

impl GradientTap {
    /// The gradient (rows, out) of the last backward pass; none where it did not come by.
    pub fn take(&self) -> Option<Tensor> {
        self.0.lock().expect("invariant: no holder of the gradient panics").take()
    }
}

impl Linear {
    /// Loads `module` in whichever form the weights hold it.
    ///
    /// # Errors
    /// A tensor is absent or broken.
    pub fn load(weights: &dyn Weights, module: &str, has_bias: bool, is_conv1d: bool) -> Result<Self> {
        let name = |part: &str| format!("{module}.{part}");
        let tensor = |part: &str| weights.tensor(&name(&format!("{part}.weight")));
        let contains = |part: &str| weights.contains(&name(&format!("{part}.weight")));
        let bias = |holder: &str| has_bias.then(|| weights.tensor(&name(holder))).transpose();
        if contains(LR_PIVOT) {
            let (pivots, coefficients) = (tensor(LR_PIVOT)?, tensor(LR_COEFFICIENTS)?);
            let order = weights.indices(&name(LR_ORDER))?;
            let low_rank = Some(LowRank::Pivot { pivots, coefficients, order });
            return Ok(Self { base: None, low_rank, bias: bias("bias")?, tap: None });
        }
        if !contains(LR_A) {
            return Ok(Self::dense(weights.matrix(&name("weight"), is_conv1d)?, bias("bias")?));
        }
        let low_rank = Some(LowRank::Factors { b: tensor(LR_B)?, a: tensor(LR_A)? });
        let has_base = contains(BASE);
        let base = has_base.then(|| weights.matrix(&name(&format!("{BASE}.weight")), is_conv1d)).transpose()?;
        let bias = bias(&format!("{}.bias", if has_base { BASE } else { LR_B }))?;
        Ok(Self { base, low_rank, bias, tap: None })
    }

    /// A dense linear of `weight` (out, in).
    pub fn dense(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { base: Some(weight), low_rank: None, bias, tap: None }
    }

    /// The same with a bias (out) that is stored elsewhere.
    pub(super) fn with_bias(self, bias: Tensor) -> Self {
        Self { bias: Some(bias), ..self }
    }

    /// From now on the gradient at the output goes to the tap that this returns, and none is computed for the weight.
    pub fn tap_gradient(&mut self) -> GradientTap {
        self.tap.insert(GradientTap::default()).clone()
    }

    /// Width of its outputs.
    pub fn out_features(&self) -> usize {
        match (&self.base, &self.low_rank) {
            (Some(t), _) | (None, Some(LowRank::Factors { b: t, .. } | LowRank::Pivot { order: t, .. })) => t.dims()[0],
            (None, None) => 0,
        }
    }

    /// The gradient (rows, in) at the input from that at the output, (rows, out), of a dense linear.
    ///
    /// # Errors
    /// The linear has a low-rank part.
    pub(super) fn backward(&self, gradient: &Tensor) -> Result<Tensor> {
        match (&self.base, &self.low_rank) {
            (Some(weight), None) => Ok(gradient.matmul(weight)?),
            _ => Err(Failure::unsupported("gradients need dense weights; the head is compressed already").into()),
        }
    }

    /// `x` (..., in) to (..., out).
    ///
    /// # Errors
    /// Shapes that do not match.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dims = x.dims().to_vec();
        let (rows, width) = (dims[..dims.len() - 1].iter().product::<usize>(), dims[dims.len() - 1]);
        let x = x.reshape((rows, width))?; // (rows, in)
        let dense = |w: &Tensor| -> Result<Tensor> {
            Ok(match &self.tap {
                Some(tap) => x.apply_op1(TappedProduct { weight: w.clone(), tap: tap.clone() })?,
                None => x.matmul(&w.t()?)?,
            })
        };
        let mut y = self.base.as_ref().map(dense).transpose()?; // (rows, out)
        if let Some(low_rank) = &self.low_rank {
            let low = low_rank.forward(&x)?; // (rows, out)
            y = Some(match y {
                Some(y) => (y + low)?,
                None => low,
            });
        }
        let Some(mut y) = y else { unreachable!("invariant: a linear has a base or a low-rank part") };
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        let mut out_dims = dims;
        *out_dims.last_mut().expect("invariant: activations have a width") = y.dim(1)?;
        Ok(y.reshape(out_dims)?)
    }
}

impl LowRank {
    /// `x` (rows, in) to (rows, out).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            // Of rank 0: zeros.
            Self::Factors { b, a } if a.dim(0)? == 0 => {
                Ok(Tensor::zeros((x.dim(0)?, b.dim(0)?), x.dtype(), x.device())?)
            }
            Self::Factors { b, a } => Ok(x.matmul(&a.t()?)?.matmul(&b.t()?)?),
            Self::Pivot { pivots, coefficients, order } => {
                let p = x.matmul(&pivots.t()?)?; // (rows, r)
                if coefficients.dim(0)? == 0 {
                    return Ok(p.index_select(order, 1)?);
                }
                let others = p.matmul(&coefficients.t()?)?; // (rows, out - r)
                Ok(Tensor::cat(&[&p, &others], 1)?.index_select(order, 1)?)
            }
        }
    }
}

/// `x Wᵀ` that tells the gradient of its result to a tap. candle's own product would also compute the gradient of `W`, at
/// the price of the forward pass, and throw it away.
struct TappedProduct {
    /// (out, in)
    weight: Tensor,
    tap: GradientTap,
}

impl CustomOp1 for TappedProduct {
    fn name(&self) -> &'static str {
        "tapped-product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &candle_core::Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, n) = layout.shape().dims2()?;
        let m = self.weight.dim(0)?;
        let transposed = self.weight.t()?;
        let (storage, weight_layout) = transposed.storage_and_layout();
        let Storage::Cpu(weight) = &*storage else { bail!("gradients of linears are computed on the CPU") };
        Ok((x.matmul(weight, (1, rows, m, n), layout, weight_layout)?, Shape::from((rows, m))))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        *self.tap.0.lock().expect("invariant: no holder of the gradient panics") = Some(gradient.detach());
        Ok(Some(gradient.contiguous()?.matmul(&self.weight)?))
    }
}

/// Checks the shape of a linear in whichever form it is stored, from headers alone.
///
/// # Errors
/// A tensor is absent, or has another shape than (out, in).
pub(super) fn expect_shape(
    checkpoint: &crate::checkpoint::Checkpoint,
    module: &str,
    [out, input]: [usize; 2],
    (has_bias, is_conv1d): (bool, bool),
    fields: &str,
) -> Result<()> {
    let pivots = format!("{module}.{LR_PIVOT}.weight");
    // (out, in), but for weights that a family stores turned, and that are not codes.
    let expect_weight = |name: &str| {
        let is_turned = is_conv1d && checkpoint.info(name).is_some_and(|info| !info.is_encoded());
        checkpoint.expect_shape(name, &if is_turned { [input, out] } else { [out, input] }, fields)
    };
    if let Some(info) = checkpoint.info(&pivots) {
        ensure!(
            info.shape.len() == 2 && info.shape[0] <= out,
            "tensor `{pivots}` is not a matrix of at most {out} rows"
        );
        let rank = info.shape[0];
        let ranks = format!("the ranks under `lrc` and {fields}");
        checkpoint.expect_shape(&pivots, &[rank, input], &ranks)?;
        checkpoint.expect_shape(&format!("{module}.{LR_COEFFICIENTS}.weight"), &[out - rank, rank], &ranks)?;
        checkpoint.expect_shape(&format!("{module}.{LR_ORDER}"), &[out], &ranks)?;
        if has_bias {
            checkpoint.expect_shape(&format!("{module}.bias"), &[out], fields)?;
        }
        return Ok(());
    }
    let lr_a = format!("{module}.{LR_A}.weight");
    let Some(a) = checkpoint.info(&lr_a) else {
        expect_weight(&format!("{module}.weight"))?;
        if has_bias {
            checkpoint.expect_shape(&format!("{module}.bias"), &[out], fields)?;
        }
        return Ok(());
    };
    ensure!(a.shape.len() == 2, "tensor `{lr_a}` is not a matrix");
    let rank = a.shape[0];
    let ranks = format!("the ranks under `lrc` and {fields}");
    checkpoint.expect_shape(&lr_a, &[rank, input], &ranks)?;
    checkpoint.expect_shape(&format!("{module}.{LR_B}.weight"), &[out, rank], &ranks)?;
    let has_base = checkpoint.info(&format!("{module}.{BASE}.weight")).is_some();
    if has_base {
        expect_weight(&format!("{module}.{BASE}.weight"))?;
    }
    if has_bias {
        let holder = if has_base { BASE } else { LR_B };
        checkpoint.expect_shape(&format!("{module}.{holder}.bias"), &[out], fields)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn every_form_of_one_matrix_gives_one_output() {
        // W = b·a with b = (1, 2)ᵀ, a = (3, 4): [[3, 4], [6, 8]]; bias (10, 20).
        let (a, b) = (tensor(&[3., 4.], &[1, 2]), tensor(&[1., 2.], &[2, 1]));
        let (w, zero) = (tensor(&[3., 4., 6., 8.], &[2, 2]), tensor(&[0.; 4], &[2, 2]));
        let bias = tensor(&[10., 20.], &[2]);
        // Row 1 is the pivot (6, 8), row 0 half of it.
        let (pivots, half) = (tensor(&[6., 8.], &[1, 2]), tensor(&[0.5], &[1, 1]));
        let order = Tensor::new(&[1u32, 0], &Device::Cpu).unwrap();
        let forms: [&[(&str, &Tensor)]; 4] = [
            &[("m.weight", &w), ("m.bias", &bias)],
            &[("m.lr_a.weight", &a), ("m.lr_b.weight", &b), ("m.lr_b.bias", &bias)],
            &[("m.lr_a.weight", &a), ("m.lr_b.weight", &b), ("m.base.weight", &zero), ("m.base.bias", &bias)],
            &[("m.lr_p.weight", &pivots), ("m.lr_t.weight", &half), ("m.lr_order", &order), ("m.bias", &bias)],
        ];
        for form in forms {
            let weights: HashMap<String, Tensor> = form.iter().map(|(n, t)| (n.to_string(), (*t).clone())).collect();
            let linear = Linear::load(&weights, "m", true, false).unwrap();
            let y = linear.forward(&tensor(&[1., 1., 0., 1.], &[1, 2, 2])).unwrap();
            assert_eq!(y.to_vec3::<f32>().unwrap(), [[[17., 34.], [14., 28.]]]);
        }
    }
}
