//! Scales and codes of the block types that candle does not write, rounded to nearest: each run of weights has the scale
//! of least weighted squared error among a few, which blocks of several runs round to a multiple of one of their own.

use super::fields::{Codec, Fields};
use super::lattice::{BlockLattice, Lattice, storable};

/// Scales that are tried for a run: at each end of the levels, and where eight weights are coded together.
const TRIALS: (usize, usize) = (16, 8);
/// The smallest scale that is tried, as a share of the one that brings the extreme to the end of the levels.
const LEAST: f32 = 0.65;
/// Larger scales, tried too where eight weights are coded together: no point has eight equal weights of the largest
/// magnitude, so that runs of equal weights need a lower one.
const LARGER: [f32; 3] = [1.35, 1.72, 5.375];

/// Whole blocks in rows of `cols`, where columns have these weights.
pub(super) fn quantize(codec: Codec, values: &[f32], cols: usize, weights: Option<&[f32]>) -> Vec<u8> {
    let (size, n_bytes) = codec.block();
    let mut bytes = vec![0u8; values.len() / size * n_bytes];
    let fields = codec.fields();
    let mut lattice = fields.lattice(&bytes, cols);
    let run = lattice.run;
    let search = Search::new(&fields);
    for (at, block) in values.chunks_exact(size).enumerate() {
        let run_scale = |(number, values): (usize, &[f32])| {
            let first = (at * size + number * run) % cols;
            search.scale(values, weights.map(|weights| &weights[first..first + run]))
        };
        let scales: Vec<f32> = block.chunks_exact(run).enumerate().map(run_scale).collect();
        let first = at * (size / run);
        lattice.common[at][0] = common(&lattice, &scales);
        for (number, scale) in scales.into_iter().enumerate() {
            lattice.runs[first + number][0] = factor(&lattice, scale, lattice.common[at][0]);
        }
    }
    fields.put_scales(&lattice, &mut bytes);
    let lattice = fields.lattice(&bytes, cols);
    fields.put(&lattice.nearest(values, cols, weights), &mut bytes);
    bytes
}

/// The scale of a block. The run with the largest one has the factor at the end of the range, the lower one if there are
/// factors of both signs.
fn common(lattice: &BlockLattice, scales: &[f32]) -> f32 {
    let largest = scales.iter().fold(0.0f32, |most, &scale| if scale.abs() > most.abs() { scale } else { most });
    match lattice.ends[0] {
        Some((low, high)) => storable(largest / if low < 0.0 { low } else { high }),
        None => largest,
    }
}

/// The factor of a run beside the scale of its block.
fn factor(lattice: &BlockLattice, scale: f32, common: f32) -> f32 {
    let Some((low, high)) = lattice.ends[0] else { return 1.0 };
    if common == 0.0 {
        return low.max(0.0);
    }
    (low + (scale / common - low).round_ties_even()).clamp(low, high)
}

/// The search for the scale of a run.
struct Search {
    /// One run of scale 1.
    unit: BlockLattice,
    /// The levels at both ends, or the largest one where signs are free.
    ends: Vec<f32>,
    n_trials: usize,
}

impl Search {
    fn new(fields: &Fields) -> Self {
        let unit = fields.unit();
        let (low, high) = unit.spacing.ends();
        let (ends, n_trials) = if unit.points.is_some() { (vec![high], TRIALS.1) } else { (vec![low, high], TRIALS.0) };
        Self { unit, ends, n_trials }
    }

    /// The scale with the least weighted squared error of those that are tried, each of which is refined once: with codes
    /// `q` fixed, the best is `Σ w v l(q) / Σ w l(q)²`.
    fn scale(&self, values: &[f32], weights: Option<&[f32]>) -> f32 {
        let extreme = values.iter().fold(0.0f32, |most, &v| if v.abs() > most.abs() { v } else { most });
        let extreme = if self.unit.points.is_some() { extreme.abs() } else { extreme };
        let mut best = (0.0f32, 0.0f32);
        // The extreme at either end of the levels, or up to a third beyond.
        let steps = (0..self.n_trials).map(|step| 1.0 - (1.0 - LEAST) * step as f32 / self.n_trials as f32);
        let larger = if self.unit.points.is_some() { &LARGER[..] } else { &[] };
        for factor in steps.chain(larger.iter().copied()) {
            for end in &self.ends {
                let scale = extreme / end * factor;
                if scale == 0.0 {
                    continue;
                }
                let scaled: Vec<f32> = values.iter().map(|value| value / scale).collect();
                let codes = self.unit.nearest(&scaled, values.len(), weights);
                let (mut along, mut square) = (0.0f32, 0.0f32);
                for (i, (value, code)) in values.iter().zip(codes).enumerate() {
                    let level = self.unit.value(0, 0, code);
                    let weight = weights.map_or(1.0, |weights| weights[i]);
                    along += weight * value * level;
                    square += weight * level * level;
                }
                // It lowers the error of a scale of zero by this much.
                if square > 0.0 && along * along / square > best.0 {
                    best = (along * along / square, along / square);
                }
            }
        }
        if best.0 > 0.0 { best.1 } else { extreme / self.ends[0] }
    }
}
