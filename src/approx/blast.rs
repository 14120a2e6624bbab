//! Matrices of blocks that share their factors: block (i, j) of b² is `U_i diag(s_ij) V_jᵀ` (BLAST, Lee et al. 2024,
//! arXiv 2410.21262).
//!
//! With `U` (m, r) and `V` (n, r) in b slices of rows each, r (m + n + b²) numbers describe a matrix whose rank may be
//! b r. `tr(G E C Eᵀ)` is minimized by least squares in the slices of `s`, `U` and `V` one after another, which never
//! raise it, extrapolated by Nesterov's weights with a restart where that does (Mitchell, Ye & De Sterck 2020). Every
//! rank is a fit of its own.
//!
//! A sweep takes 8 m n r + 2 (m n² + m² n) + b r² (m + n) multiplications and a few more, in f32: the gradient `G E C` is
//! kept up to date in slices, and errors of solves in f32 only shorten a step, because what follows sees its result.

mod factors;

use std::ops::Range;

use faer::{Mat, MatRef};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

pub use self::factors::BlockFactors;
use self::factors::{add_times_diagonal, block, column_products, rows, slice, times_diagonal};
use super::low_rank::{self, LowRank};
use super::metric::{Metric, MetricPair};
use crate::linalg::{self, LinalgError};

/// Most sweeps of a fit. Near the 60th a sweep gained less than half a percent on matrices of SmolLM2-135M
/// (docs/results.md, section 22).
const MOST_SWEEPS: usize = 60;
/// A fit ends when this many sweeps gain less than [`SMALL_GAIN`] of the error, or too little for the limit if all went on so.
const LAST_SWEEPS: usize = 5;
const SMALL_GAIN: f64 = 0.005;
/// Added to the diagonal of the forms that are inverted, as a share of its mean: they may be singular in f32.
const RIDGE: f64 = 1e-6;

/// Fits blocks, `count` by `count` of this rank, to a `target` (m, n) whose sides `count` divides, and returns them with
/// their squared error in the metric; `None` if that will not fall below `limit`.
///
/// # Errors
/// See [`LinalgError`].
pub fn fit(
    target: MatRef<'_, f64>,
    metric: MetricPair<'_>,
    (count, rank): (usize, usize),
    limit: f64,
) -> Result<Option<(BlockFactors, f64)>, LinalgError> {
    let pair = low_rank::decompose(target, metric, rank)?.truncate(target, rank);
    let problem = Problem::new(target, metric, count)?;
    let mut now = problem.sweep(started(pair, target.shape(), count))?;
    let mut before = now.0.clone();
    let (mut errors, mut since) = (vec![now.1], 1);
    while errors.len() < MOST_SWEEPS {
        let share = since as f32 / (since + 3) as f32;
        let mut after = problem.sweep(now.0.extrapolated(&before, share))?;
        since += 1;
        if after.1.is_nan() || after.1 > now.1 {
            after = problem.sweep(now.0.clone())?;
            since = 1;
        }
        if after.1.is_nan() || after.1 > now.1 {
            break; // Nothing is left to gain in f32.
        }
        before = std::mem::replace(&mut now, after).0;
        errors.push(now.1);
        let Some(at) = errors.len().checked_sub(1 + LAST_SWEEPS) else { continue };
        let (gain, n_left) = (errors[at] - now.1, (MOST_SWEEPS - errors.len()) as f64);
        if gain < SMALL_GAIN * errors[at] || now.1 - gain * n_left / LAST_SWEEPS as f64 >= limit {
            break;
        }
    }
    Ok((now.1 < limit).then(|| (now.0.balanced(), now.1)))
}

/// Multiplications of a fit with all of its sweeps.
pub fn n_multiplications((m, n): (usize, usize), count: usize, rank: usize) -> f64 {
    let [m, n, b, r] = [m, n, count, rank].map(|n| n as f64);
    MOST_SWEEPS as f64 * (8.0 * m * n * r + 2.0 * (m + n) * m * n + b * r * r * (m + n))
}

