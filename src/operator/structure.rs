//! The interface of a structure: its stored matrices, how they are applied, and how they are fitted to a weight.

use anyhow::Result;
use candle_core::Tensor;
use faer::MatRef;

use super::matrix::Matrix;
use super::rounding::{Rounded, Sides};
use crate::approx::low_rank::{DualVectors, ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::codecs::cast::Dtype;
use crate::linalg::LinalgError;
use crate::quantize::Scheme;

/// (out, in).
pub type Shape = (usize, usize);

/// The size of a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// The whole matrix.
    Whole,
    /// A low rank.
    Rank(usize),
    /// `count`² blocks, each with this rank.
    Blocks {
        /// Blocks per side.
        count: usize,
        /// Rank of each block.
        rank: usize,
    },
}

/// The content of a stored matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// Weights, which may be quantized.
    Float,
    /// A permutation of the outputs, one i32 each.
    Index,
}

/// A stored matrix, before its values are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// `lr_a` for the tensor `X.lr_a.weight`, or `lr_order` for `X.lr_order`; empty for `X.weight`.
    pub suffix: &'static str,
    /// Weights or indices, which decides the dtype.
    pub element: Element,
    /// Rows and columns; indices have one column and are stored as a vector.
    pub shape: [usize; 2],
}

/// A step in which a structure maps its input to its output, for graphs of other runtimes. The state between two steps is
/// (rows, width), or (slices, rows, width) from [`Step::Slice`] to [`Step::Join`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `x Wᵀ`, with W the part of this index; every slice is multiplied by its share of the rows of W.
    Multiply(usize),
    /// `[x, x Wᵀ]`.
    Append(usize),
    /// Output i is column `order[i]`, with the order that this part has.
    Order(usize),
    /// Cuts each row into this many slices.
    Slice(usize),
    /// Slice i of every row in slice j becomes slice j of the row in slice i: there are as many of both.
    Exchange,
    /// Slice i becomes the sum of all slices j, each of whose rows is multiplied by row (i, j) of this part.
    Mix(usize),
    /// Puts the slices of each row next to each other again.
    Join,
}

/// A kind of structured matrix: which parts are stored, and how they are applied.
///
/// ```
/// use lrc::operator::{Kind, Size};
///
/// let factors = Kind::FACTORS.structure();
/// let shapes = factors.shapes(Size::Rank(2), (6, 4)); // A (r, in), B (out, r)
/// assert_eq!(shapes, [[2, 4], [6, 2]]);
/// assert_eq!(factors.measure(&shapes), Some((Size::Rank(2), (6, 4))));
/// assert_eq!(factors.measure(&[[2, 4], [6, 3]]), None);
/// ```
pub trait Structure: Sync {
    /// The name in recipes, reports and configs.
    fn name(&self) -> &'static str;

    /// Suffixes of the stored matrices, in the order of the files. No other structure has the first one.
    fn suffixes(&self) -> &'static [(&'static str, Element)];

    /// Shapes of the stored matrices, in the order of [`Self::suffixes`].
    fn shapes(&self, size: Size, shape: Shape) -> Vec<[usize; 2]>;

    /// Size and shape (out, in) of the matrix whose stored matrices have these shapes; `None` if there is no such
    /// matrix.
    fn measure(&self, stored: &[[usize; 2]]) -> Option<(Size, Shape)>;

    /// Maps `x` (rows, in) to (rows, out), differentiable in `x` and in every float part.
    ///
    /// # Errors
    /// The shapes do not match.
    fn apply(&self, parts: &[Tensor], x: &Tensor) -> Result<Tensor>;

    /// The matrix (out, in), row-major.
    fn product(&self, parts: &[Matrix], size: Size, shape: Shape) -> Vec<f32>;

    /// The same as [`Self::apply`], step by step.
    fn steps(&self, size: Size) -> Vec<Step>;

    /// The part that has the bias, if it is not the module itself.
    fn bias_part(&self) -> Option<&'static str> {
        None
    }

    /// Whether the structure may be added to a base.
    fn takes_base(&self) -> bool {
        false
    }

    /// The parts as `A` (r, in) and `B` (out, r) of a LoRA adapter, if they have that form.
    fn adapter<'p>(&self, _parts: &'p [Matrix]) -> Option<[&'p Matrix; 2]> {
        None
    }

    /// How the structure is fitted to a weight; `None` if there is nothing to choose.
    fn fitting(&self) -> Option<&dyn Fitting> {
        None
    }
}

/// A fit of a target: the best approximations in a structure, for every rank up to the largest requested.
#[derive(Debug, Clone)]
pub struct Fit {
    /// Squared error at every rank.
    pub curve: ErrorCurve,
    /// The values at every rank.
    pub values: FitValues,
}

/// The values of a fit in the form that takes least space.
#[derive(Debug, Clone)]
pub enum FitValues {
    /// Dual vectors of the smaller side: the larger part follows from the target.
    Dual(DualVectors),
    /// Left and right part at the largest rank; the parts for a smaller rank are a selection from these.
    Pair(LowRank),
}

impl Fit {
    /// Left and right part at `rank`, for the target that was fitted.
    ///
    /// # Panics
    /// When `rank` exceeds the largest that was requested.
    pub fn pair(&self, kind: Kind, target: MatRef<'_, f64>, rank: usize) -> LowRank {
        self.values.pair(kind, target, rank)
    }
}

