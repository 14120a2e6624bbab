//! Negative log-likelihoods of targets under rows of logits, and their gradients.

use anyhow::Result;
use candle_core::{D, DType, Tensor};
use candle_nn::ops::softmax;
use pulp::Arch;
use rayon::prelude::*;

use super::finite::is_finite;
use super::kernel::has_kernel;
use crate::device::{to_host, to_host_f64};
use crate::error::{Failure, NON_FINITE_HINT};
use crate::model::softmax::{log_sum_exp, softmax_in_place};

/// Negative log-likelihoods in nats of `targets` (n) under `logits` (n, vocab_size). One that is not finite is for the
/// caller to find.
pub(in crate::model) fn negative_log_likelihoods(logits: &Tensor, targets: &[u32]) -> Result<Vec<f64>> {
    if !has_kernel(logits) {
        return portable_likelihoods(logits, targets);
    }
    let (vocab_size, arch) = (logits.dim(1)?, Arch::new());
    let logits = to_host(logits)?;
    let rows = logits.par_chunks_exact(vocab_size).zip(targets);
    Ok(rows.map(|(row, &target)| log_sum_exp(arch, row) - f64::from(row[target as usize])).collect())
}

/// The same in candle's operations.
pub(super) fn portable_likelihoods(logits: &Tensor, targets: &[u32]) -> Result<Vec<f64>> {
    let of_targets = logits.gather(&Tensor::new(targets, logits.device())?.unsqueeze(1)?, 1)?.squeeze(1)?;
    Ok(to_host_f64(&(logits.log_sum_exp(1)? - of_targets)?.to_dtype(DType::F64)?)?)
}

/// The gradient, with respect to logits before they were capped, of the summed negative log-likelihood of `targets` (n)
/// under `logits` (n, vocab_size), which are predictions from `first` on. Capped logits are `cap · tanh(l / cap)`. Adds
/// the squares of the gradients to `squares` (vocab_size).
///
/// # Errors
/// A logit is not finite.
pub(in crate::model) fn likelihood_gradient(
    logits: &Tensor,
    (first, targets): (usize, &[u32]),
    cap: Option<f64>,
    squares: Option<&mut [f64]>,
) -> Result<Tensor> {
    if !has_kernel(logits) {
        return portable_gradient(logits, (first, targets), cap, squares);
    }
    let (vocab_size, arch) = (logits.dim(1)?, Arch::new());
    let mut values = to_host(logits)?;
    expect_finite(&values, first, vocab_size)?;
    values.par_chunks_exact_mut(vocab_size).zip(targets).for_each(|(row, &target)| {
        let capped = cap.map(|_| row.to_vec());
        softmax_in_place(arch, row); // ∂nll/∂logits = softmax − one-hot
        row[target as usize] -= 1.0;
        if let (Some(cap), Some(capped)) = (cap, capped) {
            let cap = cap as f32;
            row.iter_mut().zip(capped).for_each(|(g, l)| *g *= 1.0 - (l / cap).powi(2));
        }
    });
    if let Some(squares) = squares {
        for row in values.chunks_exact(vocab_size) {
            squares.iter_mut().zip(row).for_each(|(sum, &g)| *sum += f64::from(g) * f64::from(g));
        }
    }
    Ok(Tensor::from_vec(values, logits.shape(), logits.device())?)
}

/// The same in candle's operations.
pub(super) fn portable_gradient(
    logits: &Tensor,
    (first, targets): (usize, &[u32]),
    cap: Option<f64>,
    squares: Option<&mut [f64]>,
) -> Result<Tensor> {
    if !is_finite(logits)? {
        expect_finite(&to_host(logits)?, first, logits.dim(1)?)?;
    }
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let minus_one = (targets.ones_like()?.to_dtype(DType::F32)? * -1.0)?;
    let mut gradient = softmax(logits, D::Minus1)?.contiguous()?.scatter_add(&targets, &minus_one, 1)?;
    if let Some(cap) = cap {
        gradient = (gradient * (logits / cap)?.sqr()?.affine(-1.0, 1.0)?)?;
    }
    if let Some(squares) = squares {
        let sums = gradient.to_dtype(DType::F64)?.sqr()?.sum(0)?;
        squares.iter_mut().zip(to_host_f64(&sums)?).for_each(|(sum, found)| *sum += found);
    }
    Ok(gradient)
}

fn expect_finite(logits: &[f32], first: usize, vocab_size: usize) -> Result<()> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        Some(at) => Err(not_finite(first + at / vocab_size)),
        None => Ok(()),
    }
}

/// The error for logits that are not finite; the caller adds the place of the window.
pub(in crate::model) fn not_finite(prediction: usize) -> anyhow::Error {
    let message = format!("the model's logits are not finite (prediction {prediction})");
    Failure::numeric(message).hint(NON_FINITE_HINT).into()
}
