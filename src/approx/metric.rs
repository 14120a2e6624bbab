//! The metric in which the error of an approximation is measured: one symmetric form on each side of the weight.
//!
//! With inputs `x` of mean second moment `C = Σ x xᵀ / n_tokens` and loss gradients `g` at the output of mean second
//! moment `G = Σ g gᵀ / n_tokens`, the error `E` of a weight is measured as `tr(Gᵀ E C Eᵀ)`: the mean squared
//! change of the output for `G = I`, the generalized Fisher estimate of the change of the loss for both.
//! Plain SVD is `G = C = I`.

use std::ops::Range;
use std::sync::OnceLock;

use faer::{Mat, MatRef};
use serde::{Deserialize, Serialize};

use super::gram::Gram;
use crate::linalg::{self, LinalgError};

/// A symmetric positive semidefinite form `M` on one side of a weight.
///
/// ```
/// use faer::Mat;
/// use lrc::approx::metric::Metric;
///
/// let gram = Mat::from_fn(2, 2, |i, j| if i == 0 && j == 0 { 4.0 } else { 0.0 });
/// assert_eq!(Metric::full(gram.clone()).to_diagonal(2), [4.0, 0.0]);
/// assert_eq!(Metric::damped(gram, 0.5).to_diagonal(2), [3.0, 1.0]); // the mean eigenvalue is 2
/// assert_eq!(Metric::Identity.to_diagonal(2), [1.0, 1.0]);
/// ```
#[derive(Debug)]
pub enum Metric {
    /// `M = I`.
    Identity,
    /// `M = size · I`, in place of a form of zeros, which has no scale, because nothing was measured on that side.
    Plain {
        /// The mean eigenvalue of this side in other blocks; 1 if unknown.
        size: f64,
    },
    /// `M = diag(d)`, `d` > 0.
    Diagonal(Vec<f64>),
    /// `M` as given.
    Full(FullMetric),
}

/// A Gram and its root, which is computed once, when the first linear asks.
#[derive(Debug)]
pub struct FullMetric {
    gram: Gram,
    root: OnceLock<Result<Root, LinalgError>>,
}

/// A root of `M = H Hᵀ`.
#[derive(Debug)]
enum Root {
    /// `H = L`, the Cholesky factor: a thirtieth of the work of an eigenproblem.
    Lower(Mat<f64>),
    /// `H = Q √Λ`, if `M` is too close to singular for Cholesky.
    Eigen { root: Mat<f64>, eigenvalues: Vec<f64> },
}

/// The metric of a weight (m, n): `output` is (m, m), `input` (n, n).
///
/// ```
/// use faer::Mat;
/// use lrc::approx::metric::{Metric, MetricPair};
///
/// let (output, input) = (Metric::diagonal(vec![2.0]), Metric::diagonal(vec![1.0, 10.0]));
/// let error = Mat::from_fn(1, 2, |_, j| [1.0, 3.0][j]);
/// let metric = MetricPair { output: &output, input: &input };
/// assert_eq!(metric.squared_norm(error.as_ref()), 2.0 * (1.0 * 1.0 + 10.0 * 9.0));
/// assert_eq!(MetricPair::IDENTITY.squared_norm(error.as_ref()), 1.0 + 9.0);
/// ```
#[derive(Debug, Clone, Copy)]
pub struct MetricPair<'a> {
    /// `G`, from gradients of the loss at the output; plain in methods without a backward pass.
    pub output: &'a Metric,
    /// `C`, from the inputs.
    pub input: &'a Metric,
}

/// The sides of a weight whose form was all zeros, so that the plain metric took its place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlainSides {
    /// Calibration measured only zeros among the gradients.
    pub output: bool,
    /// Calibration measured only zeros among the inputs.
    pub input: bool,
}

/// Eigenvalues below this share of the largest are raised to it. Directions that calibration never excited are then
/// ordered by the weight, at a cost of 1e-12 of the error.
const ROOT_FLOOR: f64 = 1e-12;

/// Smallest share of the largest eigenvalue down to which a form is inverted.
const CONDITION_SHARE: f64 = 1e-8;

impl Metric {
    /// The metric of a symmetric `gram` (n, n); plain if it is all zeros.
    pub fn full(gram: impl Into<Gram>) -> Self {
        let gram = gram.into();
        if gram.is_zero() {
            return Self::Plain { size: 1.0 };
        }
        Self::Full(FullMetric { gram, root: OnceLock::new() })
    }

