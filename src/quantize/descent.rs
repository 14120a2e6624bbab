//! Codes by coordinate descent, in the metric of the inputs `C` and, if it is known, of the output's gradients `G`.
//!
//! The error `f(Q) = tr(G (W − Q) C (W − Q)ᵀ)` is a parabola in every value of `Q`, with its least at
//! `q_ij + (G E C)_ij / (G_ii C_jj)`, where `E = W − Q`: the nearest level there is the best code while all others
//! stay. With `G = I` this is QuantEase (Behdin et al. 2023), and rows do not depend on each other; with `G` a row also
//! compensates the errors of the others. Sweeps begin with the codes of GPTQ; between them scales and minima are
//! refitted for the codes that there are, in the same metric. No step increases `f`.

use anyhow::Result;
use faer::{Mat, MatRef};

use super::block::{BlockType, Blocks};
use super::damped::{damped, single};
use super::feedback::one_by_one;
use super::gptq::{Fallback, feed};
use super::grouped::{Grouped, Scale, Scheme};
use super::joint;
use super::lattice::Lattice;
use super::refit::{Refit, product};
use super::sparse::{Sparse, pruned};

/// Sweeps at most.
const SWEEPS: usize = 8;
/// A sweep that lowers the error by less than this share is the last.
const LEAST_GAIN: f64 = 0.01;

/// Both sides of the metric of a matrix (rows, cols).
#[derive(Debug, Clone, Copy)]
pub struct Sides<'a> {
    /// (cols, cols)
    pub inputs: MatRef<'a, f64>,
    /// (rows, rows)
    pub outputs: Option<MatRef<'a, f64>>,
}

impl Sides<'_> {
    /// The diagonal of the inputs' side, with a mean of about 1 and nothing below a millionth; `None` if it is all
    /// zeros.
    pub fn diagonal(&self) -> Option<Vec<f32>> {
        let diagonal = self.inputs.diagonal().column_vector();
        let mean = diagonal.iter().sum::<f64>() / diagonal.nrows().max(1) as f64;
        (mean > 0.0).then(|| diagonal.iter().map(|value| (value / mean).max(1e-6) as f32).collect())
    }
}

/// `values` (rows, cols), row-major, as codes in groups, whose scales are first chosen with the diagonal of the metric;
/// those of rounding and the reason if they have the smaller error.
///
/// # Panics
/// If the shapes do not match.
pub(super) fn grouped(
    values: &[f32],
    (rows, cols): (usize, usize),
    scheme: Scheme,
    scale: Scale,
    sides: Sides<'_>,
) -> (Grouped, Option<Fallback>) {
    let kept = scheme.kept(values, (rows, cols), Some(sides.inputs));
    let start = pruned(values, kept.as_deref());
    let lattice = scheme.lattice(&start, cols, scale, sides.diagonal().as_deref());
    let rounded = lattice.round(&start, cols);
    let (codes, lattice, fallback) = match kept {
        Some(kept) => {
            let sparse = Sparse::new(lattice, scheme, cols, kept);
            let (codes, sparse, fallback) = fit(values, (rows, cols), sides, sparse, rounded);
            (codes, sparse.lattice, fallback)
        }
        None => fit(values, (rows, cols), sides, lattice, rounded),
    };
    (Grouped::of_codes(codes, rows, cols, scheme, &lattice.grids), fallback)
}

/// The same as blocks of llama.cpp.
///
/// # Errors
/// Rows do not consist of whole blocks.
///
/// # Panics
/// If the shapes do not match.
pub(super) fn blocks(
    values: &[f32],
    (rows, cols): (usize, usize),
    block_type: BlockType,
    sides: Sides<'_>,
) -> Result<(Blocks, Option<Fallback>)> {
    let mut blocks = Blocks::weighted(values, rows, cols, block_type, sides.diagonal().as_deref())?;
    let (rounded, lattice) = blocks.codes();
    let (codes, lattice, fallback) = fit(values, (rows, cols), sides, lattice, rounded);
    blocks.put(&codes);
    blocks.put_scales(&lattice);
    Ok((blocks, fallback))
}

