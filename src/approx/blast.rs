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

use std::ops::Range;

use faer::{Mat, MatRef};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::low_rank::{self, LowRank};
use super::metric::{Metric, MetricPair};
use crate::linalg::{self, LinalgError};

/// Most sweeps of a fit. From the 60th on a sweep gained less than half a percent on matrices of SmolLM2-135M.
const MOST_SWEEPS: usize = 60;
/// A fit ends when this many sweeps together gain less than [`SMALL_GAIN`] of the error.
const LAST_SWEEPS: usize = 5;
const SMALL_GAIN: f64 = 0.005;
/// Added to the diagonal of the forms that are inverted, as a share of its mean: they may be singular in f32.
const RIDGE: f64 = 1e-6;

/// The values of a matrix of blocks.
#[derive(Debug, Clone)]
pub struct BlockFactors {
    /// Slices of rows and of columns.
    pub count: usize,
    /// `U` (m, r).
    pub u: Mat<f32>,
    /// `V` (n, r).
    pub v: Mat<f32>,
    /// `s` (b², r), row-major, with rows in the order (i, j).
    pub s: Vec<f32>,
}

/// Slice `at` of `count` slices of a length that they divide.
fn slice(len: usize, count: usize, at: usize) -> Range<usize> {
    at * len / count..(at + 1) * len / count
}

/// The rows `range` of a matrix.
fn rows(x: &Mat<f32>, range: Range<usize>) -> MatRef<'_, f32> {
    x.as_ref().subrows(range.start, range.len())
}

/// A block of a matrix.
fn block(x: &Mat<f32>, rows: Range<usize>, columns: Range<usize>) -> MatRef<'_, f32> {
    x.as_ref().submatrix(rows.start, columns.start, rows.len(), columns.len())
}

/// `x diag(scales)`.
fn times_diagonal(x: MatRef<'_, f32>, scales: &[f32]) -> Mat<f32> {
    let mut scaled = x.to_owned();
    for (column, &scale) in scaled.col_iter_mut().zip(scales) {
        column.iter_mut().for_each(|value| *value *= scale);
    }
    scaled
}

/// Adds `x diag(scales)` to a sum of the same shape.
fn add_times_diagonal(sum: &mut Mat<f32>, x: MatRef<'_, f32>, scales: &[f32]) {
    for ((sum, column), &scale) in sum.col_iter_mut().zip(x.col_iter()).zip(scales) {
        sum.iter_mut().zip(column.iter()).for_each(|(sum, value)| *sum += value * scale);
    }
}

/// `Σ_i x_ik y_ik` for every column k.
fn column_products(x: MatRef<'_, f32>, y: MatRef<'_, f32>) -> Vec<f64> {
    let one = |(x, y): (&f32, &f32)| f64::from(*x) * f64::from(*y);
    x.col_iter().zip(y.col_iter()).map(|(x, y)| x.iter().zip(y.iter()).map(one).sum()).collect()
}

impl BlockFactors {
    /// r.
    pub fn rank(&self) -> usize {
        self.u.ncols()
    }

    /// `s_ij` (r).
    fn scales(&self, i: usize, j: usize) -> &[f32] {
        &self.s[(i * self.count + j) * self.rank()..][..self.rank()]
    }

    fn row_slice(&self, i: usize) -> Range<usize> {
        slice(self.u.nrows(), self.count, i)
    }

    fn column_slice(&self, j: usize) -> Range<usize> {
        slice(self.v.nrows(), self.count, j)
    }

    /// The slices of `U` times `diag(s_ij)`, one below another (m, r): the left part of the columns of slice j.
    pub fn left(&self, j: usize) -> Mat<f32> {
        let mut left = self.u.clone();
        for i in 0..self.count {
            let own = self.row_slice(i);
            for (column, &scale) in left.col_iter_mut().zip(self.scales(i, j)) {
                column.subrows_mut(own.start, own.len()).iter_mut().for_each(|value| *value *= scale);
            }
        }
        left
    }

    /// The matrix (m, n).
    pub fn product(&self) -> Mat<f32> {
        let mut product = Mat::zeros(self.u.nrows(), self.v.nrows());
        for j in 0..self.count {
            let own = self.column_slice(j);
            let columns = product.as_mut().subcols_mut(own.start, own.len());
            linalg::add_product_f32(columns, 1.0, self.left(j).as_ref(), rows(&self.v, own).transpose());
        }
        product
    }

