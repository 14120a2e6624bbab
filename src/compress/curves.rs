//! Error curves next to the weights of a factored output, with which it can be truncated further without its source.
//!
//! For each linear with ranks, `lrc-curves.arrays` has its relative energies `σ_i² / Σ σ²` up to its rank, the cost to
//! the model of its total energy, the diagonals of its metric, with `--elastic` the matrix that restores the order of
//! its ranks, and with `--center` the mean of its inputs. Over a base the energies are those of what the base leaves,
//! in the metric of the compensation, and there are no diagonals.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::output::Written;
use super::solution::Solution;
use crate::checkpoint::{Checkpoint, Dtype, OutputFolder, TensorSpec, cast, write_file};
use crate::formats::CURVES_FILES;

/// The record of a low-rank linear that an output stores so that truncation does not need the source.
#[derive(Debug, Clone)]
pub(crate) struct KeptCurve {
    /// `σ_i² / Σ σ²` of the stored ranks.
    pub energies: Vec<f32>,
    /// The cost of `Σ σ²` to the model. It is an f64 because the squares of f32 weights may overflow f32.
    pub scale: f64,
    /// Diagonals of the metric: output (m) and input (n); empty over a base.
    pub output: Vec<f32>,
    pub input: Vec<f32>,
    /// The matrix (r, r) that recovers the fit from stored matrices without an order of ranks; empty if it was not kept
    /// or is not needed. See [`crate::operator::Fitting::rank_factor`].
    pub rank_factor: Vec<f32>,
    /// The mean of the inputs (n) that the bias takes up; empty if the bias is the source's.
    pub input_mean: Vec<f32>,
}

const ARRAYS: [&str; 5] = ["energies", "scale", "output_metric", "input_metric", "rank_factor"];
/// Written for centered linears only.
const INPUT_MEAN: &str = "input_mean";
/// The name of `rank_factor` in files of versions before 0.3.
const FORMER_RANK_FACTOR: &str = "order";

impl KeptCurve {
    /// Name, dtype, length and bytes of each array.
    fn arrays(&self) -> Vec<(&'static str, Dtype, usize, Vec<u8>)> {
        let [energies, scale, output, input, rank_factor] = ARRAYS;
        let floats = |name, values: &[f32]| {
            let bytes =
                cast::encode(Dtype::F32, values).expect("invariant: curves are relative, and rank factors finite");
            (name, Dtype::F32, values.len(), bytes)
        };
        let mut arrays = vec![
            floats(energies, &self.energies),
            (scale, Dtype::F64, 1, self.scale.to_le_bytes().to_vec()),
            floats(output, &self.output),
            floats(input, &self.input),
            floats(rank_factor, &self.rank_factor),
        ];
        if !self.input_mean.is_empty() {
            arrays.push(floats(INPUT_MEAN, &self.input_mean));
        }
        arrays
    }

    /// # Errors
    /// An array is absent or damaged.
    pub fn read(curves: &Checkpoint, module: &str) -> Result<Self> {
        let [energies, scale, output, input, rank_factor] = ARRAYS.map(|name| format!("{module}.{name}"));
        let has_former = curves.info(&rank_factor).is_none();
        let rank_factor = if has_former { format!("{module}.{FORMER_RANK_FACTOR}") } else { rank_factor };
        let [energies, output, input, rank_factor] =
            [energies, output, input, rank_factor].map(|name| curves.values(&name));
        let scale = scale_of(curves, &scale)?.with_context(|| format!("the curves have no scale for `{module}`"))?;
        let mean = format!("{module}.{INPUT_MEAN}");
        let input_mean = curves.info(&mean).map(|_| curves.values(&mean)).transpose()?.unwrap_or_default();
        Ok(Self { energies: energies?, scale, output: output?, input: input?, rank_factor: rank_factor?, input_mean })
    }
}

/// A scale: an f64, or an f32 in files of the first versions.
fn scale_of(curves: &Checkpoint, name: &str) -> Result<Option<f64>> {
    if curves.require(name)?.dtype != Dtype::F64 {
        return Ok(curves.values(name)?.first().copied().map(f64::from));
    }
    let scale = curves.with_bytes(name, |bytes| bytes.first_chunk().map(|&b| f64::from_le_bytes(b)))?;
    Ok(scale.filter(|scale| scale.is_finite()))
}

/// Writes the curves of a solution.
///
/// # Errors
/// The work folder cannot be read, or the disk is full.
pub(super) fn write_of(
    folder: &OutputFolder,
    solution: &Solution<'_>,
    sensitivities: &[f64],
    written: &BTreeMap<usize, Written>,
) -> Result<()> {
    let fits = &solution.study.fits;
    let mut all = BTreeMap::new();
    for i in solution.compressed() {
        let Some(rank) = solution.forms(i).and_then(|forms| forms.rank()) else { continue };
        if solution.laid(i).is_some_and(|laid| laid.error.is_some()) {
            continue; // Its ranks have no order.
        }
        let chosen = fits.chosen(i, solution.choices[i]);
        let diagonals = fits.low_rank(i).and_then(|fitted| fitted.diagonals());
        let (curve, cost, output, input) =
            match (chosen.and_then(|fit| fit.fitted.residual()), solution.curve(i), diagonals) {
                (Some((cost, curve)), ..) => (curve, cost, &Vec::new(), &Vec::new()),
                (None, Some(curve), Some((output, input))) => (curve, curve.squared_error(0), output, input),
                _ => continue,
            };
        let total = curve.squared_error(0);
        let relative = |energy: &f64| if total > 0.0 { (energy / total) as f32 } else { 0.0 };
        let rank_factor = written.get(&i).and_then(|written| written.rank_factor.as_ref());
        let rank_factor = rank_factor
            .map(|kept| fits.spool.lock().expect("invariant: no holder of the spool panics").get(kept)?.f32s());
        let kept = KeptCurve {
            energies: curve.energies()[..rank].iter().map(relative).collect(),
            scale: cost * sensitivities[i],
            output: relative_to_mean(output),
            input: relative_to_mean(input),
            rank_factor: rank_factor.transpose()?.unwrap_or_default(),
            input_mean: solution.input_mean(i)?.unwrap_or_default().into_iter().map(|v| v as f32).collect(),
        };
        all.insert(solution.study.plan.linears[i].module.clone(), kept);
    }
    write(folder, &all)
}

/// `values` divided by their mean, because metrics matter only up to a factor: f32 then holds gradients of any size.
fn relative_to_mean(values: &[f64]) -> Vec<f32> {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    values.iter().map(|v| if mean > 0.0 { (v / mean) as f32 } else { 1.0 }).collect()
}

/// Writes curves by module; writes no file if there are none.
///
/// # Errors
/// The disk is full or cannot be written.
pub(crate) fn write(folder: &OutputFolder, all: &BTreeMap<String, KeptCurve>) -> Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    let mut arrays = BTreeMap::new();
    for (module, kept) in all {
        for (name, dtype, length, bytes) in kept.arrays() {
            arrays.insert(format!("{module}.{name}"), (dtype, length, bytes));
        }
    }
    let spec = |(name, (dtype, length, _)): (&String, &(Dtype, usize, Vec<u8>))| TensorSpec {
        name: name.clone(),
        dtype: *dtype,
        shape: vec![*length],
    };
    let specs: Vec<TensorSpec> = arrays.iter().map(spec).collect();
    write_file(&folder.path().join(CURVES_FILES[0]), &specs, |spec| Ok(arrays[&spec.name].2.clone()))
}
