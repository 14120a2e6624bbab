//! Grouped-query attention with a rotary embedding: from the projections of a block's input to the input of `o_proj`.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use candle_core::Tensor;

use super::architectures::table::FusedQkv;
use super::linear::Linear;
use super::norm::Norm;
use super::ops::{Scoring, attend};
use super::rope::{Rope, RopeKind};
use super::slot::Role;

/// Attention with grouped queries: the linears, the norms of queries and keys, and what masks and scales the scores.
#[derive(Debug, Clone)]
pub struct Attention {
    pub(super) qkv: Qkv,
    pub(super) o_proj: Linear,
    /// Norms of queries and keys, and whether each head is normalized separately.
    pub(super) query_key_norm: Option<((Norm, Norm), bool)>,
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    pub(super) head_dim: usize,
    /// Scale of the queries.
    pub(super) scale: f64,
    pub(super) scoring: Scoring,
    pub(super) rope: Option<RopeKind>,
    /// Set where each pass continues the one before it.
    pub(super) past: Option<Past>,
}

/// Keys and values of earlier passes, (batch, kv_heads, n_tokens, head_dim) each.
#[derive(Debug, Clone, Default)]
pub(super) struct Past(Arc<Mutex<Option<(Tensor, Tensor)>>>);

impl Past {
    /// The keys and values of all passes so far, with these of the next tokens.
    fn extended(&self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let mut past = self.0.lock().expect("invariant: no holder of the past panics");
        let all = match past.take() {
            Some((keys, values)) => (Tensor::cat(&[&keys, &k], 2)?, Tensor::cat(&[&values, &v], 2)?),
            None => (k, v),
        };
        Ok(past.insert(all).clone())
    }
}

/// The linears of queries, keys and values.
#[derive(Debug, Clone)]
pub(super) enum Qkv {
    Apart { q_proj: Linear, k_proj: Linear, v_proj: Linear },
    Fused { qkv_proj: Linear, rows: FusedQkv },
}

impl Qkv {
    /// # Errors
    /// The error of `load`.
    pub fn load(has: impl Fn(Role) -> bool, load: impl Fn(Role) -> Result<Linear>, rows: FusedQkv) -> Result<Self> {
        Ok(if has(Role::QkvProj) {
            Self::Fused { qkv_proj: load(Role::QkvProj)?, rows }
        } else {
            Self::Apart { q_proj: load(Role::QProj)?, k_proj: load(Role::KProj)?, v_proj: load(Role::VProj)? }
        })
    }

    pub fn linears_mut(&mut self) -> Vec<(Role, &mut Linear)> {
        match self {
            Self::Apart { q_proj, k_proj, v_proj } => {
                vec![(Role::QProj, q_proj), (Role::KProj, k_proj), (Role::VProj, v_proj)]
            }
            Self::Fused { qkv_proj, .. } => vec![(Role::QkvProj, qkv_proj)],
        }
    }

    /// Queries, keys and values (batch, n_tokens, width) of `x` (batch, n_tokens, hidden_size).
    fn forward(&self, x: &Tensor, heads: [usize; 3], head_dim: usize) -> Result<[Tensor; 3]> {
        let (batch, n_tokens, _) = x.dims3()?;
        match self {
            Self::Apart { q_proj, k_proj, v_proj } => Ok([q_proj.forward(x)?, k_proj.forward(x)?, v_proj.forward(x)?]),
            Self::Fused { qkv_proj, rows: FusedQkv::Concatenated } => {
                let y = qkv_proj.forward(x)?;
                let [q, k, v] = heads.map(|n| n * head_dim);
                Ok([y.narrow(2, 0, q)?, y.narrow(2, q, k)?, y.narrow(2, q + k, v)?])
            }
            Self::Fused { qkv_proj, rows: FusedQkv::Interleaved } => {
                let y = qkv_proj.forward(x)?.reshape((batch, n_tokens, heads[0], 3, head_dim))?;
                let part = |i: usize| -> Result<Tensor> { Ok(y.narrow(3, i, 1)?.reshape((batch, n_tokens, ()))?) };
                Ok([part(0)?, part(1)?, part(2)?])
            }
        }
    }
}

impl Attention {
    /// Mixes the values of `x` (batch, n_tokens, hidden_size): everything before `o_proj`, (batch, n_tokens, queries).
    ///
    /// # Errors
    /// The shapes do not match.
    pub(super) fn mix(&self, x: &Tensor, rope: &Rope) -> Result<Tensor> {
        let (batch, n_tokens, _) = x.dims3()?;
        let [mut q, mut k, v] = self.qkv.forward(x, [self.n_heads, self.n_kv_heads, self.n_kv_heads], self.head_dim)?;
        let split = |y: &Tensor, n: usize| y.reshape((batch, n_tokens, n, self.head_dim));
        match &self.query_key_norm {
            Some(((of_queries, of_keys), false)) => {
                (q, k) = (of_queries.apply(&q)?, of_keys.apply(&k)?);
                (q, k) = (split(&q, self.n_heads)?, split(&k, self.n_kv_heads)?);
            }
            Some(((of_queries, of_keys), true)) => {
                (q, k) = (split(&q, self.n_heads)?, split(&k, self.n_kv_heads)?);
                (q, k) = (of_queries.apply(&q)?, of_keys.apply(&k)?);
            }
            None => (q, k) = (split(&q, self.n_heads)?, split(&k, self.n_kv_heads)?),
        }
        let v = split(&v, self.n_kv_heads)?;
        let heads_first = |y: &Tensor| -> Result<Tensor> { Ok(y.transpose(1, 2)?.contiguous()?) };
        let (mut q, mut k, v) = (heads_first(&q)?, heads_first(&k)?, heads_first(&v)?); // (batch, heads, n_tokens, head_dim)
        if let Some(kind) = self.rope {
            (q, k) = (rope.rotate(kind, &q)?, rope.rotate(kind, &k)?);
        }
        let q = (q * self.scale)?;
        let (k, v) = match &self.past {
            Some(past) => past.extended(k, v)?,
            None => (k, v),
        };
        let mixed = attend(&q, &k, &v, self.scoring)?; // (batch, heads, n_tokens, head_dim)
        Ok(mixed.transpose(1, 2)?.reshape((batch, n_tokens, self.n_heads * self.head_dim))?)
    }
}