/// Factors as blocks with drawn `s`. All `s` the same would be nearly a saddle, which the first sweeps hardly leave.
fn started(LowRank { rank, b, a }: LowRank, (m, n): (usize, usize), count: usize) -> BlockFactors {
    let mut generator = ChaCha8Rng::seed_from_u64(0);
    // Uniform with variance 1.
    let mut draw = || (f64::from(generator.next_u32()) / f64::from(u32::MAX) - 0.5) as f32 * 12f32.sqrt();
    let s = (0..count * count * rank).map(|_| draw()).collect();
    let u = Mat::from_fn(m, rank, |i, k| b[i * rank + k]);
    let v = Mat::from_fn(n, rank, |j, k| a[k * n + j]);
    BlockFactors { count, u, v, s }
}

/// A target and its metric, in f32.
struct Problem {
    count: usize,
    target: Mat<f32>,
    /// `G` (m, m).
    output: Mat<f32>,
    /// `C` (n, n).
    input: Mat<f32>,
    /// The inverses of the diagonal blocks of `G`.
    output_inverses: Vec<Mat<f32>>,
    /// The same of `C`.
    input_inverses: Vec<Mat<f32>>,
}

/// What a slice of rows or of columns needs of the other side: `C V_j` (n, r), and `V_lᵀ C_lj V_j` (r, r) in the order
/// (l, j).
struct Images {
    images: Vec<Mat<f32>>,
    between: Vec<Mat<f32>>,
}

impl Images {
    /// Of a `part` (n, r) in its `form` (n, n).
    fn new(part: &Mat<f32>, form: &Mat<f32>, count: usize) -> Self {
        let slices: Vec<Range<usize>> = (0..count).map(|at| slice(part.nrows(), count, at)).collect();
        let image = |own: &Range<usize>| {
            linalg::product_f32(form.as_ref().subcols(own.start, own.len()), rows(part, own.clone()))
        };
        let images: Vec<Mat<f32>> = slices.iter().map(image).collect();
        let pairs = slices.iter().flat_map(|own| images.iter().map(move |image| (own.clone(), image)));
        let between =
            pairs.map(|(own, image)| linalg::product_f32(rows(part, own.clone()).transpose(), rows(image, own)));
        let between = between.collect();
        Self { images, between }
    }

    /// `Σ_lj diag(s_l) V_lᵀ C_lj V_j diag(s_j)` (r, r).
    fn normal(&self, scales: &[&[f32]]) -> Mat<f32> {
        let rank = scales[0].len();
        let mut normal = Mat::<f32>::zeros(rank, rank);
        for (l, left) in scales.iter().enumerate() {
            for (j, right) in scales.iter().enumerate() {
                let between = &self.between[l * scales.len() + j];
                for (k, column) in normal.col_iter_mut().enumerate() {
                    let values = column.iter_mut().zip(between.col(k).iter()).zip(*left);
                    values.for_each(|((sum, value), left)| *sum += left * value * right[k]);
                }
            }
        }
        normal
    }

    /// `Σ_j C V_j diag(s_j)` (n, r).
    fn mixed(&self, scales: &[&[f32]]) -> Mat<f32> {
        let mut mixed = times_diagonal(self.images[0].as_ref(), scales[0]);
        for (image, scales) in self.images.iter().zip(scales).skip(1) {
            add_times_diagonal(&mut mixed, image.as_ref(), scales);
        }
        mixed
    }
}

