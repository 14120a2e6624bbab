//! A quantized matrix as a function of the floats in it, while its codes stay: scales, and minima in blocks that have
//! some.
//!
//! Every layout is linear in these: `W[i, j] = Σ_k s_k[i, j / run] · L_k[i, j]`, where `L_k` is the matrix with ones in
//! the place of `s_k` and zeros in the place of the others.

use half::f16;

use super::block::Blocks;
use super::grouped::Grouped;
use super::quantized::{Quantized, Storage};

/// A matrix (rows, cols) as scales and levels.
///
/// ```
/// use lrc::quantize::Quant;
///
/// let quant: Quant = "rtn-int4".parse().unwrap();
/// let values: Vec<f32> = (-8..8).map(|code| code as f32 / 2.0).collect();
/// let (matrix, _) = quant.quantize(&values, (1, 16), None)?;
/// let scaled = matrix.scaled().unwrap();
/// assert_eq!((scaled.shape, scaled.scales[0], scaled.levels[0][0]), ([1, 1, 1], 0.5, -8.0));
/// assert_eq!(matrix.with_scales(&[1.0]).unwrap().dequantize()[0], -8.0);
/// # Ok::<(), anyhow::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Scaled {
    /// Kinds of floats, rows, and runs of columns that share one of each kind.
    pub shape: [usize; 3],
    /// `s` of [`Self::shape`], each the value of an f16.
    pub scales: Vec<f32>,
    /// `L_k` (rows, cols), row-major, for each kind.
    pub levels: Vec<Vec<f32>>,
    /// Columns of a run; the last one may be shorter.
    pub run: usize,
}

impl Storage {
    /// Kinds of floats, rows, and runs of columns that share one of each kind, of a matrix (rows, cols); `None` if it
    /// has no f16 beside its codes.
    pub fn scales_shape(self, rows: usize, cols: usize) -> Option<[usize; 3]> {
        let (n_kinds, n_runs) = match self {
            Self::Grouped(scheme) => (usize::from(scheme.levels.has_scales()), scheme.n_groups(cols)),
            Self::Block(block_type) => (block_type.floats().len(), cols / block_type.n_weights()),
        };
        (n_kinds > 0).then_some([n_kinds, rows, n_runs])
    }
}

impl Quantized {
    /// Its scales and levels; `None` if it has no f16 beside its codes.
    pub fn scaled(&self) -> Option<Scaled> {
        let (rows, cols) = match self {
            Self::Grouped(matrix) => (matrix.rows, matrix.cols),
            Self::Block(blocks) => (blocks.rows, blocks.cols),
        };
        let shape = self.storage().scales_shape(rows, cols)?;
        Some(match self {
            Self::Grouped(matrix) => {
                let ones = Grouped { scales: vec![1.0; matrix.scales.len()], ..matrix.clone() };
                let (scales, run) = (matrix.scales.clone(), matrix.scheme.group_of(cols));
                Scaled { shape, scales, levels: vec![ones.dequantize()], run }
            }
            Self::Block(blocks) => {
                let [n_kinds, rows, n_runs] = shape;
                let n = rows * n_runs;
                let one = |kind: usize| {
                    let scales: Vec<f32> = (0..n_kinds * n).map(|i| f32::from(i / n.max(1) == kind)).collect();
                    with_floats(blocks, &scales).dequantize()
                };
                let levels = (0..n_kinds).map(one).collect();
                Scaled { shape, scales: floats(blocks), levels, run: blocks.block_type.n_weights() }
            }
        })
    }

    /// The matrix with other scales, in the order of [`Scaled::scales`], which are rounded to f16.
    ///
    /// # Errors
    /// The index of the first that is not finite as an f16.
    ///
    /// # Panics
    /// If it has not as many.
    pub fn with_scales(&self, scales: &[f32]) -> Result<Self, usize> {
        let scales: Vec<f32> = scales.iter().map(|&scale| f16::from_f32(scale).to_f32()).collect();
        if let Some(broken) = scales.iter().position(|scale| !scale.is_finite()) {
            return Err(broken);
        }
        Ok(match self {
            Self::Grouped(matrix) => {
                assert_eq!(scales.len(), matrix.scales.len(), "invariant: every group has a scale");
                Self::Grouped(Grouped { scales, ..matrix.clone() })
            }
            Self::Block(blocks) => Self::Block(with_floats(blocks, &scales)),
        })
    }
}

