//! The divergence of a model from a reference, per token and on average, with the figures of
//! llama.cpp's `--kl-divergence`.

use anyhow::Result;
use candle_core::Tensor;
use rayon::prelude::*;

use crate::device::to_host;
use crate::error::{Failure, NON_FINITE_HINT};
use crate::model::{Head, RowDivergence, row_divergence};
use crate::report::{Distribution, DivergenceRecord};

/// The figures of one scored token.
#[derive(Debug, Clone, Copy)]
pub struct TokenDivergence {
    /// −ln p of the target under the reference.
    pub reference_nll: f64,
    /// −ln p of the target under the model.
    pub nll: f64,
    /// Figures that depend on the whole distribution and not only on the target.
    pub rows: RowDivergence,
}

/// Scored tokens, in order.
#[derive(Debug, Clone, Default)]
pub struct Divergence {
    tokens: Vec<TokenDivergence>,
}

/// Compares two models at rows of their last states (n, hidden_size), each of which predicts a target.
///
/// # Errors
/// The vocabularies differ, or a logit is not finite.
pub fn compare(
    reference: &Head,
    reference_x: &Tensor,
    model: &Head,
    x: &Tensor,
    targets: &[u32],
) -> Result<Vec<TokenDivergence>> {
    let vocab_size = reference.vocab_size();
    if vocab_size != model.vocab_size() {
        let message =
            format!("the vocabularies differ: {vocab_size} in the reference, {} in the model", model.vocab_size());
        return Err(Failure::unsupported(message).hint("the reference must share the model's tokenizer").into());
    }
    let mut tokens: Vec<TokenDivergence> = Vec::with_capacity(targets.len());
    let rows_at_once = reference.rows_at_once();
    for (chunk_idx, targets) in targets.chunks(rows_at_once).enumerate() {
        let logits = |head: &Head, x: &Tensor| -> Result<Vec<f32>> {
            let x = x.narrow(0, chunk_idx * rows_at_once, targets.len())?;
            Ok(to_host(&head.logits(&x)?)?)
        };
        let (p, q) = (logits(reference, reference_x)?, logits(model, x)?);
        let rows = p.par_chunks_exact(vocab_size).zip(q.par_chunks_exact(vocab_size)).zip(targets);
        tokens.par_extend(rows.map(|((p, q), &target)| {
            let rows = row_divergence(p, q);
            TokenDivergence {
                reference_nll: rows.log_sum_exp.0 - f64::from(p[target as usize]),
                nll: rows.log_sum_exp.1 - f64::from(q[target as usize]),
                rows,
            }
        }));
    }
    let is_finite = |t: &TokenDivergence| t.reference_nll.is_finite() && t.nll.is_finite() && t.rows.kl.is_finite();
    if let Some(position) = tokens.iter().position(|t| !is_finite(t)) {
        let whose = if tokens[position].reference_nll.is_finite() { "the model's" } else { "the reference's" };
        let message = format!("{whose} logits are not finite (prediction {position})");
        return Err(Failure::numeric(message).hint(NON_FINITE_HINT).into());
    }
    Ok(tokens)
}

impl Divergence {
    /// Appends the tokens of the next window.
    pub fn extend(&mut self, tokens: Vec<TokenDivergence>) {
        self.tokens.extend(tokens);
    }

    fn mean(&self, value: impl Fn(&TokenDivergence) -> f64) -> f64 {
        self.tokens.iter().map(value).sum::<f64>() / self.tokens.len() as f64
    }

    /// Mean KL(reference ‖ model) in nats.
    pub fn mean_kl(&self) -> f64 {
        self.mean(|t| t.rows.kl)
    }

    /// The model's perplexity: exp of its mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        self.mean(|t| t.nll).exp()
    }

    /// All figures.
    pub fn record(&self, reference: &str) -> DivergenceRecord {
        let n = self.tokens.len() as f64;
        let (reference_mean, mean) = (self.mean(|t| t.reference_nll), self.mean(|t| t.nll));
        // Both models are scored on the same tokens, so the variance is computed from the differences.
        let variance = self.mean(|t| (t.nll - mean - (t.reference_nll - reference_mean)).powi(2));
        let standard_error = if n > 1.0 { (variance / (n - 1.0)).sqrt() } else { 0.0 };
        let ratio = (mean - reference_mean).exp();
        let distribution =
            |value: fn(&TokenDivergence) -> f64| Distribution::of(self.tokens.iter().map(value).collect());
        DivergenceRecord {
            reference: reference.into(),
            reference_ppl: reference_mean.exp(),
            ln_ppl_ratio: mean - reference_mean,
            ln_ppl_ratio_standard_error: standard_error,
            ppl_ratio: ratio,
            ppl_ratio_standard_error: ratio * standard_error,
            kl: distribution(|t| t.rows.kl),
            reverse_kl: distribution(|t| t.rows.reverse_kl),
            delta_p: distribution(|t| (-t.nll).exp() - (-t.reference_nll).exp()),
            delta_p_rms: self.mean(|t| ((-t.nll).exp() - (-t.reference_nll).exp()).powi(2)).sqrt(),
            same_top_1: self.mean(|t| f64::from(u8::from(t.rows.same_top_1))),
            top_5_agreement: self.mean(|t| t.rows.top_5_agreement),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(reference: &[f32], model: &[f32], target: usize) -> TokenDivergence {
        let rows = row_divergence(reference, model);
        TokenDivergence {
            reference_nll: rows.log_sum_exp.0 - f64::from(reference[target]),
            nll: rows.log_sum_exp.1 - f64::from(model[target]),
            rows,
        }
    }

    #[test]
    fn figures_have_their_closed_forms() {
        // p = (1/2, 1/2), q = (3/4, 1/4); then p = q.
        let mut divergence = Divergence::default();
        divergence.extend(vec![token(&[0.0, 0.0], &[3f32.ln(), 0.0], 0), token(&[1.0, 0.0], &[1.0, 0.0], 1)]);
        let record = divergence.record("reference");
        let kl = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        let reverse = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        assert!((record.kl.mean - kl / 2.0).abs() < 1e-6 && (record.kl.max - kl).abs() < 1e-6);
        assert!((record.reverse_kl.mean - reverse / 2.0).abs() < 1e-6);
        assert!((record.delta_p.mean - 0.125).abs() < 1e-6);
        assert!((record.delta_p_rms - (0.25f64.powi(2) / 2.0).sqrt()).abs() < 1e-6);
        // ln ratio: −(ln 3/4 − ln 1/2) / 2; the spread of the paired differences over √(n − 1).
        let step = -(1.5f64.ln());
        assert!((record.ln_ppl_ratio - step / 2.0).abs() < 1e-6);
        assert!((record.ln_ppl_ratio_standard_error - step.abs() / 2.0).abs() < 1e-6);
        assert_eq!((record.same_top_1, record.top_5_agreement), (1.0, 1.0));
    }
}
