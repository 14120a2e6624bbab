use super::*;

fn samples(m: usize, n: usize, seed: u32) -> Mat<f64> {
    let value = |i: usize| {
        let mixed = (i as u32 ^ seed.wrapping_mul(0x9e37)).wrapping_mul(2_654_435_761);
        f64::from((mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519) >> 8) / 8_388_608.0 - 1.0
    };
    Mat::from_fn(m, n, |i, j| value(i * n + j + 1))
}

/// Inputs whose columns depend on each other.
fn inputs(n_tokens: usize, n: usize, seed: u32) -> Mat<f64> {
    samples(n_tokens, n, seed) * samples(n, n, seed + 1) + samples(n_tokens, n, seed + 2)
}

fn gram(x: &Mat<f64>) -> Mat<f64> {
    x.transpose() * x * faer::Scale(1.0 / x.nrows() as f64)
}

struct Case {
    weight: Mat<f64>,
    inputs: Mat<f64>,
    output: Metric,
    input: Metric,
}

impl Case {
    fn new(m: usize, n: usize, damping: f64) -> Self {
        let inputs = inputs(3 * n, n, 5);
        let output = Metric::damped(gram(&samples(2 * m, m, 3)), damping);
        let input = Metric::damped(gram(&inputs), damping);
        Self { weight: samples(m, n, 1), inputs, output, input }
    }

    fn metric(&self) -> MetricPair<'_> {
        MetricPair { output: &self.output, input: &self.input }
    }

    fn columns(&self, run: usize) -> Columns {
        Columns::new(self.weight.as_ref(), self.metric(), run)
    }

    /// The error of the refit that keeps these columns, from its values.
    fn error(&self, kept: &[usize]) -> f64 {
        let form = input_form(&self.input, self.weight.ncols());
        let refitted = refit(self.weight.as_ref(), form.as_ref(), kept);
        let mut error = self.weight.clone();
        for (at, &j) in kept.iter().enumerate() {
            (0..error.nrows()).for_each(|i| error[(i, j)] -= refitted[(i, at)]);
        }
        self.metric().squared_norm(error.as_ref())
    }

    fn all(&self, run: usize) -> [(&'static str, Narrowing); 5] {
        let columns = self.columns(run);
        let of_makers: Vec<f64> = (0..self.weight.ncols() / run).map(|g| (g % 3) as f64).collect();
        [
            ("forward", forward(&columns)),
            ("backward", backward(&columns)),
            ("leverage", by_scores(&columns, &leverage(&columns))),
            ("wanda-sp", by_scores(&columns, &wanda_sp(&columns, self.weight.as_ref()))),
            ("lorap", by_scores(&columns, &lorap(&columns, self.weight.as_ref(), &of_makers))),
        ]
    }
}

#[test]
fn the_curve_is_the_measured_error_of_the_refit_and_falls() {
    for (m, n, run) in [(9, 24, 1), (24, 9, 1), (7, 24, 4), (80, 130, 1)] {
        let case = Case::new(m, n, 0.01);
        let norm = case.metric().squared_norm(case.weight.as_ref());
        for (name, narrowing) in case.all(run) {
            assert_eq!(narrowing.errors.len(), n / run + 1);
            assert_eq!(*narrowing.errors.last().unwrap(), 0.0);
            assert!((narrowing.errors[0] / norm - 1.0).abs() < 1e-9, "{name}: {}", narrowing.errors[0]);
            assert!(narrowing.errors.windows(2).all(|pair| pair[0] >= pair[1]), "{name}");
            for count in (0..=n / run).step_by(1 + n / 12) {
                let kept: Vec<usize> = narrowing.first(count).iter().flat_map(|g| g * run..(g + 1) * run).collect();
                let (found, expected) = (narrowing.errors[count], case.error(&kept));
                assert!((found - expected).abs() < 1e-9 * norm, "{name} {count}: {found}, measured {expected}");
            }
        }
    }
}

#[test]
fn the_refit_is_the_least_squares_fit_to_the_outputs() {
    let case = Case::new(3, 10, 0.0);
    let kept = [1, 4, 5, 8];
    let refitted = refit(case.weight.as_ref(), input_form(&case.input, 10).as_ref(), &kept);
    // The residual of the outputs is orthogonal to every kept input.
    let kept_inputs = Mat::from_fn(case.inputs.nrows(), kept.len(), |i, j| case.inputs[(i, kept[j])]);
    let residual = &case.inputs * case.weight.transpose() - &kept_inputs * refitted.transpose();
    let correlation = residual.transpose() * &kept_inputs;
    assert!(correlation.norm_max() < 1e-9 * (&case.inputs * case.weight.transpose()).norm_max());
    assert!(residual.norm_max() > 1e-3);
}

