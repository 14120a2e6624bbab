//! Parts as a 16-bit float holds them: rounded with feedback, so that what rounding costs is close to what it costs a dense weight.
//!
//! Rows of `T` are thousands of coefficients long, and both their own errors and those of the pivot rows `P` come out multiplied
//! by their length. With `S = [I; T]`, so that the matrix is `S P`, and the metric `tr(G E C Eᵀ)`:
//!
//! - Pivots are swapped until no coefficient exceeds 1.2: rounding `P` with feedback costs the geometric mean of the spectrum of
//!   `Sᵀ G S`, and that is least where the volume of the pivots is largest.
//! - `T` is rounded column by column ([`feed_back`]) in the metric `P C Pᵀ`, then value by value ([`descend`]).
//! - `P` is fitted to the rounded `T̂`, `P − X P` with `X = (Ŝᵀ G Ŝ)⁻¹ Ŝᵀ G (Ŝ − S)`: what a row of length t lost becomes
//!   smaller by √(1 + t²). `C` cancels.
//! - `P` is rounded row by row, likewise, in the metric `Ŝᵀ G Ŝ`.
//!
//! Of factors, `B` is rounded to nearest (in their gauge both Grams are diagonal, so that feedback has nothing to give), and `A`
//! fitted to it and rounded. Errors are second moments: those of values that were rounded apart are taken for independent.

use faer::{Mat, MatRef};

use super::low_rank::LowRank;
use super::metric::{Metric, mean_diagonal, shifted};
use super::pivot;
use crate::checkpoint::{Dtype, cast};
use crate::formats::Parts;
use crate::linalg::{self, RowSkeleton};
use crate::model::Layout;
use crate::quantize::{descend, feed_back};

/// Bound on the coefficients where they are rounded.
const TIGHT_BOUND: f64 = 1.2;

/// Share of its mean eigenvalue that is added to a metric of feedback: it costs a hundredth of what rounding to nearest does, and
/// keeps values that make up for others from growing.
const RIDGE: f64 = 1e-4;

/// Sweeps of coordinate descent after feedback: at most so many, and none after one that gained less than a share.
const N_SWEEPS: usize = 3;
const SMALL_GAIN: f64 = 0.05;

/// One side of the metric of a weight that rounding is measured in.
pub(super) enum Side<'a> {
    Whole(&'a Metric),
    /// The diagonal of a Gram that is too large to be worth its while. Of the pair it is known all the same: see [`Sides::grams`].
    Diagonal(Metric),
}

impl Side<'_> {
    fn metric(&self) -> &Metric {
        match self {
            Self::Whole(metric) => metric,
            Self::Diagonal(metric) => metric,
        }
    }
}

/// Both sides of the metric that a pair was made in.
pub(super) struct Sides<'a> {
    pub output: &'a Metric,
    pub input: Side<'a>,
    /// `λ_k` of the pair's terms: `Bᵀ G B` and `A C Aᵀ` are diagonal, and this is their product. Not asked for where both sides
    /// are whole, and the output side is no Gram.
    pub energies: &'a [f64],
}

/// Parts whose values are all of the dtype, and the squared error of rounding in the metric.
#[derive(Debug, Clone)]
pub(super) struct Rounded {
    pub parts: Parts,
    pub squared_error: f64,
}

/// `Bᵀ G B` and `A C Aᵀ`, (r, r).
struct Grams {
    left: Mat<f64>,
    right: Mat<f64>,
}

