//! Spectra of every matrix of a checkpoint, and the figures drawn from them.

mod farms;
mod matrices;
mod power_law;
mod spectrum;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use rayon::prelude::*;

use crate::approx::low_rank::{ErrorCurve, error_curve};
use crate::approx::metric::MetricPair;
use crate::checkpoint::{Checkpoint, Dtype, TensorSpec, write_file};
use crate::compress::spectra::Weighted;
use crate::error::Failure;
use crate::linalg;
use crate::model::inventory;
use crate::progress::Progress;
use crate::report::{InspectReport, LRC_VERSION, SCHEMA_VERSION, Spectrum, SpectrumRecord};
use matrices::Matrix;
pub use spectrum::{ENERGY_SHARES, WELORE_THRESHOLDS};

/// Computes the spectrum of every matrix, in parallel over matrices; works on any safetensors checkpoint. `weighted` are the curves
/// of linears in a metric, by module, with its name.
///
/// # Errors
/// There is no matrix, or a weight is broken.
pub fn inspect(
    checkpoint: &Checkpoint,
    model: &str,
    weighted: Option<(String, BTreeMap<String, Weighted>)>,
    progress: &dyn Progress,
) -> Result<(InspectReport, Vec<Spectrum>)> {
    let (matrices, unread) = (matrices::of(checkpoint), inventory::unread(checkpoint));
    if matrices.is_empty() {
        let told = unread.unwrap_or_else(|| "none of them is a matrix of floats".into());
        let message = format!("`{model}` holds no matrix that can be inspected among its tensors: {told}");
        return Err(Failure::unsupported(message)
            .hint("matrices of F32, F16 and BF16 are read: convert the checkpoint to one of these")
            .into());
    }
    if let Some(told) = unread {
        tracing::warn!("matrices of these dtypes are not read, and are left out: {told}");
    }
    let stage = progress.stage("inspect", matrices.len() as u64, "matrices");
    let record = |matrix: &Matrix| -> Result<(SpectrumRecord, Spectrum)> {
        stage.note(&matrix.module);
        let values = matrix.values(checkpoint).with_context(|| format!("load `{}`", matrix.module))?;
        let (m, n) = matrix.shape;
        let transposed = linalg::transposed_from_row_major(&values, m, n);
        drop(values);
        let context = || format!("inspect `{}`", matrix.module);
        let curve = error_curve(transposed.transpose(), MetricPair::IDENTITY).with_context(context)?;
        let alpha_farms = farms::alpha(transposed.as_ref()).with_context(context)?;
        let weighted = weighted.as_ref().and_then(|(_, curves)| curves.get(&matrix.module));
        stage.advance(1);
        let sigma = |curve: &ErrorCurve| curve.singular_values().collect();
        let spectrum =
            Spectrum { module: matrix.module.clone(), raw: sigma(&curve), weighted: weighted.map(|w| sigma(&w.curve)) };
        Ok((spectrum::record(matrix, &curve, alpha_farms, weighted), spectrum))
    };
    let (linears, spectra): (Vec<_>, Vec<_>) =
        matrices.par_iter().map(record).collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let owned: BTreeSet<String> = matrices.iter().flat_map(Matrix::tensor_names).collect();
    let report = InspectReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: model.into(),
        parameters: checkpoint.n_elements(),
        size_bytes: checkpoint.n_bytes(),
        metric: weighted.map(|(name, _)| name),
        linears,
        other_tensors: checkpoint.tensors().filter(|t| !owned.contains(&t.name)).map(|t| t.name.clone()).collect(),
    };
    Ok((report, spectra))
}

/// Writes singular values as a safetensors file: `MODULE` (min(out, in)) in f64, and `MODULE.weighted`.
///
/// # Errors
/// The disk refuses.
pub fn write_spectra(path: &Path, spectra: &[Spectrum]) -> Result<()> {
    let mut arrays: BTreeMap<String, &[f64]> = BTreeMap::new();
    for spectrum in spectra {
        arrays.insert(spectrum.module.clone(), &spectrum.raw);
        if let Some(weighted) = &spectrum.weighted {
            arrays.insert(format!("{}.weighted", spectrum.module), weighted);
        }
    }
    let spec = |(name, values): (&String, &&[f64])| TensorSpec {
        name: name.clone(),
        dtype: Dtype::F64,
        shape: vec![values.len()],
    };
    let specs: Vec<TensorSpec> = arrays.iter().map(spec).collect();
    write_file(path, &specs, |spec| Ok(arrays[&spec.name].iter().flat_map(|v| v.to_le_bytes()).collect()))
}