/// The codes of a lattice and the lattice with refitted scales, or `rounded` with those that it had and the reason. Both
/// sides are damped as by GPTQ.
fn fit<L: Lattice + Clone>(
    values: &[f32],
    (rows, cols): (usize, usize),
    sides: Sides<'_>,
    lattice: L,
    rounded: Vec<u8>,
) -> (Vec<u8>, L, Option<Fallback>) {
    let fed = match lattice.points() {
        Some(points) => joint::feed(values, (rows, cols), sides.inputs, &lattice, points),
        None => feed(values, (rows, cols), sides.inputs, &lattice).map(|fed| fed.codes),
    };
    let Some(mut codes) = fed else {
        return (rounded, lattice, Some(Fallback::NotDefinite));
    };
    let in_order: Vec<usize> = (0..cols.max(rows)).collect();
    let one = Problem {
        values,
        shape: (rows, cols),
        inputs: single(&damped(sides.inputs, &in_order[..cols])),
        outputs: sides.outputs.map(|outputs| single(&damped(outputs, &in_order[..rows]))),
    };
    let mut refitted = lattice.clone();
    let error = one.descend(&mut refitted, &mut codes);
    if one.error(&lattice, &rounded) <= error {
        return (rounded, lattice, Some(Fallback::NoGain));
    }
    (codes, refitted, None)
}

struct Problem<'a> {
    values: &'a [f32],
    shape: (usize, usize),
    inputs: Mat<f32>,
    outputs: Option<Mat<f32>>,
}

impl Problem<'_> {
    /// `E = W − Q`.
    fn errors(&self, lattice: &impl Lattice, codes: &[u8]) -> Mat<f32> {
        let (rows, cols) = self.shape;
        Mat::from_fn(rows, cols, |i, j| self.values[i * cols + j] - lattice.value(i, j, codes[i * cols + j]))
    }

    /// `G E C`.
    fn pull(&self, errors: &Mat<f32>) -> Mat<f32> {
        let pull = product(errors.as_ref(), self.inputs.as_ref());
        match &self.outputs {
            Some(outputs) => product(outputs.as_ref(), pull.as_ref()),
            None => pull,
        }
    }

    /// `f`.
    fn error(&self, lattice: &impl Lattice, codes: &[u8]) -> f64 {
        let errors = self.errors(lattice, codes);
        dot(&errors, &self.pull(&errors))
    }

    /// Alternates sweeps over the codes with refits of their scales until they gain little; returns the error.
    fn descend(&self, lattice: &mut impl Lattice, codes: &mut [u8]) -> f64 {
        let mut last = f64::INFINITY;
        for _ in 0..=SWEEPS {
            // Computed again for each sweep, so that rounding does not add up.
            let errors = self.errors(lattice, codes);
            let pull = self.pull(&errors);
            let error = dot(&errors, &pull);
            if error > (1.0 - LEAST_GAIN) * last || error == 0.0 {
                return error;
            }
            last = error;
            self.sweep(lattice, codes, pull);
            self.refit(lattice, codes);
        }
        self.error(lattice, codes)
    }

    fn refit(&self, lattice: &mut impl Lattice, codes: &[u8]) {
        let pull = self.pull(&self.errors(lattice, codes));
        let refit = Refit { inputs: self.inputs.as_ref(), outputs: self.outputs.as_ref().map(Mat::as_ref) };
        refit.all(lattice, codes, pull);
    }

    fn sweep(&self, lattice: &impl Lattice, codes: &mut [u8], mut pull: Mat<f32>) {
        let (rows, cols) = self.shape;
        if let Some(points) = lattice.points() {
            let sides = (self.inputs.as_ref(), self.outputs.as_ref().map(Mat::as_ref));
            return joint::sweep(lattice, points, codes, pull, sides);
        }
        one_by_one(pull.as_mut(), self.inputs.as_ref(), |j, pull, _, moved| {
            let size = self.inputs[(j, j)];
            moved.fill(0.0);
            for i in 0..rows {
                let code = &mut codes[i * cols + j];
                let value = lattice.value(i, j, *code);
                let weight = self.outputs.as_ref().map_or(1.0, |outputs| outputs[(i, i)]) * size;
                let wish = value + pull[i] / weight;
                let new = lattice.code(i, j, wish);
                let found = lattice.value(i, j, new);
                // Not if two levels are equally far, nor if it is the same level.
                if (found - wish).abs() >= (value - wish).abs() {
                    continue;
                }
                *code = new;
                match &self.outputs {
                    Some(outputs) => add(found - value, column(outputs, i), moved, size, pull),
                    None => {
                        moved[i] = found - value;
                        pull[i] -= size * (found - value);
                    }
                }
            }
        });
    }
}

