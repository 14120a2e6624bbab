//! Seconds to round one pair to bf16 as pivots: `rounding_speed M N RANK`, for random factors (m, rank) and (rank, n) in the plain metric.
//!
//! `docs/performance.md` has the operations and times of a matrix of an 8B Llama. `RAYON_NUM_THREADS` decides about threads.

#![allow(clippy::print_stdout)]

use std::time::Instant;

use anyhow::{Context, Result};
use lrc::approx::low_rank::LowRank;
use lrc::approx::metric::Metric;
use lrc::checkpoint::Dtype;
use lrc::operator::{Kind, Side, Sides};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

fn main() -> Result<()> {
    let sizes: Vec<usize> = std::env::args().skip(1).map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let &[m, n, rank] = sizes.as_slice() else { anyhow::bail!("usage: rounding_speed M N RANK") };
    let pair = LowRank { rank, b: values(m * rank, 1), a: values(rank * n, 2) };
    let input = Side::Whole(&Metric::Identity);
    let sides = Sides { output: &Metric::Identity, input, energies: &[] };
    let pivot: Kind = "pivot".parse().map_err(anyhow::Error::msg)?;
    let fitting = pivot.structure().fitting().context("pivots are fitted")?;
    let started = Instant::now();
    let rounded = fitting.round(&pair, (m, n), &sides, Dtype::BF16);
    println!("{:.2} s, squared error {:e}", started.elapsed().as_secs_f64(), rounded.squared_error);
    Ok(())
}

/// Values in [-0.5, 0.5), the same for the same seed.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| (random.next_u32() >> 8) as f32 / (1u32 << 24) as f32 - 0.5).collect()
}