impl Problem {
    fn new(target: MatRef<'_, f64>, metric: MetricPair<'_>, count: usize) -> Result<Self, LinalgError> {
        let (m, n) = target.shape();
        let (output, input) = (dense(metric.output, m), dense(metric.input, n));
        let inverses = |form: &Mat<f32>| {
            let one = |at: usize| {
                let own = slice(form.nrows(), count, at);
                inverse(block(form, own.clone(), own))
            };
            (0..count).map(one).collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            count,
            target: Mat::from_fn(m, n, |i, j| target[(i, j)] as f32),
            output_inverses: inverses(&output)?,
            input_inverses: inverses(&input)?,
            output,
            input,
        })
    }

    /// The next values, with columns of `U` and `V` of norm 1, and their squared error.
    fn sweep(&self, mut blast: BlockFactors) -> Result<(BlockFactors, f64), LinalgError> {
        let error = &self.target - blast.product();
        let half = linalg::product_f32(error.as_ref(), self.input.as_ref());
        let mut gradient = linalg::product_f32(self.output.as_ref(), half.as_ref()); // G E C
        drop((error, half));
        let inputs = Images::new(&blast.v, &self.input, self.count);
        for i in 0..self.count {
            self.move_rows(&mut blast, &mut gradient, &inputs, i)?;
        }
        drop(inputs);
        let outputs = Images::new(&blast.u, &self.output, self.count);
        for j in 0..self.count {
            self.move_columns(&mut blast, &mut gradient, &outputs, j)?;
        }
        let error = &self.target - blast.product();
        let squared: f64 = column_products(gradient.as_ref(), error.as_ref()).iter().sum();
        Ok((blast.normalized(), squared))
    }

    /// The best `s_i`, one `s_ij` after another and twice around, and then the best `U_i`.
    fn move_rows(
        &self,
        blast: &mut BlockFactors,
        gradient: &mut Mat<f32>,
        inputs: &Images,
        i: usize,
    ) -> Result<(), LinalgError> {
        let own = blast.row_slice(i);
        let form = block(&self.output, own.clone(), own.clone());
        let mut moved = self.rescale(blast, gradient, inputs, i)?; // what it adds to `P C` in these rows
        let mut rest = rows(gradient, own.clone()).to_owned();
        linalg::add_product_f32(rest.as_mut(), -1.0, form, moved.as_ref());
        let scales: Vec<&[f32]> = (0..self.count).map(|j| blast.scales(i, j)).collect();
        let mut slope = Mat::zeros(own.len(), blast.rank());
        for (j, scales) in scales.iter().enumerate() {
            let columns = blast.column_slice(j);
            let product =
                linalg::product_f32(rest.as_ref().subcols(columns.start, columns.len()), rows(&blast.v, columns));
            add_times_diagonal(&mut slope, product.as_ref(), scales);
        }
        let inverse = inverse(inputs.normal(&scales).as_ref())?;
        let change = linalg::product_f32(self.output_inverses[i].as_ref(), slope.as_ref());
        let change = linalg::product_f32(change.as_ref(), inverse.as_ref());
        linalg::add_product_f32(moved.as_mut(), 1.0, change.as_ref(), inputs.mixed(&scales).transpose());
        let mut u = blast.u.as_mut().subrows_mut(own.start, own.len());
        u += &change;
        let columns = self.output.as_ref().subcols(own.start, own.len());
        linalg::add_product_f32(gradient.as_mut(), -1.0, columns, moved.as_ref());
        Ok(())
    }

    /// Moves `s_i`; returns what that adds to the rows of slice i of the product times `C`, (m / b, n).
    fn rescale(
        &self,
        blast: &mut BlockFactors,
        gradient: &Mat<f32>,
        inputs: &Images,
        i: usize,
    ) -> Result<Mat<f32>, LinalgError> {
        let (own, count, rank) = (blast.row_slice(i), self.count, blast.rank());
        let u = rows(&blast.u, own.clone());
        let image = linalg::product_f32(block(&self.output, own.clone(), own.clone()), u);
        let inner = linalg::product_f32(u.transpose(), image.as_ref()); // U_iᵀ G_ii U_i
        let slope = |j: usize| {
            let columns = blast.column_slice(j);
            let product = linalg::product_f32(block(gradient, own.clone(), columns.clone()), rows(&blast.v, columns));
            column_products(u, product.as_ref())
        };
        let mut slopes: Vec<Vec<f64>> = (0..count).map(slope).collect();
        let own_inverse = |j: usize| {
            let between = &inputs.between[j * count + j];
            inverse(Mat::from_fn(rank, rank, |k, c| inner[(k, c)] * between[(k, c)]).as_ref())
        };
        let inverses = (0..count).map(own_inverse).collect::<Result<Vec<_>, _>>()?;
        let mut change = vec![vec![0f32; rank]; count];
        for j in (0..count).chain(0..count) {
            let along = Mat::from_fn(rank, 1, |k, _| slopes[j][k] as f32);
            let step = linalg::product_f32(inverses[j].as_ref(), along.as_ref());
            for (l, slopes) in slopes.iter_mut().enumerate() {
                let between = &inputs.between[l * count + j];
                let columns = inner.col_iter().zip(between.col_iter()).zip(step.col(0).iter());
                for ((inner, between), &step) in columns {
                    let less = inner.iter().zip(between.iter()).map(|(x, y)| f64::from(x * y * step));
                    slopes.iter_mut().zip(less).for_each(|(slope, less)| *slope -= less);
                }
            }
            change[j].iter_mut().zip(step.col(0).iter()).for_each(|(sum, step)| *sum += step);
        }
        for (s, change) in blast.s[i * count * rank..][..count * rank].iter_mut().zip(change.iter().flatten()) {
            *s += change;
        }
        let change: Vec<&[f32]> = change.iter().map(Vec::as_slice).collect();
        Ok(linalg::product_f32(u, inputs.mixed(&change).transpose()))
    }

    /// The best `V_j`.
    fn move_columns(
        &self,
        blast: &mut BlockFactors,
        gradient: &mut Mat<f32>,
        outputs: &Images,
        j: usize,
    ) -> Result<(), LinalgError> {
        let own = blast.column_slice(j);
        let scales: Vec<&[f32]> = (0..self.count).map(|i| blast.scales(i, j)).collect();
        let columns = gradient.as_ref().subcols(own.start, own.len());
        let slope = linalg::product_f32(columns.transpose(), blast.left(j).as_ref()); // (n / b, r)
        let inverse = inverse(outputs.normal(&scales).as_ref())?;
        let change = linalg::product_f32(self.input_inverses[j].as_ref(), slope.as_ref());
        let change = linalg::product_f32(change.as_ref(), inverse.as_ref());
        let mixed = outputs.mixed(&scales); // G L_j
        let moved = linalg::product_f32(change.transpose(), self.input.as_ref().subrows(own.start, own.len()));
        linalg::add_product_f32(gradient.as_mut(), -1.0, mixed.as_ref(), moved.as_ref());
        let mut v = blast.v.as_mut().subrows_mut(own.start, own.len());
        v += &change;
        Ok(())
    }
}