    /// The metric of a diagonal; entries below 1e-12 of the largest are raised to it. Plain if all are zero.
    pub fn diagonal(mut values: Vec<f64>) -> Self {
        let max = values.iter().copied().fold(0.0, f64::max);
        if max == 0.0 {
            return Self::Plain { size: 1.0 };
        }
        values.iter_mut().for_each(|v| *v = v.max(max * ROOT_FLOOR));
        Self::Diagonal(values)
    }

    /// The metric of a Gram (n, n) whose eigenvalues are drawn towards their mean: `(1 − damping) M + damping ·
    /// mean(diag M) · I`.
    pub fn damped(gram: impl Into<Gram>, damping: f64) -> Self {
        Self::full(gram.into().damped(damping))
    }

    /// `M`, (n, n), if it is full.
    pub(crate) fn to_dense(&self) -> Option<Mat<f64>> {
        match self {
            Self::Full(full) => Some(full.gram.dense().into_owned()),
            Self::Identity | Self::Plain { .. } | Self::Diagonal(_) => None,
        }
    }

    /// The same metric, with scale `size` if it replaces a form of zeros.
    ///
    /// # Errors
    /// The error of `size`.
    pub(crate) fn sized<E>(self, size: impl FnOnce() -> Result<f64, E>) -> Result<Self, E> {
        Ok(match self {
            Self::Plain { .. } => Self::Plain { size: size()? },
            measured => measured,
        })
    }

    /// `X M`, of `x` (rows, n).
    pub(crate) fn times(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        match self {
            Self::Identity => x.to_owned(),
            Self::Plain { size } => scale_columns(x, |_| *size),
            Self::Diagonal(d) => scale_columns(x, |j| d[j]),
            Self::Full(full) => full.gram.left_times(x),
        }
    }

    /// `X M Xᵀ`, of `x` (rows, n).
    pub(crate) fn quadratic(&self, x: MatRef<'_, f64>) -> Mat<f64> {
        match self {
            Self::Identity => linalg::product_symmetric(x, x.transpose()),
            Self::Full(FullMetric { gram: Gram::Packed(gram), .. }) => gram.quadratic(x),
            Self::Plain { .. } | Self::Diagonal(_) | Self::Full(_) => {
                linalg::product_symmetric(self.times(x).as_ref(), x.transpose())
            }
        }
    }

    /// `X H`, where `M = H Hᵀ`.
    pub(crate) fn times_root(&self, x: MatRef<'_, f64>) -> Result<Mat<f64>, LinalgError> {
        Ok(match self {
            Self::Identity => x.to_owned(),
            Self::Plain { size } => scale_columns(x, |_| size.sqrt()),
            Self::Diagonal(d) => scale_columns(x, |j| d[j].sqrt()),
            Self::Full(full) => match full.root()? {
                Root::Lower(lower) => linalg::product_with_lower(x, lower.as_ref()),
                Root::Eigen { root, .. } => linalg::product(x, root.as_ref()),
            },
        })
    }

    /// `H V`, of `v` (n, r).
    pub(crate) fn root_times(&self, v: MatRef<'_, f64>) -> Result<Mat<f64>, LinalgError> {
        Ok(match self {
            Self::Identity => v.to_owned(),
            Self::Plain { size } => scale_rows(v, |_| size.sqrt()),
            Self::Diagonal(d) => scale_rows(v, |i| d[i].sqrt()),
            Self::Full(full) => match full.root()? {
                Root::Lower(root) | Root::Eigen { root, .. } => linalg::product(root.as_ref(), v),
            },
        })
    }

    /// `H⁻ᵀ V`, of `v` (n, r): the dual of [`Self::root_times`].
    pub(crate) fn dual_root_times(&self, v: MatRef<'_, f64>) -> Result<Mat<f64>, LinalgError> {
        Ok(match self {
            Self::Identity => v.to_owned(),
            Self::Plain { size } => scale_rows(v, |_| 1.0 / size.sqrt()),
            Self::Diagonal(d) => scale_rows(v, |i| 1.0 / d[i].sqrt()),
            Self::Full(full) => match full.root()? {
                Root::Lower(lower) => linalg::solve_transposed_lower(lower.as_ref(), v),
                Root::Eigen { root, eigenvalues } => {
                    linalg::product(root.as_ref(), scale_rows(v, |i| 1.0 / eigenvalues[i]).as_ref())
                }
            },
        })
    }

