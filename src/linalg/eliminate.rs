//! Elimination of the rows and columns of a symmetric matrix one after another, with a second matrix along: a pivoted
//! Cholesky factorization whose pivots depend on both.
//!
//! With `u = A e_j / A_jj`, a step replaces `A` by the Schur complement `A − A_jj u uᵀ`, and `B` by
//! `(I − u e_jᵀ) B (I − e_j uᵀ) = B − u vᵀ − v uᵀ` with `v = B e_j − ½ B_jj u`. Its value is `B_jj / A_jj`. Steps are
//! gathered in panels, so that nearly all of the n³ operations of all n steps are matrix products.

use std::cmp::Reverse;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use super::gram::{product, subtract_product_symmetric, threads_for};
use super::solve::solve;

/// Steps between two updates of the matrices.
const PANEL: usize = 64;

/// A diagonal entry of `A` below this share of its first value is zero but for rounding.
const VANISHED: f64 = 1e-12;

/// Which index is eliminated next.
#[derive(Debug, Clone, Copy)]
pub enum Next<'a> {
    /// The one of the largest value.
    Largest,
    /// The one of the smallest value.
    Smallest,
    /// These, in order; each index once.
    Given(&'a [usize]),
}

impl Next<'_> {
    /// The place in `left` of the next index. `value` is a function of what is there; of equal values the smallest index
    /// is taken.
    fn place(
        self,
        n_done: usize,
        left: &[usize],
        index: impl Fn(usize) -> usize,
        value: impl Fn(usize) -> f64,
    ) -> usize {
        let sign = match self {
            Self::Largest => 1.0,
            Self::Smallest => -1.0,
            Self::Given(order) => {
                let place = left.iter().position(|&at| index(at) == order[n_done]);
                return place.expect("invariant: an order has every index once");
            }
        };
        let rank = |place: usize| (sign * value(left[place]), Reverse(index(left[place])));
        let mut best = (rank(0), 0);
        for place in 1..left.len() {
            let found = rank(place);
            if found > best.0 {
                best = (found, place);
            }
        }
        best.1
    }
}

/// One step: the index, and its value, at least 0.
pub type Step = (usize, f64);

/// Eliminates every index of two symmetric matrices (n, n), `A` positive semidefinite; returns the steps in order. Only
/// lower triangles are read.
///
/// The bytes are the same at any number of threads.
///
/// # Panics
/// If the matrices differ in size.
pub fn eliminate(mut a: Mat<f64>, mut b: Mat<f64>, next: Next<'_>) -> Vec<Step> {
    let n = a.nrows();
    assert!(b.nrows() == n && a.ncols() == n && b.ncols() == n, "invariant: both matrices are (n, n)");
    let mut rest = Rest::new(&a, &b);
    let mut steps = Vec::with_capacity(n);
    while !rest.ids.is_empty() {
        let size = rest.ids.len();
        let mut panel = Panel::new(size, PANEL.min(size));
        let mut left: Vec<usize> = (0..size).collect();
        while panel.len < panel.most {
            let place = next.place(steps.len(), &left, |at| rest.ids[at], |at| rest.value(at));
            let at = left.swap_remove(place);
            steps.push((rest.ids[at], rest.value(at)));
            panel.step(a.as_ref(), b.as_ref(), at, &mut rest);
        }
        for (from, to) in moves(left, size) {
            move_index(&mut a, from, to, size);
            move_index(&mut b, from, to, size);
            rest.move_index(from, to);
            panel.move_index(from, to);
        }
        rest.ids.truncate(size - panel.len);
        panel.apply(&mut a, &mut b, rest.ids.len());
    }
    steps
}

/// From where to where indices move, so that those `left` of `size` come first.
fn moves(left: Vec<usize>, size: usize) -> Vec<(usize, usize)> {
    let mut is_left = vec![false; size];
    left.iter().for_each(|&at| is_left[at] = true);
    let behind = (left.len()..size).filter(|&at| is_left[at]);
    behind.zip((0..left.len()).filter(|&at| !is_left[at])).collect()
}

/// An entry of a symmetric matrix, in its lower triangle.
fn lower(i: usize, j: usize) -> (usize, usize) {
    (i.max(j), i.min(j))
}

