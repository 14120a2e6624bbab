//! How long and how fast to train: learning rates by step.

use std::f64::consts::PI;

/// Share of the steps in which the rate rises.
const WARM_UP: f64 = 0.1;
/// The last rate, as a share of the largest.
const LEAST: f64 = 0.1;

/// How long and how fast.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Most passes over the pieces.
    pub epochs: usize,
    /// Pieces of a step.
    pub batch: usize,
    /// The largest learning rate.
    pub learning_rate: f64,
    /// Seed of the order of the pieces.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { epochs: 8, batch: 2, learning_rate: 2e-4, seed: 0 }
    }
}

/// The rate of a step, counted from 0: it rises linearly to `largest` in a tenth of the steps, then falls along a
/// cosine to a tenth of it (Loshchilov & Hutter 2017).
pub fn learning_rate(largest: f64, step: usize, n_steps: usize) -> f64 {
    let n_warm = (WARM_UP * n_steps as f64).ceil().max(1.0);
    let at = step as f64;
    if at < n_warm {
        return largest * (at + 1.0) / n_warm;
    }
    let progress = (at - n_warm) / (n_steps as f64 - 1.0 - n_warm).max(1.0);
    largest * (LEAST + (1.0 - LEAST) * 0.5 * (1.0 + (PI * progress.min(1.0)).cos()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_to_the_largest_and_fall_to_a_tenth_of_it() {
        let rates: Vec<f64> = (0..100).map(|step| learning_rate(2e-4, step, 100)).collect();
        assert!(rates[..10].is_sorted() && (rates[0] - 2e-5).abs() < 1e-18 && rates[9] == 2e-4);
        assert!(rates[10..].is_sorted_by(|a, b| a >= b) && rates[10] == 2e-4);
        assert!((rates[99] - 2e-5).abs() < 1e-12 && (rates[54] - 1.1e-4).abs() < 2e-6, "{rates:?}");
        for n_steps in 1..4 {
            assert!((0..n_steps).all(|step| (1e-5..=1e-4).contains(&learning_rate(1e-4, step, n_steps))));
        }
    }
}