    /// Whether `H⁻ᵀ` may be used: the digits that it loses are beyond the precision of f32.
    pub(crate) fn is_well_conditioned(&self) -> Result<bool, LinalgError> {
        let is_spread_little = |largest: f64, smallest: f64| smallest > CONDITION_SHARE * largest;
        Ok(match self {
            Self::Identity | Self::Plain { .. } => true,
            Self::Diagonal(d) => {
                is_spread_little(d.iter().copied().fold(0.0, f64::max), d.iter().copied().fold(f64::INFINITY, f64::min))
            }
            Self::Full(full) => match full.root()? {
                Root::Lower(_) => true,
                Root::Eigen { eigenvalues, .. } => match (eigenvalues.first(), eigenvalues.last()) {
                    (Some(&largest), Some(&smallest)) => is_spread_little(largest, smallest),
                    _ => true,
                },
            },
        })
    }

    /// The diagonal of the form, (n); ones for the identity.
    pub fn to_diagonal(&self, n: usize) -> Vec<f64> {
        match self {
            Self::Identity => vec![1.0; n],
            Self::Plain { size } => vec![*size; n],
            Self::Diagonal(d) => d.clone(),
            Self::Full(full) => full.gram.diagonal(),
        }
    }

    /// The form restricted to a run of rows and the same columns.
    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        match self {
            Self::Identity => Self::Identity,
            Self::Plain { size } => Self::Plain { size: *size },
            Self::Diagonal(values) => Self::Diagonal(values[range].to_vec()),
            Self::Full(full) => Self::full(full.gram.slice(range)),
        }
    }
}

impl MetricPair<'_> {
    /// Both sides plain.
    pub const IDENTITY: MetricPair<'static> = MetricPair { output: &Metric::Identity, input: &Metric::Identity };

    /// Whether a side is a Gram, so that rows or columns of an error count together.
    pub(crate) fn has_gram(&self) -> bool {
        [self.output, self.input].iter().any(|side| matches!(side, Metric::Full(_)))
    }

    /// The sides whose form was all zeros.
    pub fn plain_sides(&self) -> PlainSides {
        let is_plain = |metric: &Metric| matches!(metric, Metric::Plain { .. });
        PlainSides { output: is_plain(self.output), input: is_plain(self.input) }
    }

    /// `tr(G E C Eᵀ)` of an error `E` (m, n): the quantity that [`super::low_rank::ErrorCurve`] predicts.
    pub fn squared_norm(&self, error: MatRef<'_, f64>) -> f64 {
        let right = self.input.times(error); // E C
        let left = self.output.times(error.transpose()); // (G E)ᵀ
        let columns = right.col_iter().zip(left.row_iter());
        columns.map(|(r, l)| r.iter().zip(l.iter()).map(|(r, l)| r * l).sum::<f64>()).sum()
    }
}

impl PlainSides {
    /// The sides of either.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self { output: self.output || other.output, input: self.input || other.input }
    }

    /// A note for the report; `None` if both sides were measured.
    pub fn note(self) -> Option<String> {
        let sides = match (self.output, self.input) {
            (false, false) => return None,
            (true, false) => "on its output side",
            (false, true) => "on its input side",
            (true, true) => "on both sides",
        };
        Some(format!("plain metric {sides}: calibration measured only zeros there"))
    }
}

fn scale_columns(x: MatRef<'_, f64>, scale: impl Fn(usize) -> f64) -> Mat<f64> {
    let mut x = x.to_owned();
    for (j, column) in x.col_iter_mut().enumerate() {
        let scale = scale(j);
        column.iter_mut().for_each(|v| *v *= scale);
    }
    x
}

fn scale_rows(x: MatRef<'_, f64>, scale: impl Fn(usize) -> f64) -> Mat<f64> {
    let mut x = x.to_owned();
    let scales: Vec<f64> = (0..x.nrows()).map(scale).collect();
    for column in x.col_iter_mut() {
        column.iter_mut().zip(&scales).for_each(|(v, s)| *v *= s);
    }
    x
}

/// Whether a Cholesky factor may serve as the root. The squares of its pivots lie between the extreme eigenvalues and
/// come near both. Its condition number is the square root of the form's, so solving with it loses no digit of an
/// f32.
fn has_even_pivots(lower: &Mat<f64>) -> bool {
    let pivots = (0..lower.nrows()).map(|i| lower[(i, i)] * lower[(i, i)]);
    let (smallest, largest) = pivots.fold((f64::INFINITY, 0.0f64), |(low, high), p| (low.min(p), high.max(p)));
    smallest > CONDITION_SHARE * largest
}

