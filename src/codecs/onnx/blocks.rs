//! Integers as `MatMulNBits` of ONNX Runtime reads them: `P.codes` u8 (rows, n_blocks, block · bits / 8), low bits first,
//! `P.scales` f16 (rows · n_blocks), and `P.zeros` u8, packed like codes row by row, if groups have their own zeros.
//!
//! It multiplies codes of 4 and 8 bits in blocks of a power of two from 16. Codes of fewer bits are stored in 4 or 8, and
//! a scale of a whole row is repeated for every block: values are the same to the last bit.

use super::super::cast::Dtype;
use super::super::coded::{Tensor, Written};
use crate::quantize::{Grouped, Levels, Scheme};

const CODES: &str = "codes";
const SCALES: &str = "scales";
const ZEROS: &str = "zeros";

/// The smallest block.
const SMALLEST: usize = 16;
/// The block of matrices with a scale for each row.
const OF_ROWS: usize = 128;

/// How codes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// 4 or 8.
    pub bits: u32,
    /// Columns in a block.
    pub block: usize,
    /// Added to the codes, so that their zero is the middle of the larger range.
    shift: u8,
    has_zeros: bool,
}

impl Blocks {
    /// The blocks of a matrix of `cols` columns.
    ///
    /// # Errors
    /// A clause that says why the operator cannot multiply it.
    pub fn of(scheme: Scheme, cols: usize) -> Result<Self, String> {
        let (own, has_zeros) = match scheme.levels {
            Levels::Int { bits, symmetric } => (bits, !symmetric),
            Levels::Sparse { bits } => (bits, false),
            Levels::Nf4 | Levels::E4m3 => {
                return Err(format!("ONNX Runtime multiplies integers, not `{scheme}`: quantize with `rtn-int4-g32`"));
            }
        };
        let bits = if own <= 4 { 4 } else { 8 };
        let shift = if has_zeros { 0 } else { (1u8 << (bits - 1)) - (1u8 << (own - 1)) };
        let block = match scheme.group.filter(|&group| group < cols) {
            None => OF_ROWS,
            Some(group) if group.is_power_of_two() && group >= SMALLEST => group,
            Some(group) => {
                return Err(format!(
                    "blocks of ONNX Runtime have a power of two of columns from {SMALLEST}, not {group}"
                ));
            }
        };
        Ok(Self { bits, block, shift, has_zeros })
    }

    /// The bits of a code, as a scheme packs them.
    fn packing(self) -> Scheme {
        Scheme { levels: Levels::Int { bits: self.bits, symmetric: true }, group: None }
    }

    /// The tensors of a matrix (rows, cols).
    pub fn tensors(self, [rows, cols]: [usize; 2]) -> Vec<Tensor> {
        let n_blocks = cols.div_ceil(self.block);
        let tensor = |suffix, dtype, shape| Tensor { suffix, dtype, shape };
        let mut tensors = vec![
            tensor(CODES, Dtype::U8, vec![rows, n_blocks, self.packing().code_bytes(self.block)]),
            tensor(SCALES, Dtype::F16, vec![rows * n_blocks]),
        ];
        tensors
            .extend(self.has_zeros.then(|| tensor(ZEROS, Dtype::U8, vec![rows * self.packing().code_bytes(n_blocks)])));
        tensors
    }

    /// The values of these tensors; columns after the last have the code of zero.
    pub fn write(self, matrix: &Grouped) -> Vec<Written> {
        let cols = matrix.cols.max(1);
        let (n_blocks, n_groups) = (cols.div_ceil(self.block), matrix.scheme.n_groups(cols));
        let repeated = |values: &[f32]| -> Vec<f32> {
            let rows = values.chunks_exact(n_groups);
            rows.flat_map(|row| (0..n_blocks).map(|block| row[block * n_groups / n_blocks])).collect()
        };
        let zeros: Vec<u8> = (matrix.zeros.chunks_exact(n_groups))
            .flat_map(|row| (0..n_blocks).map(|block| row[block * n_groups / n_blocks]))
            .collect();
        let middle = 1u8 << (self.bits - 1);
        let mut codes = Vec::with_capacity(matrix.rows * n_blocks * self.block);
        for (i, row) in matrix.codes.chunks_exact(cols).enumerate() {
            codes.extend(row.iter().map(|code| code + self.shift));
            let last = zeros.get((i + 1) * n_blocks - 1).copied().unwrap_or(middle);
            codes.resize((i + 1) * n_blocks * self.block, last);
        }
        let packed = self.packing().pack(&codes, n_blocks * self.block);
        let mut written = vec![
            Written::bytes(CODES, Dtype::U8, packed),
            Written::floats(SCALES, Dtype::F16, repeated(&matrix.scales)),
        ];
        if self.has_zeros {
            written.push(Written::bytes(ZEROS, Dtype::U8, self.packing().pack(&zeros, n_blocks)));
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::coded::{check_sizes, matrix};
    use super::*;
    use crate::codecs::Values;

    /// The matrix as the documentation of `MatMulNBits` has it: `(code − zero) · scale`, block by block.
    fn values(blocks: Blocks, written: &[Written], [rows, cols]: [usize; 2]) -> Vec<f32> {
        let bytes = |at: usize| match written.get(at).map(|tensor| &tensor.values) {
            Some(Values::Bytes(bytes)) => bytes.clone(),
            _ => Vec::new(),
        };
        let Values::Floats(scales) = &written[1].values else { panic!("scales are floats") };
        let (codes, zeros, n_blocks) = (bytes(0), bytes(2), cols.div_ceil(blocks.block));
        let nibble = |bytes: &[u8], at: usize| match blocks.bits {
            4 => i32::from(bytes[at / 2] >> (at % 2 * 4) & 15),
            _ => i32::from(bytes[at]),
        };
        let value = |(i, j): (usize, usize)| {
            let at = i * n_blocks + j / blocks.block;
            let code = nibble(&codes, at * blocks.block + j % blocks.block);
            let row = i * zeros.len() / rows;
            let zero = if zeros.is_empty() { 1 << (blocks.bits - 1) } else { nibble(&zeros[row..], j / blocks.block) };
            (code - zero) as f32 * scales[at]
        };
        (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(value).collect()
    }

    #[test]
    fn integers_of_all_widths_keep_their_values() {
        for bits in [2, 3, 4, 5, 8] {
            for symmetric in [true, false] {
                for (group, cols) in [(Some(16), 40), (Some(32), 96), (None, 40), (None, 300), (Some(512), 300)] {
                    let scheme = Scheme { levels: Levels::Int { bits, symmetric }, group };
                    let matrix = matrix(3, cols, scheme, 7);
                    let blocks = Blocks::of(scheme, cols).unwrap();
                    let written = blocks.write(&matrix);
                    check_sizes(&blocks.tensors([3, cols]), &written);
                    assert_eq!(values(blocks, &written, [3, cols]), matrix.dequantize(), "{scheme} {cols}");
                }
            }
        }
        let sparse = Scheme { levels: Levels::Sparse { bits: 4 }, group: Some(32) };
        assert_eq!(Blocks::of(sparse, 64).map(|blocks| (blocks.bits, blocks.block)), Ok((4, 32)));
    }

    #[test]
    fn what_the_operator_cannot_multiply_is_refused() {
        for (levels, group, expected) in [
            (Levels::Nf4, Some(64), "integers, not `nf4-g64`"),
            (Levels::Int { bits: 4, symmetric: true }, Some(8), "a power of two of columns from 16, not 8"),
        ] {
            let reason = Blocks::of(Scheme { levels, group }, 64).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
