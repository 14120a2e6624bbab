//! How long and how fast to train: learning rates by step.

use std::f64::consts::PI;

/// Share of the steps in which the rate rises.
const WARM_UP: f64 = 0.1;
/// The last rate, as a share of the largest.
const LEAST: f64 = 0.1;

/// The largest rate of a fit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rate {
    /// This one.
    Fixed(f64),
    /// By what there is to gain: steps are as noisy near the end of a fit as far from it, so that they must be shorter
    /// there.
    ByLoss {
        /// What the loss of the held-out pieces before the first step is multiplied by.
        factor: f64,
        /// The largest rate of all.
        most: f64,
    },
}

impl Rate {
    /// The rate of a fit that begins with a `loss`.
    pub fn largest(self, loss: f64) -> f64 {
        match self {
            Self::Fixed(rate) => rate,
            Self::ByLoss { factor, most } => (factor * loss).min(most),
        }
    }
}

/// How long and how fast.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Most passes over the pieces.
    pub epochs: usize,
    /// Pieces of a step.
    pub batch: usize,
    /// The largest learning rate.
    pub learning_rate: Rate,
    /// Seed of the order of the pieces.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { epochs: 8, batch: 2, learning_rate: Rate::Fixed(2e-4), seed: 0 }
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
    fn a_rate_by_the_loss_is_less_where_there_is_less_to_gain() {
        let rate = Rate::ByLoss { factor: 1e-4, most: 5e-5 };
        assert_eq!([0.0, 0.1, 0.5, 3.0].map(|loss| rate.largest(loss)), [0.0, 1e-5, 5e-5, 5e-5]);
        assert_eq!(Rate::Fixed(2e-4).largest(0.1), 2e-4);
    }

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
