//! The project's own packing of a matrix `P.weight` (out, in): `P.codes` u8, rows of packed codes with low bits first,
//! `P.scales` f16 (out, n_groups), and `P.zeros` u8, packed like codes, if groups have their own zeros. With `2of4`,
//! two of every four columns have a code, and a row of `P.codes` ends in a bit for each column, which are those that
//! have.

use serde::{Deserialize, Serialize};

use super::cast::{self, Dtype};
use super::coded::{Tensor, Written, checked};
use crate::quantize::{Grouped, Quant, Scheme, bits};

const CODES: &str = "codes";
const SCALES: &str = "scales";
const ZEROS: &str = "zeros";

/// The entry of a matrix in `lrc.quantized` of `config.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedEntry {
    /// `int4-g128`, `nf4-g64`.
    pub scheme: String,
    /// (out, in).
    pub shape: [usize; 2],
    /// The dtype of the weight before quantization.
    pub dtype: String,
}

impl PackedEntry {
    /// The entry of a matrix (out, in) whose weight had `dtype`.
    pub fn new(scheme: Scheme, shape: [usize; 2], dtype: Dtype) -> Self {
        Self { scheme: scheme.to_string(), shape, dtype: format!("{dtype:?}") }
    }

    /// The inverse of [`Self::new`], for a matrix whose rows of codes have `width` bytes.
    ///
    /// # Errors
    /// The scheme is unknown, or rows of this width cannot hold the columns.
    pub fn read(&self, width: usize) -> Result<(Scheme, Dtype), String> {
        let Ok(Quant::Bare(scheme, _) | Quant::Rtn(scheme, _)) = self.scheme.parse() else {
            return Err(format!("`{}` is not a known scheme", self.scheme));
        };
        let dtype = match self.dtype.as_str() {
            "F16" => Dtype::F16,
            "BF16" => Dtype::BF16,
            _ => Dtype::F32,
        };
        let [rows, cols] = self.shape;
        // The entry decides how much is allocated, so it must not claim more than the stored codes can hold.
        if rows == 0 || cols == 0 || cols > width.saturating_mul(8) {
            return Err(format!("rows of {width} bytes cannot hold the {cols} columns of shape {:?}", self.shape));
        }
        Ok((scheme, dtype))
    }
}

/// The suffix of the tensor that every packed matrix has.
pub const FIRST: &str = CODES;

/// The index of the scales among [`tensors`].
pub const SCALES_AT: usize = 1;

/// The tensors of a matrix (rows, cols).
pub fn tensors(scheme: Scheme, [rows, cols]: [usize; 2]) -> Vec<Tensor> {
    let (bits, groups) = (scheme.levels.bits(), scheme.n_groups(cols));
    let tensor = |suffix, dtype, width| Tensor { suffix, dtype, shape: vec![rows, width] };
    let mut tensors = vec![tensor(CODES, Dtype::U8, scheme.code_bytes(cols)), tensor(SCALES, Dtype::F16, groups)];
    if scheme.levels.has_zeros() {
        tensors.push(tensor(ZEROS, Dtype::U8, bits::row_bytes(groups, bits, 1)));
    }
    tensors
}

/// The values of [`tensors`], in the same order.
pub fn write(matrix: &Grouped) -> Vec<Written> {
    let (bits, groups) = (matrix.scheme.levels.bits(), matrix.scheme.n_groups(matrix.cols));
    let mut written = vec![
        Written::bytes(CODES, Dtype::U8, matrix.scheme.pack(&matrix.codes, matrix.cols)),
        Written::floats(SCALES, Dtype::F16, matrix.scales.clone()),
    ];
    if matrix.scheme.levels.has_zeros() {
        written.push(Written::bytes(ZEROS, Dtype::U8, bits::pack(&matrix.zeros, groups, bits, 1)));
    }
    written
}

/// The matrix (rows, cols) from the `stored` tensors, in the order of [`tensors`]; `None` if their sizes do not match.
pub fn read([rows, cols]: [usize; 2], scheme: Scheme, stored: &[(Dtype, Vec<u8>)]) -> Option<Grouped> {
    let (bits, groups) = (scheme.levels.bits(), scheme.n_groups(cols));
    let codes = scheme.unpack(&stored.first()?.1, rows, cols)?;
    let (dtype, scales) = stored.get(SCALES_AT)?;
    let zeros = match scheme.levels.has_zeros() {
        true => bits::unpack(&stored.get(2)?.1, rows, groups, bits, 1)?,
        false => Vec::new(),
    };
    checked(Grouped { rows, cols, scheme, codes, scales: cast::decode(*dtype, scales)?, zeros })
}

#[cfg(test)]
mod tests {
    use super::super::coded::{check_sizes, matrix, stored};
    use super::*;
    use crate::quantize::Levels;

    proptest::proptest! {
        #[test]
        fn matrices_survive_a_round_trip(rows in 1usize..6, cols in 1usize..70, bits in 2u32..=8, symmetric: bool,
                                         group in proptest::option::of(1usize..40), is_nf4: bool, seed: u64) {
            let levels = if is_nf4 { Levels::Nf4 } else { Levels::Int { bits, symmetric } };
            let scheme = Scheme { levels, group };
            let before = matrix(rows, cols, scheme, seed);
            let written = write(&before);
            check_sizes(&tensors(scheme, [rows, cols]), &written);
            let mut tensors = stored(written);
            proptest::prop_assert_eq!(read([rows, cols], scheme, &tensors), Some(before));
            tensors[0].1.push(0);
            proptest::prop_assert_eq!(read([rows, cols], scheme, &tensors), None);
        }
    }

    #[test]
    fn entries_survive_a_round_trip_and_claim_no_more_than_is_stored() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let scheme = Scheme { levels: Levels::Int { bits: 4, symmetric: false }, group: Some(32) };
            let entry = PackedEntry::new(scheme, [3, 64], dtype);
            assert_eq!(entry.read(32), Ok((scheme, dtype)));
            assert!(entry.read(7).unwrap_err().contains("cannot hold the 64 columns"));
        }
    }
}
