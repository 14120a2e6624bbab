//! Power laws in the tails of spectra.

use crate::report::PowerLaw;

/// Fits `p(λ) ∝ λ^−α` to the eigenvalues from `xmin` on (Clauset, Shalizi & Newman 2009, eqs. 3.1 and
/// 3.9), as WeightWatcher does (Martin & Mahoney 2021): α by maximum likelihood, with the `xmin` of the
/// smallest Kolmogorov–Smirnov distance among all values but the largest. `descending` holds eigenvalues
/// σ². None if all are equal.
pub(super) fn fit(descending: &[f64]) -> Option<PowerLaw> {
    let values: Vec<f64> = descending.iter().rev().copied().filter(|&v| v > 0.0).collect();
    let logs: Vec<f64> = values.iter().map(|v| v.ln()).collect();
    let mut best: Option<PowerLaw> = None;
    let mut tail: f64 = logs.last().copied()?;
    for i in (0..values.len().checked_sub(1)?).rev() {
        tail += logs[i];
        let n = (values.len() - i) as f64;
        let excess = tail - n * logs[i];
        if excess <= 0.0 {
            continue;
        }
        let alpha = 1.0 + n / excess;
        let bound = best.as_ref().map_or(f64::INFINITY, |best| best.distance);
        let distance = distance(&logs[i..], alpha, bound);
        // Ties go to the longest tail, as with numpy's argmin.
        if distance <= bound {
            let n_spikes = values[i..].iter().filter(|&&v| v > values[i]).count();
            best = Some(PowerLaw { alpha, xmin: values[i], distance, n_spikes });
        }
    }
    best
}

/// Kolmogorov–Smirnov distance between the power law and the values, given as ascending logarithms. Returns early with
/// a larger value once it exceeds `bound`.
fn distance(logs: &[f64], alpha: f64, bound: f64) -> f64 {
    let n = logs.len() as f64;
    let mut largest: f64 = 0.0;
    for (i, log) in logs.iter().enumerate() {
        let theory = -((1.0 - alpha) * (log - logs[0])).exp_m1();
        largest = largest.max((theory - i as f64 / n).abs());
        if largest > bound {
            break;
        }
    }
    largest
}

/// Hill's estimate of α over the larger half: `1 + k / Σ ln(λ_i / λ_k)` (AlphaPruning, Lu et al.
/// 2024). None if all are equal.
pub(super) fn hill(mut eigenvalues: Vec<f64>) -> Option<f64> {
    eigenvalues.retain(|&v| v > 0.0);
    eigenvalues.sort_unstable_by(|a, b| b.total_cmp(a));
    let k = eigenvalues.len() / 2;
    let threshold = eigenvalues.get(k)?;
    let sum: f64 = eigenvalues[..k].iter().map(|v| (v / threshold).ln()).sum();
    (sum > 0.0).then(|| 1.0 + k as f64 / sum)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// The spectra in `tests/oracles/spectra.py`, descending.
    fn spectrum(kind: &str, n: usize) -> Vec<f64> {
        let value = |i: usize| {
            let u = (i as f64 * 0.618_033_988_749_894_9).fract();
            match kind {
                "pareto" => (1.0 - u).powf(-1.0 / 1.5),
                "bulk and tail" if i.is_multiple_of(2) => 0.1 + 1.9 * u,
                "bulk and tail" => 2.0 * (1.0 - u).powf(-1.0 / 3.0),
                _ => -(-u).ln_1p(),
            }
        };
        let mut values: Vec<f64> = (1..=n).map(value).collect();
        values.sort_by(|a, b| b.total_cmp(a));
        values
    }

    #[test]
    fn fits_equal_those_of_weightwatcher() {
        let oracle: Value = serde_json::from_str(include_str!("../../tests/oracles/spectra.json")).unwrap();
        let mut n_alike = 0;
        for (name, case) in oracle.as_object().unwrap() {
            let values = spectrum(case["kind"].as_str().unwrap(), case["n"].as_u64().unwrap() as usize);
            assert!((values.iter().sum::<f64>() / case["sum"].as_f64().unwrap() - 1.0).abs() < 1e-12, "{name}");
            let found = fit(&values).unwrap();
            let theirs: Vec<f64> = serde_json::from_value(case["weightwatcher"].clone()).unwrap();
            for (found, theirs) in [found.alpha, found.xmin, found.distance].into_iter().zip(theirs) {
                assert!((found / theirs - 1.0).abs() < 1e-9, "{name}: {found}, theirs {theirs}");
            }
            assert_eq!(found.n_spikes as u64, case["spikes"].as_u64().unwrap(), "{name}");
            let hill = hill(values).unwrap();
            assert!((hill / case["hill"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{name}");
            // The powerlaw package does not fit α above 3; below, all three agree.
            let package: Vec<f64> = serde_json::from_value(case["powerlaw"].clone()).unwrap();
            n_alike += usize::from((found.alpha / package[0] - 1.0).abs() < 1e-9);
        }
        assert!(n_alike >= 2, "{n_alike} fits equal the fits of the powerlaw package");
    }

    #[test]
    fn spectra_without_a_tail_have_no_fit() {
        for values in [&[][..], &[1.0], &[2.0, 2.0], &[0.0, 0.0]] {
            assert!(fit(values).is_none() && hill(values.to_vec()).is_none(), "{values:?}");
        }
    }
}
