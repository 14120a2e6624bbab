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
    let scale =
        |block: &mut [u8], scales: &[f32; 1]| block[..2].copy_from_slice(&f16::from_f32(scales[0]).to_le_bytes());
    quantize(Codec::Iq4Nl, values, cols, weights, scale)
}

/// Blocks of 256 weights. The run with the largest scale has the integer −32 or 31.
pub(super) fn quantize_xs(values: &[f32], cols: usize, weights: Option<&[f32]>) -> Vec<u8> {
    quantize(Codec::Iq4Xs, values, cols, weights, |block: &mut [u8], scales: &[f32; 8]| {
        let largest = scales.iter().fold(0.0f32, |most, &scale| if scale.abs() > most.abs() { scale } else { most });
        let common = f16::from_f32(largest / -32.0);
        block[..2].copy_from_slice(&common.to_le_bytes());
        let (common, mut high) = (common.to_f32(), 0u16);
        for (run, scale) in scales.iter().enumerate() {
            let whole = if common == 0.0 { 0.0 } else { (scale / common).round_ties_even().clamp(-32.0, 31.0) };
            let bits = (whole + 32.0) as u8;
            block[4 + run / 2] |= (bits & 15) << (4 * (run % 2));
            high |= u16::from(bits >> 4) << (2 * run);
        }
        block[2..4].copy_from_slice(&high.to_le_bytes());
    })
}

/// Blocks of `N` runs, each with the scale that suits it best; `put` stores the scales of a block.
fn quantize<const N: usize>(
    codec: Codec,
    values: &[f32],
    cols: usize,
    weights: Option<&[f32]>,
    put: impl Fn(&mut [u8], &[f32; N]),
) -> Vec<u8> {
    let mut bytes = vec![0u8; values.len() / (N * RUN) * codec.block().1];
    for (at, (block, values)) in bytes.chunks_exact_mut(codec.block().1).zip(values.chunks_exact(N * RUN)).enumerate() {
        let weights = weights.map(|weights| &weights[at * N * RUN % cols..][..N * RUN]);
        let scales = std::array::from_fn(|run| {
            let run = run * RUN..(run + 1) * RUN;
            best_scale(&values[run.clone()], weights.map(|weights| &weights[run]))
        });
        put(block, &scales);
    }
    let fields = codec.fields();
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
