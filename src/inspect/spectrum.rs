//! The figures of one spectrum, defined at the fields of [`SpectrumRecord`] and [`Figures`].

use super::matrices::Matrix;
use super::power_law;
use crate::approx::low_rank::ErrorCurve;
use crate::compress::spectra::Weighted;
use crate::report::{BelowThreshold, EnergyRank, Figures, SpectrumRecord};

/// Shares of Σσ² whose energy rank is reported.
pub const ENERGY_SHARES: [f64; 5] = [0.5, 0.9, 0.95, 0.99, 0.999];

/// Thresholds below which values of the normalized spectrum are counted.
pub const WELORE_THRESHOLDS: [f64; 3] = [0.05, 0.1, 0.25];

/// Points of the sketch.
const SKETCH_POINTS: usize = 24;

/// The record of a matrix, with figures in the calibration metric if `weighted` is given.
pub(super) fn record(
    matrix: &Matrix,
    curve: &ErrorCurve,
    alpha_farms: Option<f64>,
    weighted: Option<&Weighted>,
) -> SpectrumRecord {
    let (m, n) = matrix.shape;
    // Σσ² / (m n) is the mean square of an entry.
    let random_edge = curve.squared_error(0) / (m * n) as f64 * ((m as f64).sqrt() + (n as f64).sqrt()).powi(2);
    SpectrumRecord {
        module: matrix.module.clone(),
        kind: matrix.kind.clone(),
        block: matrix.block,
        shape: [m, n],
        dtype: format!("{:?}", matrix.dtype),
        stored_rank: matrix.stored_rank,
        break_even_rank: matrix.break_even_rank(),
        figures: figures(matrix, curve),
        mp_edge: random_edge,
        mp_spikes: curve.energies().iter().filter(|&&e| e > random_edge).count(),
        alpha_farms,
        weighted: weighted.map(|weighted| figures(matrix, &weighted.curve)),
        note: weighted.and_then(|weighted| weighted.note.clone()),
    }
}

fn figures(matrix: &Matrix, curve: &ErrorCurve) -> Figures {
    let sigma: Vec<f64> = curve.singular_values().collect();
    let energy = curve.squared_error(0);
    let first = sigma.first().copied().unwrap_or(0.0);
    let tolerance = first * matrix.shape.0.max(matrix.shape.1) as f64 * f64::from(f32::EPSILON);
    let normalized = normalize(&sigma);
    let below = |threshold: f64| normalized.iter().filter(|&&s| s < threshold).count();
    Figures {
        rank: sigma.iter().filter(|&&s| s > tolerance).count(),
        spectral_norm: first,
        log10_spectral_norm: Some(first.log10()).filter(|log| log.is_finite()),
        frobenius_norm: energy.sqrt(),
        log10_frobenius_norm: Some(energy.sqrt().log10()).filter(|log| log.is_finite()),
        stable_rank: if first > 0.0 { energy / (first * first) } else { 0.0 },
        entropy: entropy(curve.energies()),
        effective_rank: effective_rank(curve.energies()),
        effective_rank_sigma: effective_rank(&sigma),
        energy_ranks: ENERGY_SHARES
            .iter()
            .map(|&share| EnergyRank { share, rank: energy_rank(curve, share) })
            .collect(),
        welore: WELORE_THRESHOLDS
            .iter()
            .map(|&threshold| BelowThreshold { threshold, count: below(threshold) })
            .collect(),
        knee: knee(&normalized),
        power_law: power_law::fit(curve.energies()),
        alpha_hill: power_law::hill(curve.energies().to_vec()),
        break_even_error: curve.relative_error(matrix.break_even_rank()),
        sketch: sketch(&sigma),
    }
}

/// WeLore's normalized spectrum: `(σ − σ_min) / (σ_max − σ_min)`; all 1 if they are equal.
fn normalize(sigma: &[f64]) -> Vec<f64> {
    let (max, min) = (sigma.first().copied().unwrap_or(0.0), sigma.last().copied().unwrap_or(0.0));
    sigma.iter().map(|s| if max > min { (s - min) / (max - min) } else { 1.0 }).collect()
}

/// The rank where the normalized spectrum is farthest below the chord from its first value to its last.
fn knee(normalized: &[f64]) -> usize {
    let last = normalized.len().saturating_sub(1).max(1) as f64;
    let below = |(i, s): (usize, &f64)| 1.0 - i as f64 / last - s;
    let depths: Vec<f64> = normalized.iter().enumerate().map(below).collect();
    (0..depths.len()).reduce(|best, i| if depths[i] > depths[best] { i } else { best }).unwrap_or(0)
}