impl Sides<'_> {
    /// The Grams of a pair `b_t` (r, m), `a` (r, n). That of a side which is large, or of which only the diagonal is at hand,
    /// follows from the other.
    fn grams(&self, b_t: MatRef<'_, f64>, a: MatRef<'_, f64>) -> Grams {
        let gram =
            |metric: &Metric, x: MatRef<'_, f64>| linalg::product_symmetric(metric.times(x).as_ref(), x.transpose());
        let dual = |gram: &Mat<f64>| {
            Mat::from_fn(gram.nrows(), gram.nrows(), |i, j| match gram[(i, i)] {
                size if i == j && size > 0.0 => self.energies[i] / size,
                _ => 0.0,
            })
        };
        match (&self.input, self.output) {
            (Side::Whole(input), Metric::Full(_)) => {
                let right = gram(input, a);
                Grams { left: dual(&right), right }
            }
            (Side::Whole(input), output) => Grams { left: gram(output, b_t), right: gram(input, a) },
            (Side::Diagonal(_), output) => {
                let left = gram(output, b_t);
                Grams { right: dual(&left), left }
            }
        }
    }
}

/// Lays out a pair of a matrix (m, n) in values of `dtype`.
pub(super) fn lay_out(
    layout: Layout,
    pair: &LowRank,
    shape: (usize, usize),
    sides: &Sides<'_>,
    dtype: Dtype,
) -> Rounded {
    match layout {
        Layout::Factors => factors(pair, shape, sides, dtype),
        Layout::Pivot => pivots(pair, shape, sides, dtype),
    }
}

/// Rounds to nearest; what overflows is left as it is, to be refused where it is written.
fn round(dtype: Dtype, values: &mut [f32]) {
    for value in values {
        let nearest = cast::nearest(dtype, *value);
        if nearest.is_finite() {
            *value = nearest;
        }
    }
}

fn rounded(dtype: Dtype, values: &[f32]) -> Vec<f32> {
    let mut values = values.to_vec();
    round(dtype, &mut values);
    values
}

/// `Σ_ij rows_i columns_j (x_ij − y_ij)²` of row-major matrices.
fn weighted_error(x: &[f32], y: &[f32], rows: &[f64], columns: &[f64]) -> f64 {
    let row = |(x, y): (&[f32], &[f32])| -> f64 {
        let squared = |((x, y), weight): ((&f32, &f32), &f64)| weight * (f64::from(*x) - f64::from(*y)).powi(2);
        x.iter().zip(y).zip(columns).map(squared).sum()
    };
    let width = columns.len().max(1);
    x.chunks_exact(width).zip(y.chunks_exact(width)).zip(rows).map(|(pair, weight)| weight * row(pair)).sum()
}

fn diagonal(matrix: &Mat<f64>) -> Vec<f64> {
    (0..matrix.nrows()).map(|i| matrix[(i, i)]).collect()
}

/// `tr(X Y)` of symmetric matrices.
fn trace_of_product(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
    x.col_iter().zip(y.col_iter()).map(|(x, y)| x.iter().zip(y.iter()).map(|(x, y)| x * y).sum::<f64>()).sum()
}

/// What a right part `A` becomes once its left part was rounded.
struct Fit {
    /// `A − X A` is the best that there is.
    x: Mat<f64>,
    /// `Ŝᵀ G Ŝ`.
    left: Mat<f64>,
    /// Squared error of the rounded left part with it.
    squared_error: f64,
}

impl Fit {
    /// Of a left part `S`, transposed (r, m), and by how much rounding moved it; with the Grams `Sᵀ G S` and that of the right
    /// part. None where the rounded one is singular.
    fn new(
        output: &Metric,
        left_t: MatRef<'_, f64>,
        moved_t: MatRef<'_, f64>,
        left: &Mat<f64>,
        right: &Mat<f64>,
    ) -> Option<Self> {
        let weighted = output.times(moved_t); // (Ŝ − S)ᵀ G
        let cross = linalg::product(weighted.as_ref(), left_t.transpose());
        let own = linalg::product_symmetric(weighted.as_ref(), moved_t.transpose());
        let left = left + &cross + cross.transpose() + &own;
        let image = cross + &own; // (Ŝ − S)ᵀ G Ŝ
        let shift = RIDGE * RIDGE * mean_diagonal(&left);
        let x = linalg::solve(shifted(left.clone(), shift).as_ref(), image.transpose())?;
        let gained = linalg::product_symmetric(image.as_ref(), x.as_ref());
        let squared_error = (trace_of_product(&own, right) - trace_of_product(&gained, right)).max(0.0);
        Some(Self { x, left, squared_error })
    }

