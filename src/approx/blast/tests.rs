use super::*;

fn noise(m: usize, n: usize, seed: u64) -> Mat<f64> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    Mat::from_fn(m, n, |_, _| (0..4).map(|_| f64::from(generator.next_u32()) / f64::from(u32::MAX) - 0.5).sum())
}

fn form(n: usize, seed: u64) -> Metric {
    let samples = noise(3 * n, n, seed);
    Metric::damped(samples.transpose() * &samples, 0.01)
}

fn wide(x: &Mat<f32>) -> Mat<f64> {
    Mat::from_fn(x.nrows(), x.ncols(), |i, j| f64::from(x[(i, j)]))
}

fn blocks(count: usize, rank: usize, (m, n): (usize, usize), seed: u64) -> BlockFactors {
    let narrow = |x: Mat<f64>| Mat::from_fn(x.nrows(), x.ncols(), |i, j| x[(i, j)] as f32);
    let s = linalg::to_row_major(noise(count * count, rank, seed + 2).as_ref());
    BlockFactors { count, u: narrow(noise(m, rank, seed)), v: narrow(noise(n, rank, seed + 1)), s }
}

/// Entry by entry, from the definition.
#[test]
fn a_block_is_the_product_of_its_slices_and_scales() {
    let ((m, n), count, rank) = ((6, 8), 2, 3);
    let blast = blocks(count, rank, (m, n), 1);
    for x in [&blast, &blast.clone().normalized(), &blast.clone().normalized().balanced()] {
        let product = x.product();
        for (p, q) in (0..m).flat_map(|p| (0..n).map(move |q| (p, q))) {
            let (i, j) = (p / (m / count), q / (n / count));
            let term = |k: usize| blast.u[(p, k)] * blast.s[(i * count + j) * rank + k] * blast.v[(q, k)];
            let expected: f32 = (0..rank).map(term).sum();
            assert!((product[(p, q)] - expected).abs() < 1e-5, "{p} {q}");
        }
    }
}

/// With twice the rank, in which the descent has no other minimum on its way.
#[test]
fn blocks_that_share_their_factors_are_found() {
    let ((m, n), count, rank) = ((24, 32), 4, 2);
    let target = wide(&blocks(count, rank, (m, n), 5).product());
    for (output, input) in [(Metric::Identity, Metric::Identity), (form(m, 3), form(n, 4))] {
        let metric = MetricPair { output: &output, input: &input };
        let (_, error) = fit(target.as_ref(), metric, (count, 2 * rank), f64::INFINITY).unwrap().unwrap();
        // Its rank is that of all blocks together, so that factors of as many numbers are far from it.
        let curve = low_rank::error_curve(target.as_ref(), metric).unwrap();
        let of_factors = curve.squared_error(2 * rank * (m + n + count * count) / (m + n));
        assert!(error < 1e-6 * of_factors && of_factors > 1e-3 * curve.squared_error(0), "{error} {of_factors}");
    }
}

#[test]
fn sweeps_never_raise_the_error_which_is_that_of_the_product() {
    let ((m, n), count, rank) = ((24, 40), 4, 9);
    let (target, output, input) = (noise(m, n, 7), form(m, 8), form(n, 9));
    let metric = MetricPair { output: &output, input: &input };
    let measured = |blast: &BlockFactors| metric.squared_norm((&target - wide(&blast.product())).as_ref());
    let problem = Problem::new(target.as_ref(), metric, count).unwrap();
    let mut blast = blocks(count, rank, (m, n), 10);
    let mut before = measured(&blast);
    let mut errors = Vec::new();
    for _ in 0..8 {
        let (next, error) = problem.sweep(blast).unwrap();
        assert!((measured(&next) - error).abs() < 1e-4 * error, "{} {error}", measured(&next));
        assert!(error < before * (1.0 + 1e-5), "{error} {before}");
        (blast, before) = (next, error);
        errors.push(error);
    }
    assert!(errors[7] < 0.8 * errors[0]);
    // With extrapolation and more sweeps it is lower, and the same at every run.
    let fit = |limit: f64| fit(target.as_ref(), metric, (count, rank), limit).unwrap();
    let (found, error) = fit(f64::INFINITY).unwrap();
    assert!(error < errors[7] && (measured(&found) - error).abs() < 1e-4 * error);
    assert_eq!(fit(1.1 * error).unwrap().0.s, found.s);
    assert!(fit(0.999 * error).is_none() && fit(0.1 * error).is_none());
    // No part is of another size than the others.
    for k in 0..rank {
        let squares: f32 = found.s.iter().skip(k).step_by(rank).map(|s| s * s).sum();
        let [of_u, of_v] = [&found.u, &found.v].map(|part| part.col(k).norm_l2());
        assert!((squares / (count * count) as f32 - 1.0).abs() < 1e-3 && (of_u / of_v - 1.0).abs() < 1e-3);
    }
}

/// The last slice that a sweep moves is where its error has no slope, by finite differences.
#[test]
fn a_sweep_ends_at_the_least_squares_of_its_last_slice() {
    let ((m, n), count, rank) = ((16, 16), 2, 4);
    let (target, output, input) = (noise(m, n, 17), form(m, 18), form(n, 19));
    let metric = MetricPair { output: &output, input: &input };
    let problem = Problem::new(target.as_ref(), metric, count).unwrap();
    let (blast, error) = problem.sweep(blocks(count, rank, (m, n), 20)).unwrap();
    let slope = |q: usize, k: usize| {
        let at = |step: f32| {
            let mut moved = blast.clone();
            moved.v[(q, k)] += step;
            metric.squared_norm((&target - wide(&moved.product())).as_ref())
        };
        (at(0.05) - at(-0.05)) / 0.1
    };
    let slopes = |rows: Range<usize>| {
        rows.flat_map(|q| (0..rank).map(move |k| (q, k))).map(|(q, k)| slope(q, k).abs()).fold(0.0, f64::max)
    };
    assert!(slopes(n / 2..n) < 1e-3 * error, "{} {error}", slopes(n / 2..n));
    // The slice before it was moved first, so that its slope is not 0 any more.
    assert!(slopes(0..n / 2) > 1e-2 * error);
}

#[test]
fn values_that_are_not_finite_are_an_error() {
    let mut target = noise(8, 8, 1);
    target[(0, 0)] = f64::NAN;
    assert!(fit(target.as_ref(), MetricPair::IDENTITY, (2, 2), f64::INFINITY).is_err());
}
