//! Fewer columns of a weight, with the least-squares refit of those that stay: how channels of a feed-forward layer, and
//! groups of heads, are chosen.
//!
//! For `W` (m, n), inputs of second moment `C` and output gradients of second moment `G`, keeping the columns S costs
//! `ε(S) = min_M tr(G E C Eᵀ)` with `E = W − M Sᵀ`. The best `M = W C_{:S} C_SS⁻¹` does not depend on `G`, and then
//! `ε(S) = tr(H R_S)`, with `H = Wᵀ G W` and the Schur complement `R_S = C − C_{:S} C_SS⁻¹ C_{S:}`. It has the unit of
//! the curves of [`super::low_rank`] in the same metric. Each way to choose gives a nested order, and one pass gives
//! the error at every width:
//!
//! - [`forward`]: pivoted Cholesky of `C`. The next column is the one that lowers ε most, `(R H R)_jj / R_jj`.
//! - [`backward`]: optimal brain surgery (Hassibi & Stork 1993; as in ZipLM, Kurtic et al. 2023, and OSSCAR, Meng et al.
//!   2024). The column that goes is the one that raises ε least, `(Mᵀ G M)_jj / (C_SS⁻¹)_jj`.
//! - [`by_scores`]: the order of scores that other methods define, [`leverage`], [`wanda_sp`] and
//!   [`lorap`].
//!
//! A run of columns that stay or go together is as easy: quotients become `tr(D_gg⁻¹ N_gg)`.

use faer::{Mat, MatRef};

use super::metric::{Metric, MetricPair};
use crate::linalg::{self, Next, Step};

/// An input form that is not positive definite gets this share of its mean diagonal on the diagonal.
const FLOOR: f64 = 1e-8;

/// The columns of a weight, in a metric.
#[derive(Debug)]
pub struct Columns {
    /// `C` (n, n), positive definite.
    input: Mat<f64>,
    /// `H = Wᵀ G W` (n, n).
    image: Mat<f64>,
    /// Columns that stay or go together: adjacent ones, `run` at a time.
    run: usize,
}

/// An order of columns, or of runs of them, with the error at every number of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Narrowing {
    /// The most important first.
    pub order: Vec<usize>,
    /// Squared error if the first k of `order` stay, for k from 0 to all, which err nothing.
    pub errors: Vec<f64>,
}

impl Narrowing {
    /// From steps that keep one after another.
    fn kept(steps: &[Step]) -> Self {
        let order = steps.iter().map(|(index, _)| *index).collect();
        // Summed from the end, so that small errors keep their digits.
        let mut errors = vec![0.0];
        steps.iter().rev().for_each(|(_, gain)| errors.push(errors[errors.len() - 1] + gain));
        errors.reverse();
        Self { order, errors }
    }

    /// From steps that drop one after another.
    fn dropped(steps: &[Step]) -> Self {
        let reversed: Vec<Step> = steps.iter().rev().copied().collect();
        Self::kept(&reversed)
    }

    /// The first `count` of the order, in that order.
    pub fn leading(&self, count: usize) -> Vec<usize> {
        self.order[..count].to_vec()
    }

    /// The first `count` of the order, ascending.
    pub fn first(&self, count: usize) -> Vec<usize> {
        let mut kept = self.order[..count].to_vec();
        kept.sort_unstable();
        kept
    }
}

impl Columns {
    /// The columns of `weight` (m, n), in runs of `run`.
    ///
    /// # Panics
    /// If the columns are not whole runs.
    pub fn new(weight: MatRef<'_, f64>, metric: MetricPair<'_>, run: usize) -> Self {
        let n = weight.ncols();
        assert!(n.is_multiple_of(run), "invariant: {n} columns in runs of {run}");
        let half = metric.output.times(weight.transpose()); // Wᵀ G (n, m)
        let image = linalg::product_symmetric(half.as_ref(), weight);
        Self { input: input_form(metric.input, n), image, run }
    }

    fn eliminate(&self, a: Mat<f64>, b: Mat<f64>, next: Next<'_>) -> Vec<Step> {
        match self.run {
            1 => linalg::eliminate(a, b, next),
            run => linalg::eliminate_runs(a, b, run, next),
        }
    }

    /// `C` and `C H C`.
    fn forms_to_keep(&self) -> (Mat<f64>, Mat<f64>) {
        let half = linalg::product(self.input.as_ref(), self.image.as_ref());
        (self.input.clone(), linalg::product_symmetric(half.as_ref(), self.input.as_ref()))
    }

    /// `C⁻¹` (n, n).
    fn inverse(&self) -> Mat<f64> {
        linalg::inverse_positive(self.input.as_ref()).expect("invariant: the form is positive definite")
    }
}

/// The form of a metric (n, n), positive definite.
pub fn input_form(metric: &Metric, n: usize) -> Mat<f64> {
    positive_definite(metric.to_dense().unwrap_or_else(|| {
        let diagonal = metric.to_diagonal(n);
        Mat::from_fn(n, n, |i, j| if i == j { diagonal[i] } else { 0.0 })
    }))
}