    /// `A − X A`.
    fn of(&self, a: MatRef<'_, f64>) -> Mat<f64> {
        a - linalg::product(self.x.as_ref(), a)
    }
}

fn factors(pair: &LowRank, (m, n): (usize, usize), sides: &Sides<'_>, dtype: Dtype) -> Rounded {
    let rank = pair.rank;
    let b_t = linalg::transposed_from_row_major(&pair.b, m, rank); // (r, m)
    let a_t = linalg::transposed_from_row_major(&pair.a, rank, n); // (n, r)
    let grams = sides.grams(b_t.as_ref(), a_t.transpose());
    let b = rounded(dtype, &pair.b);
    let inputs = sides.input.metric().to_diagonal(n);
    let of_a = |a: &[f32], target: &[f32]| weighted_error(a, target, &diagonal(&grams.left), &inputs);
    let plain = || {
        let a = rounded(dtype, &pair.a);
        let of_b = weighted_error(&b, &pair.b, &sides.output.to_diagonal(m), &diagonal(&grams.right));
        let squared_error = of_b + of_a(&a, &pair.a);
        Rounded { parts: Parts::Factors { rank, b: b.clone().into(), a: a.into() }, squared_error }
    };
    let moved_t = linalg::transposed_from_row_major(&b, m, rank) - &b_t;
    let fit = Fit::new(sides.output, b_t.as_ref(), moved_t.as_ref(), &grams.left, &grams.right);
    let Some(fit) = fit else { return plain() };
    let target = linalg::to_row_major(fit.of(a_t.transpose()).as_ref());
    let a = rounded(dtype, &target);
    let squared_error = fit.squared_error + of_a(&a, &target);
    Rounded { parts: Parts::Factors { rank, b: b.into(), a: a.into() }, squared_error }
}

/// Rounds `weights` (rows, cols) in a `metric` (cols, cols) of the columns: with feedback, then by coordinate descent. With what
/// that costs each row in the metric. None where the metric has no factor.
fn columns_with_feedback(weights: &Mat<f64>, metric: &Mat<f64>, dtype: Dtype) -> Option<(Mat<f32>, Vec<f64>)> {
    let (rows, cols) = (weights.nrows(), weights.ncols());
    let order = by_weight(weights, metric);
    let shift = RIDGE * mean_diagonal(metric);
    let metric = Mat::from_fn(cols, cols, |i, j| metric[(order[i], order[j])] + if i == j { shift } else { 0.0 });
    let (upper, _) = linalg::inverse_cholesky(metric.as_ref())?;
    let upper = Mat::from_fn(cols, cols, |i, j| upper[(i, j)] as f32);
    let weights = Mat::from_fn(rows, cols, |i, j| weights[(i, order[j])] as f32);
    let (mut found, mut costs) = (weights.clone(), vec![0.0; rows]);
    let spend = |errors: &[f32]| {
        costs.iter_mut().zip(errors).for_each(|(cost, &error)| *cost += f64::from(error) * f64::from(error));
    };
    feed_back(found.as_mut(), upper.as_ref(), |_, column| round(dtype, column), spend);
    drop(upper);
    let metric = Mat::from_fn(cols, cols, |i, j| metric[(i, j)] as f32);
    for _ in 0..N_SWEEPS {
        let before: f64 = costs.iter().sum();
        descend(found.as_mut(), weights.as_ref(), metric.as_ref(), &mut costs, |_, column| round(dtype, column));
        costs.iter_mut().for_each(|cost| *cost = cost.max(0.0));
        if costs.iter().sum::<f64>() > (1.0 - SMALL_GAIN) * before {
            break;
        }
    }
    let mut result = Mat::zeros(rows, cols);
    for (&at, column) in order.iter().zip(found.col_iter()) {
        result.col_mut(at).copy_from(column);
    }
    costs.iter().all(|cost| cost.is_finite()).then_some((result, costs))
}