    /// The same matrix, with columns of `U` and `V` of norm 1.
    fn normalized(mut self) -> Self {
        let sizes = [&self.u, &self.v].map(|part| column_products(part.as_ref(), part.as_ref()));
        let root = |square: &f64| if *square > 0.0 { square.sqrt() as f32 } else { 1.0 };
        let [of_u, of_v] = sizes.map(|squares| squares.iter().map(root).collect::<Vec<f32>>());
        let inverse = |sizes: &[f32]| sizes.iter().map(|size| 1.0 / size).collect::<Vec<f32>>();
        self.u = times_diagonal(self.u.as_ref(), &inverse(&of_u));
        self.v = times_diagonal(self.v.as_ref(), &inverse(&of_v));
        for scales in self.s.chunks_exact_mut(of_u.len().max(1)) {
            scales.iter_mut().zip(of_u.iter().zip(&of_v)).for_each(|(s, (u, v))| *s *= u * v);
        }
        self
    }

    /// The same matrix, with columns of `s` of mean square 1 and what is left shared by `U` and `V`: steps of training are
    /// of one size for all values.
    fn balanced(mut self) -> Self {
        let (rank, n_blocks) = (self.rank(), (self.count * self.count) as f32);
        let square = |k: usize| self.s.iter().skip(k).step_by(rank).map(|s| s * s).sum::<f32>() / n_blocks;
        let root = |k: usize| Some(square(k).sqrt().sqrt()).filter(|root| *root > 0.0).unwrap_or(1.0);
        let roots: Vec<f32> = (0..rank).map(root).collect();
        self.u = times_diagonal(self.u.as_ref(), &roots);
        self.v = times_diagonal(self.v.as_ref(), &roots);
        for scales in self.s.chunks_exact_mut(rank.max(1)) {
            scales.iter_mut().zip(&roots).for_each(|(s, root)| *s /= root * root);
        }
        self
    }

    /// `self + share (self − before)`, part by part.
    fn extrapolated(&self, before: &Self, share: f32) -> Self {
        let moved = |now: &Mat<f32>, before: &Mat<f32>| now + (now - before) * faer::Scale(share);
        let s = self.s.iter().zip(&before.s).map(|(now, before)| now + share * (now - before)).collect();
        Self { count: self.count, u: moved(&self.u, &before.u), v: moved(&self.v, &before.v), s }
    }
}

/// Fits blocks, `count` by `count` of this rank, to a `target` (m, n) whose sides `count` divides, and returns them with
/// their squared error in the metric.
///
/// # Errors
/// See [`LinalgError`].
pub fn fit(
    target: MatRef<'_, f64>,
    metric: MetricPair<'_>,
    count: usize,
    rank: usize,
) -> Result<(BlockFactors, f64), LinalgError> {
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
        let earlier = errors.len().checked_sub(1 + LAST_SWEEPS).map(|at| errors[at]);
        if earlier.is_some_and(|earlier| now.1 > (1.0 - SMALL_GAIN) * earlier) {
            break;
        }
    }
    Ok((now.0.balanced(), now.1))
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
        let form = block(&self.output, own.clone(), own.clone()).to_owned();
        let mut moved = self.rescale(blast, gradient, inputs, i)?; // what it adds to `P C` in these rows
        let mut rest = rows(gradient, own.clone()).to_owned();
        linalg::add_product_f32(rest.as_mut(), -1.0, form.as_ref(), moved.as_ref());
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
        let u = rows(&blast.u, own.clone()).to_owned();
        let image = linalg::product_f32(block(&self.output, own.clone(), own.clone()), u.as_ref());
        let inner = linalg::product_f32(u.transpose(), image.as_ref()); // U_iᵀ G_ii U_i
        let slope = |j: usize| {
            let columns = blast.column_slice(j);
            let product = linalg::product_f32(block(gradient, own.clone(), columns.clone()), rows(&blast.v, columns));
            column_products(u.as_ref(), product.as_ref())
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
        Ok(linalg::product_f32(u.as_ref(), inputs.mixed(&change).transpose()))
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