/// Moves a row and column of the leading `size` of a symmetric matrix to the place of another, which is lost.
fn move_index(matrix: &mut Mat<f64>, from: usize, to: usize, size: usize) {
    matrix[(to, to)] = matrix[(from, from)];
    for i in (0..size).filter(|&i| i != from && i != to) {
        matrix[lower(to, i)] = matrix[lower(from, i)];
    }
}

/// What is left of the matrices: the leading rows and columns of both, with diagonals that every step updates.
struct Rest {
    /// The index of each row.
    ids: Vec<usize>,
    a: Vec<f64>,
    b: Vec<f64>,
    /// The diagonal of `A` before all steps.
    first: Vec<f64>,
}

impl Rest {
    fn new(a: &Mat<f64>, b: &Mat<f64>) -> Self {
        let diagonal = |matrix: &Mat<f64>| -> Vec<f64> { (0..matrix.nrows()).map(|i| matrix[(i, i)]).collect() };
        Self { ids: (0..a.nrows()).collect(), a: diagonal(a), b: diagonal(b), first: diagonal(a) }
    }

    fn is_vanished(&self, at: usize) -> bool {
        self.a[at] <= VANISHED * self.first[at]
    }

    /// `B_jj / A_jj`; 0 where `A` has nothing left.
    fn value(&self, at: usize) -> f64 {
        if self.is_vanished(at) { 0.0 } else { (self.b[at] / self.a[at]).max(0.0) }
    }

    fn move_index(&mut self, from: usize, to: usize) {
        self.ids[to] = self.ids[from];
        for values in [&mut self.a, &mut self.b, &mut self.first] {
            values[to] = values[from];
        }
    }
}

/// Steps whose updates are not yet applied: `A − U diag(ρ) Uᵀ` and `B − U Vᵀ − V Uᵀ`.
struct Panel {
    /// `[U V]` (n, 2 `most`).
    uv: Mat<f64>,
    rho: Vec<f64>,
    most: usize,
    len: usize,
}

impl Panel {
    fn new(n: usize, most: usize) -> Self {
        Self { uv: Mat::zeros(n, 2 * most), rho: Vec::with_capacity(most), most, len: 0 }
    }

    fn u(&self) -> MatRef<'_, f64> {
        self.uv.as_ref().subcols(0, self.len)
    }

    fn v(&self) -> MatRef<'_, f64> {
        self.uv.as_ref().subcols(self.most, self.len)
    }

    fn move_index(&mut self, from: usize, to: usize) {
        (0..self.uv.ncols()).for_each(|j| self.uv[(to, j)] = self.uv[(from, j)]);
    }

    /// Eliminates the index at this place.
    fn step(&mut self, a: MatRef<'_, f64>, b: MatRef<'_, f64>, at: usize, rest: &mut Rest) {
        let (n, t) = (self.uv.nrows(), self.len);
        let mut columns = Mat::from_fn(n, 2, |i, j| [a, b][j][lower(i, at)]); // of A and of B
        if t > 0 {
            let (u, v) = (self.u(), self.v());
            let of_u = Mat::from_fn(t, 2, |i, j| if j == 0 { self.rho[i] * u[(at, i)] } else { v[(at, i)] });
            let of_v = u.row(at).transpose().as_mat();
            matmul(&mut columns, Accum::Add, u, of_u, -1.0, Par::Seq);
            matmul(columns.as_mut().subcols_mut(1, 1), Accum::Add, v, of_v, -1.0, Par::Seq);
        }
        let [rho, own_b] = [columns[(at, 0)], columns[(at, 1)]];
        let rho = if rest.is_vanished(at) { 0.0 } else { rho.max(0.0) };
        if rho > 0.0 {
            for i in 0..n {
                let u = columns[(i, 0)] / rho;
                let v = columns[(i, 1)] - 0.5 * own_b * u;
                (self.uv[(i, t)], self.uv[(i, self.most + t)]) = (u, v);
                rest.a[i] -= rho * u * u;
                rest.b[i] -= 2.0 * u * v;
            }
        }
        self.rho.push(rho);
        self.len += 1;
    }

    /// Applies the updates of all steps to the leading n rows and columns.
    fn apply(&self, a: &mut Mat<f64>, b: &mut Mat<f64>, n: usize) {
        let t = self.len;
        let (u, v) = (self.u().subrows(0, n), self.v().subrows(0, n));
        let scaled = Mat::from_fn(n, t, |i, j| self.rho[j] * u[(i, j)]);
        let vu = Mat::from_fn(n, 2 * t, |i, j| if j < t { v[(i, j)] } else { u[(i, j - t)] });
        subtract_product_symmetric(a.submatrix_mut(0, 0, n, n), scaled.as_ref(), u.transpose());
        subtract_product_symmetric(b.submatrix_mut(0, 0, n, n), self.uv.as_ref().subrows(0, n), vu.transpose());
    }
}