/// −Σ p ln p, p = weights / Σ weights, in nats; 0 for a matrix of zeros.
fn entropy(weights: &[f64]) -> f64 {
    let sum: f64 = weights.iter().sum();
    if sum <= 0.0 {
        return 0.0;
    }
    // + 0.0 removes the sign of −0, which occurs if one value has all of the sum.
    weights.iter().map(|w| w / sum).filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum::<f64>() + 0.0
}

/// exp of the entropy; 0 for a matrix of zeros.
fn effective_rank(weights: &[f64]) -> f64 {
    if weights.iter().any(|&w| w > 0.0) { entropy(weights).exp() } else { 0.0 }
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

    fn record(m: usize, n: usize, energies: &[f64]) -> SpectrumRecord {
        super::record(&Matrix::of_shape(m, n), &ErrorCurve::new(energies.to_vec()), None, None)
    }

    #[test]
    fn equal_singular_values_have_full_rank_by_every_measure() {
        let record = record(8, 10, &[4.0; 8]);
        let figures = &record.figures;
        assert_eq!((figures.rank, figures.spectral_norm), (8, 2.0));
        for rank in [figures.stable_rank, figures.effective_rank, figures.effective_rank_sigma, figures.entropy.exp()] {
            assert!((rank - 8.0).abs() < 1e-12);
        }
        let ranks: Vec<usize> = figures.energy_ranks.iter().map(|e| e.rank).collect();
        assert_eq!(ranks, [4, 8, 8, 8, 8]);
        // The break-even rank of 8 × 10 is 4: half of the energy is beyond it.
        assert_eq!(record.break_even_rank, 4);
        assert!((figures.break_even_error - 0.5f64.sqrt()).abs() < 1e-12);
        assert!(figures.power_law.is_none() && figures.welore.iter().all(|w| w.count == 0));
        // A random matrix of that energy reaches Σσ² / (m n) · (√m + √n)².
        assert!((record.mp_edge - 32.0 / 80.0 * (8f64.sqrt() + 10f64.sqrt()).powi(2)).abs() < 1e-12);
        assert_eq!(record.mp_spikes, 0);
    }

    #[test]
    fn figures_of_two_values_have_their_closed_forms() {
        // σ = (2, 1): energies (4, 1), p = (0.8, 0.2).
        let figures = record(2, 2, &[4.0, 1.0]).figures;
        assert!((figures.stable_rank - 1.25).abs() < 1e-12);
        let entropy = -(0.8f64 * 0.8f64.ln() + 0.2 * 0.2f64.ln());
        assert!((figures.entropy - entropy).abs() < 1e-12 && (figures.effective_rank - entropy.exp()).abs() < 1e-12);
        assert!((figures.frobenius_norm - 5f64.sqrt()).abs() < 1e-12);
        assert!((figures.log10_spectral_norm.unwrap() - 2f64.log10()).abs() < 1e-12);
        assert_eq!(figures.energy_ranks.iter().map(|e| e.rank).collect::<Vec<_>>(), [1, 2, 2, 2, 2]);
    }

    #[test]
    fn the_knee_and_the_counts_are_at_the_bend_of_the_spectrum() {
        // σ = 10, 2, 1, 0.5, 0: normalized 1, 0.2, 0.1, 0.05, 0, the chord 1, 0.75, 0.5, 0.25, 0.
        let figures = record(5, 5, &[100.0, 4.0, 1.0, 0.25, 0.0]).figures;
        assert_eq!(figures.knee, 1);
        assert_eq!(figures.welore.iter().map(|w| w.count).collect::<Vec<_>>(), [1, 2, 4]);
    }

    #[test]
    fn one_strong_direction_exceeds_the_edge_of_a_random_matrix() {
        let mut energies = vec![1.0; 100];
        energies[0] = 900.0;
        let record = record(100, 100, &energies);
        // Σσ² = 999, the edge is 999 / 10⁴ · 400.
        assert!((record.mp_edge - 39.96).abs() < 1e-9);
        assert_eq!(record.mp_spikes, 1);
    }

    #[test]
    fn a_matrix_of_zeros_has_figures() {
        let figures = record(3, 3, &[0.0; 3]).figures;
        assert_eq!((figures.rank, figures.stable_rank, figures.effective_rank), (0, 0.0, 0.0));
        assert!(figures.sketch.iter().all(|s| *s == 0.0) && figures.log10_spectral_norm.is_none());
    }
}