#[test]
fn greedy_orders_are_near_the_best_of_all_subsets_and_better_than_scores() {
    let (m, n) = (4, 10);
    let case = Case::new(m, n, 0.01);
    let best = |count: u32| {
        let subsets = (0u32..1 << n).filter(|set| set.count_ones() == count);
        let columns = |set: u32| (0..n).filter(|j| set >> j & 1 == 1).collect::<Vec<_>>();
        subsets.map(|set| case.error(&columns(set))).fold(f64::INFINITY, f64::min)
    };
    let [forward, backward, leverage, wanda_sp, lorap] = case.all(1).map(|(_, narrowing)| narrowing);
    // The first step of each is the best there is.
    assert!((forward.errors[1] / best(1) - 1.0).abs() < 1e-9);
    assert!((backward.errors[n - 1] / best(n as u32 - 1) - 1.0).abs() < 1e-9);
    for count in 1..n {
        let best = best(count as u32);
        assert!([&forward, &backward].iter().all(|n| n.errors[count] >= best * (1.0 - 1e-9)));
        let greedy = forward.errors[count].min(backward.errors[count]);
        assert!(greedy <= 1.25 * best, "{count}: {greedy}, best {best}");
    }
    let total = |narrowing: &Narrowing| narrowing.errors.iter().sum::<f64>();
    assert!(total(&backward) < total(&leverage) && total(&backward) < total(&wanda_sp));
    assert!(total(&backward) < total(&lorap));
}

#[test]
fn lorap_adds_the_norms_of_all_matrices_of_a_channel() {
    // Rows of `W` times `diag(d)^½`: (3, 4) · diag(4, 1)^½ and (0, 5).
    let transposed = Mat::from_fn(2, 2, |j, i| [[3.0, 4.0], [0.0, 5.0]][i][j]);
    let norms = norms_of_rows(transposed.as_ref(), &Metric::diagonal(vec![4.0, 1.0]));
    assert!((norms[0] - 52f64.sqrt()).abs() < 1e-12 && (norms[1] - 5.0).abs() < 1e-12);
    let weight = Mat::from_fn(2, 4, |i, j| if i == 0 { 1.0 + j as f64 } else { 0.0 });
    let input = Metric::diagonal(vec![1.0, 4.0, 1.0, 1.0]);
    let columns = Columns::new(weight.as_ref(), MetricPair { output: &Metric::Identity, input: &input }, 2);
    assert_eq!(lorap(&columns, weight.as_ref(), &norms[1..].repeat(2)), [3.5, 6.5, 5.5, 6.5]);
}

#[test]
fn runs_are_the_best_that_go_together() {
    let (m, n, run) = (6, 20, 5);
    let case = Case::new(m, n, 0.01);
    let backward = backward(&case.columns(run));
    let without = |g: usize| (0..n).filter(|j| j / run != g).collect::<Vec<_>>();
    let errors: Vec<f64> = (0..n / run).map(|g| case.error(&without(g))).collect();
    let least = errors.iter().copied().fold(f64::INFINITY, f64::min);
    assert!((backward.errors[n / run - 1] / least - 1.0).abs() < 1e-9);
    assert_eq!(errors[backward.order[n / run - 1]], least);
}

#[test]
fn columns_that_others_make_cost_nothing() {
    let n = 8;
    let mut x = samples(50, n, 9);
    for i in 0..50 {
        x[(i, 6)] = x[(i, 0)] - 2.0 * x[(i, 1)];
        x[(i, 7)] = 0.0;
    }
    let input = Metric::full(gram(&x));
    let weight = samples(5, n, 2);
    let metric = MetricPair { output: &Metric::Identity, input: &input };
    let columns = Columns::new(weight.as_ref(), metric, 1);
    for narrowing in [forward(&columns), backward(&columns)] {
        let norm = narrowing.errors[0];
        assert!(narrowing.errors[n - 2] < 1e-6 * norm && narrowing.errors[n - 3] > 1e-3 * norm, "{narrowing:?}");
        assert!(narrowing.order[n - 2..].contains(&7), "{narrowing:?}");
    }
}

#[test]
fn a_run_left_out_alone_errs_as_the_refit_of_the_others() {
    for (m, n, run) in [(9, 24, 1), (24, 9, 1), (7, 24, 4), (5, 6, 6)] {
        let case = Case::new(m, n, 0.01);
        let norm = case.metric().squared_norm(case.weight.as_ref());
        let errors = alone(&case.columns(run));
        assert_eq!(errors.len(), n / run);
        for (at, found) in errors.iter().enumerate() {
            let kept: Vec<usize> = (0..n).filter(|j| j / run != at).collect();
            let expected = case.error(&kept);
            assert!((found - expected).abs() < 1e-9 * norm, "run {at} of {run}: {found}, measured {expected}");
        }
        let least = errors.iter().copied().fold(f64::INFINITY, f64::min);
        let first = backward(&case.columns(run)).errors[n / run - 1];
        assert!((least - first).abs() < 1e-9 * norm, "{least} {first}");
    }
}
