//! Codes of eight columns chosen together, from the points of a grid: with feedback, and by descent.
//!
//! As for single columns (`gptq.rs`, `descent.rs`), but that what is chosen is a vector of eight values, in the metric
//! that it has while all others stay: `(U_R ᵀ U_R)⁻¹` with feedback, for the rows and columns `R` of `H⁻¹ = Uᵀ U` (Frantar
//! et al. 2022; van Baalen et al. 2024, GPTVQ), and `C_RR` in a sweep. A vector only moves to one of less error.

use faer::{Mat, MatRef};

use super::damped::{damped, falling_runs, single};
use super::feedback::{contiguous, run_by_run};
use super::grid::RUN;
use super::lattice::{Lattice, Number};
use super::points::{Parabola, Points};
use crate::linalg;

type Square = [[f32; RUN]; RUN];

/// Chooses codes with feedback, columns in runs of eight in the order of their falling sums of `H_jj`; `None` if `H`
/// cannot be factored.
///
/// # Panics
/// If the shapes do not match.
pub(super) fn feed(
    values: &[f32],
    (rows, cols): (usize, usize),
    gram: MatRef<'_, f64>,
    lattice: &impl Lattice,
    points: &Points,
) -> Option<Vec<u8>> {
    let permutation = falling_runs(gram, RUN);
    let (upper, factor) = linalg::inverse_cholesky(damped(gram, &permutation).as_ref())?;
    let upper = single(&upper);
    let mut weights = Mat::from_fn(rows, cols, |i, j| values[i * cols + permutation[j]]);
    let mut codes = vec![0u8; rows * cols];
    run_by_run(weights.as_mut(), upper.as_ref(), RUN, |first, run, mut errors| {
        let own = upper.submatrix(first, first, RUN, RUN);
        // The inverse of a block on the diagonal of `U` is that of `U⁻¹`.
        let square = square_of(factor.submatrix(first, first, RUN, RUN));
        let weights = diagonal(&square);
        for i in 0..rows {
            let wish = std::array::from_fn(|k| run[(i, k)]);
            let codes = eight(&mut codes, i * cols + permutation[first]);
            let scale = scale(lattice, i, permutation[first]);
            points.nearest(scale, &weights, &wish, codes);
            let near = *codes;
            points.improve(scale, &Parabola { square: &square, wish }, &near, codes);
            for k in 0..RUN {
                let value = lattice.value(i, permutation[first + k], codes[k]);
                let spread: f32 = (0..k).map(|l| errors[(i, l)] * own[(l, k)]).sum();
                errors[(i, k)] = (wish[k] - spread - value) / own[(k, k)];
            }
        }
    });
    Some(codes)
}

/// One sweep over all codes, with `pull = G E C` (rows, cols) in the metric of `inputs` `C` and `outputs` `G`.
pub(super) fn sweep(
    lattice: &impl Lattice,
    points: &Points,
    codes: &mut [u8],
    mut pull: Mat<f32>,
    (inputs, outputs): (MatRef<'_, f32>, Option<MatRef<'_, f32>>),
) {
    let (rows, cols) = pull.shape();
    run_by_run(pull.as_mut(), inputs, RUN, |first, mut pull, mut moved| {
        moved.fill(0.0);
        let square: Square = std::array::from_fn(|a| std::array::from_fn(|b| inputs[(first + a, first + b)]));
        let Some(inverse) = inverse(inputs.submatrix(first, first, RUN, RUN)) else { return };
        let weights = diagonal(&square);
        for i in 0..rows {
            let weight = outputs.map_or(1.0, |outputs| outputs[(i, i)]);
            let codes = eight(codes, i * cols + first);
            let before: [f32; RUN] = std::array::from_fn(|k| lattice.value(i, first + k, codes[k]));
            let own: [f32; RUN] = std::array::from_fn(|k| pull[(i, k)] / weight);
            let wish =
                std::array::from_fn(|k| before[k] + inverse[k].iter().zip(&own).map(|(a, p)| a * p).sum::<f32>());
            let (scale, mut near) = (scale(lattice, i, first), *codes);
            points.nearest(scale, &weights, &wish, &mut near);
            // Most runs have found their point after a few sweeps.
            if near == *codes {
                continue;
            }
            points.improve(scale, &Parabola { square: &square, wish }, &near, codes);
            let step: [f32; RUN] = std::array::from_fn(|k| lattice.value(i, first + k, codes[k]) - before[k]);
            if step.iter().all(|&step| step == 0.0) {
                continue;
            }
            for k in 0..RUN {
                let fall: f32 = square[k].iter().zip(&step).map(|(a, step)| a * step).sum();
                let (pull, moved) = (contiguous(pull.as_mut(), k), contiguous(moved.as_mut(), k));
                match outputs {
                    Some(outputs) => add(step[k], fall, outputs, i, moved, pull),
                    None => {
                        moved[i] = step[k];
                        pull[i] -= fall;
                    }
                }
            }
        }
    });
}

/// One row moves by `step`, and its pull by `−G_ii fall`: the others follow by their column of `G`.
fn add(step: f32, fall: f32, outputs: MatRef<'_, f32>, row: usize, moved: &mut [f32], pull: &mut [f32]) {
    let column = outputs.col(row).try_as_col_major().expect("invariant: an owned matrix is column-major").as_slice();
    for ((moved, pull), weight) in moved.iter_mut().zip(pull).zip(column) {
        *moved += step * weight;
        *pull -= fall * weight;
    }
}

/// The scale of all levels of a run, signed.
fn scale(lattice: &impl Lattice, row: usize, col: usize) -> f32 {
    lattice.number(Number::Scale, row, col) * lattice.number(Number::CommonScale, row, col)
}

fn eight(codes: &mut [u8], first: usize) -> &mut [u8; RUN] {
    codes[first..].first_chunk_mut().expect("invariant: rows are made of whole runs")
}

fn diagonal(square: &Square) -> [f32; RUN] {
    std::array::from_fn(|k| square[k][k])
}

/// `F Fᵀ`.
fn square_of(factor: MatRef<'_, f64>) -> Square {
    let square = factor * factor.transpose();
    std::array::from_fn(|a| std::array::from_fn(|b| square[(a, b)] as f32))
}

/// The inverse of a positive definite matrix; `None` if it is singular.
fn inverse(matrix: MatRef<'_, f32>) -> Option<Square> {
    let wide = Mat::from_fn(RUN, RUN, |a, b| f64::from(matrix[(a, b)]));
    // `H⁻¹ = Uᵀ U`.
    let (upper, _) = linalg::inverse_cholesky(wide.as_ref())?;
    Some(square_of(upper.transpose()))
}
