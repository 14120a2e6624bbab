//! A quantized matrix as a layout stores it: a few tensors, distinguished by the suffixes of their names.

use super::cast::{self, Dtype};
use crate::quantize::Grouped;

/// A stored tensor, from headers alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// The name after the module: `qweight`.
    pub suffix: &'static str,
    /// The dtype in the file; codes are packed into integers.
    pub dtype: Dtype,
    /// The shape in the file.
    pub shape: Vec<usize>,
}

/// The values of a stored tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Codes and indices, written as they are.
    Bytes(Vec<u8>),
    /// Floats, rounded to the dtype of the tensor.
    Floats(Vec<f32>),
}

/// A stored tensor with its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// The name after the module: `qweight`.
    pub suffix: &'static str,
    /// The dtype in the file.
    pub dtype: Dtype,
    /// Row-major.
    pub values: Values,
}

impl Written {
    pub(super) fn bytes(suffix: &'static str, dtype: Dtype, bytes: Vec<u8>) -> Self {
        Self { suffix, dtype, values: Values::Bytes(bytes) }
    }

    pub(super) fn floats(suffix: &'static str, dtype: Dtype, floats: Vec<f32>) -> Self {
        Self { suffix, dtype, values: Values::Floats(floats) }
    }

    /// The bytes in a file.
    ///
    /// # Errors
    /// The index of the first value that the dtype cannot hold.
    pub fn into_bytes(self) -> Result<Vec<u8>, usize> {
        match self.values {
            Values::Bytes(bytes) => Ok(bytes),
            Values::Floats(floats) => cast::encode(self.dtype, &floats),
        }
    }
}

/// Transposes a row-major matrix (rows, cols).
pub(super) fn transposed<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols).flat_map(|j| (0..rows).map(move |i| values[i * cols + j])).collect()
}

/// Transposes a matrix (n, cols) of 32-bit words.
pub(super) fn transposed_words(bytes: &[u8], cols: usize) -> Vec<u8> {
    let words = bytes.as_chunks::<4>().0;
    transposed(words, words.len() / cols.max(1), cols).into_flattened()
}

/// The size of groups in which columns come one after another; `None` if they are in another order.
pub(super) fn run_of(group_of_column: &[usize], group: usize) -> Option<usize> {
    group_of_column.iter().enumerate().all(|(i, &g)| g == i / group).then_some(group)
}

/// A matrix whose columns have the scales and zeros of any group, row-major; `scales` and `zeros` are (rows, n_groups).
pub(super) fn gathered(
    codes: &[u8],
    scales: &[f32],
    zeros: &[u8],
    group_of_column: &[usize],
    n_groups: usize,
) -> Vec<f32> {
    let rows = codes.chunks_exact(group_of_column.len().max(1));
    let groups = scales.chunks_exact(n_groups.max(1)).zip(zeros.chunks_exact(n_groups.max(1)));
    let row = |(codes, (scales, zeros)): (&[u8], (&[f32], &[u8]))| -> Vec<f32> {
        let value = |(&code, &g): (&u8, &usize)| (f32::from(code) - f32::from(zeros[g])) * scales[g];
        codes.iter().zip(group_of_column).map(value).collect()
    };
    rows.zip(groups).flat_map(row).collect()
}

/// `matrix`, if its scales and zeros have the right shape.
pub(super) fn checked(matrix: Grouped) -> Option<Grouped> {
    let n_entries = matrix.rows * matrix.scheme.n_groups(matrix.cols);
    let n_zeros = if matrix.scheme.levels.has_zeros() { n_entries } else { 0 };
    ((matrix.scales.len(), matrix.zeros.len()) == (n_entries, n_zeros)).then_some(matrix)
}

/// These serve the round-trip tests of every layout.
#[cfg(test)]
pub(super) use tests::{check_sizes, matrix, stored};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{Scale, Scheme};

    /// A matrix of (rows, cols) that depends on `seed`.
    pub fn matrix(rows: usize, cols: usize, scheme: Scheme, seed: u64) -> Grouped {
        let value = |i: usize| ((i as u64 * 7919 + seed % 10_007 * 31) % 1009) as f32 / 504.5 - 1.0;
        let values: Vec<f32> = (0..rows * cols).map(value).collect();
        Grouped::round(&values, rows, cols, scheme, Scale::Absmax)
    }

    /// The stored tensors as a reader gets them from a writer.
    pub fn stored(written: Vec<Written>) -> Vec<(Dtype, Vec<u8>)> {
        written.into_iter().map(|tensor| (tensor.dtype, tensor.into_bytes().unwrap())).collect()
    }

    /// The tensors of a header agree with those that are written, in order and in bytes.
    pub fn check_sizes(tensors: &[Tensor], written: &[Written]) {
        assert_eq!(tensors.len(), written.len());
        for (tensor, written) in tensors.iter().zip(written) {
            assert_eq!((tensor.suffix, tensor.dtype), (written.suffix, written.dtype));
            let n_bytes = cast::n_bytes(tensor.dtype, tensor.shape.iter().product()).unwrap();
            assert_eq!(written.clone().into_bytes().unwrap().len() as u64, n_bytes, "{}", tensor.suffix);
        }
    }
}