/// Columns by what rounding them to nearest costs, most first: it is done while most can still make up for it.
fn by_weight(weights: &Mat<f64>, metric: &Mat<f64>) -> Vec<usize> {
    let costs: Vec<f64> =
        weights.col_iter().enumerate().map(|(j, column)| metric[(j, j)] * column.squared_norm_l2()).collect();
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&i, &j| costs[j].total_cmp(&costs[i]).then(i.cmp(&j)));
    order
}

/// A pair as rows and coefficients, before anything is rounded.
struct Skeleton<'a> {
    rank: usize,
    shape: (usize, usize),
    sides: &'a Sides<'a>,
    rows: RowSkeleton,
    /// The pivot rows of `B`, (r, r).
    basis: Mat<f64>,
    /// `Aᵀ` (n, r).
    a_t: Mat<f64>,
    /// `Bᵀ G B`.
    of_basis: Mat<f64>,
    /// `P C Pᵀ`.
    right: Mat<f64>,
}

impl<'a> Skeleton<'a> {
    fn new(pair: &LowRank, (m, n): (usize, usize), sides: &'a Sides<'a>) -> Self {
        let rank = pair.rank;
        let b_t = linalg::transposed_from_row_major(&pair.b, m, rank); // (r, m)
        let a_t = linalg::transposed_from_row_major(&pair.a, rank, n); // (n, r)
        let rows = linalg::row_skeleton(b_t.transpose(), TIGHT_BOUND);
        let basis = Mat::from_fn(rank, rank, |i, k| b_t[(k, rows.pivots[i])]);
        let Grams { left, right } = sides.grams(b_t.as_ref(), a_t.transpose());
        let right = linalg::product(basis.as_ref(), right.as_ref());
        let right = linalg::product_symmetric(right.as_ref(), basis.transpose());
        Self { rank, shape: (m, n), sides, rows, basis, a_t, of_basis: left, right }
    }

    /// `Sᵀ` (r, m) of coefficients.
    fn left_t(&self, coefficients: &Mat<f64>) -> Mat<f64> {
        let mut left_t = Mat::zeros(self.rank, self.shape.0);
        for (place, &row) in self.rows.pivots.iter().enumerate() {
            left_t[(place, row)] = 1.0;
        }
        for (i, &row) in self.rows.others.iter().enumerate() {
            left_t.col_mut(row).copy_from(coefficients.row(i).transpose());
        }
        left_t
    }

    /// `Sᵀ G S = B_p⁻ᵀ (Bᵀ G B) B_p⁻¹`, or in the diagonal of `G` where the pivot rows are singular.
    fn left(&self) -> Mat<f64> {
        let of_basis = || {
            let half = linalg::solve(self.basis.transpose(), self.of_basis.as_ref())?;
            linalg::solve(self.basis.transpose(), half.transpose())
        };
        of_basis().unwrap_or_else(|| {
            let left_t = self.left_t(&self.rows.coefficients);
            linalg::product_symmetric(self.sides.output.times(left_t.as_ref()).as_ref(), left_t.transpose())
        })
    }

    fn parts(&self, pivots: Vec<f32>, coefficients: &Mat<f64>) -> Parts {
        Parts::Pivot {
            rank: self.rank,
            pivots: pivots.into(),
            coefficients: linalg::to_row_major(coefficients.as_ref()).into(),
            order: pivot::order(&self.rows.pivots, &self.rows.others),
        }
    }

    /// Weights of errors in the rows of `T`, and in the columns of `P`.
    fn weights(&self) -> (Vec<f64>, Vec<f64>) {
        let (outputs, inputs) = (self.sides.output.to_diagonal(self.shape.0), self.sides.input.metric());
        (self.rows.others.iter().map(|&row| outputs[row]).collect(), inputs.to_diagonal(self.shape.1))
    }

