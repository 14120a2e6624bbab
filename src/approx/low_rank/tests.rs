use proptest::prelude::*;
use serde::Deserialize;

use super::*;

fn matrix(values: &[f64], m: usize, n: usize) -> Mat<f64> {
    Mat::from_fn(m, n, |i, j| values[i * n + j])
}

fn gram(inputs: &Mat<f64>) -> Mat<f64> {
    inputs.transpose() * inputs * faer::Scale(1.0 / inputs.nrows() as f64)
}

fn product(pair: &LowRank, m: usize, n: usize) -> Mat<f64> {
    let wide = |values: &[f32], m, n| matrix(&values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>(), m, n);
    wide(&pair.b, m, pair.rank) * wide(&pair.a, pair.rank, n)
}

/// A form of every kind from the rows of `samples`.
fn form(kind: &str, samples: &Mat<f64>, damping: f64) -> Metric {
    match kind {
        "identity" => Metric::Identity,
        "diagonal" => {
            let gram = gram(samples);
            let n = samples.ncols();
            let mean = (0..n).map(|i| gram[(i, i)]).sum::<f64>() / n as f64;
            Metric::diagonal((0..n).map(|i| gram[(i, i)] + damping * mean).collect())
        }
        _ => Metric::damped(gram(samples), damping),
    }
}

const KINDS: [&str; 3] = ["identity", "diagonal", "full"];

#[derive(Deserialize)]
struct Case {
    m: usize,
    n: usize,
    weight: Vec<f64>,
    inputs: Vec<f64>,
    gradients: Vec<f64>,
    metrics: Vec<Expected>,
}

#[derive(Deserialize)]
struct Expected {
    output: String,
    input: String,
    singular_values: Vec<f64>,
    products: Vec<Vec<f64>>,
}

#[test]
fn agrees_with_cholesky_whitening_in_numpy() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("../../../tests/oracles/low_rank.json")).unwrap();
    assert_eq!(cases.iter().map(|c| c.metrics.len()).sum::<usize>(), 3 * 9);
    for case in cases {
        let (m, n) = (case.m, case.n);
        let weight = matrix(&case.weight, m, n);
        let (inputs, gradients) = (matrix(&case.inputs, 40, n), matrix(&case.gradients, 40, m));
        for expected in &case.metrics {
            let (output, input) = (form(&expected.output, &gradients, 0.0), form(&expected.input, &inputs, 0.0));
            let metric = MetricPair { output: &output, input: &input };
            let name = format!("{} {} {m} x {n}", expected.output, expected.input);
            let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
            let first = expected.singular_values[0];
            for (found, expected) in decomposition.curve.singular_values().zip(&expected.singular_values) {
                // Squares of singular values are exact to 1e-16 of the largest.
                assert!((found - expected).abs() < 1e-7 * first, "{name}: {found} {expected}");
            }
            let alone = error_curve(weight.as_ref(), metric).unwrap();
            for rank in 1..=m.min(n) {
                let best = matrix(&expected.products[rank - 1], m, n);
                let found = product(&decomposition.truncate(weight.as_ref(), rank), m, n);
                assert!((&found - &best).norm_max() < 2e-5 * weight.norm_max(), "{name} rank {rank}");
                assert!((alone.relative_error(rank) - decomposition.curve.relative_error(rank)).abs() < 1e-7);
            }
        }
    }
}

/// A weight, inputs and gradients of any rank, and a rank to cut at.
fn problem() -> impl Strategy<Value = (Mat<f64>, Mat<f64>, Mat<f64>, usize)> {
    (1usize..14, 1usize..14, 1usize..20).prop_flat_map(|(m, n, n_tokens)| {
        let values = |len| proptest::collection::vec(-3.0f64..3.0, len);
        (values(m * n), values(n_tokens * n), values(n_tokens * m), 0..=m.min(n))
            .prop_map(move |(w, x, g, rank)| (matrix(&w, m, n), matrix(&x, n_tokens, n), matrix(&g, n_tokens, m), rank))
    })
}