/// The places of the floats of blocks in their bytes, kind by kind.
fn places(blocks: &Blocks) -> impl Iterator<Item = usize> + use<> {
    let (size, n_bytes) = (blocks.block_type.n_block_bytes(), blocks.bytes.len());
    blocks.block_type.floats().iter().flat_map(move |&at| (0..n_bytes / size).map(move |block| block * size + at))
}

fn floats(blocks: &Blocks) -> Vec<f32> {
    let float = |at: usize| f16::from_le_bytes([blocks.bytes[at], blocks.bytes[at + 1]]).to_f32();
    places(blocks).map(float).collect()
}

fn with_floats(blocks: &Blocks, floats: &[f32]) -> Blocks {
    let mut changed = blocks.clone();
    assert_eq!(floats.len(), places(blocks).count(), "invariant: every block has its floats");
    for (at, &float) in places(blocks).zip(floats) {
        changed.bytes[at..at + 2].copy_from_slice(&f16::from_f32(float).to_le_bytes());
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::super::{BLOCK_TYPES, Levels, Quant, READ_TYPES, Scale, Scheme};
    use super::*;

    /// The matrix that scales and levels make.
    fn product(scaled: &Scaled, cols: usize) -> Vec<f32> {
        let [n_kinds, rows, n_runs] = scaled.shape;
        let value = |at: usize| {
            let (i, j) = (at / cols, at % cols);
            let term = |k: usize| scaled.scales[(k * rows + i) * n_runs + j / scaled.run] * scaled.levels[k][at];
            (0..n_kinds).map(term).sum()
        };
        (0..rows * cols).map(value).collect()
    }

    #[test]
    fn scales_times_levels_are_the_matrix_and_others_take_their_place() {
        let (rows, cols) = (3, 512);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
        let grouped = [(3, true, Some(40)), (4, false, Some(32)), (8, true, None), (2, false, None)];
        let schemes = grouped.map(|(bits, symmetric, group)| Scheme { levels: Levels::Int { bits, symmetric }, group });
        let nf4 = Scheme { levels: Levels::Nf4, group: Some(64) };
        let quants = schemes.into_iter().chain([nf4]).map(|scheme| Quant::Rtn(scheme, Scale::Mse));
        for quant in quants.chain(BLOCK_TYPES.map(Quant::Block)) {
            let (matrix, _) = quant.quantize(&values, (rows, cols), None).unwrap();
            let scaled = matrix.scaled().unwrap();
            let close = |found: &[f32], expected: &[f32]| {
                found.iter().zip(expected).all(|(f, e)| (f - e).abs() <= 1e-6 * (1.0 + e.abs()))
            };
            assert!(close(&product(&scaled, cols), &matrix.dequantize()), "{quant}");
            assert_eq!(matrix.with_scales(&scaled.scales).unwrap(), matrix, "{quant}");
            // Values of f16 of which no two are alike.
            let others: Vec<f32> = (0..scaled.scales.len()).map(|i| 1.0 + i as f32 / 1024.0).collect();
            let changed = matrix.with_scales(&others).unwrap();
            let found = changed.scaled().unwrap();
            assert_eq!((&found.scales, &found.levels), (&others, &scaled.levels), "{quant}: codes stay");
            assert!(close(&product(&found, cols), &changed.dequantize()), "{quant}");
            assert_eq!(matrix.storage().scales_shape(rows, cols), Some(scaled.shape));
            let mut broken = others;
            broken[1] = 1e5;
            assert_eq!(matrix.with_scales(&broken), Err(1), "{quant}");
        }
    }

    #[test]
    fn codes_without_scales_have_none() {
        let e4m3 = Storage::Grouped(Scheme { levels: Levels::E4m3, group: None });
        assert!([e4m3, Storage::Block(READ_TYPES[0])].iter().all(|storage| storage.scales_shape(2, 256).is_none()));
    }
}
