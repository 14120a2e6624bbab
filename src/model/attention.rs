//! Causal grouped-query attention with a rotary embedding.

use anyhow::Result;
use candle_core::{D, Device, Tensor};
use candle_nn::ops::softmax;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use pulp::Arch;
use rayon::prelude::*;

use super::config::ModelConfig;
use super::linear::Linear;
use super::ops::Kernels;
use super::softmax::softmax_in_place;

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
        // Angles in f64: position × frequency loses digits in f32 at long contexts. transformers
        // multiplies in f32; the two differ by its rounding.
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

/// Queries whose scores are held at a time, for each thread.
const QUERY_BLOCK: usize = 64;

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
        let mixed = match kernels {
            Kernels::Fused => self.attend_fused(&q, &k, &v)?,
            Kernels::Differentiable => self.attend_differentiable(&q, &k, &v)?,
        }; // (batch, heads, n_tokens, head_dim)
        Ok(mixed.transpose(1, 2)?.reshape((batch, n_tokens, self.n_heads * self.head_dim))?)
    }

    /// Causal attention a block of queries at a time: scores of the future are never computed, and those of the past
    /// stay in the cache. Heads are shared out to threads; each is computed in one order.
    fn attend_fused(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (_, _, n_tokens, head_dim) = q.dims4()?;
        let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        let (queries, keys, values) = (values(q)?, values(k)?, values(v)?);
        let head_len = n_tokens * head_dim;
        let heads_per_group = self.n_heads / self.n_kv_heads;
        let arch = Arch::new();
        let mut mixed = vec![0f32; queries.len()];
        let buffer = || vec![0f32; QUERY_BLOCK.min(n_tokens) * n_tokens];
        mixed.par_chunks_exact_mut(head_len).enumerate().for_each_init(buffer, |scores, (head_idx, mixed)| {
            let group = head_idx / heads_per_group; // counts over batches too: heads and groups are nested in them
            let q = &queries[head_idx * head_len..][..head_len];
            let (k, v) = (&keys[group * head_len..][..head_len], &values[group * head_len..][..head_len]);
            attend_one_head(arch, q, k, v, head_dim, scores, mixed);
        });
        Ok(Tensor::from_vec(mixed, q.shape(), &Device::Cpu)?)
    }

    /// The same in candle's operations, through which gradients flow.
    fn attend_differentiable(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (batch, _, n_tokens, head_dim) = q.dims4()?;
        let n_groups = batch * self.n_kv_heads;
        let heads_per_group = self.n_heads / self.n_kv_heads;
        // A group is one key-value head with the query heads that share it.
        let q = q.reshape((n_groups, heads_per_group * n_tokens, head_dim))?;
        let k = k.reshape((n_groups, n_tokens, head_dim))?;
        let v = v.reshape((n_groups, n_tokens, head_dim))?;
        let scores = q.matmul(&k.transpose(1, 2)?)?; // (n_groups, heads_per_group * n_tokens, n_tokens)
        let scores = scores.reshape((n_groups * heads_per_group, n_tokens, n_tokens))?;
        let weights = softmax(&scores.broadcast_add(&causal_mask(n_tokens)?)?, D::Minus1)?;
        let mixed = weights.reshape((n_groups, heads_per_group * n_tokens, n_tokens))?.matmul(&v)?;
        Ok(mixed.reshape((batch, self.n_heads, n_tokens, head_dim))?)
    }
}

/// `mixed = softmax(q kᵀ) v` with a causal mask, all (n_tokens, head_dim) row-major; `scores` is scratch.
fn attend_one_head(
    arch: Arch,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    head_dim: usize,
    scores: &mut [f32],
    mixed: &mut [f32],
) {
    let rows = |values: &[f32]| values.len() / head_dim;
    for (block_idx, (q, mixed)) in
        q.chunks(QUERY_BLOCK * head_dim).zip(mixed.chunks_mut(QUERY_BLOCK * head_dim)).enumerate()
    {
        let (first, n_rows) = (block_idx * QUERY_BLOCK, rows(q));
        let n_keys = first + n_rows;
        let scores = &mut scores[..n_rows * n_keys]; // (n_rows, n_keys)
        let (k, v) = (&k[..n_keys * head_dim], &v[..n_keys * head_dim]);
        let q = MatRef::from_row_major_slice(q, n_rows, head_dim);
        let k = MatRef::from_row_major_slice(k, n_keys, head_dim);
        let v = MatRef::from_row_major_slice(v, n_keys, head_dim);
        let into = MatMut::from_row_major_slice_mut(&mut *scores, n_rows, n_keys);
        matmul(into, Accum::Replace, q, k.transpose(), 1.0, Par::Seq);
        for (i, row) in scores.chunks_exact_mut(n_keys).enumerate() {
            let (past, future) = row.split_at_mut(first + i + 1);
            softmax_in_place(arch, past);
            future.fill(0.0);
        }
        let weights = MatRef::from_row_major_slice(&*scores, n_rows, n_keys);
        matmul(MatMut::from_row_major_slice_mut(mixed, n_rows, head_dim), Accum::Replace, weights, v, 1.0, Par::Seq);
    }
}

/// 0 where a position may look, -∞ where it lies in the future.
fn causal_mask(n_tokens: usize) -> Result<Tensor> {
    let values: Vec<f32> =
        (0..n_tokens).flat_map(|i| (0..n_tokens).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 })).collect();
    Ok(Tensor::from_vec(values, (n_tokens, n_tokens), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fused_and_differentiable_attention_agree() {
        let linear = || Linear::dense(Tensor::zeros((1, 1), candle_core::DType::F32, &Device::Cpu).unwrap(), None);
        for (batch, n_heads, n_kv_heads, n_tokens, head_dim) in [(2, 6, 3, 150, 8), (1, 4, 1, 64, 16), (3, 2, 2, 1, 4)]
        {
            let attention = Attention {
                q_proj: linear(),
                k_proj: linear(),
                v_proj: linear(),
                o_proj: linear(),
                n_heads,
                n_kv_heads,
                head_dim,
            };
            let tensor = |n: usize, seed: usize| {
                let values: Vec<f32> = (0..batch * n * n_tokens * head_dim)
                    .map(|i| ((i * 7919 + seed * 104_729) % 10_007) as f32 / 2500.0 - 2.0)
                    .collect();
                Tensor::from_vec(values, (batch, n, n_tokens, head_dim), &Device::Cpu).unwrap()
            };
            let (q, k, v) = (tensor(n_heads, 1), tensor(n_kv_heads, 2), tensor(n_kv_heads, 3));
            let fused = attention.attend_fused(&q, &k, &v).unwrap();
            let slow = attention.attend_differentiable(&q, &k, &v).unwrap();
            let error = (fused - slow).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(error < 2e-6, "{error}");
        }
    }
}
