//! From the last states to logits and losses, or to the pooled vector of an encoder.

use std::ops::Range;

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::activation::Activation;
use super::linear::Linear;
use super::norm::Norm;
use super::ops::{self, is_finite};
use super::sentence::SentencePooler;
use crate::error::{Failure, NON_FINITE_HINT};

/// The final norm and the head.
pub struct Head {
    pub(super) norm: Option<Norm>,
    /// Maps to the width of the embeddings, if that differs.
    pub(super) projection: Option<Linear>,
    pub(super) transform: Option<Transform>,
    pub(super) lm_head: Linear,
    /// Logits l become `cap · tanh(l / cap)`.
    pub(super) cap: Option<f64>,
}

/// The layers of an encoder's head before its vocabulary matrix.
pub(super) struct Transform {
    pub dense: Linear,
    pub activation: Activation,
    pub norm: Norm,
}

/// Pools an encoder's last states into one vector.
pub struct Pooler(pub(super) Kind);

pub(super) enum Kind {
    /// The sentence-transformers modules next to the checkpoint.
    Sentence { pooler: SentencePooler, name: String, is_by_cosine: bool },
    /// tanh of the checkpoint's own linear, applied to the first token's state.
    Learned(Linear),
    /// The mean of the states, if there is no other pooling.
    Mean,
}

/// Bytes of logits held at a time.
pub(super) const LOGIT_BYTES: usize = 32 << 20;

impl Head {
    /// The input of the vocabulary matrix, in the shape of `x` (..., hidden_size).
    fn before_vocabulary(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = match &self.norm {
            Some(norm) => norm.apply(x)?,
            None => x.clone(),
        };
        if let Some(projection) = &self.projection {
            x = projection.forward(&x)?;
        }
        if let Some(Transform { dense, activation, norm }) = &self.transform {
            x = norm.apply(&activation.apply(&dense.forward(&x)?)?)?;
        }
        Ok(x)
    }

    /// Maps `x` (..., hidden_size) to (..., vocab_size).
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.logits_of(&self.before_vocabulary(x)?)
    }

    /// The logits of the inputs of the vocabulary matrix.
    fn logits_of(&self, before: &Tensor) -> Result<Tensor> {
        let logits = self.lm_head.forward(before)?;
        Ok(match self.cap {
            Some(cap) => ((logits / cap)?.tanh()? * cap)?,
            None => logits,
        })
    }

    /// Calls `f` with the logits (rows, vocab_size) of `x` (n, hidden_size) and the range of their rows, a chunk of rows
    /// at a time: memory is never n × vocabulary.
    ///
    /// # Errors
    /// The shapes do not match, or `f` fails.
    pub fn for_each_logits(&self, x: &Tensor, f: impl FnMut(Range<usize>, &Tensor) -> Result<()>) -> Result<()> {
        self.for_each_logits_of(&self.before_vocabulary(x)?, f)
    }

    /// The same of the inputs of the vocabulary matrix.
    fn for_each_logits_of(
        &self,
        before: &Tensor,
        mut f: impl FnMut(Range<usize>, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let (n, rows_at_once) = (before.dim(0)?, self.rows_at_once());
        for first in (0..n).step_by(rows_at_once) {
            let n_rows = rows_at_once.min(n - first);
            f(first..first + n_rows, &self.logits_of(&before.narrow(0, first, n_rows)?)?)?;
        }
        Ok(())
    }

    /// The gradient (n, hidden_size) of a loss with respect to `x` (n, hidden_size). `slope` gives it with respect to
    /// some rows of logits (n_rows, vocab_size) before they were capped, from the logits and the range of their rows.
    ///
    /// # Errors
    /// The shapes do not match, or `slope` fails.
    pub fn gradient(
        &self,
        x: &Tensor,
        mut slope: impl FnMut(Range<usize>, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let variable = Var::from_tensor(x)?;
        let (before, mut gradients) = (self.before_vocabulary(&variable)?, Vec::new());
        self.for_each_logits_of(&before.detach(), |rows, logits| {
            gradients.push(self.lm_head.backward(&slope(rows, logits)?)?); // (n_rows, width)
            Ok(())
        })?;
        slope_of((before * Tensor::cat(&gradients, 0)?)?, &variable)
    }

    /// The gradient with respect to logits before they were capped, from that with respect to `logits`.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn before_cap(&self, gradient: Tensor, logits: &Tensor) -> Result<Tensor> {
        match self.cap {
            Some(cap) => Ok((gradient * (logits / cap)?.sqr()?.affine(-1.0, 1.0)?)?),
            None => Ok(gradient),
        }
    }

    /// Number of rows whose logits are held at a time.
    pub fn rows_at_once(&self) -> usize {
        (LOGIT_BYTES / (4 * self.vocab_size())).max(1)
    }

    /// Logits per row.
    pub fn vocab_size(&self) -> usize {
        self.lm_head.out_features()
    }

    /// Inputs of a row of logits.
    pub fn width(&self) -> usize {
        self.lm_head.in_features()
    }

    /// The gradient (n, hidden_size), with respect to `x` (n, hidden_size), of the summed negative log-likelihood of
    /// `targets`; each is predicted from the state in its row of `rows`. Adds the squares of the gradients at the
    /// outputs of the matrix to `squares` (vocab_size).
    ///
    /// # Errors
    /// A logit is not finite.
    pub fn loss_gradient(
        &self,
        x: &Tensor,
        rows: &[u32],
        targets: &[u32],
        mut squares: Option<&mut [f64]>,
    ) -> Result<Tensor> {
        if rows.is_empty() {
            return Ok(x.zeros_like()?);
        }
        let rows = Tensor::new(rows, x.device())?;
        let gradient = self.gradient(&x.index_select(&rows, 0)?, |rows, logits| {
            let targets = (rows.start, &targets[rows]);
            ops::likelihood_gradient(logits, targets, self.cap, squares.as_deref_mut())
        })?;
        expect_finite(x.zeros_like()?.index_add(&rows, &gradient, 0)?)
    }

    /// The inputs of the matrix of the vocabulary, (n_rows, width), for `rows` of `x` (n, hidden_size).
    ///
    /// # Errors
    /// A row does not exist.
    pub fn inputs(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        self.before_vocabulary(&x.index_select(&Tensor::new(rows, x.device())?, 0)?)
    }

    /// Negative log-likelihoods in nats of `targets` (n), each predicted from its row of `x` (n, hidden_size).
    /// Logits are computed in chunks: memory is never n × vocabulary.
    ///
    /// # Errors
    /// A logit is not finite.
    pub fn negative_log_likelihoods(&self, x: &Tensor, targets: &[u32]) -> Result<Vec<f64>> {
        let mut nlls = Vec::with_capacity(targets.len());
        self.for_each_logits(x, |rows, logits| {
            nlls.extend(ops::negative_log_likelihoods(logits, &targets[rows])?);
            Ok(())
        })?;
        if let Some(position) = nlls.iter().position(|nll| !nll.is_finite()) {
            return Err(ops::not_finite(position));
        }
        Ok(nlls)
    }
}

