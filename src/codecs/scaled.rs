//! Weights of one byte with a scale for the whole matrix, for every row, or for every block of rows and columns: the
//! arithmetic that fp8 and int8 layouts share, `W[i, j] = (code[i, j] − zero[i / b, j / c]) · scale[i / b, j / c]`.

use super::cast::Dtype;
use super::float8;
use super::layout::{Decoded, Decoder, Stored, name_of};

/// A matrix of one-byte codes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scaled {
    /// (rows, cols)
    pub shape: [usize; 2],
    /// Rows and columns with one scale; the last block may be smaller.
    pub block: [usize; 2],
    /// Suffix of the codes, in a dtype of one byte.
    pub codes: &'static str,
    /// Suffix of the scales, row-major by block.
    pub scales: &'static str,
    /// Suffix of the zeros, one for every scale, if there are any.
    pub zeros: Option<&'static str>,
    /// A number that all scales are multiplied by.
    pub factor: f32,
    /// The kind of codes for the report: `fp8`.
    pub kind: &'static str,
}

/// Rows and columns with one scale: from the shape of the scales, and from the size of blocks in
/// the settings where it fits.
///
/// # Errors
/// The scales do not divide the matrix.
pub(super) fn block_of(shape: [usize; 2], scales: &[usize], setting: Option<[usize; 2]>) -> Result<[usize; 2], String> {
    let [rows, cols] = shape;
    let refuse = || format!("its scales have shape {scales:?}, which does not divide its shape {shape:?}");
    let (r, c) = match *scales {
        [] => (1, 1),
        [r] => (r, 1),
        [r, c] => (r, c),
        _ => return Err(refuse()),
    };
    if let Some([b, d]) = setting.filter(|&[b, d]| b > 0 && d > 0 && rows.div_ceil(b) == r && cols.div_ceil(d) == c) {
        return Ok([b, d]);
    }
    let divides = |n: usize, k: usize| k > 0 && n.is_multiple_of(k);
    if divides(rows, r) && divides(cols, c) { Ok([(rows / r).max(1), (cols / c).max(1)]) } else { Err(refuse()) }
}

/// The kind of one-byte codes in words.
///
/// # Errors
/// The dtype is none that weights are stored in.
pub(super) fn kind_of(dtype: Dtype, suffix: &str) -> Result<&'static str, String> {
    match dtype {
        Dtype::F8_E4M3 | Dtype::F8_E5M2 => Ok("fp8"),
        Dtype::I8 => Ok("int8"),
        _ => Err(format!("its `{}` has dtype {dtype:?}, expected F8_E4M3, F8_E5M2 or I8", name_of(suffix))),
    }
}

impl Scaled {
    /// Scales in a row of blocks.
    fn n_across(&self) -> usize {
        self.shape[1].div_ceil(self.block[1])
    }

    fn n_scales(&self) -> usize {
        self.shape[0].div_ceil(self.block[0]) * self.n_across()
    }
}

impl Decoder for Scaled {
    fn decode(&self, stored: &Stored) -> Option<Decoded> {
        let [rows, cols] = self.shape;
        let (dtype, codes) = stored.get(self.codes)?;
        let levels = float8::table(dtype)?;
        let is_whole = |values: &Vec<f32>| values.len() == self.n_scales();
        let scales = stored.floats(self.scales).filter(is_whole)?;
        let zeros = match self.zeros {
            Some(suffix) => stored.floats(suffix).filter(is_whole)?,
            None => vec![0.0; scales.len()],
        };
        if codes.len() != rows * cols {
            return None;
        }
        let mut values = Vec::with_capacity(rows * cols);
        for (i, row) in codes.chunks_exact(cols.max(1)).enumerate() {
            let first = i / self.block[0] * self.n_across();
            for (run, at) in row.chunks(self.block[1]).zip(first..) {
                let (scale, zero) = (scales[at] * self.factor, zeros[at]);
                values.extend(run.iter().map(|&code| (levels[usize::from(code)] - zero) * scale));
            }
        }
        Some(Decoded::Values(values))
    }

    fn words(&self) -> String {
        let ([rows, cols], [b, c]) = (self.shape, self.block);
        let asymmetric = if self.zeros.is_some() { "-asym" } else { "" };
        match (b >= rows, c >= cols) {
            (true, true) => format!("{}-tensor{asymmetric}", self.kind),
            (_, true) if b == 1 => format!("{}-channel{asymmetric}", self.kind),
            (_, false) if b == 1 => format!("{}-g{c}{asymmetric}", self.kind),
            _ => format!("{}-b{b}x{c}{asymmetric}", self.kind),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_follow_from_the_scales() {
        for (shape, scales, setting, expected) in [
            ([6, 8], &[][..], None, Some([6, 8])),
            ([6, 8], &[1], None, Some([6, 8])),
            ([6, 8], &[6], None, Some([1, 8])),
            ([6, 8], &[6, 1], None, Some([1, 8])),
            ([6, 8], &[3, 2], None, Some([2, 4])),
            ([6, 8], &[2, 2], Some([4, 4]), Some([4, 4])),
            ([6, 8], &[2, 2], Some([5, 5]), Some([5, 5])),
            ([6, 8], &[4, 2], Some([4, 4]), None),
            ([6, 8], &[0, 2], None, None),
            ([0, 8], &[1], None, Some([1, 8])),
            ([6, 8], &[2, 2, 2], None, None),
        ] {
            assert_eq!(block_of(shape, scales, setting).ok(), expected, "{shape:?} {scales:?}");
        }
    }

    #[test]
    fn every_block_has_its_scale_and_zero() {
        let of =
            |block| Scaled { shape: [3, 4], block, codes: "q", scales: "s", zeros: None, factor: 1.0, kind: "int8" };
        let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let codes: Vec<u8> = (0..12).collect();
        let stored = |scales: &[f32], zeros: &[f32]| {
            let part = |name, values: &[f32]| (name, Dtype::F32, floats(values));
            Stored(vec![("q", Dtype::I8, codes.clone()), part("s", scales), part("z", zeros)])
        };
        let values = of([2, 3]).decode(&stored(&[1.0, 2.0, 3.0, 4.0], &[]));
        let expected = [0.0, 1.0, 2.0, 6.0, 4.0, 5.0, 6.0, 14.0, 24.0, 27.0, 30.0, 44.0];
        assert_eq!(values, Some(Decoded::Values(expected.into())));
        let with_zeros = Scaled { zeros: Some("z"), ..of([3, 4]) };
        let values = with_zeros.decode(&stored(&[2.0], &[1.0]));
        assert_eq!(values, Some(Decoded::Values((0..12).map(|code| (code as f32 - 1.0) * 2.0).collect())));
        assert_eq!(of([2, 3]).decode(&stored(&[1.0], &[])), None, "a scale for every block");
        let words = [[3, 4], [1, 4], [1, 2], [2, 3]].map(|block| of(block).words());
        assert_eq!(words, ["int8-tensor", "int8-channel", "int8-g2", "int8-b2x3"]);
    }
}
