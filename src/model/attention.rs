//! Causal grouped-query attention with a rotary embedding.

use anyhow::Result;
use candle_core::{Device, Tensor};

use super::config::ModelConfig;
use super::linear::Linear;
use super::ops::Kernels;

/// The rotary embedding of every position up to a length.
#[derive(Debug, Clone)]
pub struct Rope {
    /// (n_positions, head_dim / 2)
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// # Errors
    /// The config asks for a kind of scaling that is not supported.
    pub fn new(config: &ModelConfig, n_positions: usize) -> Result<Self> {
        let frequencies = config.rope_inverse_frequencies()?;
        // Angles in f64: position × frequency loses digits in f32 at long contexts. transformers multiplies in f32;
        // at position 2048 the two differ by less than 1e-4 in the angle.
        let angles: Vec<f64> = (0..n_positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f)).collect();
        let shape = (n_positions, frequencies.len());
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, shape, &Device::Cpu);
        Ok(Self {
            cos: tensor(angles.iter().map(|a| a.cos() as f32).collect())?,
            sin: tensor(angles.iter().map(|a| a.sin() as f32).collect())?,
        })
    }
}

#[derive(Debug, Clone)]
pub struct Attention {
    pub(super) q_proj: Linear,
    pub(super) k_proj: Linear,
    pub(super) v_proj: Linear,
    pub(super) o_proj: Linear,
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    pub(super) head_dim: usize,
}

/// Attention scores held at a time, in bytes; whole groups of heads are taken until it is reached.
const SCORE_BYTES: usize = 64 << 20;

impl Attention {
    /// Mixes the values of `x` (batch, n_tokens, hidden_size): everything before `o_proj`, (batch, n_tokens, queries).
    ///
    /// # Errors
    /// Shapes that do not match.
    pub(super) fn mix(&self, x: &Tensor, rope: &Rope, kernels: Kernels) -> Result<Tensor> {
        let (batch, n_tokens, _) = x.dims3()?;
        let heads = |y: Tensor, n: usize| -> Result<Tensor> {
            Ok(y.reshape((batch, n_tokens, n, self.head_dim))?.transpose(1, 2)?.contiguous()?)
        };
        let q = heads(self.q_proj.forward(x)?, self.n_heads)?; // (batch, heads, n_tokens, head_dim)
        let k = heads(self.k_proj.forward(x)?, self.n_kv_heads)?; // (batch, kv_heads, n_tokens, head_dim)
        let v = heads(self.v_proj.forward(x)?, self.n_kv_heads)?;
        let (cos, sin) = (rope.cos.narrow(0, 0, n_tokens)?, rope.sin.narrow(0, 0, n_tokens)?);
        let q = (kernels.rope(&q, &cos, &sin)? / (self.head_dim as f64).sqrt())?;
        let k = kernels.rope(&k, &cos, &sin)?;
        let mixed = self.attend(&q, &k, &v, kernels)?; // (batch, heads, n_tokens, head_dim)
        Ok(mixed.transpose(1, 2)?.reshape((batch, n_tokens, self.n_heads * self.head_dim))?)
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, kernels: Kernels) -> Result<Tensor> {
        let (batch, _, n_tokens, head_dim) = q.dims4()?;
        let n_groups = batch * self.n_kv_heads;
        let heads_per_group = self.n_heads / self.n_kv_heads;
        // A group is one key-value head with the query heads that share it.
        let q = q.reshape((n_groups, heads_per_group * n_tokens, head_dim))?;
        let k = k.reshape((n_groups, n_tokens, head_dim))?;
        let v = v.reshape((n_groups, n_tokens, head_dim))?;
        let mask = causal_mask(n_tokens)?; // (n_tokens, n_tokens)
        let groups_at_once = (SCORE_BYTES / (4 * heads_per_group * n_tokens * n_tokens)).clamp(1, n_groups);
        let mut mixed = Vec::new();
        for first in (0..n_groups).step_by(groups_at_once) {
            let count = groups_at_once.min(n_groups - first);
            let part = |t: &Tensor| t.narrow(0, first, count);
            let scores = part(&q)?.matmul(&part(&k)?.transpose(1, 2)?)?; // (count, heads_per_group * n_tokens, n_tokens)
            let scores = scores.reshape((count * heads_per_group, n_tokens, n_tokens))?.broadcast_add(&mask)?;
            let weights = kernels.softmax(&scores)?.reshape((count, heads_per_group * n_tokens, n_tokens))?;
            mixed.push(weights.matmul(&part(&v)?)?);
        }
        Ok(Tensor::cat(&mixed, 0)?.reshape((batch, self.n_heads, n_tokens, head_dim))?)
    }
}

/// 0 where a position may look, -∞ where it lies in the future.
fn causal_mask(n_tokens: usize) -> Result<Tensor> {
    let values: Vec<f32> =
        (0..n_tokens).flat_map(|i| (0..n_tokens).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 })).collect();
    Ok(Tensor::from_vec(values, (n_tokens, n_tokens), &Device::Cpu)?)
}