/// The rows and columns at `places`.
fn restricted(matrix: &Mat<f64>, places: &[usize]) -> Mat<f64> {
    Mat::from_fn(places.len(), places.len(), |i, j| matrix[(places[i], places[j])])
}

/// The same for runs of `run` indices at once: the value of a run g is `tr(A_gg⁻¹ B_gg)`, and indices are those of runs.
///
/// # Panics
/// If the matrices differ in size, or are not made of whole runs.
pub fn eliminate_runs(mut a: Mat<f64>, mut b: Mat<f64>, run: usize, next: Next<'_>) -> Vec<Step> {
    assert!(a.nrows() == b.nrows() && a.nrows().is_multiple_of(run), "invariant: matrices of whole runs");
    let mut ids: Vec<usize> = (0..a.nrows() / run).collect();
    let mut steps = Vec::with_capacity(ids.len());
    while !ids.is_empty() {
        let values: Vec<f64> = (0..ids.len()).map(|at| value_of_run(&a, &b, run, at)).collect();
        let places: Vec<usize> = (0..ids.len()).collect();
        let at = next.place(steps.len(), &places, |at| ids[at], |at| values[at]);
        steps.push((ids[at], values[at]));
        let first = at * run;
        let own = |m: &Mat<f64>| m.submatrix(first, first, run, run).to_owned();
        let (own_a, own_b) = (positive(own(&a)), own(&b));
        let rows_a = a.subrows(first, run).to_owned(); // (run, n)
        let rows_b = b.subrows(first, run).to_owned();
        let x = solve(own_a.as_ref(), rows_a.as_ref()).expect("invariant: a positive definite matrix has an inverse"); // (run, n)
        // B − X ᵀB_g − B_gᵀ X + Xᵀ B_gg X, with B_g less a half of B_gg X in both products.
        let half = &rows_b - product(own_b.as_ref(), x.as_ref()) * faer::Scale(0.5);
        let threads = threads_for(a.nrows() * a.nrows() * run);
        matmul(&mut a, Accum::Add, x.transpose(), &rows_a, -1.0, threads);
        matmul(&mut b, Accum::Add, x.transpose(), &half, -1.0, threads);
        matmul(&mut b, Accum::Add, half.transpose(), &x, -1.0, threads);
        ids.remove(at);
        let left: Vec<usize> = (0..a.nrows()).filter(|i| !(first..first + run).contains(i)).collect();
        (a, b) = (restricted(&a, &left), restricted(&b, &left));
    }
    steps
}

/// The values of all runs before any of them is eliminated.
///
/// # Panics
/// If the matrices differ in size, or are not made of whole runs.
pub fn values_of_runs(a: &Mat<f64>, b: &Mat<f64>, run: usize) -> Vec<f64> {
    assert!(a.nrows() == b.nrows() && a.nrows().is_multiple_of(run), "invariant: matrices of whole runs");
    (0..a.nrows() / run).map(|at| value_of_run(a, b, run, at)).collect()
}

/// `tr(A_gg⁻¹ B_gg)`, at least 0.
fn value_of_run(a: &Mat<f64>, b: &Mat<f64>, run: usize, at: usize) -> f64 {
    let own = |m: &Mat<f64>| m.submatrix(at * run, at * run, run, run).to_owned();
    let solved = solve(positive(own(a)).as_ref(), own(b).as_ref());
    solved.map_or(0.0, |solved| (0..run).map(|i| solved[(i, i)]).sum::<f64>().max(0.0))
}

