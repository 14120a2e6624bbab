//! Attention: over all past tokens, a window of them, or in both directions.

use anyhow::Result;
use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Shape, Tensor, bail};
use candle_nn::ops::softmax;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use pulp::Arch;
use rayon::prelude::*;

use super::kernel::has_kernel;
use crate::device::{Device, host_slice, like, to_host};
use crate::model::softmax::softmax_in_place;

/// Mixes values by `softmax(q kᵀ)`. Shapes: `q` (batch, heads, n_tokens, head_dim), `k` and `v` (batch, kv_heads,
/// n_keys, head_dim); the result has the shape of `q`. Queries are those of the last keys. Gradients need as many queries
/// as keys.
pub(in crate::model) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scoring: Scoring) -> Result<Tensor> {
    if !has_kernel(q) {
        return portable_attend(q, k, v, scoring);
    }
    Ok(q.apply_op3(k, v, RecomputingAttention(scoring))?)
}

/// The same in candle's operations, which hold all scores at once.
pub(super) fn portable_attend(q: &Tensor, k: &Tensor, v: &Tensor, scoring: Scoring) -> Result<Tensor> {
    let ((batch, n_heads, n_tokens, head_dim), (_, n_kv_heads, n_keys, _)) = (q.dims4()?, k.dims4()?);
    let (n_groups, heads_per_group) = (batch * n_kv_heads, n_heads / n_kv_heads);
    let queries = q.reshape((n_groups, heads_per_group * n_tokens, head_dim))?;
    let keys = k.reshape((n_groups, n_keys, head_dim))?;
    let scores = queries.matmul(&keys.transpose(1, 2)?)?;
    let scores = scores.reshape((n_groups * heads_per_group, n_tokens, n_keys))?;
    let scores = match scoring.cap.map(f64::from) {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let scores = match scoring.mask(n_tokens, n_keys, q.device())? {
        Some(mask) => scores.broadcast_add(&mask)?,
        None => scores,
    };
    let weights = softmax(&scores, D::Minus1)?;
    let weights = weights.reshape((n_groups, heads_per_group * n_tokens, n_keys))?;
    let mixed = weights.matmul(&v.reshape((n_groups, n_keys, head_dim))?)?;
    Ok(mixed.reshape((batch, n_heads, n_tokens, head_dim))?)
}

/// How scores become weights, besides softmax.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::model) struct Scoring {
    /// Number of keys that a query sees, including its own; `None`: all keys before it.
    pub window: Option<usize>,
    /// Scores s become `cap · tanh(s / cap)`.
    pub cap: Option<f32>,
    /// Queries also see later keys.
    pub is_bidirectional: bool,
}

impl Scoring {
    /// Number of keys, out of `n_tokens`, that some query before `end` sees; only these are scored.
    fn n_keys(self, end: usize, n_tokens: usize) -> usize {
        if self.is_bidirectional { n_tokens } else { end }
    }

