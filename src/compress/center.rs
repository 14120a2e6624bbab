//! Centering: a bias takes up what an approximation changes in the mean output.
//!
//! With inputs `x` of mean `μ`, the bias `b' = b + (W − W') μ` is the best for any `W'`, in any metric of the outputs.
//! The error is then `tr(G E (C − μ μᵀ) Eᵀ)`, which is never larger than `tr(G E C Eᵀ)`; LiteASR (Kamahori et al. 2025)
//! factors its linears like that. Metrics that are no second moment of the inputs (svd, asvd, fwsvd) stay as they are,
//! and the bias is refitted all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use anyhow::Result;

use crate::checkpoint::{Checkpoint, cast};
use crate::error::Failure;
use crate::model::inventory::LinearInfo;
use crate::model::{LinearId, ModelConfig};

/// Means over tokens, from which a bias follows: `b' = b + output − W' input`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Means {
    /// Mean output of the source without its bias, (m).
    pub output: Vec<f64>,
    /// Mean input of the approximation, (n).
    pub input: Vec<f64>,
}

/// Biases that were refitted, by index in the plan.
#[derive(Default)]
pub(super) struct Biases(Mutex<BTreeMap<usize, Vec<f32>>>);

impl Biases {
    /// The bias of a linear, if it was made.
    pub fn get(&self, i: usize) -> Option<Vec<f32>> {
        self.0.lock().expect("invariant: no holder of the biases panics").get(&i).cloned()
    }

    pub fn keep(&self, i: usize, bias: Vec<f32>) {
        self.0.lock().expect("invariant: no holder of the biases panics").insert(i, bias);
    }

    /// Drops the bias of a linear that has a new fit.
    pub fn forget(&self, i: usize) {
        self.0.lock().expect("invariant: no holder of the biases panics").remove(&i);
    }
}

/// The linears that a model runs with a bias of their own. A part of a fused matrix has none.
///
/// # Errors
/// There is none.
pub(super) fn biased(checkpoint: &Checkpoint, linears: &[LinearInfo]) -> Result<BTreeSet<LinearId>> {
    let (config, architecture) = ModelConfig::of(checkpoint)?;
    let has_bias = |linear: &LinearInfo, id: LinearId| {
        let info = checkpoint.info(&bias_name(linear));
        config.has_bias(architecture, id.slot.role)
            && info.is_some_and(|info| cast::is_float(info.dtype) && info.shape == [linear.out_features])
    };
    let ids = linears.iter().filter_map(|linear| linear.id.filter(|&id| has_bias(linear, id)));
    let biased: BTreeSet<LinearId> = ids.collect();
    if biased.is_empty() {
        return Err(Failure::unsupported("`--center` has no effect: no linear to compress has a bias")
            .hint("remove it; a bias is only changed, never added")
            .into());
    }
    Ok(biased)
}

/// The tensor of the bias of a linear.
pub(super) fn bias_name(linear: &LinearInfo) -> String {
    format!("{}.bias", linear.module)
}

/// `W x` of a weight (m, n), row-major, and a vector (n).
pub(super) fn image(weight: &[f32], x: &[f64]) -> Vec<f64> {
    let row = |row: &[f32]| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
    weight.chunks_exact(x.len()).map(row).collect()
}

#[cfg(test)]
mod tests {
    use faer::{Mat, MatRef};

    use super::*;
    use crate::approx::low_rank::{LowRank, decompose};
    use crate::approx::metric::{Metric, MetricPair};
    use crate::calibrate::{Header, Needs, Observation, Statistics, TextPart};
    use crate::linalg;
    use crate::model::{Role, Slot};

    const N_TOKENS: usize = 60;

    /// Deterministic values in [-1, 1].
    fn value(i: usize, j: usize, seed: usize) -> f64 {
        (((i * 37 + j * 23 + i * j * 5 + seed * 11) % 29) as f64 - 14.0) / 14.0
    }

    /// Inputs (n, n_tokens) with a mean, and statistics of them.
    fn calibrated(n: usize) -> (Mat<f64>, Statistics, LinearId) {
        let inputs = Mat::from_fn(n, N_TOKENS, |i, t| f64::from((value(i, t, 1) + 1.5 * value(i, 3, 2)) as f32));
        let (text_sha256, part) = ("0".repeat(64), (1, 1));
        let tokens = N_TOKENS;
        let part =
            TextPart { text_sha256, samples: 1, seq_len: tokens, seed: 0, part, windows: 1, tokens, gradients: None };
        let needs = Needs { input_gram: true, input_sum: true, ..Needs::default() };
        let header = Header::new(Default::default(), Observation { needs, clip_gradients: false }, vec![part]);
        let mut statistics = Statistics::new(header, 1 << 20, &std::env::temp_dir());
        let gram = &inputs * inputs.transpose();
        let gram: Vec<f32> = (0..n).flat_map(|i| (0..=i).map(move |j| (i, j))).map(|at| gram[at] as f32).collect();
        let sums: Vec<f32> = inputs.row_iter().map(|row| row.iter().sum::<f64>() as f32).collect();
        let arrays = [("0.down.input_gram", gram), ("0.down.input_sum", sums)];
        statistics.keep(arrays.map(|(name, values)| (name.into(), values.into())).into()).unwrap();
        (inputs, statistics, LinearId { block: 0, slot: Slot::shared(Role::DownProj) })
    }

