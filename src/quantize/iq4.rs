//! Scales and codes of the 4-bit types of llama.cpp with levels that are not evenly spaced, `iq4_nl` and `iq4_xs`,
//! rounded to nearest.

use half::f16;

use super::fields::{Codec, LEVELS};
use super::lattice::{Lattice, Spacing};

const RUN: usize = 32;
const SPACING: Spacing = Spacing::Table(&LEVELS);
/// Scales that are tried on each side of zero.
const TRIALS: usize = 16;

/// Blocks of 32 weights with one scale.
pub(super) fn quantize_nl(values: &[f32], cols: usize, weights: Option<&[f32]>) -> Vec<u8> {
    quantize(Codec::Iq4Nl, values, cols, weights, |scales| (scales[0], vec![1.0]))
}

/// Blocks of 256 weights. The run with the largest scale has the integer −32 or 31.
pub(super) fn quantize_xs(values: &[f32], cols: usize, weights: Option<&[f32]>) -> Vec<u8> {
    quantize(Codec::Iq4Xs, values, cols, weights, |scales| {
        let largest = scales.iter().fold(0.0f32, |most, &scale| if scale.abs() > most.abs() { scale } else { most });
        let common = f16::from_f32(largest / -32.0).to_f32();
        let whole = |scale: &f32| {
            if common == 0.0 { 0.0 } else { (scale / common).round_ties_even().clamp(-32.0, 31.0) }
        };
        (common, scales.iter().map(whole).collect())
    })
}

/// Blocks of runs, each with the scale that suits it best; `nested` divides the scales of a block into a common one and
/// a factor of each run.
fn quantize(
    codec: Codec,
    values: &[f32],
    cols: usize,
    weights: Option<&[f32]>,
    nested: impl Fn(&[f32]) -> (f32, Vec<f32>),
) -> Vec<u8> {
    let (size, n_bytes) = codec.block();
    let mut bytes = vec![0u8; values.len() / size * n_bytes];
    let fields = codec.fields();
    let mut lattice = fields.lattice(&bytes, cols);
    for (at, block) in values.chunks_exact(size).enumerate() {
        let run = |(run, values): (usize, &[f32])| {
            let first = (at * size + run * RUN) % cols;
            best_scale(values, weights.map(|weights| &weights[first..first + RUN]))
        };
        let scales: Vec<f32> = block.chunks_exact(RUN).enumerate().map(run).collect();
        let (common, factors) = nested(&scales);
        lattice.common[at][0] = common;
        for (run, factor) in factors.into_iter().enumerate() {
            lattice.runs[at * (size / RUN) + run][0] = factor;
        }
    }
    fields.put_scales(&lattice, &mut bytes);
    let lattice = fields.lattice(&bytes, cols);
    fields.put(&lattice.round(values, cols), &mut bytes);
    bytes
}

/// The scale with the least weighted squared error of those that are tried, each of which is refined once: with codes
/// `q` fixed, the best is `Σ w v l(q) / Σ w l(q)²`.
fn best_scale(values: &[f32], weights: Option<&[f32]>) -> f32 {
    let extreme = values.iter().fold(0.0f32, |most, &v| if v.abs() > most.abs() { v } else { most });
    let mut best = (0.0f32, 0.0f32);
    for trial in 0..2 * TRIALS {
        // The extreme at either end of the levels, or up to a third beyond.
        let end = if trial % 2 == 0 { f32::from(LEVELS[0]) } else { f32::from(LEVELS[15]) };
        let scale = extreme / end * (1.0 - 0.35 * (trial / 2) as f32 / TRIALS as f32);
        if scale == 0.0 {
            continue;
        }
        let (mut along, mut square) = (0.0f32, 0.0f32);
        for (i, value) in values.iter().enumerate() {
            let level = SPACING.level(SPACING.nearest(value / scale));
            let weight = weights.map_or(1.0, |weights| weights[i]);
            along += weight * value * level;
            square += weight * level * level;
        }
        // It lowers the error of a scale of zero by this much.
        if square > 0.0 && along * along / square > best.0 {
            best = (along * along / square, along / square);
        }
    }
    if best.0 > 0.0 { best.1 } else { extreme / f32::from(LEVELS[0]) }
}
