//! Error curves beside the weights of a factored output, by which it is truncated further without its source.
//!
//! `lrc-curves.arrays` has for each linear of low rank its relative energies `σ_i² / Σ σ²` up to its rank, what all of its energy
//! costs the model, the diagonals of its metric, and with `--elastic` what restores the order of its ranks.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::output::Written;
use super::solution::Solution;
use crate::checkpoint::{Checkpoint, Dtype, OutputFolder, TensorSpec, cast, write_file};
use crate::formats::CURVES_FILES;

/// What an output stores about a low-rank linear, so that the source is not needed.
#[derive(Debug, Clone)]
pub(crate) struct KeptCurve {
    /// `σ_i² / Σ σ²` of the stored ranks.
    pub energies: Vec<f32>,
    /// What `Σ σ²` costs the model. An f64: the squares of weights that an f32 holds are not always numbers that it holds.
    pub scale: f64,
    /// Diagonals of the metric: output (m) and input (n).
    pub output: Vec<f32>,
    pub input: Vec<f32>,
    /// The matrix (r, r) by which the fit is found again where stored matrices have lost the order of ranks; empty where it was not
    /// kept, or is not needed. See [`crate::operator::Fitting::rank_factor`].
    pub rank_factor: Vec<f32>,
}

const PARTS: [&str; 5] = ["energies", "scale", "output_metric", "input_metric", "order"];

impl KeptCurve {
    /// Name, dtype, length and bytes of each part.
    fn arrays(&self) -> [(&'static str, Dtype, usize, Vec<u8>); 5] {
        let [energies, scale, output, input, order] = PARTS;
        let floats = |part, values: &[f32]| {
            let bytes =
                cast::encode(Dtype::F32, values).expect("invariant: curves are relative, and rank factors finite");
            (part, Dtype::F32, values.len(), bytes)
        };
        [
            floats(energies, &self.energies),
            (scale, Dtype::F64, 1, self.scale.to_le_bytes().to_vec()),
            floats(output, &self.output),
            floats(input, &self.input),
            floats(order, &self.rank_factor),
        ]
    }

    /// # Errors
    /// An array is absent or broken.
    pub fn read(curves: &Checkpoint, module: &str) -> Result<Self> {
        let [energies, scale, output, input, order] = PARTS.map(|part| format!("{module}.{part}"));
        let [energies, output, input, order] = [energies, output, input, order].map(|name| curves.values(&name));
        let scale = scale_of(curves, &scale)?.with_context(|| format!("the curves have no scale for `{module}`"))?;
        Ok(Self { energies: energies?, scale, output: output?, input: input?, rank_factor: order? })
    }
}

/// A scale: an f64, or an f32 as the first versions wrote it.
fn scale_of(curves: &Checkpoint, name: &str) -> Result<Option<f64>> {
    if curves.require(name)?.dtype != Dtype::F64 {
        return Ok(curves.values(name)?.first().copied().map(f64::from));
    }
    let scale = curves.with_bytes(name, |bytes| bytes.first_chunk().map(|&b| f64::from_le_bytes(b)))?;
    Ok(scale.filter(|scale| scale.is_finite()))
}

/// The curves of a solution.
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
        let rank = solution.forms(i).and_then(|forms| forms.rank());
        let diagonals = fits.low_rank(i).and_then(|fitted| fitted.diagonals());
        let (Some(rank), Some(curve), Some((output, input))) = (rank, solution.curve(i), diagonals) else { continue };
        let total = curve.squared_error(0);
        let relative = |energy: &f64| if total > 0.0 { (energy / total) as f32 } else { 0.0 };
        let rank_factor = written.get(&i).and_then(|written| written.rank_factor.as_ref());
        let rank_factor = rank_factor
            .map(|kept| fits.spool.lock().expect("invariant: no holder of the spool panics").get(kept)?.f32s());
        let kept = KeptCurve {
            energies: curve.energies()[..rank].iter().map(relative).collect(),
            scale: total * sensitivities[i],
            output: relative_to_mean(output),
            input: relative_to_mean(input),
            rank_factor: rank_factor.transpose()?.unwrap_or_default(),
        };
        all.insert(solution.study.plan.linears[i].module.clone(), kept);
    }
    write(folder, &all)
}

/// Metrics matter up to a factor: `values` over their mean, which f32 holds whatever the size of gradients.
fn relative_to_mean(values: &[f64]) -> Vec<f32> {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    values.iter().map(|v| if mean > 0.0 { (v / mean) as f32 } else { 1.0 }).collect()
}

/// Writes curves by module; no file where there is none.
///
/// # Errors
/// The disk is full or cannot be written.
pub(crate) fn write(folder: &OutputFolder, all: &BTreeMap<String, KeptCurve>) -> Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    let mut arrays = BTreeMap::new();
    for (module, kept) in all {
        for (part, dtype, length, bytes) in kept.arrays() {
            arrays.insert(format!("{module}.{part}"), (dtype, length, bytes));
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