/// Runs `check` in every one of the nine metrics. Input Grams may be singular, output Grams are damped, full or
/// diagonal: where rows differ in weight by a factor c², factors in f32 are exact to about c of their rounding.
fn in_every_metric(
    inputs: &Mat<f64>,
    gradients: &Mat<f64>,
    mut check: impl FnMut(MetricPair<'_>, &str) -> Result<(), TestCaseError>,
) -> Result<(), TestCaseError> {
    for output_kind in KINDS {
        for input_kind in KINDS {
            let (output, input) = (form(output_kind, gradients, 0.01), form(input_kind, inputs, 0.0));
            check(MetricPair { output: &output, input: &input }, &format!("{output_kind} {input_kind}"))?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_curve_is_the_measured_error((weight, inputs, gradients, rank) in problem()) {
        let (m, n) = (weight.nrows(), weight.ncols());
        in_every_metric(&inputs, &gradients, |metric, name| {
            let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
            let error = &weight - product(&decomposition.truncate(weight.as_ref(), rank), m, n);
            let measured = metric.squared_norm(error.as_ref());
            let total = decomposition.curve.squared_error(0);
            prop_assert!((total - metric.squared_norm(weight.as_ref())).abs() <= 1e-8 * total + 1e-12, "{}", name);
            prop_assert!((measured - decomposition.curve.squared_error(rank)).abs() <= 1e-6 * total + 1e-9,
                "{name}: measured {measured}, curve {}, total {total}", decomposition.curve.squared_error(rank));
            Ok(())
        })?;
    }

    #[test]
    fn full_rank_reproduces_the_weight_even_in_a_singular_metric((weight, inputs, gradients, _) in problem()) {
        let (m, n) = (weight.nrows(), weight.ncols());
        in_every_metric(&inputs, &gradients, |metric, name| {
            let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
            let rebuilt = product(&decomposition.truncate(weight.as_ref(), m.min(n)), m, n);
            prop_assert!((&rebuilt - &weight).norm_max() <= 1e-5 * weight.norm_max().max(1.0), "{}", name);
            Ok(())
        })?;
    }

    #[test]
    fn no_method_beats_another_in_the_others_metric((weight, inputs, gradients, rank) in problem()) {
        let (m, n) = (weight.nrows(), weight.ncols());
        let mut errors = Vec::new();
        in_every_metric(&inputs, &gradients, |metric, _| {
            let pair = decompose(weight.as_ref(), metric, rank).unwrap().truncate(weight.as_ref(), rank);
            errors.push(&weight - product(&pair, m, n));
            Ok(())
        })?;
        let mut own = 0;
        in_every_metric(&inputs, &gradients, |metric, name| {
            let slack = 1e-6 * metric.squared_norm(weight.as_ref()) + 1e-9;
            let best = metric.squared_norm(errors[own].as_ref());
            for other in &errors {
                prop_assert!(best <= metric.squared_norm(other.as_ref()) + slack, "{}", name);
            }
            own += 1;
            Ok(())
        })?;
    }

    #[test]
    fn error_falls_with_rank_and_norms_are_balanced((weight, inputs, gradients, rank) in problem()) {
        in_every_metric(&inputs, &gradients, |metric, _| {
            let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
            let full = weight.nrows().min(weight.ncols());
            let errors: Vec<f64> = (0..=full).map(|r| decomposition.curve.squared_error(r)).collect();
            prop_assert!(errors.windows(2).all(|e| e[0] >= e[1]));
            let pair = decomposition.truncate(weight.as_ref(), rank);
            for i in 0..rank {
                let column: f32 = pair.b.iter().skip(i).step_by(rank).map(|v| v * v).sum();
                let row: f32 = pair.a[i * weight.ncols()..][..weight.ncols()].iter().map(|v| v * v).sum();
                prop_assert!(row < 1e-6 || (column / row - 1.0).abs() < 1e-3, "{column} {row}");
            }
            Ok(())
        })?;
    }

    #[test]
    fn shorter_truncations_are_prefixes_of_longer_ones((weight, inputs, gradients, rank) in problem()) {
        in_every_metric(&inputs, &gradients, |metric, _| {
            let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
            let full = decomposition.truncate(weight.as_ref(), weight.nrows().min(weight.ncols()));
            let (short, prefix) = (decomposition.truncate(weight.as_ref(), rank), full.prefix(rank));
            let close = |x: &[f32], y: &[f32]| x.iter().zip(y).all(|(s, l)| (s - l).abs() <= 1e-6 * l.abs().max(1.0));
            prop_assert!(short.rank == prefix.rank && close(&short.a, &prefix.a) && close(&short.b, &prefix.b));
            Ok(())
        })?;
    }

    #[test]
    fn dual_vectors_give_the_same_pair_from_their_arrays((weight, inputs, gradients, rank) in problem()) {
        in_every_metric(&inputs, &gradients, |metric, _| {
            let decomposition = decompose(weight.as_ref(), metric, usize::MAX).unwrap();
            let (space, basis, dual) = decomposition.dual.to_arrays();
            let read = DualVectors::from_arrays(space, weight.shape(), rank, &basis, &dual);
            let (m, n) = weight.shape();
            let [found, exact] = [read.truncate(weight.as_ref(), rank), decomposition.truncate(weight.as_ref(), rank)]
                .map(|pair| product(&pair, m, n));
            let (lost, norm) = (metric.squared_norm((found - exact).as_ref()), metric.squared_norm(weight.as_ref()));
            prop_assert!(lost <= 1e-10 * norm, "{lost} {norm}");
            Ok(())
        })?;
    }

    /// kfac with G = I is svd-llm, with both plain it is svd.
    #[test]
    fn the_general_metric_contains_the_simple_ones((weight, inputs, _, rank) in problem()) {
        let (m, n) = (weight.nrows(), weight.ncols());
        let eye = |n: usize| Metric::full(Mat::identity(n, n));
        let input = form("full", &inputs, 0.0);
        let cases = [
            (MetricPair { output: &eye(m), input: &input }, MetricPair { output: &Metric::Identity, input: &input }),
            (MetricPair { output: &eye(m), input: &eye(n) }, MetricPair::IDENTITY),
        ];
        for (general, simple) in cases {
            let curve = |metric| decompose(weight.as_ref(), metric, rank).unwrap();
            let (general, simple) = (curve(general), curve(simple));
            let total = simple.curve.squared_error(0);
            for (g, s) in general.curve.energies().iter().zip(simple.curve.energies()) {
                prop_assert!((g - s).abs() <= 1e-9 * total);
            }
            // Equal energies on both sides of the cut leave the subspace free; the error is the same.
            let error = |d: &Decomposition| {
                let error = &weight - product(&d.truncate(weight.as_ref(), rank), m, n);
                MetricPair { output: &Metric::Identity, input: &input }.squared_norm(error.as_ref())
            };
            if rank == 0 || rank == m.min(n) || simple.curve.energies()[rank - 1] - simple.curve.energies()[rank] > 1e-3 * total {
                prop_assert!((error(&general) - error(&simple)).abs() <= 1e-6 * (total + 1.0));
            }
        }
    }
}

#[test]
fn a_weight_of_zeros_stays_zero() {
    let weight = Mat::zeros(4, 6);
    let decomposition = decompose(weight.as_ref(), MetricPair::IDENTITY, 3).unwrap();
    let pair = decomposition.truncate(weight.as_ref(), 3);
    assert!(product(&pair, 4, 6).norm_max() == 0.0 && pair.b.iter().all(|v| v.is_finite()));
    assert_eq!(decomposition.curve.relative_error(1), 0.0);
}