    /// The keys that the query at `position` sees, out of the `n_keys` that are scored.
    fn seen(self, position: usize, n_keys: usize) -> std::ops::Range<usize> {
        if self.is_bidirectional {
            return 0..n_keys;
        }
        let end = position + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// What is added to the scores of queries (rows) and keys (columns), (n_tokens, n_keys): 0 where a key is seen,
    /// else −∞. `None` if every query sees all keys. It is made on the device, of two short vectors.
    fn mask(self, n_tokens: usize, n_keys: usize, device: &Device) -> Result<Option<Tensor>> {
        if self.is_bidirectional {
            return Ok(None);
        }
        let positions = Tensor::arange(0f32, n_keys as f32, device)?;
        let queries = positions.narrow(0, n_keys - n_tokens, n_tokens)?.unsqueeze(1)?;
        let keys = positions.unsqueeze(0)?;
        let mut is_hidden = keys.broadcast_gt(&queries)?;
        if let Some(window) = self.window {
            let is_past = (keys + window as f64)?.broadcast_le(&queries)?;
            is_hidden = is_hidden.maximum(&is_past)?;
        }
        let seen = Tensor::zeros((n_tokens, n_keys), DType::F32, device)?;
        Ok(Some(is_hidden.where_cond(&Tensor::full(f32::NEG_INFINITY, seen.shape(), device)?, &seen)?))
    }

    /// Converts scores (n_rows, n_keys) of the queries from `first` on into weights, in place.
    fn weigh(self, arch: Arch, scores: &mut [f32], n_keys: usize, first: usize) {
        if let Some(cap) = self.cap {
            scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
        }
        for (i, row) in scores.chunks_exact_mut(n_keys).enumerate() {
            let seen = self.seen(first + i, n_keys);
            let (past, future) = row.split_at_mut(seen.end);
            let (unseen, past) = past.split_at_mut(seen.start);
            softmax_in_place(arch, past);
            unseen.fill(0.0);
            future.fill(0.0);
        }
    }
}

/// Number of queries whose scores are held at a time, per thread.
const QUERY_BLOCK: usize = 64;

/// Attention of all heads, one block of queries at a time: scores of unseen keys are never computed, and the others
/// stay in the cache. Threads share the heads, each of which is computed in a fixed order. Shapes: `q` (batch, heads,
/// n_tokens, head_dim), `k` and `v` (batch, kv_heads, n_keys, head_dim); the result has the shape of `q`. Heads are
/// indexed across batches, because heads and groups are nested in the same way.
fn attend_all([q, k, v]: [&[f32]; 3], [n_tokens, n_keys]: [usize; 2], head_dim: usize, scoring: Scoring) -> Vec<f32> {
    let (of_queries, of_keys) = (n_tokens * head_dim, n_keys * head_dim);
    let heads_per_group = (q.len() / of_queries.max(1)) / (k.len() / of_keys.max(1)).max(1);
    let arch = Arch::new();
    let mut mixed = vec![0f32; q.len()];
    let buffer = || vec![0f32; QUERY_BLOCK.min(n_tokens) * n_keys];
    mixed.par_chunks_exact_mut(of_queries).enumerate().for_each_init(buffer, |scores, (head_idx, mixed)| {
        let group = head_idx / heads_per_group;
        let (k, v) = (&k[group * of_keys..][..of_keys], &v[group * of_keys..][..of_keys]);
        attend_one_head(arch, [&q[head_idx * of_queries..][..of_queries], k, v], head_dim, scoring, scores, mixed);
    });
    mixed
}

/// Attention with its own backward pass: weights are recomputed for one block of queries at a time, as in
/// FlashAttention (Dao et al. 2022), and no score matrix is kept.
struct RecomputingAttention(Scoring);

impl CustomOp3 for RecomputingAttention {
    fn name(&self) -> &'static str {
        "recomputing-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((_, _, n_tokens, head_dim), (_, _, n_keys, _)) = (q_layout.shape().dims4()?, k_layout.shape().dims4()?);
        let inputs = [host_slice(q, q_layout)?, host_slice(k, k_layout)?, host_slice(v, v_layout)?];
        Ok((CpuStorage::F32(attend_all(inputs, [n_tokens, n_keys], head_dim, self.0)), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mixed: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, n_heads, n_tokens, head_dim) = q.dims4()?;
        if k.dim(2)? != n_tokens {
            bail!("{n_tokens} queries of {} keys have no gradient", k.dim(2)?);
        }
        let head_len = n_tokens * head_dim;
        let heads_per_group = n_heads / k.dim(1)?;
        let (q_values, k_values, v_values) = (to_host(q)?, to_host(k)?, to_host(v)?);
        let (mixed, gradient) = (to_host(mixed)?, to_host(gradient)?);
        let arch = Arch::new();
        let (mut dq, mut dk, mut dv) =
            (vec![0f32; q_values.len()], vec![0f32; k_values.len()], vec![0f32; v_values.len()]);
        let groups = dq.par_chunks_exact_mut(heads_per_group * head_len);
        let groups = groups.zip(dk.par_chunks_exact_mut(head_len)).zip(dv.par_chunks_exact_mut(head_len)).enumerate();
        groups.for_each(|(group, ((dq, dk), dv))| {
            for (i, dq) in dq.chunks_exact_mut(head_len).enumerate() {
                let head = |values: &'_ [f32]| -> std::ops::Range<usize> {
                    let first = (group * heads_per_group + i) * head_len;
                    debug_assert!(first + head_len <= values.len());
                    first..first + head_len
                };
                let forward = Head {
                    q: &q_values[head(&q_values)],
                    k: &k_values[group * head_len..][..head_len],
                    v: &v_values[group * head_len..][..head_len],
                    mixed: &mixed[head(&mixed)],
                };
                forward.backward(arch, (head_dim, self.0), &gradient[head(&gradient)], dq, dk, dv);
            }
        });
        Ok((like(q, dq)?, like(k, dk)?, like(v, dv)?))
    }
}

/// Inputs and output of the forward pass of one head, all (n_tokens, head_dim) row-major.
struct Head<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    mixed: &'a [f32],
}

