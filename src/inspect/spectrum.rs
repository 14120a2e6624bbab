//! The figures of one spectrum; their definitions stand at the fields of [`SpectrumRecord`].

use crate::compress::low_rank::ErrorCurve;
use crate::model::inventory::{LinearInfo, Stored};
use crate::report::{EnergyRank, SpectrumRecord};

/// Shares of Σσ² for which the energy rank is given.
pub const ENERGY_SHARES: [f64; 5] = [0.5, 0.9, 0.95, 0.99, 0.999];

/// Points of the sketch.
const SKETCH_POINTS: usize = 24;

pub(super) fn record(linear: &LinearInfo, curve: &ErrorCurve) -> SpectrumRecord {
    let sigma: Vec<f64> = curve.singular_values().collect();
    let energy = curve.squared_error(0);
    let first = sigma.first().copied().unwrap_or(0.0);
    let break_even_rank = linear.break_even_rank();
    let tolerance = first * linear.out_features.max(linear.in_features) as f64 * f64::from(f32::EPSILON);
    SpectrumRecord {
        module: linear.module.clone(),
        block: linear.block,
        shape: [linear.out_features, linear.in_features],
        dtype: format!("{:?}", linear.dtype),
        stored_rank: match linear.stored {
            Stored::LowRank { rank, .. } => Some(rank),
            Stored::Dense | Stored::DenseTransposed => None,
        },
        rank: sigma.iter().filter(|&&s| s > tolerance).count(),
        spectral_norm: first,
        frobenius_norm: energy.sqrt(),
        stable_rank: if first > 0.0 { energy / (first * first) } else { 0.0 },
        effective_rank: effective_rank(curve.energies()),
        effective_rank_sigma: effective_rank(&sigma),
        energy_ranks: ENERGY_SHARES
            .iter()
            .map(|&share| EnergyRank { share, rank: energy_rank(curve, share) })
            .collect(),
        break_even_rank,
        break_even_error: curve.relative_error(break_even_rank),
        sketch: sketch(&sigma),
    }
}

/// exp(−Σ p ln p), p = weights / Σ weights; 0 for a matrix of zeros.
fn effective_rank(weights: &[f64]) -> f64 {
    let sum: f64 = weights.iter().sum();
    if sum <= 0.0 {
        return 0.0;
    }
    let entropy: f64 = weights.iter().map(|w| w / sum).filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum();
    entropy.exp()
}

/// Smallest k with Σ_{i < k} σ_i² ≥ share · Σσ².
fn energy_rank(curve: &ErrorCurve, share: f64) -> usize {
    let target = share * curve.squared_error(0);
    let mut sum = 0.0;
    curve
        .energies()
        .iter()
        .take_while(|&&e| {
            let is_short = sum < target;
            sum += e;
            is_short
        })
        .count()
}

fn sketch(sigma: &[f64]) -> Vec<f64> {
    let first = sigma.first().copied().unwrap_or(0.0);
    let n = SKETCH_POINTS.min(sigma.len());
    (0..n)
        .map(|i| {
            let at = if n > 1 { i * (sigma.len() - 1) / (n - 1) } else { 0 };
            if first > 0.0 { sigma[at] / first } else { 0.0 }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Dtype;

    fn linear(m: usize, n: usize) -> LinearInfo {
        LinearInfo {
            module: "m".into(),
            out_features: m,
            in_features: n,
            dtype: Dtype::F32,
            stored: Stored::Dense,
            block: None,
            id: None,
            is_default_target: true,
        }
    }

    #[test]
    fn equal_singular_values_have_full_rank_by_every_measure() {
        let record = record(&linear(8, 10), &ErrorCurve::new(vec![4.0; 8]));
        assert_eq!((record.rank, record.spectral_norm), (8, 2.0));
        for rank in [record.stable_rank, record.effective_rank, record.effective_rank_sigma] {
            assert!((rank - 8.0).abs() < 1e-12);
        }
        let ranks: Vec<usize> = record.energy_ranks.iter().map(|e| e.rank).collect();
        assert_eq!(ranks, [4, 8, 8, 8, 8]);
        // Break-even of 8 × 10 is 4: half of the energy is behind it.
        assert_eq!(record.break_even_rank, 4);
        assert!((record.break_even_error - 0.5f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn figures_agree_with_their_closed_forms_on_two_values() {
        // σ = (2, 1): energies (4, 1), p = (0.8, 0.2).
        let record = record(&linear(2, 2), &ErrorCurve::new(vec![4.0, 1.0]));
        assert!((record.stable_rank - 1.25).abs() < 1e-12);
        let entropy = -(0.8f64 * 0.8f64.ln() + 0.2 * 0.2f64.ln());
        assert!((record.effective_rank - entropy.exp()).abs() < 1e-12);
        assert!((record.frobenius_norm - 5f64.sqrt()).abs() < 1e-12);
        assert_eq!(record.energy_ranks.iter().map(|e| e.rank).collect::<Vec<_>>(), [1, 2, 2, 2, 2]);
    }

    #[test]
    fn a_matrix_of_zeros_has_figures_too() {
        let record = record(&linear(3, 3), &ErrorCurve::new(vec![0.0; 3]));
        assert_eq!((record.rank, record.stable_rank, record.effective_rank), (0, 0.0, 0.0));
        assert!(record.sketch.iter().all(|s| *s == 0.0));
    }
}
