//! Units of several linears: the best joint choices, from the choices of each.

/// Cost, weighted error, and the choice that has them.
pub type Point<C> = (u64, f64, C);

/// Sums of one point from each list that are optimal at some price, in ascending order of cost.
pub fn frontier<C: Copy>(lists: &[Vec<Point<C>>]) -> Vec<(u64, f64, Vec<C>)> {
    let hulls: Vec<Vec<Point<C>>> = lists.iter().map(|points| hull(points)).collect();
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (list, hull) in hulls.iter().enumerate() {
        steps.extend(hull.windows(2).enumerate().map(|(at, pair)| (slope(pair[0], pair[1]), list, at + 1)));
    }
    steps.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    let mut at = vec![0; hulls.len()];
    let sum = |at: &[usize]| {
        let points: Vec<Point<C>> = hulls.iter().zip(at).map(|(hull, &at)| hull[at]).collect();
        (points.iter().map(|p| p.0).sum(), points.iter().map(|p| p.1).sum(), points.iter().map(|p| p.2).collect())
    };
    let mut sums = vec![sum(&at)];
    for (_, list, next) in steps {
        at[list] = next;
        sums.push(sum(&at));
    }
    sums
}

/// Error saved per cost between two points.
fn slope<C>(a: Point<C>, b: Point<C>) -> f64 {
    (a.1 - b.1) / (b.0 - a.0) as f64
}

/// The lower convex hull of points, in ascending cost and falling error.
fn hull<C: Copy>(points: &[Point<C>]) -> Vec<Point<C>> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|x, y| x.0.cmp(&y.0).then(x.1.total_cmp(&y.1)));
    let mut hull: Vec<Point<C>> = Vec::new();
    for new in sorted {
        if hull.last().is_some_and(|last| last.1 <= new.1 || last.0 == new.0) {
            continue;
        }
        while let [.., first, second] = hull[..] {
            if slope(first, second) > slope(second, new) {
                break;
            }
            hull.pop();
        }
        hull.push(new);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_best_exchange_at_each_price() {
        let lists = [
            vec![(10, 0.0, 'd'), (1, 9.0, 'a'), (2, 8.5, 'b'), (4, 1.0, 'c')],
            vec![(3, 4.0, 'a'), (3, 5.0, 'b'), (9, 0.0, 'd')],
        ];
        let costs_and_choices: Vec<(u64, String)> =
            frontier(&lists).into_iter().map(|(cost, _, choices)| (cost, choices.into_iter().collect())).collect();
        let expected = [(4, "aa"), (7, "ca"), (13, "cd"), (19, "dd")];
        assert_eq!(costs_and_choices, expected.map(|(cost, choices)| (cost, choices.to_string())));
    }
}