impl Head<'_> {
    /// With `P = softmax(q kᵀ)` and `o = P v`: `dv = Pᵀ do`, `dS = P ⊙ (do vᵀ − rowsum(do ⊙ o))`, `dq = dS k`, `dk =
    /// dSᵀ q`. Adds to `dk` and `dv`, which several query heads share. The gradient of a capped score s is multiplied
    /// by `1 − (s / cap)²`.
    fn backward(
        &self,
        arch: Arch,
        (head_dim, scoring): (usize, Scoring),
        gradient: &[f32],
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let n_tokens = self.q.len() / head_dim;
        for first in (0..n_tokens).step_by(QUERY_BLOCK) {
            let n_rows = QUERY_BLOCK.min(n_tokens - first);
            let n_keys = scoring.n_keys(first + n_rows, n_tokens);
            let rows = first * head_dim..(first + n_rows) * head_dim;
            let seen = ..n_keys * head_dim;
            let matrix = |values| MatRef::from_row_major_slice(values, n_rows, head_dim);
            let keys = |values| MatRef::from_row_major_slice(values, n_keys, head_dim);
            let (q, k, v) = (matrix(&self.q[rows.clone()]), keys(&self.k[seen]), keys(&self.v[seen]));
            let d_out = matrix(&gradient[rows.clone()]);
            let mut weights = vec![0f32; n_rows * n_keys];
            let into = MatMut::from_row_major_slice_mut(&mut weights, n_rows, n_keys);
            matmul(into, Accum::Replace, q, k.transpose(), 1.0, Par::Seq);
            let passed_on: Option<Vec<f32>> =
                scoring.cap.map(|cap| weights.iter().map(|s| 1.0 - (s / cap).tanh().powi(2)).collect());
            scoring.weigh(arch, &mut weights, n_keys, first);
            let p = MatRef::from_row_major_slice(&weights, n_rows, n_keys);
            let into = MatMut::from_row_major_slice_mut(&mut dv[seen], n_keys, head_dim);
            matmul(into, Accum::Add, p.transpose(), d_out, 1.0, Par::Seq);
            let mut d_scores = vec![0f32; n_rows * n_keys];
            let into = MatMut::from_row_major_slice_mut(&mut d_scores, n_rows, n_keys);
            matmul(into, Accum::Replace, d_out, v.transpose(), 1.0, Par::Seq);
            let outputs =
                self.mixed[rows.clone()].chunks_exact(head_dim).zip(gradient[rows.clone()].chunks_exact(head_dim));
            let score_rows = d_scores.chunks_exact_mut(n_keys).zip(weights.chunks_exact(n_keys));
            for ((d_row, p_row), (o, d_o)) in score_rows.zip(outputs) {
                let shift: f32 = o.iter().zip(d_o).map(|(o, d)| o * d).sum();
                d_row.iter_mut().zip(p_row).for_each(|(d, p)| *d = p * (*d - shift));
            }
            if let Some(passed_on) = passed_on {
                d_scores.iter_mut().zip(passed_on).for_each(|(d, share)| *d *= share);
            }
            let d_scores = MatRef::from_row_major_slice(&d_scores, n_rows, n_keys);
            let into = MatMut::from_row_major_slice_mut(&mut dq[rows.clone()], n_rows, head_dim);
            matmul(into, Accum::Replace, d_scores, k, 1.0, Par::Seq);
            let into = MatMut::from_row_major_slice_mut(&mut dk[seen], n_keys, head_dim);
            matmul(into, Accum::Add, d_scores.transpose(), q, 1.0, Par::Seq);
        }
    }
}

/// `mixed = softmax(q kᵀ) v` over the keys that are seen, `q` and `mixed` (n_tokens, head_dim), `k` and `v` (n_keys,
/// head_dim), row-major; `scores` is scratch space.
fn attend_one_head(
    arch: Arch,
    [q, k, v]: [&[f32]; 3],
    head_dim: usize,
    scoring: Scoring,
    scores: &mut [f32],
    mixed: &mut [f32],
) {
    let rows = |values: &[f32]| values.len() / head_dim;
    let n_tokens = rows(k);
    let before = n_tokens - rows(q);
    for (block_idx, (q, mixed)) in
        q.chunks(QUERY_BLOCK * head_dim).zip(mixed.chunks_mut(QUERY_BLOCK * head_dim)).enumerate()
    {
        let (first, n_rows) = (before + block_idx * QUERY_BLOCK, rows(q));
        let n_keys = scoring.n_keys(first + n_rows, n_tokens);
        let scores = &mut scores[..n_rows * n_keys]; // (n_rows, n_keys)
        let (k, v) = (&k[..n_keys * head_dim], &v[..n_keys * head_dim]);
        let q = MatRef::from_row_major_slice(q, n_rows, head_dim);
        let k = MatRef::from_row_major_slice(k, n_keys, head_dim);
        let v = MatRef::from_row_major_slice(v, n_keys, head_dim);
        let into = MatMut::from_row_major_slice_mut(&mut *scores, n_rows, n_keys);
        matmul(into, Accum::Replace, q, k.transpose(), 1.0, Par::Seq);
        scoring.weigh(arch, scores, n_keys, first);
        let weights = MatRef::from_row_major_slice(&*scores, n_rows, n_keys);
        matmul(MatMut::from_row_major_slice_mut(mixed, n_rows, head_dim), Accum::Replace, weights, v, 1.0, Par::Seq);
    }
}