/// A symmetric form (n, n), with more on its diagonal if it is not positive definite.
pub fn positive_definite(mut form: Mat<f64>) -> Mat<f64> {
    let n = form.nrows();
    if linalg::cholesky(form.as_ref()).is_none() {
        let mean = (0..n).map(|i| form[(i, i)]).sum::<f64>() / n.max(1) as f64;
        (0..n).for_each(|i| form[(i, i)] += FLOOR * mean);
    }
    form
}

/// The order in which columns lower the error most.
pub fn forward(columns: &Columns) -> Narrowing {
    let (a, b) = columns.forms_to_keep();
    Narrowing::kept(&columns.eliminate(a, b, Next::Largest))
}

/// The order in which columns, taken away from the end, raise the error least.
pub fn backward(columns: &Columns) -> Narrowing {
    Narrowing::dropped(&columns.eliminate(columns.inverse(), columns.image.clone(), Next::Smallest))
}

/// The squared error of leaving out each run alone, after all others are refitted: `tr((C⁻¹)_gg⁻¹ H_gg)`.
pub fn alone(columns: &Columns) -> Vec<f64> {
    linalg::values_of_runs(&columns.inverse(), &columns.image, columns.run)
}

/// The order of `scores` (n), largest first; a run has the sum of its columns.
pub fn by_scores(columns: &Columns, scores: &[f64]) -> Narrowing {
    let scores: Vec<f64> = scores.chunks(columns.run).map(|run| run.iter().sum()).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&i, &j| scores[j].total_cmp(&scores[i]));
    let (a, b) = columns.forms_to_keep();
    Narrowing::kept(&columns.eliminate(a, b, Next::Given(&order)))
}

/// Ridge leverage `[C (C + λ I)⁻¹]_jj` (n), for an input form that is damped by λ already; up to a constant factor
/// (MoDeGPT, Lin et al. 2025, algorithm 1).
pub fn leverage(columns: &Columns) -> Vec<f64> {
    let inverse = columns.inverse();
    (0..inverse.nrows()).map(|j| -inverse[(j, j)]).collect()
}

/// `Σ_i |W_ij| ‖x_j‖` (n) (Wanda-sp: An et al. 2024, after Sun et al. 2024).
pub fn wanda_sp(columns: &Columns, weight: MatRef<'_, f64>) -> Vec<f64> {
    let column = |j: usize| weight.col(j).iter().map(|v| v.abs()).sum::<f64>();
    (0..weight.ncols()).map(|j| column(j) * columns.input[(j, j)].sqrt()).collect()
}

/// The norms of the rows of `|W_ij| ‖x_j‖` (m) for `weight` (n, m), transposed: what LoRAP scores of the matrices that make
/// a channel.
pub fn norms_of_rows(transposed: MatRef<'_, f64>, input: &Metric) -> Vec<f64> {
    let diagonal = input.to_diagonal(transposed.nrows());
    let squares = |i: usize| transposed.col(i).iter().zip(&diagonal).map(|(v, d)| v * v * d).sum::<f64>();
    (0..transposed.ncols()).map(|i| squares(i).sqrt()).collect()
}

/// `‖x_j‖ ‖W_:j‖` (n) and the mean of what the other matrices of its run have, `of_makers`, one a run: products of weight and
/// input norms over all matrices of a channel, each by its 2-norm (LoRAP: Li et al. 2024, its score of channels).
pub fn lorap(columns: &Columns, weight: MatRef<'_, f64>, of_makers: &[f64]) -> Vec<f64> {
    let own = |j: usize| weight.col(j).squared_norm_l2().sqrt() * columns.input[(j, j)].sqrt();
    (0..weight.ncols()).map(|j| own(j) + of_makers[j / columns.run] / columns.run as f64).collect()
}

/// `W C_{:S} C_SS⁻¹` (m, |S|): the kept columns, refitted to take up what the others did.
///
/// `input` is [`input_form`]; the columns of the result are in the order of `kept`.
pub fn refit(weight: MatRef<'_, f64>, input: MatRef<'_, f64>, kept: &[usize]) -> Mat<f64> {
    let n = input.nrows();
    let beside = Mat::from_fn(n, kept.len(), |i, j| input[(i, kept[j])]);
    let own = Mat::from_fn(kept.len(), kept.len(), |i, j| input[(kept[i], kept[j])]);
    let (upper, _) =
        linalg::inverse_cholesky(own.as_ref()).expect("invariant: a part of a positive definite form is one");
    let right = linalg::product(weight, beside.as_ref()); // W C_{:S} (m, |S|)
    linalg::product(linalg::product(right.as_ref(), upper.transpose()).as_ref(), upper.as_ref())
}

#[cfg(test)]
mod tests;