impl FitValues {
    /// See [`Fit::pair`].
    ///
    /// # Panics
    /// When `rank` exceeds the largest that was requested.
    pub fn pair(&self, kind: Kind, target: MatRef<'_, f64>, rank: usize) -> LowRank {
        match self {
            Self::Dual(dual) => dual.truncate(target, rank),
            Self::Pair(pair) => kind.fitting().prefix(pair, rank, target.shape()),
        }
    }
}

/// How a structure is fitted. Ranks are those in [`Size`]: of the matrix, or of each of its blocks.
pub trait Fitting: Sync {
    /// The size that a rank gives for a matrix.
    fn size(&self, rank: usize, shape: Shape) -> Size;

    /// Largest rank with fewer parameters than the matrix.
    fn largest_saving_rank(&self, shape: Shape) -> usize;

    /// Largest possible rank.
    fn largest_rank(&self, shape: Shape) -> usize;

    /// Fits `target` (m, n) in a metric.
    ///
    /// # Errors
    /// See [`LinalgError`].
    fn fit(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>, largest_rank: usize) -> Result<Fit, LinalgError>;

    /// Largest number of values in [`FitValues`] at a rank: the dual vectors of the smaller side.
    fn n_values(&self, rank: usize, (m, n): Shape) -> u64 {
        2 * (rank * m.min(n)) as u64
    }

    /// The error at every rank, without the fit.
    ///
    /// # Errors
    /// See [`LinalgError`].
    fn curve(&self, target: MatRef<'_, f64>, metric: MetricPair<'_>) -> Result<ErrorCurve, LinalgError>;

    /// How one rank is fitted by itself, if a fit of one rank is no part of a larger one.
    fn alone(&self) -> Option<&dyn FittingAlone> {
        None
    }

    /// The parts at a smaller rank.
    fn prefix(&self, pair: &LowRank, rank: usize, shape: Shape) -> LowRank;

    /// The matrices that store a fit.
    fn lay_out(&self, pair: LowRank, shape: Shape) -> Vec<Matrix>;

    /// The matrices rounded to values of `dtype`, and the cost of rounding in the metric.
    fn round(&self, pair: &LowRank, shape: Shape, sides: &Sides<'_>, dtype: Dtype) -> Rounded;

    /// The same of stored matrices whose values are not those of a fit any more; what says which rows are which stays.
    fn round_parts(&self, parts: &[Matrix], size: Size, shape: Shape, sides: &Sides<'_>, dtype: Dtype) -> Rounded {
        self.round(&self.pair(parts, size, shape), shape, sides, dtype)
    }

    /// Another structure that may lose less to rounding than this one does, with as many parameters.
    fn alternative(&self) -> Option<Kind> {
        None
    }

    /// Quantizes the stored matrices of an approximation of `target` (m, n), in its output metric: the matrix that is
    /// multiplied last is rounded first, and the rest is refitted to it.
    ///
    /// # Errors
    /// The quantized part has dependent columns.
    fn quantize(
        &self,
        parts: &[Matrix],
        size: Size,
        target: MatRef<'_, f64>,
        output: &Metric,
        scheme: Scheme,
    ) -> Result<Vec<Matrix>>;

    /// Left and right part from the stored matrices, as [`Self::prefix`] takes them.
    fn pair(&self, parts: &[Matrix], size: Size, shape: Shape) -> LowRank;

    /// Whether a fit of a smaller rank is a selection from the stored matrices.
    fn is_nested(&self) -> bool {
        true
    }

    /// If it is not: the matrix (r, r) that recovers the fit, with left part `b`, from the stored matrices.
    fn rank_factor(&self, _parts: &[Matrix], _b: &[f32]) -> Option<Vec<f32>> {
        None
    }

    /// Recovers from [`Self::pair`] the fit that [`Self::rank_factor`] was computed for; `None` if the factor is
    /// singular.
    fn restored(&self, _pair: LowRank, _rank_factor: &[f32], _shape: Shape) -> Option<LowRank> {
        None
    }
}

/// How a structure is fitted whose fit of one rank is no part of a larger one. A linear is stored in the planned structure
/// or in this one, whichever errs less with as many parameters.
pub trait FittingAlone: Sync {
    /// The structure whose ranks are chosen, and fitted, in place of this one's.
    fn planned(&self) -> Kind;

    /// The stored matrices of the best fit of this rank that is found; `None` if its squared error will not fall below
    /// `limit`.
    ///
    /// # Errors
    /// See [`LinalgError`].
    fn fit(
        &self,
        target: MatRef<'_, f64>,
        metric: MetricPair<'_>,
        rank: usize,
        limit: f64,
    ) -> Result<Option<Vec<Matrix>>, LinalgError>;

    /// Multiplications of a fit, in f32.
    fn n_multiplications(&self, rank: usize, shape: Shape) -> f64;
}

/// A structure, by its index in the registry.
///
/// ```
/// use lrc::operator::Kind;
///
/// assert_eq!(Kind::layouts().map(Kind::name).collect::<Vec<_>>(), ["factors", "pivot", "monarch", "blast"]);
/// let pivot: Kind = "pivot".parse()?;
/// assert_eq!(Kind::FACTORS.n_parameters(2, (6, 4)), 2 * (6 + 4));
/// assert_eq!(pivot.n_parameters(2, (6, 4)), 2 * (6 + 4 - 2));
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind(pub(super) u8);

impl Size {
    /// The rank of the matrix, or of its blocks.
    pub fn rank(self) -> Option<usize> {
        match self {
            Self::Whole => None,
            Self::Rank(rank) | Self::Blocks { rank, .. } => Some(rank),
        }
    }
}