    fn product(pair: &LowRank, m: usize, n: usize) -> Mat<f64> {
        let values = linalg::product_row_major(&pair.b, &pair.a, m, pair.rank, n);
        linalg::transposed_from_row_major(&values, m, n).transpose().to_owned()
    }

    /// `Σ eᵀ G e / n_tokens` of the columns of an error (m, n_tokens).
    fn mean_error(error: &Mat<f64>, g: &Mat<f64>) -> f64 {
        let image = g * error;
        let sum = image.col_iter().zip(error.col_iter()).map(|(a, b)| a.transpose() * b).sum::<f64>();
        sum / error.ncols() as f64
    }

    /// The least error of `B (A x) + δ` at a rank by alternating least squares, which know no mean and no Gram: `[B δ]`
    /// is a regression on `[A x; 1]`, and `A` follows from `B`.
    fn alternating(weight: &Mat<f64>, inputs: &Mat<f64>, g: &Mat<f64>, rank: usize) -> f64 {
        let (targets, (m, n)) = (weight * inputs, weight.shape());
        let mut a = Mat::from_fn(rank, n, |i, j| value(i + 2, j + 1, 5));
        let mut least = f64::INFINITY;
        for _ in 0..2000 {
            let codes = &a * inputs;
            let rows = |i: usize, t: usize| if i < rank { codes[(i, t)] } else { 1.0 };
            let z = Mat::from_fn(rank + 1, N_TOKENS, rows);
            let fit = linalg::solve((&z * z.transpose()).as_ref(), (&z * targets.transpose()).as_ref()).unwrap();
            let b = fit.subrows(0, rank).transpose().to_owned(); // (m, r)
            least = mean_error(&(&targets - fit.transpose() * &z), g);
            assert_eq!(b.nrows(), m);
            let left = b.transpose() * g;
            a = linalg::solve((&left * &b).as_ref(), (&left * weight).as_ref()).unwrap();
        }
        least
    }

    #[test]
    fn a_centered_fit_with_its_bias_is_the_best_with_an_intercept() {
        let (m, n) = (6, 8);
        let weight = Mat::from_fn(m, n, |i, j| value(i, j, 3));
        let bias: Vec<f64> = (0..m).map(|i| value(i, 1, 4)).collect();
        let (inputs, statistics, id) = calibrated(n);
        let samples = Mat::from_fn(m, 20, |i, j| value(i, j, 6));
        let g = &samples * samples.transpose();
        let mean = statistics.input_mean(id, n).unwrap();
        let row_major = |matrix: MatRef<'_, f64>| linalg::to_row_major(matrix);
        for output in [Metric::Identity, Metric::full(g.clone())] {
            let g = if matches!(output, Metric::Identity) { Mat::identity(m, m) } else { g.clone() };
            let curve = |input: Metric| {
                let metric = MetricPair { output: &output, input: &input };
                let found = decompose(weight.as_ref(), metric, m).unwrap();
                (found.curve.clone(), found)
            };
            let (centered, found) = curve(Metric::full(statistics.centered_input_gram(id, n).unwrap()));
            let (plain, _) = curve(Metric::full(statistics.input_gram(id, n).unwrap()));
            for rank in 0..=m {
                let (with, without) = (centered.squared_error(rank), plain.squared_error(rank));
                assert!(with <= without + 1e-6 * plain.squared_error(0), "{rank}: {with} {without}");
                let smaller = product(&found.truncate(weight.as_ref(), rank), m, n);
                let [whole, part] = [&weight, &smaller].map(|matrix| image(&row_major(matrix.as_ref()), &mean));
                // (W x + b) - (W' x + b'), with b' - b = (W - W') μ.
                let shift: Vec<f64> = (0..m).map(|i| bias[i] - (bias[i] + whole[i] - part[i])).collect();
                let change = (&weight - &smaller) * &inputs;
                let change = Mat::from_fn(m, N_TOKENS, |i, t| change[(i, t)] + shift[i]);
                let measured = mean_error(&change, &g);
                let total = centered.squared_error(0);
                assert!((measured - with).abs() < 1e-5 * total, "{rank}: {measured} {with}");
                if [1, 3].contains(&rank) {
                    let expected = alternating(&weight, &inputs, &g, rank);
                    assert!((expected - with).abs() < 1e-4 * total, "{rank}: {expected} {with}");
                }
            }
        }
    }
}
