//! The search for points of a grid: the nearest to eight weights, and the best in a metric that couples them.

use std::ops::Range;

use pulp::{Arch, NullaryFnOnce};

use super::grid::{Grid, RUN};

/// Points that are compared at a time.
const LANES: usize = 16;

/// What is minimized over the values `x` of eight weights: `(x − wish)ᵀ A (x − wish)`.
pub(super) struct Parabola<'a> {
    /// `A`, positive semidefinite.
    pub square: &'a [[f32; RUN]; RUN],
    pub wish: [f32; RUN],
}

impl Parabola<'_> {
    fn at(&self, values: &[f32; RUN]) -> f32 {
        let error: [f32; RUN] = std::array::from_fn(|k| values[k] - self.wish[k]);
        self.square.iter().zip(&error).map(|(row, e)| e * row.iter().zip(&error).map(|(a, f)| a * f).sum::<f32>()).sum()
    }
}

/// The points of a grid, for searches.
#[derive(Debug)]
pub(super) struct Points {
    pub grid: &'static Grid,
    /// The magnitudes of sixteen points, by weight.
    magnitudes: Vec<[[f32; LANES]; RUN]>,
}

/// The best point of a search: its cost and its index.
type Best = (f32, usize);

/// The best points so far, by lane.
struct Lanes {
    costs: [f32; LANES],
    points: [u32; LANES],
}

impl Lanes {
    const NONE: Self = Self { costs: [f32::INFINITY; LANES], points: [0; LANES] };

    /// Keeps the better ones of the points from `first`.
    #[inline(always)]
    fn keep(&mut self, costs: &[f32; LANES], first: usize) {
        let lanes = self.costs.iter_mut().zip(&mut self.points).zip(costs).enumerate();
        for (lane, ((best, point), cost)) in lanes {
            let is_better = *cost < *best;
            *point = if is_better { (first + lane) as u32 } else { *point };
            *best = if is_better { *cost } else { *best };
        }
    }

    /// The best of all, the first one if several are.
    fn best(&self) -> Best {
        let all = self.costs.iter().copied().zip(self.points.iter().map(|&point| point as usize));
        all.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))).unwrap_or_default()
    }
}

impl Points {
    pub fn new(grid: &'static Grid) -> Self {
        let magnitude = |point: u16, k: usize| match k < grid.width {
            true => grid.levels[usize::from(grid.n_magnitudes + grid.magnitude(point, k))],
            false => 0.0,
        };
        let lanes = grid.points.as_chunks::<LANES>().0.iter();
        let magnitudes = lanes
            .map(|points| std::array::from_fn(|k| std::array::from_fn(|lane| magnitude(points[lane], k))))
            .collect();
        Self { grid, magnitudes }
    }

    /// The codes of least `Σ weights · (scale · level − wish)²`. Without a scale all have the value 0.
    pub fn nearest(&self, scale: f32, weights: &[f32; RUN], wish: &[f32; RUN], codes: &mut [u8; RUN]) {
        let wish = wish.map(|wish| if scale == 0.0 { 0.0 } else { wish / scale });
        let parts = (0..RUN).step_by(self.grid.width).map(|first| first..first + self.grid.width);
        let mut signs: [bool; RUN] = std::array::from_fn(|k| wish[k] < 0.0);
        let is_odd = self.grid.has_parity() && signs.iter().filter(|&&sign| sign).count() % 2 == 1;
        let found: Vec<(Range<usize>, [Best; 2])> =
            parts.map(|part| (part.clone(), self.nearest_part(&weights[part.clone()], &wish[part], is_odd))).collect();
        // If the signs cannot be stored, one is wrong: where that costs least.
        let extra = |[own, other]: [Best; 2]| other.0 - own.0;
        let wrong =
            found.iter().enumerate().min_by(|a, b| extra(a.1.1).total_cmp(&extra(b.1.1))).map_or(0, |(at, _)| at);
        for (at, (part, [own, other])) in found.into_iter().enumerate() {
            let is_wrong = is_odd && at == wrong;
            let point = self.grid.points[if is_wrong { other.1 } else { own.1 }];
            if is_wrong {
                let cost = |k: usize| {
                    let level = self.grid.levels
                        [usize::from(self.grid.n_magnitudes + self.grid.magnitude(point, k - part.start))];
                    weights[k] * wish[k].abs() * level
                };
                let least = part.clone().min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap_or(part.start);
                signs[least] = !signs[least];
            }
            for k in part.clone() {
                codes[k] = self.grid.code(self.grid.magnitude(point, k - part.start), signs[k]);
            }
        }
    }

