//! What becomes of one linear: a base, parts of low rank, or both.

use std::borrow::Cow;

use crate::checkpoint::{Dtype, cast};
use crate::linalg;
use crate::model::Layout;
use crate::model::inventory::LinearInfo;
use crate::quantize::{Quantized, Scheme, Storage};

/// A matrix as it will be stored, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum Matrix {
    Float(Vec<f32>),
    Quantized(Quantized),
}

impl Matrix {
    /// What it stands for.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Float(values) => Cow::Borrowed(values),
            Self::Quantized(matrix) => Cow::Owned(matrix.dequantize()),
        }
    }

    /// As `dtype` stores floats; codes are stored as they are.
    fn rounded(&self, dtype: Dtype) -> Result<Self, usize> {
        Ok(match self {
            Self::Float(values) => {
                let bytes = cast::encode(dtype, values)?;
                Self::Float(cast::decode(dtype, &bytes).expect("invariant: what was encoded is decoded"))
            }
            Self::Quantized(_) => self.clone(),
        })
    }
}

impl From<Vec<f32>> for Matrix {
    fn from(values: Vec<f32>) -> Self {
        Self::Float(values)
    }
}

/// A matrix (m, n) of low rank in one of its layouts.
#[derive(Debug, Clone, PartialEq)]
pub enum Parts {
    /// `B` (m, rank) and `A` (rank, n).
    Factors { rank: usize, b: Matrix, a: Matrix },
    /// `pivots` (rank, n), `coefficients` (m − rank, rank) of the other rows in them, and `order` (m): where each row of the
    /// matrix stands among pivots, then others.
    Pivot { rank: usize, pivots: Matrix, coefficients: Matrix, order: Vec<i32> },
}

impl Parts {
    /// Of rank 0, whatever the shape: a matrix of zeros.
    pub fn empty() -> Self {
        Self::Factors { rank: 0, b: Vec::new().into(), a: Vec::new().into() }
    }

    /// The matrix (m, n), row-major.
    pub fn product(&self, m: usize, n: usize) -> Vec<f32> {
        match self {
            Self::Factors { rank, b, a } => linalg::product_row_major(&b.values(), &a.values(), m, *rank, n),
            Self::Pivot { rank, pivots, coefficients, order } => {
                let pivots = pivots.values();
                let others = linalg::product_row_major(&coefficients.values(), &pivots, m - rank, *rank, n);
                let row = |&place: &i32| {
                    let place = place as usize;
                    match place.checked_sub(*rank) {
                        None => &pivots[place * n..][..n],
                        Some(other) => &others[other * n..][..n],
                    }
                };
                order.iter().flat_map(row).copied().collect()
            }
        }
    }

    /// `L x` (m) of the matrix `L` (m, n), of a rank above 0, in f64.
    ///
    /// # Panics
    /// When `x` has not n values.
    pub fn times(&self, x: &[f64]) -> Vec<f64> {
        let product = |matrix: &Matrix, x: &[f64]| -> Vec<f64> {
            let row = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
            matrix.values().chunks_exact(x.len().max(1)).map(row).collect()
        };
        match self {
            Self::Factors { b, a, .. } => product(b, &product(a, x)),
            Self::Pivot { pivots, coefficients, order, .. } => {
                let mut y = product(pivots, x);
                y.extend(product(coefficients, &y));
                order.iter().map(|&place| y[place as usize]).collect()
            }
        }
    }

    /// The parts as they are stored beside weights of `dtype`.
    ///
    /// # Errors
    /// A value does not fit; the index of the first.
    pub fn rounded(&self, dtype: Dtype) -> Result<Self, usize> {
        Ok(match self {
            Self::Factors { rank, b, a } => Self::Factors { rank: *rank, b: b.rounded(dtype)?, a: a.rounded(dtype)? },
            Self::Pivot { rank, pivots, coefficients, order } => Self::Pivot {
                rank: *rank,
                pivots: pivots.rounded(dtype)?,
                coefficients: coefficients.rounded(dtype)?,
                order: order.clone(),
            },
        })
    }
}

/// A compressed linear: `base + parts`, of which one may be absent.
#[derive(Debug, Clone, PartialEq)]
pub struct Module {
    pub base: Option<Matrix>,
    pub parts: Option<Parts>,
}

impl Module {
    pub fn of_parts(parts: Parts) -> Self {
        Self { base: None, parts: Some(parts) }
    }

    /// The matrix (m, n), row-major.
    ///
    /// # Panics
    /// When both are absent.
    pub fn product(&self, m: usize, n: usize) -> Vec<f32> {
        match (&self.base, &self.parts) {
            (None, None) => unreachable!("invariant: a module has a base or parts"),
            (Some(base), None) => base.values().into_owned(),
            (None, Some(parts)) => parts.product(m, n),
            (Some(base), Some(parts)) => {
                let mut values = parts.product(m, n);
                values.iter_mut().zip(base.values().iter()).for_each(|(v, b)| *v += b);
                values
            }
        }
    }
}

/// A [`Module`] before its values are known: what decides names, shapes and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub base: Option<Base>,
    pub pair: Option<Pair>,
}

/// How a base is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// In the dtype of the weight.
    Dense,
    Quantized(Storage),
}

/// A part of low rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    pub rank: usize,
    pub layout: Layout,
    /// How its matrices are quantised; none: stored in the dtype of the weight.
    pub scheme: Option<Scheme>,
}

impl Entry {
    /// Low rank alone.
    pub fn low_rank(rank: usize, layout: Layout) -> Self {
        Self { base: None, pair: Some(Pair { rank, layout, scheme: None }) }
    }

    /// Parameters of base and pair, each counted whole.
    pub fn n_parameters(&self, linear: &LinearInfo) -> u64 {
        let base = if self.base.is_some() { linear.n_parameters() } else { 0 };
        base + self.pair.map_or(0, |pair| pair.layout.n_parameters(pair.rank, linear.shape()))
    }

    /// Bytes of the base and of the pair in the project's own packing.
    pub fn n_bytes(&self, linear: &LinearInfo) -> (u64, u64) {
        let ((m, n), width) = (linear.shape(), linear.dtype.bitsize() as u64 / 8);
        let base = match self.base {
            None => 0,
            Some(Base::Dense) => linear.n_parameters() * width,
            Some(Base::Quantized(storage)) => storage.n_bytes(m, n),
        };
        let pair = self.pair.map_or(0, |Pair { rank, layout, scheme }| {
            let left = if layout == Layout::Pivot { m - rank } else { m };
            let order = if layout == Layout::Pivot { 4 * m as u64 } else { 0 };
            order
                + match scheme {
                    Some(scheme) => scheme.n_bytes(left, rank) + scheme.n_bytes(rank, n),
                    None => layout.n_parameters(rank, (m, n)) * width,
                }
        });
        (base, pair)
    }
}
