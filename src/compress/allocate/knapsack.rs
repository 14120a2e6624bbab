//! Minimizes the total error `Σ sensitivity · curve(rank)` under the budget: a knapsack with one candidate per item.
//!
//! Each linear may have any rank that saves, or stay dense. Only the lower convex hull of its (cost, error) points is
//! kept; steps along the hulls are taken in the order of error saved per cost, the optimum of the Lagrangian relaxation
//! (Everett 1963). The rest of the budget is spent on the single changes that save most.

use super::allocator::{Allocator, Spectra};
use super::item::{Candidate, Candidates, Ends, Item, Ladder, Pick, Rules};

pub(super) struct Knapsack;

/// A choice with its cost and its error.
#[derive(Debug, Clone, Copy)]
struct PricedPick {
    pick: Pick,
    cost: u64,
    error: f64,
}

impl Item<'_> {
    fn priced_pick(&self, pick: Pick) -> PricedPick {
        PricedPick { pick, cost: self.cost(pick), error: self.error(pick) }
    }
}

impl Allocator for Knapsack {
    fn spectra(&self) -> Spectra {
        Spectra::Metric
    }

    fn choices(&self, items: &[Item<'_>], rules: &Rules) -> Vec<Pick> {
        let candidates: Vec<Vec<PricedPick>> = items.iter().map(|item| candidates(item, rules)).collect();
        let hulls: Vec<Vec<PricedPick>> = candidates.iter().map(|c| lower_hull(c)).collect();
        let mut chosen: Vec<PricedPick> = hulls.iter().map(|hull| hull[0]).collect();
        let mut left = i128::from(rules.budget) - chosen.iter().map(|c| i128::from(c.cost)).sum::<i128>();

        // (error saved per cost, item, index of the step on its hull); along a hull the savings fall.
        let mut steps: Vec<(f64, usize, usize)> = Vec::new();
        for (i, hull) in hulls.iter().enumerate() {
            let saved = |pair: &[PricedPick]| (pair[0].error - pair[1].error) / (pair[1].cost - pair[0].cost) as f64;
            steps.extend(hull.windows(2).enumerate().map(|(at, pair)| (saved(pair), i, at + 1)));
        }
        steps.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
        let mut is_stuck = vec![false; items.len()];
        for (_, i, at) in steps {
            let next = hulls[i][at];
            let extra = i128::from(next.cost) - i128::from(chosen[i].cost);
            is_stuck[i] |= extra > left;
            if !is_stuck[i] {
                left -= extra;
                chosen[i] = next;
            }
        }
        let change = |chosen: &mut Vec<PricedPick>, left: &mut i128, i: usize, to: PricedPick| {
            *left -= i128::from(to.cost) - i128::from(chosen[i].cost);
            chosen[i] = to;
        };
        // The steps of quantized bases are wide, so enough may remain to be worth exchanging for.
        let is_coarse = items.iter().any(|item| matches!(item.candidates, Candidates::Menu(_))) && left >= 0;
        let mut exchanges = if is_coarse { EXCHANGES } else { 0 };
        loop {
            while let Some((i, better)) = best_change(&candidates, &chosen, left) {
                change(&mut chosen, &mut left, i, better);
            }
            let exchange = if exchanges > 0 { best_exchange(&candidates, &chosen, left) } else { None };
            let Some([(i, better), (j, worse)]) = exchange else { break };
            change(&mut chosen, &mut left, i, better);
            change(&mut chosen, &mut left, j, worse);
            exchanges -= 1;
        }
        chosen.into_iter().map(|c| c.pick).collect()
    }
}

/// The candidates of an item, in ascending cost and falling error.
fn candidates(item: &Item<'_>, rules: &Rules) -> Vec<PricedPick> {
    match item.candidates {
        Candidates::Ranks(ladder) => candidates_by_rank(item, &ladder, rules),
        Candidates::Menu(menu) => undominated(item, menu),
        Candidates::Free(free) => undominated(item, &[free]),
    }
}

/// All ranks that save, from the floor up, then dense; of a residual all ranks.
fn candidates_by_rank(item: &Item<'_>, ladder: &Ladder<'_>, rules: &Rules) -> Vec<PricedPick> {
    if rules.ends == Ends::Residual {
        let ranks = (ladder.smallest_rank(rules)..=ladder.largest_rank()).step_by(rules.multiple);
        return ranks.map(|rank| item.priced_pick(Pick::Candidate(rank))).collect();
    }
    let dense = item.priced_pick(Pick::Dense);
    let mut candidates: Vec<PricedPick> = (ladder.smallest_rank(rules)..=ladder.saving_rank())
        .step_by(rules.multiple)
        .map(|rank| item.priced_pick(Pick::Candidate(rank)))
        .filter(|candidate| candidate.cost < dense.cost)
        .collect();
    candidates.push(dense);
    candidates
}

/// The candidates, and dense, that no other candidate beats in both cost and error.
fn undominated(item: &Item<'_>, candidates: &[Candidate]) -> Vec<PricedPick> {
    let picks = (0..candidates.len()).map(Pick::Candidate).chain([Pick::Dense]);
    let mut candidates: Vec<PricedPick> = picks.map(|pick| item.priced_pick(pick)).collect();
    candidates.sort_by(|x, y| x.cost.cmp(&y.cost).then(x.error.total_cmp(&y.error)));
    let mut least = f64::INFINITY;
    candidates.retain(|c| {
        let is_better = c.error < least;
        least = least.min(c.error);
        is_better
    });
    candidates
}

/// The points that are optimal for some price per cost, in ascending cost and falling error.
fn lower_hull(candidates: &[PricedPick]) -> Vec<PricedPick> {
    let mut hull: Vec<PricedPick> = Vec::new();
    for &new in candidates {
        if hull.last().is_some_and(|last| last.error <= new.error) {
            continue;
        }
        while let [.., first, second] = hull[..] {
            let slope = |a: PricedPick, b: PricedPick| (a.error - b.error) / (b.cost - a.cost) as f64;
            if slope(first, second) > slope(second, new) {
                break;
            }
            hull.pop();
        }
        hull.push(new);
    }
    hull
}

/// The single change within the remaining budget that lowers the error most.
fn best_change(candidates: &[Vec<PricedPick>], chosen: &[PricedPick], left: i128) -> Option<(usize, PricedPick)> {
    let mut best: Option<(f64, usize, PricedPick)> = None;
    for (i, candidates) in candidates.iter().enumerate() {
        // Errors fall with cost, so the most expensive affordable candidate is the best.
        let affordable = i128::from(chosen[i].cost) + left;
        let n_affordable = candidates.partition_point(|c| i128::from(c.cost) <= affordable);
        let Some(&candidate) = candidates[..n_affordable].last() else { continue };
        let saved = chosen[i].error - candidate.error;
        if saved > best.map_or(0.0, |(saved, ..)| saved) {
            best = Some((saved, i, candidate));
        }
    }
    best.map(|(_, i, candidate)| (i, candidate))
}

/// The most exchanges tried, and the most work for finding one: models with very many linears have fine enough steps.
const EXCHANGES: usize = 200;
const EXCHANGE_WORK: usize = 100_000_000;

/// A pair of changes, one to a higher and one to a lower cost, that fits the remaining budget and lowers the error
/// most.
fn best_exchange(
    candidates: &[Vec<PricedPick>],
    chosen: &[PricedPick],
    left: i128,
) -> Option<[(usize, PricedPick); 2]> {
    let n_candidates: usize = candidates.iter().map(Vec::len).sum();
    if n_candidates * candidates.len() > EXCHANGE_WORK {
        return None;
    }
    let losses = Losses::of(candidates, chosen);
    let mut best: Option<(f64, [(usize, PricedPick); 2])> = None;
    for (i, dearer) in candidates.iter().enumerate() {
        for &better in dearer.iter().filter(|c| c.cost > chosen[i].cost) {
            let missing = i128::from(better.cost) - i128::from(chosen[i].cost) - left;
            let saved = chosen[i].error - better.error;
            if missing <= 0 || best.is_some_and(|(most, _)| saved <= most) {
                continue;
            }
            let Some(given) = losses.least(missing, i) else { continue };
            let gain = saved - given.loss;
            // Slightly above 0, so that rounding errors cannot cause a cycle.
            if gain > best.map_or(1e-9 * saved, |(most, _)| most) {
                best = Some((gain, [(i, better), (given.item, given.pick)]));
            }
        }
    }
    best.map(|(_, exchange)| exchange)
}

/// A change to a lower cost.
#[derive(Debug, Clone, Copy)]
struct Loss {
    freed: i128,
    loss: f64,
    item: usize,
    pick: PricedPick,
}

/// All changes to a lower cost, the largest first; with each, the two items that lose least by one that frees as much
/// or more.
struct Losses {
    freed: Vec<i128>,
    least: Vec<[Option<Loss>; 2]>,
}

impl Losses {
    fn of(candidates: &[Vec<PricedPick>], chosen: &[PricedPick]) -> Self {
        let mut changes: Vec<Loss> = Vec::new();
        for (item, (candidates, now)) in candidates.iter().zip(chosen).enumerate() {
            changes.extend(candidates.iter().filter(|c| c.cost < now.cost).map(|&pick| Loss {
                freed: i128::from(now.cost) - i128::from(pick.cost),
                loss: pick.error - now.error,
                item,
                pick,
            }));
        }
        changes.sort_by(|x, y| y.freed.cmp(&x.freed).then(x.item.cmp(&y.item)));
        let [mut first, mut second]: [Option<Loss>; 2] = [None, None];
        let least = changes.iter().map(|&new| {
            let is_less = |than: Option<Loss>| than.is_none_or(|than| new.loss < than.loss);
            let is_other = first.is_some_and(|first| first.item != new.item);
            if is_less(first) {
                second = if is_other { first } else { second };
                first = Some(new);
            } else if is_other && is_less(second) {
                second = Some(new);
            }
            [first, second]
        });
        Self { least: least.collect(), freed: changes.iter().map(|change| change.freed).collect() }
    }

