//! A linear layer `y = base·x + B·(A·x) + bias`, of which `base` or `B·A` may be absent.

use anyhow::{Result, ensure};
use candle_core::Tensor;

use super::weights::Weights;

/// Suffixes of the tensors of a compressed linear; see `formats::factored`.
pub const LR_A: &str = "lr_a";
pub const LR_B: &str = "lr_b";
pub const BASE: &str = "base";

#[derive(Debug, Clone)]
pub struct Linear {
    /// (out, in)
    base: Option<Tensor>,
    low_rank: Option<Factors>,
    /// (out)
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
struct Factors {
    /// (out, r)
    b: Tensor,
    /// (r, in)
    a: Tensor,
}

impl Linear {
    /// Loads `module` in whichever form the weights hold it.
    ///
    /// # Errors
    /// A tensor is absent or broken.
    pub fn load(weights: &dyn Weights, module: &str, has_bias: bool) -> Result<Self> {
        let name = |part: &str| format!("{module}.{part}");
        let (lr_a, lr_b) = (name(&format!("{LR_A}.weight")), name(&format!("{LR_B}.weight")));
        if !weights.contains(&lr_a) {
            let base = Some(weights.tensor(&name("weight"))?);
            let bias = has_bias.then(|| weights.tensor(&name("bias"))).transpose()?;
            return Ok(Self { base, low_rank: None, bias });
        }
        let low_rank = Some(Factors { b: weights.tensor(&lr_b)?, a: weights.tensor(&lr_a)? });
        let base_name = name(&format!("{BASE}.weight"));
        let has_base = weights.contains(&base_name);
        let base = has_base.then(|| weights.tensor(&base_name)).transpose()?;
        let bias_name = name(&format!("{}.bias", if has_base { BASE } else { LR_B }));
        let bias = has_bias.then(|| weights.tensor(&bias_name)).transpose()?;
        Ok(Self { base, low_rank, bias })
    }

    /// A dense linear of `weight` (out, in).
    pub fn dense(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { base: Some(weight), low_rank: None, bias }
    }

    /// Width of its outputs.
    pub fn out_features(&self) -> usize {
        let factors = self.low_rank.as_ref().map(|f| &f.b);
        self.base.as_ref().or(factors).map_or(0, |t| t.dims()[0])
    }

    /// `x` (..., in) to (..., out).
    ///
    /// # Errors
    /// Shapes that do not match.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dims = x.dims().to_vec();
        let (rows, width) = (dims[..dims.len() - 1].iter().product::<usize>(), dims[dims.len() - 1]);
        let x = x.reshape((rows, width))?; // (rows, in)
        let mut y = self.base.as_ref().map(|w| x.matmul(&w.t()?)).transpose()?; // (rows, out)
        if let Some(Factors { b, a }) = &self.low_rank {
            let low = x.matmul(&a.t()?)?.matmul(&b.t()?)?; // (rows, out)
            y = Some(match y {
                Some(y) => (y + low)?,
                None => low,
            });
        }
        let Some(mut y) = y else { unreachable!("invariant: a linear has a base or factors") };
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        let mut out_dims = dims;
        *out_dims.last_mut().expect("invariant: activations have a width") = y.dim(1)?;
        Ok(y.reshape(out_dims)?)
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
    has_bias: bool,
    fields: &str,
) -> Result<()> {
    let lr_a = format!("{module}.{LR_A}.weight");
    let Some(a) = checkpoint.info(&lr_a) else {
        checkpoint.expect_shape(&format!("{module}.weight"), &[out, input], fields)?;
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
        checkpoint.expect_shape(&format!("{module}.{BASE}.weight"), &[out, input], fields)?;
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
        let forms: [&[(&str, &Tensor)]; 3] = [
            &[("m.weight", &w), ("m.bias", &bias)],
            &[("m.lr_a.weight", &a), ("m.lr_b.weight", &b), ("m.lr_b.bias", &bias)],
            &[("m.lr_a.weight", &a), ("m.lr_b.weight", &b), ("m.base.weight", &zero), ("m.base.bias", &bias)],
        ];
        for form in forms {
            let weights: HashMap<String, Tensor> = form.iter().map(|(n, t)| (n.to_string(), (*t).clone())).collect();
            let linear = Linear::load(&weights, "m", true).unwrap();
            let y = linear.forward(&tensor(&[1., 1., 0., 1.], &[1, 2, 2])).unwrap();
            assert_eq!(y.to_vec3::<f32>().unwrap(), [[[17., 34.], [14., 28.]]]);
        }
    }
}
