//! Fuzzing at two scales: `tests/hostile/` runs every target for some seconds, `examples/fuzz.rs` for as long as
//! requested.
//!
//! A run is a target, a seed and a number. They determine the input, so every finding can be reproduced from these
//! three.

#![allow(dead_code)] // the test and the example use a part each

mod mutate;
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

pub use mutate::Random;
pub use targets::{TARGETS, Target};

/// The outcome of an input.
pub enum Outcome {
    /// A value.
    Read,
    /// An error.
    Refused,
    /// The message of the panic.
    Panicked(String),
    /// It took longer than [`SLOW`].
    Slow(Duration),
}

/// Inputs are small, so nothing sized by their real content takes this long.
pub const SLOW: Duration = Duration::from_secs(10);

/// A target with its files in place.
pub struct Bench {
    target: &'static Target,
    bed: targets::Bed,
    seeds: Vec<Vec<u8>>,
}

impl Outcome {
    /// The fault, if there is one.
    pub fn fault(&self) -> Option<String> {
        match self {
            Self::Read | Self::Refused => None,
            Self::Panicked(text) => Some(format!("panicked: {}", text.replace('\n', " "))),
            Self::Slow(time) => Some(format!("took {:.1} s", time.as_secs_f64())),
        }
    }
}

impl Bench {
    pub fn new(target: &'static Target) -> Self {
        let bed = targets::Bed::new();
        let seeds = (target.seeds)(&bed);
        assert!(!seeds.is_empty(), "`{}` has inputs to begin with", target.name);
        Self { target, bed, seeds }
    }

    /// The `number`-th input of a seed.
    pub fn input(&self, seed: u64, number: u64) -> Vec<u8> {
        let mut random = Random::new(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut input = self.seeds[random.below(self.seeds.len())].clone();
        (self.target.mutate)(&mut input, &mut random);
        input
    }

    pub fn seeds(&self) -> &[Vec<u8>] {
        &self.seeds
    }

    pub fn run(&self, input: &[u8]) -> Outcome {
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.target.run)(&self.bed, input)));
        match outcome {
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
                Outcome::Panicked(text.unwrap_or_else(|| "a panic without words".into()))
            }
            Ok(_) if started.elapsed() > SLOW => Outcome::Slow(started.elapsed()),
            Ok(true) => Outcome::Read,
            Ok(false) => Outcome::Refused,
        }
    }
}