    /// Both parts rounded to nearest.
    fn plain(&self, dtype: Dtype) -> Rounded {
        let coefficients = linalg::to_row_major(self.rows.coefficients.as_ref());
        let pivots = linalg::to_row_major(linalg::product(self.basis.as_ref(), self.a_t.transpose()).as_ref());
        let (t, p) = (rounded(dtype, &coefficients), rounded(dtype, &pivots));
        let (outputs, inputs) = self.weights();
        let squared_error = weighted_error(&t, &coefficients, &outputs, &diagonal(&self.right))
            + weighted_error(&p, &pivots, &diagonal(&self.left()), &inputs);
        let t = linalg::transposed_from_row_major(&t, outputs.len(), self.rank);
        Rounded { parts: self.parts(p, &t.transpose().to_owned()), squared_error }
    }

    /// Both parts rounded with feedback; none where a metric has no factor.
    fn fed_back(&self, dtype: Dtype) -> Option<Rounded> {
        let (_, inputs) = self.weights();
        let (t, _) = columns_with_feedback(&self.rows.coefficients, &self.right, dtype)?;
        let coefficients = Mat::from_fn(t.nrows(), self.rank, |i, k| f64::from(t[(i, k)]));
        let mut moved_t = self.left_t(&coefficients);
        let left_t = self.left_t(&self.rows.coefficients);
        moved_t -= &left_t;
        let fit = Fit::new(self.sides.output, left_t.as_ref(), moved_t.as_ref(), &self.left(), &self.right)?;
        let targets = linalg::product(self.a_t.as_ref(), fit.of(self.basis.as_ref()).transpose()); // (n, r)
        let (p, costs) = columns_with_feedback(&targets, &fit.left, dtype)?;
        let pivots = p.col_iter().flat_map(|column| column.iter().copied()).collect();
        let of_pivots: f64 = costs.iter().zip(&inputs).map(|(cost, weight)| cost * weight).sum();
        Some(Rounded { parts: self.parts(pivots, &coefficients), squared_error: fit.squared_error + of_pivots })
    }
}

