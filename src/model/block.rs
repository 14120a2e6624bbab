//! One decoder block: attention and feed-forward, each behind a norm, each added to its input.

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::architectures::{Architecture, InputSite, LinearId, Role};
use super::attention::{Attention, Rope};
use super::config::ModelConfig;
use super::linear::{GradientTap, Linear};
use super::mlp::Mlp;
use super::ops::Kernels;
use super::weights::Weights;

#[derive(Debug, Clone)]
pub struct Block {
    input_layernorm: Tensor,
    attention: Attention,
    post_attention_layernorm: Tensor,
    mlp: Mlp,
    rms_norm_eps: f64,
}

/// Sees the input of every linear: (batch, n_tokens, in).
pub type Observer<'a> = dyn FnMut(InputSite, &Tensor) -> Result<()> + 'a;

impl Block {
    /// # Errors
    /// A tensor is absent or broken.
    pub fn load(
        weights: &dyn Weights,
        config: &ModelConfig,
        architecture: &Architecture,
        block_idx: usize,
    ) -> Result<Self> {
        let load = |role: Role| {
            let module = architecture.module(LinearId { block: block_idx, role });
            Linear::load(weights, &module, role.has_bias(config)).with_context(|| format!("load `{module}`"))
        };
        let norm = |name: &str| weights.tensor(&format!("{}.{name}.weight", architecture.block(block_idx)));
        Ok(Self {
            input_layernorm: norm(architecture.input_layernorm)?,
            attention: Attention {
                q_proj: load(Role::QProj)?,
                k_proj: load(Role::KProj)?,
                v_proj: load(Role::VProj)?,
                o_proj: load(Role::OProj)?,
                n_heads: config.num_attention_heads,
                n_kv_heads: config.num_key_value_heads(),
                head_dim: config.head_dim(),
            },
            post_attention_layernorm: norm(architecture.post_attention_layernorm)?,
            mlp: Mlp {
                gate_proj: load(Role::GateProj)?,
                up_proj: load(Role::UpProj)?,
                down_proj: load(Role::DownProj)?,
            },
            rms_norm_eps: config.rms_norm_eps,
        })
    }

    /// Taps the gradients at the outputs of all linears.
    pub fn tap_gradients(&mut self) -> Vec<(Role, GradientTap)> {
        let (attention, mlp) = (&mut self.attention, &mut self.mlp);
        let linears = [
            (Role::QProj, &mut attention.q_proj),
            (Role::KProj, &mut attention.k_proj),
            (Role::VProj, &mut attention.v_proj),
            (Role::OProj, &mut attention.o_proj),
            (Role::GateProj, &mut mlp.gate_proj),
            (Role::UpProj, &mut mlp.up_proj),
            (Role::DownProj, &mut mlp.down_proj),
        ];
        linears.into_iter().map(|(role, linear)| (role, linear.tap_gradient())).collect()
    }

    /// The input (batch, n_tokens, in) of the linears at `site`: as much of [`Self::forward`] as comes before it.
    ///
    /// # Errors
    /// Shapes that do not match.
    pub fn input_at(&self, site: InputSite, x: &Tensor, rope: &Rope, kernels: Kernels) -> Result<Tensor> {
        let normed = kernels.rms_norm(x, &self.input_layernorm, self.rms_norm_eps)?;
        if site == InputSite::Qkv {
            return Ok(normed);
        }
        let mixed = self.attention.mix(&normed, rope, kernels)?;
        if site == InputSite::O {
            return Ok(mixed);
        }
        let x = (x + self.attention.o_proj.forward(&mixed)?)?;
        let normed = kernels.rms_norm(&x, &self.post_attention_layernorm, self.rms_norm_eps)?;
        if site == InputSite::GateUp { Ok(normed) } else { self.mlp.gate(&normed) }
    }

    /// `x` (batch, n_tokens, hidden_size) to the same shape.
    ///
    /// # Errors
    /// Shapes that do not match, or the observer's error.
    pub fn forward(&self, x: &Tensor, rope: &Rope, kernels: Kernels, observe: &mut Observer<'_>) -> Result<Tensor> {
        let normed = kernels.rms_norm(x, &self.input_layernorm, self.rms_norm_eps)?;
        observe(InputSite::Qkv, &normed)?;
        let mixed = self.attention.mix(&normed, rope, kernels)?; // (batch, n_tokens, queries)
        observe(InputSite::O, &mixed)?;
        let x = (x + self.attention.o_proj.forward(&mixed)?)?;

        let normed = kernels.rms_norm(&x, &self.post_attention_layernorm, self.rms_norm_eps)?;
        observe(InputSite::GateUp, &normed)?;
        let gated = self.mlp.gate(&normed)?; // (batch, n_tokens, intermediate_size)
        observe(InputSite::Down, &gated)?;
        Ok((x + self.mlp.down_proj.forward(&gated)?)?)
    }
}
