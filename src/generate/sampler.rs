//! Which token comes next: the likeliest, or one drawn from the likeliest.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it. 0 takes the likeliest token.
    pub temperature: f64,
    /// Only so many of the likeliest tokens; none: all.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together have this probability, of those that `top_k` leaves (nucleus sampling,
    /// Holtzman et al. 2020, arXiv:1904.09751).
    pub top_p: f64,
    /// Seed of the generator.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, seed: 0 }
    }
}

/// Draws tokens.
pub struct Sampler {
    settings: Sampling,
    generator: ChaCha8Rng,
}

impl Sampler {
    /// With a generator of the seed.
    pub fn new(settings: &Sampling) -> Self {
        Self { settings: *settings, generator: ChaCha8Rng::seed_from_u64(settings.seed) }
    }

    /// A token by its logits (vocab_size); ties go to the first.
    pub fn draw(&mut self, logits: &[f32]) -> u32 {
        let falling = |i: &usize, j: &usize| logits[*j].total_cmp(&logits[*i]);
        if self.settings.temperature == 0.0 {
            return (0..logits.len()).min_by(falling).unwrap_or(0) as u32;
        }
        let mut by_logit: Vec<usize> = (0..logits.len()).collect();
        by_logit.sort_by(falling);
        by_logit.truncate(self.settings.top_k.unwrap_or(usize::MAX).max(1));
        let largest = f64::from(by_logit.first().map_or(0.0, |&token| logits[token]));
        let weight = |token: usize| ((f64::from(logits[token]) - largest) / self.settings.temperature).exp();
        let weights: Vec<f64> = by_logit.iter().map(|&token| weight(token)).collect();
        let within = self.settings.top_p * weights.iter().sum::<f64>();
        let kept = nucleus(&weights, within);
        let point = uniform(&mut self.generator) * weights[..kept].iter().sum::<f64>();
        let mut sum = 0.0;
        let found = weights[..kept].iter().position(|weight| {
            sum += weight;
            point < sum
        });
        by_logit.get(found.unwrap_or(kept - 1)).map_or(0, |&token| token as u32)
    }
}

/// How many of the `weights`, in falling order, it takes for a sum of `within`; at least one.
fn nucleus(weights: &[f64], within: f64) -> usize {
    let mut sum = 0.0;
    let full = weights.iter().position(|weight| {
        sum += weight;
        sum >= within
    });
    full.map_or(weights.len(), |at| at + 1)
}

/// A number in [0, 1), of 53 random bits.
fn uniform(generator: &mut ChaCha8Rng) -> f64 {
    (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.5, 2.0, -1.0, 2.0, 1.0];

    /// How often each token is drawn.
    fn shares(sampling: Sampling) -> [f64; 5] {
        let (mut sampler, mut counts) = (Sampler::new(&sampling), [0.0; 5]);
        const DRAWS: usize = 40_000;
        (0..DRAWS).for_each(|_| counts[sampler.draw(&LOGITS) as usize] += 1.0 / DRAWS as f64);
        counts
    }

    #[test]
    fn without_a_temperature_the_first_of_the_likeliest_is_taken() {
        assert_eq!(Sampler::new(&Sampling::default()).draw(&LOGITS), 1);
    }

    #[test]
    fn tokens_are_drawn_by_the_softmax_of_what_is_left() {
        let softmax = |temperature: f64, allowed: [bool; 5]| {
            let weights: Vec<f64> = LOGITS.iter().map(|l| (f64::from(*l) / temperature).exp()).collect();
            let sum: f64 = weights.iter().zip(allowed).filter(|(_, allowed)| *allowed).map(|(w, _)| w).sum();
            std::array::from_fn::<f64, 5, _>(|i| if allowed[i] { weights[i] / sum } else { 0.0 })
        };
        let sampling = Sampling { temperature: 0.7, seed: 3, ..Sampling::default() };
        for (sampling, allowed) in [
            (sampling, [true; 5]),
            (Sampling { top_k: Some(3), ..sampling }, [false, true, false, true, true]),
            (Sampling { top_k: Some(1), ..sampling }, [false, true, false, false, false]),
            // The two of logit 2 have 0.80 of the probability.
            (Sampling { top_p: 0.79, ..sampling }, [false, true, false, true, false]),
            (Sampling { top_p: 0.85, ..sampling }, [false, true, false, true, true]),
            (Sampling { top_p: 0.0, ..sampling }, [false, true, false, false, false]),
        ] {
            let expected = softmax(sampling.temperature, allowed);
            for (found, expected) in shares(sampling).into_iter().zip(expected) {
                assert!((found - expected).abs() < 0.01, "{sampling:?}: {found} {expected}");
            }
        }
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let draws = |seed: u64| {
            let mut sampler = Sampler::new(&Sampling { temperature: 1.0, seed, ..Sampling::default() });
            (0..50).map(|_| sampler.draw(&LOGITS)).collect::<Vec<u32>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }
}