fn column(matrix: &Mat<f32>, at: usize) -> &[f32] {
    matrix.col(at).try_as_col_major().expect("invariant: an owned matrix is column-major").as_slice()
}

/// One row moves by `step`: this moves the column of the pull by `−size · step · column`, with `column` of `G`.
fn add(step: f32, column: &[f32], moved: &mut [f32], size: f32, pull: &mut [f32]) {
    let fall = size * step;
    for ((moved, pull), weight) in moved.iter_mut().zip(pull).zip(column) {
        *moved += step * weight;
        *pull -= fall * weight;
    }
}

fn dot(a: &Mat<f32>, b: &Mat<f32>) -> f64 {
    let columns = a.col_iter().zip(b.col_iter());
    columns.map(|(a, b)| a.iter().zip(b.iter()).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()).sum()
}

#[cfg(test)]
mod tests {
    use super::super::{BLOCK_TYPES, Levels};
    use super::*;

    fn matrix(rows: usize, cols: usize, seed: u32) -> Vec<f32> {
        let value = |i: usize| ((i as u32 ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
        (0..rows * cols).map(value).collect()
    }

    /// The second moment of correlated vectors, as activations and gradients are.
    fn gram(n: usize, seed: u32) -> Mat<f64> {
        let x = matrix(2 * n, n, seed);
        let x = Mat::from_fn(2 * n, n, |i, j| {
            let at = |j: usize| f64::from(x[i * n + j]);
            at(j) + 0.9 * at(j / 3) + if j % 5 == 0 { at(0) } else { 0.0 }
        });
        x.transpose() * &x * faer::Scale(0.5 / n as f64)
    }

    /// `tr(G E C Eᵀ)`.
    fn error(values: &[f32], found: &[f32], sides: Sides<'_>) -> f64 {
        let cols = sides.inputs.nrows();
        let e = Mat::from_fn(values.len() / cols, cols, |i, j| f64::from(values[i * cols + j] - found[i * cols + j]));
        let square = &e * sides.inputs * e.transpose();
        let square = sides.outputs.map_or_else(|| square.clone(), |outputs| outputs * &square);
        square.diagonal().column_vector().iter().sum()
    }

    #[test]
    fn it_beats_gptq_which_beats_rounding_in_the_metric_of_both_sides() {
        let (rows, cols) = (24, 256);
        let (values, inputs, outputs) = (matrix(rows, cols, 5), gram(cols, 77), gram(rows, 78));
        for outputs in [None, Some(outputs.as_ref())] {
            let sides = Sides { inputs: inputs.as_ref(), outputs };
            for bits in [2, 3, 4, 8] {
                let scheme = Scheme { levels: Levels::Int { bits, symmetric: bits == 3 }, group: Some(32) };
                let (found, fallback) = grouped(&values, (rows, cols), scheme, Scale::Mse, sides);
                assert_eq!(fallback, None);
                let (fed, _) = super::super::gptq::gptq(&values, rows, cols, inputs.as_ref(), scheme, Scale::Mse);
                let rounded = Grouped::round(&values, rows, cols, scheme, Scale::Mse);
                let [found, fed, rounded] =
                    [found, fed, rounded].map(|matrix| error(&values, &matrix.dequantize(), sides));
                let share = if outputs.is_some() { 0.9 } else { 0.99 };
                assert!(found < share * fed && fed < 0.8 * rounded, "{scheme:?}: {found} {fed} {rounded}");
            }
            for block_type in BLOCK_TYPES {
                let (found, fallback) = blocks(&values, (rows, cols), block_type, sides).unwrap();
                assert_eq!(fallback, None, "{}", block_type.name);
                let rounded = Blocks::quantize(&values, rows, cols, block_type).unwrap();
                assert_eq!(found.bytes.len(), rounded.bytes.len());
                let [found, rounded] = [found, rounded].map(|blocks| error(&values, &blocks.dequantize(), sides));
                assert!(found < 0.7 * rounded, "{}: {found} {rounded}", block_type.name);
            }
        }
    }

    #[test]
    fn sweeps_and_refits_by_turns_never_raise_the_error() {
        let (rows, cols) = (6, 256);
        let (values, inputs, outputs) = (matrix(rows, cols, 3), gram(cols, 7), gram(rows, 8));
        for outputs in [None, Some(single(&outputs))] {
            let one = Problem { values: &values, shape: (rows, cols), inputs: single(&inputs), outputs };
            for block_type in BLOCK_TYPES {
                let (mut codes, mut lattice) = Blocks::quantize(&values, rows, cols, block_type).unwrap().codes();
                let first = one.error(&lattice, &codes);
                let mut last = first;
                for _ in 0..6 {
                    let pull = one.pull(&one.errors(&lattice, &codes));
                    one.sweep(&lattice, &mut codes, pull);
                    let swept = one.error(&lattice, &codes);
                    one.refit(&mut lattice, &codes);
                    let error = one.error(&lattice, &codes);
                    let found = [last, swept, error];
                    assert!(found.is_sorted_by(|a, b| *b <= a * 1.000_01), "{}: {found:?}", block_type.name);
                    last = error;
                }
                assert!(last < 0.8 * first, "{}: {last} {first}", block_type.name);
            }
        }
    }

    #[test]
    fn no_sweep_raises_the_error_and_in_the_end_no_code_can_lower_it() {
        let (rows, cols) = (6, 70);
        let (values, inputs, outputs) = (matrix(rows, cols, 3), gram(cols, 7), gram(rows, 8));
        let scheme = Scheme { levels: Levels::Int { bits: 3, symmetric: true }, group: Some(32) };
        for outputs in [None, Some(&outputs)] {
            let lattice = scheme.lattice(&values, cols, Scale::Mse, None);
            let one =
                Problem { values: &values, shape: (rows, cols), inputs: single(&inputs), outputs: outputs.map(single) };
            let mut codes = Grouped::round(&values, rows, cols, scheme, Scale::Mse).codes;
            let mut last = one.error(&lattice, &codes);
            loop {
                let before = codes.clone();
                let pull = one.pull(&one.errors(&lattice, &codes));
                one.sweep(&lattice, &mut codes, pull);
                let error = one.error(&lattice, &codes);
                assert!(error <= last * 1.000_001, "{error} {last}");
                last = error;
                if codes == before {
                    break;
                }
            }
            let found = Grouped::of_codes(codes.clone(), rows, cols, scheme, &lattice.grids).dequantize();
            let sides = Sides { inputs: inputs.as_ref(), outputs: outputs.map(Mat::as_ref) };
            let exact = error(&values, &found, sides);
            assert!((last / exact - 1.0).abs() < 1e-4, "{last} {exact}");
            for at in 0..rows * cols {
                for code in 0..8 {
                    let mut moved = codes.clone();
                    moved[at] = code;
                    assert!(one.error(&lattice, &moved) >= last * 0.999_99, "{at} {code}");
                }
            }
        }
    }

    #[test]
    fn without_correlation_or_measurement_it_is_rounding_with_better_scales() {
        let (rows, cols) = (7, 64);
        let values = matrix(rows, cols, 9);
        let scheme = Scheme { levels: Levels::Int { bits: 3, symmetric: true }, group: Some(32) };
        let rounded = Grouped::round(&values, rows, cols, scheme, Scale::Mse);
        let broken = Mat::from_fn(cols, cols, |i, j| if i == j { 1.0 } else { -5.0 });
        for inputs in [Mat::identity(cols, cols), Mat::zeros(cols, cols)] {
            let sides = Sides { inputs: inputs.as_ref(), outputs: None };
            let (found, fallback) = grouped(&values, (rows, cols), scheme, Scale::Mse, sides);
            assert_eq!(fallback, None);
            let plain = Mat::identity(cols, cols);
            let plain = Sides { inputs: plain.as_ref(), outputs: None };
            let [found, rounded] = [&found, &rounded].map(|matrix| error(&values, &matrix.dequantize(), plain));
            assert!(found < rounded && found > 0.9 * rounded, "{found} {rounded}");
            for block_type in BLOCK_TYPES.into_iter().filter(|block_type| block_type.divides(cols)) {
                let (found, _) = blocks(&values, (rows, cols), block_type, sides).unwrap();
                let expected = Blocks::quantize(&values, rows, cols, block_type).unwrap();
                let [found, expected] = [found, expected].map(|blocks| error(&values, &blocks.dequantize(), plain));
                assert!(found <= expected, "{}", block_type.name);
            }
        }
        let sides = Sides { inputs: broken.as_ref(), outputs: None };
        let found = grouped(&values, (rows, cols), scheme, Scale::Mse, sides);
        assert_eq!(found, (rounded, Some(Fallback::NotDefinite)));
    }
}
