//! Matrices of which two in every four columns of a row are kept (2:4, semi-structured sparsity).
//!
//! Which two is decided as by SparseGPT (Frantar and Alistarh 2023): columns are gone through in fours, those with the
//! largest inputs first, and of each four a row keeps the two of largest `w² / U_jj²` (`H⁻¹ = Uᵀ U`), what their
//! removal would cost; the columns that follow compensate what is removed.

use std::borrow::Cow;

use faer::{Mat, MatRef};

use super::bits::{KEPT, RUN};
use super::damped::{damped, falling_runs, single};
use super::feedback::one_by_one;
use super::grouped::Scheme;
use super::lattice::{Lattice, Number};
use super::levels::Levels;
use crate::linalg;

impl Scheme {
    /// The places (rows, cols) that are not zero, if it is sparse: see [`kept`].
    pub(super) fn kept(
        self,
        values: &[f32],
        shape: (usize, usize),
        gram: Option<MatRef<'_, f64>>,
    ) -> Option<Vec<bool>> {
        matches!(self.levels, Levels::Sparse { .. }).then(|| kept(values, shape, gram))
    }
}

/// `values` with zeros where nothing is kept; `None` keeps all.
pub(super) fn pruned<'v>(values: &'v [f32], kept: Option<&[bool]>) -> Cow<'v, [f32]> {
    match kept {
        Some(kept) => values.iter().zip(kept).map(|(&value, &kept)| if kept { value } else { 0.0 }).collect(),
        None => Cow::Borrowed(values),
    }
}

/// The places (rows, cols) that are kept, in the metric of the inputs' Gram `H` (cols, cols); by magnitude alone if
/// there is none, or if it cannot be factored.
///
/// # Panics
/// If the shapes do not match.
fn kept(values: &[f32], (rows, cols): (usize, usize), gram: Option<MatRef<'_, f64>>) -> Vec<bool> {
    let factored = gram.and_then(|gram| {
        assert_eq!((values.len(), gram.nrows()), (rows * cols, cols), "invariant: the Gram belongs to the inputs");
        let permutation = falling_runs(gram, RUN);
        let (upper, _) = linalg::inverse_cholesky(damped(gram, &permutation).as_ref())?;
        Some((permutation, single(&upper)))
    });
    let (permutation, upper) = factored.unwrap_or_else(|| ((0..cols).collect(), Mat::identity(cols, cols)));
    let mut weights = Mat::from_fn(rows, cols, |i, j| values[i * cols + permutation[j]]);
    let mut kept = vec![false; rows * cols];
    one_by_one(weights.as_mut(), upper.as_ref(), |j, weight, later, moved| {
        if j % RUN == 0 {
            for i in 0..rows {
                let value = |k: usize| if k == 0 { weight[i] } else { later[(i, k - 1)] };
                let costs = std::array::from_fn(|k| {
                    // The last run of a row may be shorter.
                    if j + k < cols { (value(k) / upper[(j + k, j + k)]).powi(2) } else { -1.0 }
                });
                for k in largest(costs).into_iter().filter(|k| j + k < cols) {
                    kept[i * cols + permutation[j + k]] = true;
                }
            }
        }
        for (i, (weight, moved)) in weight.iter_mut().zip(moved).enumerate() {
            let stays = kept[i * cols + permutation[j]];
            *moved = if stays { 0.0 } else { *weight / upper[(j, j)] };
        }
    });
    kept
}

/// The two largest of four, the earlier ones if they are equal.
fn largest(costs: [f32; RUN]) -> [usize; KEPT] {
    let mut places = [0, 1, 2, 3];
    places.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]).then(a.cmp(&b)));
    [places[0], places[1]]
}

/// A lattice of which some places are zero.
#[derive(Clone)]
pub(super) struct Sparse<L> {
    pub lattice: L,
    cols: usize,
    /// (rows, cols)
    kept: Vec<bool>,
    /// The code of zero.
    zero: u8,
}

impl<L: Lattice> Sparse<L> {
    /// The places `kept` (rows, cols) of a lattice of this scheme.
    pub fn new(lattice: L, scheme: Scheme, cols: usize, kept: Vec<bool>) -> Self {
        Self { lattice, cols, kept, zero: scheme.levels.middle() as u8 }
    }
}

