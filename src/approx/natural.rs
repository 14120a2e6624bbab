//! Steps of the natural gradient of a matrix, without what is noise in the gradient of few tokens.
//!
//! With the Fisher information `G ⊗ C` (K-FAC, Martens & Grosse 2015) the step is `G⁻¹ ∇ C⁻¹`. With roots `G = K Kᵀ`,
//! `C = H Hᵀ` it is `K⁻ᵀ M H⁻¹` of the whitened gradient `M = K⁻¹ ∇ H⁻ᵀ`, in which every direction counts the same, and
//! the gradient of few tokens is mostly noise. How large that is, a second gradient says, in which half of the tokens
//! have the other sign: the signal is gone there, the noise is as large. Singular values of `M` below the largest of
//! the noise, the edge of Marchenko and Pastur, are dropped, and the others shrunk to what is left of them without
//! noise: the optimal shrinkage of Gavish & Donoho (2017) for the Frobenius norm.

use faer::{Mat, MatRef};

use super::metric::MetricPair;
use crate::linalg::{self, LinalgError};

/// A step `L R` of low rank.
#[derive(Debug, Clone)]
pub struct NaturalStep {
    /// `L` (m, k).
    pub left: Mat<f64>,
    /// `R` (k, n).
    pub right: Mat<f64>,
}

/// `G⁻¹ ∇ C⁻¹` of a `gradient` (m, n) as far as it exceeds `noise`, a gradient of the same tokens of which half have
/// the other sign. It is to be subtracted from the matrix.
///
/// # Errors
/// See [`LinalgError`].
pub fn natural_step(
    gradient: MatRef<'_, f64>,
    noise: MatRef<'_, f64>,
    metric: MetricPair<'_>,
) -> Result<NaturalStep, LinalgError> {
    let (m, n) = gradient.shape();
    let left = metric.output.dual_root_times(Mat::identity(m, m).as_ref())?; // K⁻ᵀ (m, m)
    let right = metric.input.dual_root_times(Mat::identity(n, n).as_ref())?; // H⁻ᵀ (n, n)
    let whiten = |gradient: MatRef<'_, f64>| {
        let half = linalg::product(left.transpose(), gradient);
        linalg::product(half.as_ref(), right.as_ref())
    };
    let shrunk = shrink(whiten(gradient).as_ref(), whiten(noise).as_ref())?;
    Ok(NaturalStep {
        left: linalg::product(left.as_ref(), shrunk.left.as_ref()),
        right: linalg::product(shrunk.right.as_ref(), right.transpose()),
    })
}

/// A matrix (m, n) without its noise, which is as large as `noise`, as far as singular values tell.
fn shrink(matrix: MatRef<'_, f64>, noise: MatRef<'_, f64>) -> Result<NaturalStep, LinalgError> {
    let is_wide = matrix.nrows() <= matrix.ncols();
    // Rows are the smaller side.
    let [wide, noise] = [matrix, noise].map(|matrix| if is_wide { matrix } else { matrix.transpose() });
    let (p, q) = wide.shape();
    let square = |of: MatRef<'_, f64>| linalg::product_symmetric(of, of.transpose());
    let edge = linalg::eigenvalues(square(noise).as_ref())?.first().map_or(0.0, |largest| largest.max(0.0).sqrt());
    let linalg::Eigh { values, vectors } = linalg::eigh(square(wide).as_ref())?;
    let ratio = p as f64 / q.max(1) as f64;
    let shares = values.iter().map(|value| kept_share(value.max(0.0).sqrt(), edge, ratio));
    let shares: Vec<f64> = shares.take_while(|&share| share > 0.0).collect();
    let basis = vectors.subcols(0, shares.len()); // (p, k)
    let images = linalg::product(basis.transpose(), wide); // (k, q)
    let images = Mat::from_fn(shares.len(), q, |i, j| shares[i] * images[(i, j)]);
    Ok(match is_wide {
        true => NaturalStep { left: basis.to_owned(), right: images },
        false => NaturalStep { left: images.transpose().to_owned(), right: basis.transpose().to_owned() },
    })
}