    /// The nearest point to magnitudes, with the signs that these have, and with one of them wrong.
    fn nearest_part(&self, weights: &[f32], wish: &[f32], is_odd: bool) -> [Best; 2] {
        let near = Near { magnitudes: &self.magnitudes, weights, wish, is_odd };
        let best = Arch::new().dispatch(near);
        best.map(|best| best.best())
    }

    /// Replaces codes by others where that lowers a parabola: for the signs that they have, and for those of `near`, the
    /// best point of all. The values of codes are `scale · level`.
    pub fn improve(&self, scale: f32, parabola: &Parabola<'_>, near: &[u8; RUN], codes: &mut [u8; RUN]) {
        if scale == 0.0 {
            return;
        }
        let value = |code: u8| scale * self.grid.levels[usize::from(code)];
        let signs = |codes: &[u8; RUN]| codes.map(|code| code < self.grid.n_magnitudes);
        let mut best = parabola.at(&codes.map(value));
        // With the same signs the search is the same.
        let starts = [*codes, *near];
        for start in if signs(codes) == signs(near) { &starts[1..] } else { &starts } {
            let mut found = *start;
            for first in (0..RUN).step_by(self.grid.width) {
                self.improve_part(scale, parabola, first..first + self.grid.width, &mut found);
            }
            let cost = parabola.at(&found.map(value));
            if cost < best {
                (best, *codes) = (cost, found);
            }
        }
    }

    /// The best point for one part, with its signs and all other codes as they are.
    fn improve_part(&self, scale: f32, parabola: &Parabola<'_>, part: Range<usize>, codes: &mut [u8; RUN]) {
        let n = part.len();
        let values = codes.map(|code| scale * self.grid.levels[usize::from(code)]);
        let signs = codes.map(|code| if code < self.grid.n_magnitudes { -scale } else { scale });
        // The parabola in the magnitudes `t` of this part: `tᵀ S t − 2 hᵀ t`.
        let (mut square, mut along) = ([[0.0f32; RUN]; RUN], [0.0f32; RUN]);
        for a in 0..n {
            let row = &parabola.square[part.start + a];
            for b in 0..n {
                // Each pair counts twice, below the diagonal.
                let n = if a == b { 1.0 } else { 2.0 };
                square[a][b] = n * row[part.start + b] * signs[part.start + a] * signs[part.start + b];
            }
            let rest = |k: usize| if part.contains(&k) { 0.0 } else { values[k] };
            let pull: f32 = (0..RUN).map(|k| row[k] * (parabola.wish[k] - rest(k))).sum();
            along[a] = 2.0 * pull * signs[part.start + a];
        }
        let best = match self.grid.width {
            4 => Arch::new().dispatch(Least::<4> { magnitudes: &self.magnitudes, square: &square, along: &along }),
            _ => Arch::new().dispatch(Least::<RUN> { magnitudes: &self.magnitudes, square: &square, along: &along }),
        };
        let point = self.grid.points[best.best().1];
        for k in part.clone() {
            let is_negative = codes[k] < self.grid.n_magnitudes;
            codes[k] = self.grid.code(self.grid.magnitude(point, k - part.start), is_negative);
        }
    }
}

