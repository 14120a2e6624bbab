//! The mean of a sample, and its standard error.

pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Standard error of the mean: √(variance / (n − 1)).
pub(super) fn standard_error(values: &[f64], mean: f64) -> f64 {
    let n = values.len() as f64;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    if n > 1.0 { (variance / (n - 1.0)).sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_have_their_closed_forms() {
        let values = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(mean(&values), 2.5);
        // Variance 1.25 over n, standard error √(1.25 / 3).
        assert!((standard_error(&values, 2.5) - (1.25f64 / 3.0).sqrt()).abs() < 1e-15);
    }
}