fn pivots(pair: &LowRank, shape: (usize, usize), sides: &Sides<'_>, dtype: Dtype) -> Rounded {
    let skeleton = Skeleton::new(pair, shape, sides);
    skeleton.fed_back(dtype).unwrap_or_else(|| skeleton.plain(dtype))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::low_rank::{self, Decomposition};
    use crate::compress::metric::MetricPair;

    const DTYPE: Dtype = Dtype::BF16;

    fn noise(rows: usize, cols: usize, seed: u64) -> Mat<f64> {
        let mut state = seed;
        Mat::from_fn(rows, cols, |_, _| {
            // SplitMix64; the sum of four is close enough to a normal value.
            let mut next = || {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1u64 << 53) as f64 - 0.5
            };
            next() + next() + next() + next()
        })
    }

    /// Samples of `n` features whose spectrum falls, with one far above the others.
    fn samples(n: usize, seed: u64) -> Mat<f64> {
        let mixed = noise(3 * n, n, seed) * linalg::orthonormal_columns(noise(n, n, seed + 1)).transpose();
        let decay = |j: usize| if j == 0 { 8.0 } else { (1.0 + j as f64).powf(-0.5) };
        let faded = Mat::from_fn(3 * n, n, |i, j| mixed[(i, j)] * decay(j));
        faded * linalg::orthonormal_columns(noise(n, n, seed + 2)).transpose()
    }

    fn form(kind: &str, n: usize, seed: u64) -> Metric {
        let samples = samples(n, seed);
        let gram = samples.transpose() * &samples;
        match kind {
            "identity" => Metric::Identity,
            "diagonal" => Metric::diagonal((0..n).map(|i| gram[(i, i)]).collect()),
            _ => Metric::damped(gram, 0.01),
        }
    }

    fn weight(m: usize, n: usize, seed: u64) -> Mat<f64> {
        let k = m.min(n);
        let left = linalg::orthonormal_columns(noise(m, k, seed + 11));
        let faded = Mat::from_fn(m, k, |i, j| left[(i, j)] * (1.0 + j as f64).powf(-0.5));
        faded * linalg::orthonormal_columns(noise(n, k, seed + 12)).transpose()
    }

    struct Case {
        weight: Mat<f64>,
        output: Metric,
        input: Metric,
        decomposition: Decomposition,
        pair: LowRank,
    }

    impl Case {
        fn new((m, n): (usize, usize), rank: usize, output: &str, input: &str, seed: u64) -> Self {
            let (weight, output, input) = (weight(m, n, seed), form(output, m, seed + 1), form(input, n, seed + 2));
            let metric = MetricPair { output: &output, input: &input };
            let decomposition = low_rank::decompose(weight.as_ref(), metric, rank).unwrap();
            let pair = decomposition.truncate(weight.as_ref(), rank);
            Self { weight, output, input, decomposition, pair }
        }

        /// As a study knows them: of a larger input side only the diagonal of a Gram.
        fn sides(&self) -> Sides<'_> {
            let (m, n) = (self.weight.nrows(), self.weight.ncols());
            let input = match &self.input {
                Metric::Full(_) if m <= n => Side::Diagonal(Metric::diagonal(self.input.to_diagonal(n))),
                input => Side::Whole(input),
            };
            Sides { output: &self.output, input, energies: self.decomposition.curve.energies() }
        }

        /// Error of parts beside the pair, over the norm of the weight, both in the metric.
        fn error(&self, parts: &Parts) -> f64 {
            let (m, n) = (self.weight.nrows(), self.weight.ncols());
            let pair = linalg::product_row_major(&self.pair.b, &self.pair.a, m, self.pair.rank, n);
            let [found, exact] =
                [parts.product(m, n), pair].map(|values| linalg::transposed_from_row_major(&values, m, n));
            let metric = MetricPair { output: &self.output, input: &self.input };
            (metric.squared_norm((found - exact).transpose()) / self.decomposition.curve.squared_error(0)).sqrt()
        }

        fn rounded(&self, layout: Layout) -> Rounded {
            let rounded = lay_out(layout, &self.pair, self.weight.shape(), &self.sides(), DTYPE);
            assert_eq!(rounded.parts.rounded(DTYPE).unwrap(), rounded.parts, "every value is one of the dtype");
            rounded
        }

        /// Error of the layout, rounded to nearest.
        fn plain(&self, layout: Layout) -> f64 {
            self.error(&pivot::lay_out(layout, self.pair.clone(), self.weight.shape()).rounded(DTYPE).unwrap())
        }
    }

    #[test]
    fn feedback_beats_rounding_in_all_nine_metrics_and_knows_its_error() {
        let (mut gains, mut ratios) = ([Vec::new(), Vec::new()], Vec::new());
        for shape in [(48, 96), (96, 48), (64, 64)] {
            let rank = Layout::Pivot.largest_saving_rank(shape) * 7 / 10;
            for output in ["identity", "diagonal", "full"] {
                for input in ["identity", "diagonal", "full"] {
                    // Where one input outweighs all others chance decides a single case.
                    let cases: Vec<Case> =
                        (0..6).map(|seed| Case::new(shape, rank, output, input, 100 * seed)).collect();
                    for layout in [Layout::Pivot, Layout::Factors] {
                        let (mut found, mut plain, mut expected) = (0.0, 0.0, 0.0);
                        for case in &cases {
                            let rounded = case.rounded(layout);
                            found += case.error(&rounded.parts).powi(2);
                            plain += case.plain(layout).powi(2);
                            expected += rounded.squared_error / case.decomposition.curve.squared_error(0);
                        }
                        let (gain, ratio) = ((plain / found).sqrt(), (expected / found).sqrt());
                        let name = format!("{shape:?} {output} {input} {layout:?}");
                        assert!((0.4..2.5).contains(&ratio), "{name}: {ratio}");
                        ratios.push(ratio);
                        // With an outlier on both sides a single number is nearly all of the error of factors.
                        if layout == Layout::Pivot || (output, input) != ("full", "full") {
                            gains[usize::from(layout == Layout::Factors)].push(gain);
                        }
                    }
                }
            }
        }
        let means = gains.each_ref().map(|gains| gains.iter().sum::<f64>() / gains.len() as f64);
        let least = gains.map(|gains| gains.into_iter().fold(f64::INFINITY, f64::min));
        assert!(means[0] > 3.0 && means[1] > 1.1, "{means:?}");
        assert!(least[0] > 1.0 && least[1] > 1.0, "{least:?}");
        let ratio = ratios.iter().sum::<f64>() / ratios.len() as f64;
        assert!((0.9..1.1).contains(&ratio), "{ratio}");
    }

    #[test]
    fn long_coefficients_cost_no_more_than_twice_what_a_dense_weight_does() {
        for shape in [(160, 560), (560, 160)] {
            let case = Case::new(shape, 120, "full", "full", 0);
            let metric = MetricPair { output: &case.output, input: &case.input };
            let dense = Mat::from_fn(shape.0, shape.1, |i, j| {
                case.weight[(i, j)] - f64::from(cast::nearest(DTYPE, case.weight[(i, j)] as f32))
            });
            let dense = (metric.squared_norm(dense.as_ref()) / case.decomposition.curve.squared_error(0)).sqrt();
            let (found, plain) = (case.error(&case.rounded(Layout::Pivot).parts), case.plain(Layout::Pivot));
            assert!(found < 2.0 * dense && found < 0.4 * plain, "{shape:?}: {found}, plain {plain}, dense {dense}");
        }
    }

    #[test]
    fn a_pair_of_rank_one_is_rounded_as_by_hand() {
        // Rows 3 and 1 + 2⁻⁹ of the column, plain metric: the pivot is 3, the coefficient c = (1 + 2⁻⁹) / 3 rounded to ĉ, and
        // the row is the nearest value to a (1 + c ĉ) / (1 + ĉ²).
        let (long, short) = (3.0f32, 1.0 + 1.0 / 512.0);
        let a = [0.71f32, -1.3, 2.9];
        let pair = LowRank { rank: 1, b: vec![short, long], a: a.to_vec() };
        let energies = [f64::from(long * long + short * short)];
        let sides = Sides { output: &Metric::Identity, input: Side::Whole(&Metric::Identity), energies: &energies };
        let Parts::Pivot { pivots, coefficients, order, .. } =
            lay_out(Layout::Pivot, &pair, (2, 3), &sides, DTYPE).parts
        else {
            panic!("pivots were asked for");
        };
        let c = f64::from(short) / f64::from(long);
        let c_hat = f64::from(cast::nearest(DTYPE, c as f32));
        assert_eq!((order, coefficients.values().to_vec()), (vec![1, 0], vec![c_hat as f32]));
        let fitted = a.map(|a| f64::from(a) * f64::from(long) * (1.0 + c * c_hat) / (1.0 + c_hat * c_hat));
        assert_eq!(pivots.values().to_vec(), fitted.map(|v| cast::nearest(DTYPE, v as f32)));
    }

    #[test]
    fn what_cannot_be_fed_back_is_rounded() {
        // Zeros have no metric; dependent columns have a singular one; full rank leaves no coefficients.
        for (b, a) in [(vec![0.0; 12], vec![0.0; 10]), (vec![0.3; 12], vec![0.7; 10])] {
            let pair = LowRank { rank: 2, b, a };
            for layout in [Layout::Pivot, Layout::Factors] {
                let sides =
                    Sides { output: &Metric::Identity, input: Side::Whole(&Metric::Identity), energies: &[0.0; 2] };
                let rounded = lay_out(layout, &pair, (6, 5), &sides, DTYPE);
                let exact = linalg::product_row_major(&pair.b, &pair.a, 6, 2, 5);
                for (found, exact) in rounded.parts.product(6, 5).iter().zip(exact) {
                    assert!((found - exact).abs() <= 0.01 * exact.abs(), "{found} {exact}");
                }
            }
        }
        let case = Case::new((6, 9), 6, "full", "full", 0);
        assert!(case.error(&case.rounded(Layout::Pivot).parts) < 4e-3);
    }
}