    /// The change that loses least of those that free at least `missing`, of another item than `item`.
    fn least(&self, missing: i128, item: usize) -> Option<Loss> {
        let n_enough = self.freed.partition_point(|&freed| freed >= missing);
        let [first, second] = self.least[n_enough.checked_sub(1)?];
        if first.is_some_and(|first| first.item == item) { second } else { first }
    }
}

/// The largest error that one step of a hull saves; the knapsack is at most this far from the optimum.
#[cfg(test)]
pub(super) fn widest_step(items: &[Item<'_>], rules: &Rules) -> f64 {
    let steps = items.iter().flat_map(|item| {
        let hull = lower_hull(&candidates(item, rules));
        hull.windows(2).map(|pair| pair[0].error - pair[1].error).collect::<Vec<_>>()
    });
    steps.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::cost;
    use super::super::tests::Linear;
    use super::*;
    use crate::approx::low_rank::ErrorCurve;
    use crate::operator::Kind;

    proptest! {
        /// Compares with every combination of choices.
        #[test]
        fn it_is_within_one_step_of_the_optimum(
            linears in proptest::collection::vec((3usize..7, 3usize..7, 0.2f64..0.99, 0.1f64..10.0), 1..4), keep in 0.3f64..1.0,
        ) {
            for layout in Kind::layouts() {
                let curve = |m: usize, n, decay: f64| ErrorCurve::new((0..m.min(n)).map(|i| decay.powi(i as i32)).collect());
                let linears: Vec<Linear> = linears.iter()
                    .map(|&(m, n, decay, sensitivity)| Linear::new(layout, (m, n), curve(m, n, decay), sensitivity)).collect();
                let items: Vec<Item<'_>> = linears.iter().map(Linear::item).collect();
                let rules = Rules::of_keep(&items, keep);
                let all: Vec<Vec<PricedPick>> = items.iter().map(|item| candidates(item, &rules)).collect();
                let mut combinations = vec![(0u64, 0.0f64)];
                for candidates in &all {
                    combinations = combinations.iter()
                        .flat_map(|&(c, e)| candidates.iter().map(move |x| (c + x.cost, e + x.error))).collect();
                }
                let best = combinations.iter().filter(|(c, _)| *c <= rules.budget).map(|(_, e)| *e).reduce(f64::min);
                let choices = Knapsack.choices(&items, &rules);
                if let Some(best) = best {
                    prop_assert!(cost(&items, &choices) <= rules.budget);
                    let found: f64 = items.iter().zip(&choices).map(|(item, &pick)| item.error(pick)).sum();
                    let widest = widest_step(&items, &rules);
                    prop_assert!(found <= best + widest + 1e-12, "{} {} {}", found, best, widest);
                }
            }
        }
    }

    proptest! {
        /// Compares with every pair of changes.
        #[test]
        fn the_best_exchange_is_found(
            menus in proptest::collection::vec(proptest::collection::vec((1u64..40, 0.0f64..9.0), 2..6), 2..6),
            at in proptest::collection::vec(0usize..6, 6), left in 0i128..20,
        ) {
            let menus: Vec<Vec<Candidate>> = menus.into_iter()
                .map(|menu| menu.into_iter().map(|(cost, error)| Candidate { cost, error }).collect()).collect();
            let items = menus.iter().map(|menu| Item { dense_cost: 50, candidates: Candidates::Menu(menu) });
            let candidates: Vec<Vec<PricedPick>> =
                items.map(|item| super::candidates(&item, &Rules::of_keep(&[item], 0.5))).collect();
            let chosen: Vec<PricedPick> = candidates.iter().zip(&at).map(|(of, at)| of[at % of.len()]).collect();
            let cost = |pick: PricedPick, i: usize| i128::from(pick.cost) - i128::from(chosen[i].cost);
            let mut most = 0.0f64;
            for (i, j) in (0..candidates.len()).flat_map(|i| (0..candidates.len()).map(move |j| (i, j))) {
                let pairs = candidates[i].iter().flat_map(|&a| candidates[j].iter().map(move |&b| (a, b)));
                for (a, b) in pairs.filter(|&(a, b)| i != j && cost(a, i) > left && cost(b, j) < 0) {
                    if cost(a, i) + cost(b, j) <= left {
                        most = most.max(chosen[i].error - a.error + chosen[j].error - b.error);
                    }
                }
            }
            let found = best_exchange(&candidates, &chosen, left);
            let gain = found.map_or(0.0, |[(i, a), (j, b)]| {
                assert!(i != j && cost(a, i) + cost(b, j) <= left);
                chosen[i].error - a.error + chosen[j].error - b.error
            });
            prop_assert!((gain - most).abs() <= 1e-8 * most.max(1.0), "{gain} {most}");
        }
    }

    #[test]
    fn candidates_are_chosen_by_error_for_their_bytes() {
        // Expensive and inaccurate, dominated, and the two on the hull.
        let menu = |sensitivity: f64| {
            [(20, 8.0), (50, 7.0), (40, 2.0), (45, 2.5)]
                .map(|(cost, error)| Candidate { cost, error: sensitivity * error })
        };
        let menus = [menu(1.0), menu(10.0)];
        let items = [0, 1].map(|i| Item { dense_cost: 200, candidates: Candidates::Menu(&menus[i]) });
        let chosen = |budget| {
            let rules = Rules { budget, ..Rules::of_keep(&items, 0.5) };
            Knapsack.choices(&items, &rules)
        };
        let (small, large) = (Pick::Candidate(0), Pick::Candidate(2));
        assert_eq!(chosen(40), [small, small]);
        assert_eq!(chosen(79), [small, large]);
        assert_eq!(chosen(80), [large, large]);
        assert_eq!(chosen(240), [large, Pick::Dense]);
        assert_eq!(chosen(400), [Pick::Dense, Pick::Dense]);
    }

    #[test]
    fn hulls_are_convex() {
        let point = |cost, error| PricedPick { pick: Pick::Dense, cost, error };
        let hull = lower_hull(&[point(1, 10.0), point(2, 9.0), point(3, 3.0), point(4, 3.5), point(9, 0.0)]);
        assert_eq!(hull.iter().map(|c| c.cost).collect::<Vec<_>>(), [1, 3, 9]);
    }
}
