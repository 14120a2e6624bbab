//! Elimination of the rows and columns of a symmetric matrix one after another, with a second matrix along: a pivoted
//! Cholesky factorization whose pivots depend on both.
//!
//! With `u = A e_j / A_jj`, a step replaces `A` by the Schur complement `A − A_jj u uᵀ`, and `B` by
//! `(I − u e_jᵀ) B (I − e_j uᵀ) = B − u vᵀ − v uᵀ` with `v = B e_j − ½ B_jj u`. Its value is `B_jj / A_jj`. Steps are
//! gathered in panels, so that nearly all of the 2 n³ operations of all n steps are matrix products.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use super::gram::{product, threads_for};
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
    /// The next of `left`, as its place there. `value` is a function of that place; the first of equal values is taken.
    fn place(self, n_done: usize, left: &[usize], value: impl Fn(usize) -> f64) -> usize {
        let best = |is_better: fn(f64, f64) -> bool| {
            let better = |best: usize, at: usize| if is_better(value(at), value(best)) { at } else { best };
            (1..left.len()).fold(0, better)
        };
        match self {
            Self::Largest => best(|a, b| a > b),
            Self::Smallest => best(|a, b| a < b),
            Self::Given(order) => {
                left.iter().position(|&index| index == order[n_done]).expect("invariant: an order has every index once")
            }
        }
    }
}

/// One step: the index, and its value, at least 0.
pub type Step = (usize, f64);

/// The diagonals of both matrices, which every step updates.
struct Diagonals {
    a: Vec<f64>,
    b: Vec<f64>,
    first: Vec<f64>,
}

impl Diagonals {
    /// `B_jj / A_jj`; 0 where `A` has nothing left.
    fn value(&self, at: usize) -> f64 {
        if self.a[at] > VANISHED * self.first[at] { (self.b[at] / self.a[at]).max(0.0) } else { 0.0 }
    }

    fn keep(&mut self, left: &[usize]) {
        for values in [&mut self.a, &mut self.b, &mut self.first] {
            *values = left.iter().map(|&at| values[at]).collect();
        }
    }
}

/// Eliminates every index of two symmetric matrices (n, n), `A` positive semidefinite; returns the steps in order.
///
/// The bytes are the same at any number of threads.
///
/// # Panics
/// If the matrices differ in size.
pub fn eliminate(mut a: Mat<f64>, mut b: Mat<f64>, next: Next<'_>) -> Vec<Step> {
    let n = a.nrows();
    assert!(b.nrows() == n && a.ncols() == n && b.ncols() == n, "invariant: both matrices are (n, n)");
    let diagonal = |matrix: &Mat<f64>| -> Vec<f64> { (0..n).map(|i| matrix[(i, i)]).collect() };
    let mut diagonals = Diagonals { a: diagonal(&a), b: diagonal(&b), first: diagonal(&a) };
    let mut ids: Vec<usize> = (0..n).collect();
    let mut steps = Vec::with_capacity(n);
    while !ids.is_empty() {
        let size = ids.len();
        let mut panel = Panel::new(size, PANEL.min(size));
        let mut left: Vec<usize> = (0..size).collect(); // places in this panel's matrices
        while panel.len < panel.u.ncols() {
            let names: Vec<usize> =
                if let Next::Given(_) = next { left.iter().map(|&at| ids[at]).collect() } else { left.clone() };
            let place = next.place(steps.len(), &names, |i| diagonals.value(left[i]));
            let at = left.remove(place);
            steps.push((ids[at], diagonals.value(at)));
            panel.step(a.as_ref(), b.as_ref(), at, &mut diagonals);
        }
        if left.is_empty() {
            break;
        }
        panel.apply(&mut a, &mut b);
        (a, b) = (restricted(&a, &left), restricted(&b, &left));
        diagonals.keep(&left);
        ids = left.iter().map(|&at| ids[at]).collect();
    }
    steps
}

/// The rows and columns at `places`.
fn restricted(matrix: &Mat<f64>, places: &[usize]) -> Mat<f64> {
    Mat::from_fn(places.len(), places.len(), |i, j| matrix[(places[i], places[j])])
}

/// Steps whose updates are not yet applied: `A − U diag(ρ) Uᵀ` and `B − U Vᵀ − V Uᵀ`.
struct Panel {
    u: Mat<f64>,
    v: Mat<f64>,
    rho: Vec<f64>,
    len: usize,
}

impl Panel {
    fn new(n: usize, most: usize) -> Self {
        Self { u: Mat::zeros(n, most), v: Mat::zeros(n, most), rho: Vec::with_capacity(most), len: 0 }
    }

    /// Eliminates the index at this place.
    fn step(&mut self, a: MatRef<'_, f64>, b: MatRef<'_, f64>, at: usize, diagonals: &mut Diagonals) {
        let (n, t) = (a.nrows(), self.len);
        let mut column_a = a.subcols(at, 1).to_owned(); // (n, 1)
        let mut column_b = b.subcols(at, 1).to_owned();
        if t > 0 {
            let (u, v) = (self.u.as_ref().subcols(0, t), self.v.as_ref().subcols(0, t));
            let scaled = Mat::from_fn(t, 1, |i, _| self.rho[i] * u[(at, i)]);
            let of = |m: MatRef<'_, f64>| Mat::from_fn(t, 1, |i, _| m[(at, i)]);
            matmul(&mut column_a, Accum::Add, u, &scaled, -1.0, Par::Seq);
            matmul(&mut column_b, Accum::Add, u, of(v), -1.0, Par::Seq);
            matmul(&mut column_b, Accum::Add, v, of(u), -1.0, Par::Seq);
        }
        let rho = column_a[(at, 0)];
        let is_vanished = diagonals.a[at] <= VANISHED * diagonals.first[at] || rho <= 0.0;
        let rho = if is_vanished { 0.0 } else { rho };
        for i in 0..n {
            let u = if is_vanished { 0.0 } else { column_a[(i, 0)] / rho };
            let v = if is_vanished { 0.0 } else { column_b[(i, 0)] - 0.5 * column_b[(at, 0)] * u };
            (self.u[(i, t)], self.v[(i, t)]) = (u, v);
            diagonals.a[i] -= rho * u * u;
            diagonals.b[i] -= 2.0 * u * v;
        }
        self.rho.push(rho);
        self.len += 1;
    }

    /// Applies the updates of all steps.
    fn apply(&self, a: &mut Mat<f64>, b: &mut Mat<f64>) {
        let (n, t) = (self.u.nrows(), self.len);
        let (u, v) = (self.u.as_ref().subcols(0, t), self.v.as_ref().subcols(0, t));
        let scaled = Mat::from_fn(n, t, |i, j| self.rho[j] * u[(i, j)]);
        let threads = threads_for(n * n * t);
        matmul(a, Accum::Add, &scaled, u.transpose(), -1.0, threads);
        matmul(&mut *b, Accum::Add, u, v.transpose(), -1.0, threads);
        matmul(b, Accum::Add, v, u.transpose(), -1.0, threads);
    }
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
        let at = next.place(steps.len(), &ids, |at| values[at]);
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