/// What is kept of a singular value `size`, as a share of it: `√((y² − β − 1)² − 4β) / y²` above the edge `y = 1 + √β`
/// of the noise, and nothing below; β, in (0, 1], is the `ratio` of the sides.
fn kept_share(size: f64, edge: f64, ratio: f64) -> f64 {
    if size <= edge {
        return 0.0;
    }
    if edge == 0.0 {
        return 1.0;
    }
    let square = (size / edge * (1.0 + ratio.sqrt())).powi(2);
    ((square - ratio - 1.0).powi(2) - 4.0 * ratio).max(0.0).sqrt() / square
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::approx::metric::Metric;

    /// Nearly normal numbers of variance 1 from a fixed sequence.
    fn noise(m: usize, n: usize, seed: u64) -> Mat<f64> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut value = || (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
        let values: Vec<f64> = (0..m * n).map(|_| value()).collect();
        Mat::from_fn(m, n, |i, j| values[i * n + j])
    }

    fn product(step: &NaturalStep) -> Mat<f64> {
        &step.left * &step.right
    }

    #[test]
    fn noise_leaves_little_and_a_signal_comes_back_better_than_it_was() {
        for (m, n) in [(60, 90), (90, 60), (64, 64)] {
            let ([noise, other], zeros) = ([3, 4].map(|seed| noise(m, n, seed)), Mat::zeros(m, n));
            let alone = shrink(noise.as_ref(), other.as_ref()).unwrap();
            assert!(alone.left.ncols() <= 2, "{} of {m}", alone.left.ncols());
            let signal =
                Mat::from_fn(m, n, |i, j| 3.0 * ((i as f64).sin() * (j as f64 * 0.7).cos() + ((i + j) as f64).cos()));
            let found = shrink((&signal + &noise).as_ref(), other.as_ref()).unwrap();
            assert!((2..=4).contains(&found.left.ncols()), "{m} {n}");
            assert!((&product(&found) - &signal).norm_l2() < 0.6 * noise.norm_l2(), "{m} {n}");
            // Without noise it stays.
            let found = product(&shrink(signal.as_ref(), zeros.as_ref()).unwrap());
            assert!((&found - &signal).norm_max() < 1e-6 * signal.norm_max(), "{m} {n}");
        }
    }

    /// The largest singular values of `σ u vᵀ` in noise of variance 1 / q tend to `√((1 + σ²)(β + σ²)) / σ`, of which
    /// the optimal share gives back `σ` times the cosines of both vectors (Gavish & Donoho 2017, equations 6 to 9).
    #[test]
    fn shares_are_those_of_the_spiked_model() {
        for ratio in [0.25f64, 0.5, 1.0] {
            let edge = 1.0 + ratio.sqrt();
            for strength in [1.5f64, 3.0, 10.0] {
                let square = strength * strength;
                let seen = ((1.0 + square) * (ratio + square)).sqrt() / strength;
                let left = (square * square - ratio) / (square * square + ratio * square);
                let right = (square * square - ratio) / (square * square + square);
                let expected = strength * (left * right).sqrt();
                assert!((seen * kept_share(seen, edge, ratio) - expected).abs() < 1e-9, "{ratio} {strength}");
            }
            assert_eq!(kept_share(edge, edge, ratio), 0.0);
        }
    }

    #[test]
    fn a_step_without_noise_solves_both_sides() {
        let (m, n) = (24, 30);
        let form = |n: usize, seed| {
            let root = noise(n, n, seed);
            &root * root.transpose() + Mat::<f64>::identity(n, n)
        };
        let (output, input) = (form(m, 5), form(n, 7));
        let expected = Mat::from_fn(m, n, |i, j| (i as f64).sin() * (j as f64).cos());
        let gradient = &output * &expected * &input;
        let metric = MetricPair { output: &Metric::full(output), input: &Metric::full(input) };
        let found = product(&natural_step(gradient.as_ref(), Mat::zeros(m, n).as_ref(), metric).unwrap());
        assert!((&found - &expected).norm_max() < 1e-6, "{}", (&found - &expected).norm_max());
    }
}