/// The search for the points nearest to magnitudes `wish`, with no or one wrong sign.
struct Near<'a> {
    magnitudes: &'a [[[f32; LANES]; RUN]],
    weights: &'a [f32],
    wish: &'a [f32],
    is_odd: bool,
}

impl NullaryFnOnce for Near<'_> {
    type Output = [Lanes; 2];

    #[inline(always)]
    fn call(self) -> [Lanes; 2] {
        let mut best = [Lanes::NONE; 2];
        for (chunk, magnitudes) in self.magnitudes.iter().enumerate() {
            let (mut cost, mut least) = ([0.0f32; LANES], [f32::INFINITY; LANES]);
            for ((levels, weight), wish) in magnitudes.iter().zip(self.weights).zip(self.wish) {
                let along = 2.0 * weight * wish.abs();
                for lane in 0..LANES {
                    let level = levels[lane];
                    cost[lane] += level * (weight * level - along);
                    let wrong = 2.0 * along * level;
                    least[lane] = if wrong < least[lane] { wrong } else { least[lane] };
                }
            }
            best[0].keep(&cost, chunk * LANES);
            if self.is_odd {
                let mut other = cost;
                for lane in 0..LANES {
                    other[lane] += least[lane];
                }
                best[1].keep(&other, chunk * LANES);
            }
        }
        best
    }
}

/// The search for the magnitudes `t` of a point with the least `Σ t_a S_ab t_b − along_a t_a`, over `b ≤ a`.
struct Least<'a, const WIDTH: usize> {
    magnitudes: &'a [[[f32; LANES]; RUN]],
    square: &'a [[f32; RUN]; RUN],
    along: &'a [f32; RUN],
}