impl FullMetric {
    fn root(&self) -> Result<&Root, LinalgError> {
        let root = self.root.get_or_init(|| {
            let gram = self.gram.dense();
            if let Some(lower) = linalg::cholesky(gram.as_ref().as_ref()).filter(has_even_pivots) {
                return Ok(Root::Lower(lower));
            }
            let linalg::Eigh { values, vectors } = linalg::eigh(gram.as_ref().as_ref())?;
            // A form of zeros is `Plain`, so the largest eigenvalue is positive.
            let floor = (values.first().copied().unwrap_or(0.0) * ROOT_FLOOR).max(f64::MIN_POSITIVE);
            let eigenvalues: Vec<f64> = values.into_iter().map(|v| v.max(floor)).collect();
            Ok(Root::Eigen { root: scale_columns(vectors.as_ref(), |j| eigenvalues[j].sqrt()), eigenvalues })
        });
        root.as_ref().map_err(|e| *e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::approx::low_rank::decompose;

    fn matrix(m: usize, n: usize, seed: usize) -> Mat<f64> {
        Mat::from_fn(m, n, |i, j| ((i * 31 + j * 17 + i * j * (seed + 5) + seed) % 29) as f64 - 14.0)
    }

    /// A form of every kind, times `scale`.
    fn forms(n: usize, scale: f64) -> [Metric; 2] {
        let x = matrix(2 * n, n, 7);
        let gram = x.transpose() * &x * faer::Scale(scale);
        [Metric::diagonal((0..n).map(|i| gram[(i, i)]).collect()), Metric::damped(gram, 0.01)]
    }

    #[test]
    fn the_scale_of_a_form_scales_the_error_and_nothing_else() {
        for (m, n) in [(6, 11), (11, 6)] {
            let weight = matrix(m, n, 3);
            for kind in 0..2 {
                let decomposed = |scale: f64| {
                    let (output, input) = (&forms(m, scale)[kind], &forms(n, scale)[kind]);
                    let found = decompose(weight.as_ref(), MetricPair { output, input }, 4).unwrap();
                    (found.truncate(weight.as_ref(), 4), found.curve)
                };
                let (expected, curve) = decomposed(1.0);
                // Scales down to 1e-15 and far below, as gradients and inputs have: powers of two change no digit.
                for scale in [-100, -300, -480, 100, 300, 480].map(|exponent| 2f64.powi(exponent)) {
                    let (pair, scaled) = decomposed(scale);
                    assert!(pair.b.iter().zip(&expected.b).all(|(x, y)| (x - y).abs() < 1e-5 * y.abs().max(1.0)));
                    for rank in 0..=m.min(n) {
                        assert!(
                            (scaled.relative_error(rank) - curve.relative_error(rank)).abs() < 1e-9,
                            "{scale:e} {rank}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_form_of_zeros_is_the_plain_metric_of_that_side() {
        for (m, n) in [(6, 11), (11, 6)] {
            let weight = matrix(m, n, 3);
            let zeros = |n: usize| [Metric::diagonal(vec![0.0; n]), Metric::damped(Mat::zeros(n, n), 0.01)];
            for kind in 0..2 {
                let (measured, plain) = (&forms(n, 1.0)[kind], &Metric::Identity);
                let zeros = &zeros(m)[kind];
                let pair = |output, input| MetricPair { output, input };
                assert_eq!(pair(zeros, measured).plain_sides(), PlainSides { output: true, input: false });
                assert_eq!(pair(plain, measured).plain_sides(), PlainSides::default());
                let curve = |metric| decompose(weight.as_ref(), metric, 3).unwrap().curve;
                assert_eq!(curve(pair(zeros, measured)), curve(pair(plain, measured)));
                // Its magnitude is the magnitude of the errors.
                let sized = Metric::Plain { size: 1.0 }.sized(|| Ok::<_, LinalgError>(4.0)).unwrap();
                let (found, expected) = (curve(pair(&sized, measured)), curve(pair(plain, measured)));
                assert!((found.squared_error(2) / expected.squared_error(2) - 4.0).abs() < 1e-9);
            }
        }
        assert_eq!(PlainSides::default().note(), None);
    }
}