impl<L: Lattice> Lattice for Sparse<L> {
    #[inline(always)]
    fn code(&self, row: usize, col: usize, value: f32) -> u8 {
        if self.kept[row * self.cols + col] { self.lattice.code(row, col, value) } else { self.zero }
    }

    #[inline(always)]
    fn value(&self, row: usize, col: usize, code: u8) -> f32 {
        self.lattice.value(row, col, code)
    }

    fn numbers(&self) -> Vec<(Number, usize)> {
        self.lattice.numbers()
    }

    fn number(&self, number: Number, row: usize, col: usize) -> f32 {
        self.lattice.number(number, row, col)
    }

    fn slope(&self, number: Number, row: usize, col: usize, code: u8) -> f32 {
        self.lattice.slope(number, row, col, code)
    }

    fn put_number(&mut self, number: Number, row: usize, col: usize, wish: f32) -> f32 {
        self.lattice.put_number(number, row, col, wish)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Grouped, Quant, Quantized, Sides};
    use super::*;

    fn matrix(rows: usize, cols: usize, seed: u32) -> Vec<f32> {
        let value = |i: usize| ((i as u32 ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
        (0..rows * cols).map(value).collect()
    }

    /// The second moment of correlated vectors.
    fn gram(n: usize, seed: u32) -> Mat<f64> {
        let x = matrix(2 * n, n, seed);
        let x = Mat::from_fn(2 * n, n, |i, j| f64::from(x[i * n + j]) + 0.9 * f64::from(x[i * n + j / 3]));
        x.transpose() * &x * faer::Scale(0.5 / n as f64)
    }

    fn quantized(name: &str, values: &[f32], shape: (usize, usize), sides: Sides<'_>) -> Grouped {
        let quant: Quant = name.parse().unwrap();
        let (found, fallback) = quant.quantize(values, shape, Some(sides)).unwrap();
        assert_eq!(fallback, None, "{name}");
        let Quantized::Grouped(found) = found else { panic!("{name} has groups") };
        found
    }

    #[test]
    fn two_of_four_are_kept_and_each_method_errs_less_than_the_one_before() {
        let (rows, cols) = (20, 200);
        let (values, inputs, outputs) = (matrix(rows, cols, 5), gram(cols, 7), gram(rows, 8));
        for outputs in [None, Some(outputs.as_ref())] {
            let sides = Sides { inputs: inputs.as_ref(), outputs };
            for bits in [4, 8] {
                let errors = ["rtn", "gptq", "cd"].map(|method| {
                    let found = quantized(&format!("{method}-int{bits}-g32-2of4"), &values, (rows, cols), sides);
                    let zero = 1u8 << (bits - 1);
                    assert!(found.codes.chunks(4).all(|run| run.iter().filter(|&&code| code != zero).count() <= 2));
                    let back = found.dequantize();
                    let e = Mat::from_fn(rows, cols, |i, j| f64::from(values[i * cols + j] - back[i * cols + j]));
                    let square = &e * &inputs * e.transpose();
                    let square = outputs.map_or_else(|| square.clone(), |outputs| outputs * &square);
                    square.diagonal().column_vector().iter().sum::<f64>()
                });
                assert!(errors[2] < 0.97 * errors[1] && errors[1] < 0.7 * errors[0], "int{bits}: {errors:?}");
            }
        }
    }

    #[test]
    fn the_pair_that_is_kept_is_that_of_least_cost() {
        // Without correlation, what a removal costs is w² H_jj.
        let diagonal =
            Mat::from_fn(8, 8, |i, j| if i == j { [1.0, 1.0, 1.0, 100.0, 1.0, 2.0, 3.0, 4.0][i] } else { 0.0 });
        let values = [0.5, -0.9, 0.7, 0.1, 1.0, 1.0, -1.0, 1.0];
        let found = kept(&values, (1, 8), Some(diagonal.as_ref()));
        assert_eq!(found, [false, true, false, true, false, false, true, true]);
        assert_eq!(kept(&values, (1, 8), None), [false, true, true, false, true, true, false, false]);
    }
}