impl Pooler {
    /// Whether the checkpoint's own linear makes the vector.
    pub fn is_learned(&self) -> bool {
        matches!(self.0, Kind::Learned(_))
    }

    /// Whether sentence-transformers modules make the vector.
    pub fn is_of_sentences(&self) -> bool {
        matches!(self.0, Kind::Sentence { .. })
    }

    /// The name in reports.
    pub fn name(&self) -> &str {
        match &self.0 {
            Kind::Sentence { name, .. } => name,
            Kind::Learned(_) => "pooler",
            Kind::Mean => "mean",
        }
    }

    /// Pools the states of a window, (n_tokens, hidden_size), into one vector (width).
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn pool(&self, x: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Kind::Sentence { pooler, .. } => pooler.pool(x),
            Kind::Learned(dense) => Ok(dense.forward(&x.narrow(0, 0, 1)?)?.tanh()?.squeeze(0)?),
            Kind::Mean => Ok(x.mean(0)?),
        }
    }

    /// The gradient of half the squared norm of the pooled vector with respect to `x` (n_tokens, hidden_size).
    ///
    /// # Errors
    /// It is not finite.
    pub fn norm_gradient(&self, x: &Tensor) -> Result<Tensor> {
        let variable = Var::from_tensor(x)?;
        let pooled = self.pool(&variable)?;
        gradient_of((pooled.sqr()? * 0.5)?.sum_all()?, &variable)
    }

    /// The gradient of `uᵀ e` with respect to `x` (n_tokens, hidden_size), where e is the embedding, scaled to length 1
    /// if embeddings are compared by cosine, and u has random signs drawn by `seed`. Averaged over u, `g gᵀ` is `Jᵀ J`
    /// with J the Jacobian of e: the metric of the squared error of e, which is 2 − 2 cos if e has length 1.
    ///
    /// # Errors
    /// The gradient is not finite, or the embedding is zero and has no direction.
    pub fn probe_gradient(&self, x: &Tensor, seed: u64) -> Result<Tensor> {
        let variable = Var::from_tensor(x)?;
        let e = self.pool(&variable)?;
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let sign = |_| if generator.next_u32() & 1 == 0 { 1.0f32 } else { -1.0 };
        let signs: Vec<f32> = (0..e.dim(0)?).map(sign).collect();
        let product = (&e * Tensor::new(signs, x.device())?)?.sum_all()?;
        let is_by_cosine = matches!(&self.0, Kind::Sentence { is_by_cosine: true, .. });
        gradient_of(if is_by_cosine { (product / e.sqr()?.sum_all()?.sqrt()?)? } else { product }, &variable)
    }
}

/// The gradient of the sum of `loss`.
fn slope_of(loss: Tensor, variable: &Var) -> Result<Tensor> {
    Ok(loss.backward()?.get(variable).context("the head passes no gradient")?.detach())
}

/// The same, which must be finite.
fn gradient_of(loss: Tensor, variable: &Var) -> Result<Tensor> {
    expect_finite(slope_of(loss, variable)?)
}

fn expect_finite(gradient: Tensor) -> Result<Tensor> {
    if !is_finite(&gradient)? {
        let message = "the gradient of the loss at the last states is not finite";
        return Err(Failure::numeric(message).hint(NON_FINITE_HINT).into());
    }
    Ok(gradient)
}
