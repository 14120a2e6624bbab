//! One stored matrix of a structure.

use std::borrow::Cow;

use crate::codecs::cast::{self, Dtype};
use crate::quantize::{Grouped, Quantized, Scale, Scheme};

/// A matrix as it is stored, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum Matrix {
    /// Values, stored in the dtype of the weight.
    Float(Vec<f32>),
    /// Codes with scales, or blocks of llama.cpp.
    Quantized(Quantized),
    /// A permutation: the position of every row.
    Indices(Vec<i32>),
}

impl Matrix {
    /// Rounds `values` (rows, cols) to `scheme`, with the scale of least squared error in every group.
    pub fn quantized(values: &[f32], rows: usize, cols: usize, scheme: Scheme) -> Self {
        Self::Quantized(Quantized::Grouped(Grouped::round(values, rows, cols, scheme, Scale::Mse)))
    }

    /// The values, dequantized if necessary.
    ///
    /// # Panics
    /// If they are indices.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Float(values) => Cow::Borrowed(values),
            Self::Quantized(matrix) => Cow::Owned(matrix.dequantize()),
            Self::Indices(_) => unreachable!("invariant: indices are not values"),
        }
    }

    /// The indices.
    ///
    /// # Panics
    /// If they are values.
    pub fn indices(&self) -> &[i32] {
        match self {
            Self::Indices(indices) => indices,
            Self::Float(_) | Self::Quantized(_) => unreachable!("invariant: values are not indices"),
        }
    }

    /// The first rows and columns of a matrix; codes keep their scales.
    ///
    /// # Panics
    /// If they are more than it has, or it has blocks of llama.cpp.
    pub fn leading(&self, [_, cols]: [usize; 2], [new_rows, new_cols]: [usize; 2]) -> Self {
        fn of<T: Copy>(values: &[T], cols: usize, rows: usize, new_cols: usize) -> Vec<T> {
            values.chunks_exact(cols.max(1)).take(rows).flat_map(|row| &row[..new_cols]).copied().collect()
        }
        match self {
            Self::Float(values) => Self::Float(of(values, cols, new_rows, new_cols)),
            Self::Indices(indices) => Self::Indices(of(indices, cols, new_rows, new_cols)),
            Self::Quantized(Quantized::Grouped(matrix)) => {
                let (groups, new_groups) = (matrix.scheme.n_groups(cols), matrix.scheme.n_groups(new_cols));
                Self::Quantized(Quantized::Grouped(Grouped {
                    rows: new_rows,
                    cols: new_cols,
                    codes: of(&matrix.codes, cols, new_rows, new_cols),
                    scales: of(&matrix.scales, groups, new_rows, new_groups),
                    zeros: of(&matrix.zeros, groups, new_rows, new_groups),
                    scheme: matrix.scheme,
                }))
            }
            Self::Quantized(Quantized::Block(_)) => unreachable!("invariant: factors are no blocks"),
        }
    }

    /// The matrix with its floats rounded to `dtype`; codes and indices do not change.
    ///
    /// # Errors
    /// The index of the first value that does not fit.
    pub fn rounded(&self, dtype: Dtype) -> Result<Self, usize> {
        Ok(match self {
            Self::Float(values) => {
                let bytes = cast::encode(dtype, values)?;
                Self::Float(cast::decode(dtype, &bytes).expect("invariant: what was encoded is decoded"))
            }
            Self::Quantized(_) | Self::Indices(_) => self.clone(),
        })
    }
}

impl From<Vec<f32>> for Matrix {
    fn from(values: Vec<f32>) -> Self {
        Self::Float(values)
    }
}