/// A positive semidefinite matrix with its diagonal raised by rounding errors, so that it can be inverted.
fn positive(mut matrix: Mat<f64>) -> Mat<f64> {
    let largest = (0..matrix.nrows()).map(|i| matrix[(i, i)]).fold(f64::MIN_POSITIVE, f64::max);
    (0..matrix.nrows()).for_each(|i| matrix[(i, i)] += VANISHED * largest);
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(m: usize, n: usize) -> Mat<f64> {
        let value = |i: usize| {
            let mixed = (i as u32 ^ 0x5bd1).wrapping_mul(2_654_435_761);
            f64::from((mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519) >> 8) / 8_388_608.0 - 1.0
        };
        Mat::from_fn(m, n, |i, j| value(i * n + j + 1))
    }

    fn gram(m: usize, n: usize) -> Mat<f64> {
        let x = samples(m, n);
        x.transpose() * &x
    }

    /// One step at a time, by the definition.
    fn by_definition(mut a: Mat<f64>, mut b: Mat<f64>, order: &[usize]) -> Vec<f64> {
        let n = a.nrows();
        let mut values = Vec::new();
        for &j in order {
            values.push(b[(j, j)] / a[(j, j)]);
            let u = Mat::from_fn(n, 1, |i, _| a[(i, j)] / a[(j, j)]);
            let mut project = Mat::<f64>::identity(n, n);
            (0..n).for_each(|i| project[(i, j)] -= u[(i, 0)]);
            b = &project * &b * project.transpose();
            a = &project * &a;
        }
        values
    }

    #[test]
    fn steps_are_those_of_the_definition_over_several_panels() {
        let n = 150;
        let (a, b) = (gram(2 * n, n), gram(40, n));
        for next in [Next::Largest, Next::Smallest] {
            let steps = eliminate(a.clone(), b.clone(), next);
            let order: Vec<usize> = steps.iter().map(|(index, _)| *index).collect();
            let expected = by_definition(a.clone(), b.clone(), &order);
            let scale = expected.iter().copied().fold(0.0, f64::max);
            assert!(steps.iter().zip(&expected).all(|((_, found), expected)| (found - expected).abs() < 1e-9 * scale));
            assert_eq!(eliminate(a.clone(), b.clone(), Next::Given(&order)).len(), n);
        }
    }

    #[test]
    fn each_pivot_is_the_best_that_is_left() {
        let n = 12;
        let (a, b) = (gram(30, n), gram(5, n));
        let steps = eliminate(a.clone(), b.clone(), Next::Largest);
        let mut done: Vec<usize> = Vec::new();
        for &(index, value) in &steps {
            for other in (0..n).filter(|other| !done.contains(other)) {
                let order: Vec<usize> = done.iter().copied().chain([other]).collect();
                let found = *by_definition(a.clone(), b.clone(), &order).last().unwrap();
                assert!(found <= value * (1.0 + 1e-9), "{index} {other}");
            }
            done.push(index);
        }
    }

    #[test]
    fn runs_of_one_are_single_steps_and_longer_ones_are_steps_together() {
        let n = 24;
        let (a, b) = (gram(60, n), gram(9, n));
        for next in [Next::Largest, Next::Smallest] {
            let single = eliminate(a.clone(), b.clone(), next);
            for ((index, value), (other, expected)) in eliminate_runs(a.clone(), b.clone(), 1, next).iter().zip(single)
            {
                assert!(*index == other && (value - expected).abs() < 1e-8 * expected.max(1.0));
            }
            let runs = eliminate_runs(a.clone(), b.clone(), 4, next);
            let order: Vec<usize> = runs.iter().flat_map(|(g, _)| 4 * g..4 * g + 4).collect();
            let steps = eliminate(a.clone(), b.clone(), Next::Given(&order));
            for ((_, value), steps) in runs.iter().zip(steps.chunks(4)) {
                let together: f64 = steps.iter().map(|(_, value)| value).sum();
                assert!((value - together).abs() < 1e-8 * together.max(1.0), "{value} {together}");
            }
        }
    }

    #[test]
    fn a_matrix_of_low_rank_runs_out_of_values() {
        let (n, rank) = (90, 7);
        let a = gram(rank, n);
        let steps = eliminate(a.clone(), a, Next::Largest);
        assert!(steps[..rank].iter().all(|(_, value)| *value > 0.0));
        assert!(steps[rank..].iter().all(|(_, value)| *value < 1e-9), "{steps:?}");
    }
}
