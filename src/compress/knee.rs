//! Where a curve of size and quality bends: past this point further bytes buy less than those before.

/// The index of the knee of points (bytes, perplexity); `None` with fewer than three points that no other beats in
/// both, or if none is below the chord of the ends.
///
/// It is the point farthest below the straight line between the ends of the Pareto front, with bytes and the logarithm
/// of perplexity scaled to (0, 1): Kneedle's without smoothing (Satopää et al. 2011).
pub(super) fn knee(points: &[(f64, f64)]) -> Option<usize> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| points[a].0.total_cmp(&points[b].0).then(points[a].1.total_cmp(&points[b].1)));
    let mut front: Vec<usize> = Vec::new();
    for at in order {
        let is_better = front.last().is_none_or(|&last| points[at].1 < points[last].1);
        if is_better && points[at].1.is_finite() {
            front.push(at);
        }
    }
    let &[first, .., last] = front.as_slice() else { return None };
    let share = |of: fn((f64, f64)) -> f64, at: usize| {
        let (begin, end) = (of(points[first]), of(points[last]));
        (of(points[at]) - begin) / (end - begin)
    };
    // How far the fall of the perplexity is ahead of the rise of the bytes.
    let gain = |at: usize| share(|(_, ppl)| ppl.ln(), at) - share(|(bytes, _)| bytes, at);
    let best = front.iter().copied().reduce(|best, at| if gain(at) > gain(best) { at } else { best })?;
    (gain(best) > 1e-9).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_knee_is_where_the_curve_bends() {
        let points = [(40.0, 41.0), (10.0, 900.0), (20.0, 60.0), (30.0, 45.0), (25.0, 70.0)];
        assert_eq!(knee(&points), Some(2));
        // The order of the points, and units, change nothing.
        let scaled: Vec<(f64, f64)> = points.iter().rev().map(|(bytes, ppl)| (3.0 * bytes + 7.0, *ppl)).collect();
        assert_eq!(knee(&scaled), Some(2));
    }

    #[test]
    fn straight_and_short_curves_have_none() {
        let straight: Vec<(f64, f64)> = (0..5).map(|i| (f64::from(i), f64::from(-i).exp())).collect();
        assert_eq!(knee(&straight), None);
        assert_eq!(knee(&[(1.0, 9.0), (2.0, 8.0)]), None);
        assert_eq!(knee(&[(1.0, 9.0), (2.0, f64::NAN), (3.0, 8.0), (2.0, 10.0)]), None);
        assert_eq!(knee(&[]), None);
    }
}
