//! Softmax and log-sum-exp over rows for evaluation; besides matrix products, attention and large vocabularies spend
//! most of their time here.
//!
//! Sums use a fixed number of lanes, so that results do not depend on the vector width of the machine.

use std::array;

use pulp::Arch;

const LANES: usize = 16;

/// Replaces `row` by exp(row) / Σ exp(row).
pub(crate) fn softmax_in_place(arch: Arch, row: &mut [f32]) {
    arch.dispatch(
        #[inline(always)]
        || {
            let max = max(row);
            let mut lanes = [0f32; LANES];
            let mut chunks = row.chunks_exact_mut(LANES);
            for chunk in &mut chunks {
                for (lane, v) in lanes.iter_mut().zip(chunk) {
                    *v = exp(*v - max);
                    *lane += *v;
                }
            }
            let mut sum: f32 = lanes.iter().sum();
            for v in chunks.into_remainder() {
                *v = exp(*v - max);
                sum += *v;
            }
            let scale = 1.0 / sum;
            row.iter_mut().for_each(|v| *v *= scale);
        },
    );
}

/// ln Σ exp(row), summed in f64. Not finite if an element is NaN or +∞.
pub(crate) fn log_sum_exp(arch: Arch, row: &[f32]) -> f64 {
    arch.dispatch(
        #[inline(always)]
        || {
            let max = max(row);
            let mut lanes = [0f64; LANES];
            let chunks = row.chunks_exact(LANES);
            let rest: f64 = chunks.remainder().iter().map(|v| f64::from(exp(v - max))).sum();
            for chunk in chunks {
                let chunk: [f32; LANES] = array::from_fn(|i| exp(chunk[i] - max));
                for (lane, v) in lanes.iter_mut().zip(chunk) {
                    *lane += f64::from(v);
                }
            }
            (lanes.iter().sum::<f64>() + rest).ln() + f64::from(max)
        },
    )
}

/// The difference of two rows of logits, as distributions `p` (the reference) and `q`.
#[derive(Debug, Clone, Copy)]
pub struct RowDivergence {
    /// The log-sum-exp of the reference and of the model.
    pub log_sum_exp: (f64, f64),
    /// KL(p ‖ q), in nats.
    pub kl: f64,
    /// KL(q ‖ p), in nats.
    pub reverse_kl: f64,
    /// Whether both have their largest logit at the same index.
    pub same_top_1: bool,
    /// Fraction of the five largest logits that both have in common.
    pub top_5_agreement: f64,
}

/// Compares two rows of logits.
pub fn row_divergence(reference: &[f32], model: &[f32]) -> RowDivergence {
    let arch = Arch::new();
    let log_sum_exp = (log_sum_exp(arch, reference), log_sum_exp(arch, model));
    let shift = log_sum_exp.1 - log_sum_exp.0;
    // ln p − ln q = (l_p − l_q) + (lse_q − lse_p)
    let (kl, reverse_kl) = arch.dispatch(
        #[inline(always)]
        || {
            let (mut forward, mut backward) = ([0f64; LANES], [0f64; LANES]);
            for (p, q) in reference.chunks(LANES).zip(model.chunks(LANES)) {
                for (i, (&p, &q)) in p.iter().zip(q).enumerate() {
                    let difference = f64::from(p) - f64::from(q) + shift;
                    forward[i] += f64::from(exp(p - log_sum_exp.0 as f32)) * difference;
                    backward[i] -= f64::from(exp(q - log_sum_exp.1 as f32)) * difference;
                }
            }
            (forward.iter().sum::<f64>(), backward.iter().sum::<f64>())
        },
    );
    let (top, other) = (largest(reference), largest(model));
    let common = top.iter().filter(|i| other.contains(i)).count();
    RowDivergence {
        log_sum_exp,
        kl,
        reverse_kl,
        same_top_1: top[0] == other[0],
        top_5_agreement: common as f64 / top.len() as f64,
    }
}

/// Indices of the five largest values (or fewer), in falling order.
fn largest(row: &[f32]) -> Vec<usize> {
    let mut top: Vec<usize> = Vec::with_capacity(6);
    for (i, &v) in row.iter().enumerate() {
        if top.len() == 5 && v <= row[top[4]] {
            continue;
        }
        let at = top.partition_point(|&j| row[j] >= v);
        top.insert(at, i);
        top.truncate(5);
    }
    top
}

#[inline(always)]
fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// exp of a value ≤ 0, to 2 units in the last place; NaN stays NaN. x = n ln 2 + r, |r| ≤ ln 2 / 2, and a polynomial in
/// r with the coefficients of Cephes' `expf` (Moshier).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Below this value exp is not a normal number; it is flushed to the smallest one, 1e-38.
    const LOWEST: f32 = -87.0;
    /// Adding this leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // A comparison that NaN fails, unlike `f32::max`.
    let x = if x < LOWEST { LOWEST } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    (p * r * r + r + 1.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) / expected - 1.0).abs();
            assert!(error <= 2.0 * f64::from(f32::EPSILON), "{x}: {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e9) < 1e-37);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn softmax_agrees_with_f64() {
        for n in [1, 7, 16, 33, 512] {
            let row: Vec<f32> = (0..n).map(|i| ((i * 37) % 101) as f32 * 0.3 - 12.0).collect();
            let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
            assert!((log_sum_exp(Arch::new(), &row) - sum.ln()).abs() < 1e-6);
            let mut found = row.clone();
            softmax_in_place(Arch::new(), &mut found);
            for (found, v) in found.iter().zip(&row) {
                assert!((f64::from(*found) - f64::from(*v).exp() / sum).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn broken_logits_are_not_hidden() {
        for broken in [f32::NAN, f32::INFINITY] {
            let mut row = vec![0.0; 40];
            for at in [0, 20, 39] {
                row[at] = broken;
                assert!(!log_sum_exp(Arch::new(), &row).is_finite());
                row[at] = 0.0;
            }
        }
    }
}