/// The form of a metric (n, n).
fn dense(metric: &Metric, n: usize) -> Mat<f32> {
    match metric.to_dense() {
        Some(form) => Mat::from_fn(n, n, |i, j| form[(i, j)] as f32),
        None => {
            let diagonal = metric.to_diagonal(n);
            Mat::from_fn(n, n, |i, j| if i == j { diagonal[i] as f32 } else { 0.0 })
        }
    }
}

/// The inverse of a form (n, n) that may be singular within rounding: the ridge grows until there is one.
///
/// # Errors
/// It is not finite.
fn inverse(form: MatRef<'_, f32>) -> Result<Mat<f32>, LinalgError> {
    let n = form.nrows();
    let mean = (0..n).map(|i| f64::from(form[(i, i)])).sum::<f64>() / n.max(1) as f64;
    if !mean.is_finite() {
        return Err(LinalgError::NonFinite { n });
    }
    let mut share = RIDGE;
    while share < 1.0 {
        let ridge = share * mean.max(f64::MIN_POSITIVE);
        let wide = Mat::from_fn(n, n, |i, j| f64::from(form[(i, j)]) + if i == j { ridge } else { 0.0 });
        if let Some(inverse) = linalg::inverse_positive(wide.as_ref()) {
            return Ok(Mat::from_fn(n, n, |i, j| inverse[(i, j)] as f32));
        }
        share *= 10.0;
    }
    Err(LinalgError::NonFinite { n })
}

#[cfg(test)]
mod tests;