impl<const WIDTH: usize> NullaryFnOnce for Least<'_, WIDTH> {
    type Output = Lanes;

    #[inline(always)]
    fn call(self) -> Lanes {
        let mut best = Lanes::NONE;
        for (chunk, magnitudes) in self.magnitudes.iter().enumerate() {
            let mut cost = [0.0f32; LANES];
            for a in 0..WIDTH {
                let mut slope = [-self.along[a]; LANES];
                for (weight, levels) in self.square[a].iter().zip(magnitudes).take(a + 1) {
                    for lane in 0..LANES {
                        slope[lane] += weight * levels[lane];
                    }
                }
                for lane in 0..LANES {
                    cost[lane] += magnitudes[a][lane] * slope[lane];
                }
            }
            best.keep(&cost, chunk * LANES);
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::super::grid::{IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS};
    use super::*;

    const GRIDS: [&Grid; 5] = [&IQ2_XXS, &IQ2_XS, &IQ2_S, &IQ3_XXS, &IQ3_S];

    fn numbers(seed: u32) -> impl FnMut() -> f32 {
        let mut at = seed;
        move || {
            at = at.wrapping_add(1);
            (at.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0
        }
    }

    fn diagonal(weights: [f32; RUN]) -> [[f32; RUN]; RUN] {
        std::array::from_fn(|a| std::array::from_fn(|b| if a == b { weights[a] } else { 0.0 }))
    }

    fn value(grid: &Grid, scale: f32, codes: &[u8; RUN]) -> [f32; RUN] {
        codes.map(|code| scale * grid.levels[usize::from(code)])
    }

    /// All codes of one part of a run.
    fn parts(grid: &Grid) -> Vec<Vec<u8>> {
        let all = (0..grid.points.len()).flat_map(|point| (0..1usize << grid.width).map(move |signs| (point, signs)));
        all.map(|(point, signs)| {
            let code = |k| grid.code(grid.magnitude(grid.points[point], k), signs >> k & 1 == 1);
            (0..grid.width).map(code).collect()
        })
        .collect()
    }

    /// The least cost of all codes, by trying each.
    fn least(grid: &Grid, scale: f32, weights: &[f32; RUN], wish: &[f32; RUN]) -> f32 {
        let mut best = [[f32::INFINITY; 2]; 2];
        for (first, best) in (0..RUN).step_by(grid.width).zip(&mut best) {
            for codes in parts(grid) {
                let cost = codes.iter().enumerate().map(|(k, &code)| {
                    let error = scale * grid.levels[usize::from(code)] - wish[first + k];
                    weights[first + k] * error * error
                });
                let odd = codes.iter().filter(|&&code| code < grid.n_magnitudes).count() % 2;
                best[odd] = best[odd].min(cost.sum());
            }
        }
        match (grid.width, grid.has_parity()) {
            (8, true) => best[0][0],
            (8, false) => best[0][0].min(best[0][1]),
            (_, true) => (best[0][0] + best[1][0]).min(best[0][1] + best[1][1]),
            (_, false) => best[0][0].min(best[0][1]) + best[1][0].min(best[1][1]),
        }
    }

    #[test]
    fn the_nearest_point_is_the_best_of_all_and_no_search_improves_it() {
        let mut next = numbers(3);
        for grid in GRIDS {
            let points = Points::new(grid);
            for scale in [0.04, 0.1, -0.06] {
                let (wish, weights) = (std::array::from_fn(|_| next()), std::array::from_fn(|_| 1.1 + next()));
                let mut codes = [0; RUN];
                points.nearest(scale, &weights, &wish, &mut codes);
                let parabola = Parabola { square: &diagonal(weights), wish };
                let (found, expected) = (parabola.at(&value(grid, scale, &codes)), least(grid, scale, &weights, &wish));
                assert!((found / expected - 1.0).abs() < 1e-4, "{scale}: {found} {expected}");
                let before = codes;
                points.improve(scale, &parabola, &before, &mut codes);
                assert_eq!(codes, before);
            }
        }
    }

    #[test]
    fn improving_finds_the_best_point_for_the_signs_in_a_metric_with_correlation() {
        let mut next = numbers(9);
        for grid in GRIDS {
            let points = Points::new(grid);
            for _ in 0..8 {
                let root: [[f32; RUN]; RUN] = std::array::from_fn(|_| std::array::from_fn(|_| next()));
                let dot = |a: usize, b: usize| (0..RUN).map(|k| root[a][k] * root[b][k]).sum::<f32>();
                let square = std::array::from_fn(|a| std::array::from_fn(|b| dot(a, b)));
                let parabola = Parabola { square: &square, wish: std::array::from_fn(|_| next()) };
                let mut codes = [0; RUN];
                points.nearest(0.07, &[1.0; RUN], &parabola.wish, &mut codes);
                let first = parabola.at(&value(grid, 0.07, &codes));
                let near = codes;
                points.improve(0.07, &parabola, &near, &mut codes);
                let found = parabola.at(&value(grid, 0.07, &codes));
                assert!(found <= first, "{found} {first}");
                // No other point for the last part has less error with these signs.
                let begin = RUN - grid.width;
                for part in parts(grid) {
                    let mut other = codes;
                    other[begin..].copy_from_slice(&part);
                    let is_same = |k: usize| (other[k] < grid.n_magnitudes) == (codes[k] < grid.n_magnitudes);
                    if (begin..RUN).all(is_same) {
                        assert!(parabola.at(&value(grid, 0.07, &other)) >= found * 0.999);
                    }
                }
            }
        }
    }

    #[test]
    fn grids_rise_and_have_a_point_for_every_index() {
        for grid in GRIDS {
            assert!(grid.points.is_sorted_by(|a, b| a < b) && grid.points.len().is_multiple_of(LANES));
            assert_eq!(grid.points.len(), 1 << (grid.index[0].0 + grid.index[1].0));
            let magnitudes =
                grid.points.iter().flat_map(|&point| (0..grid.width).map(move |k| grid.magnitude(point, k)));
            assert_eq!(magnitudes.max(), Some(grid.n_magnitudes - 1));
        }
    }
}
