//! Spectra of every matrix of a checkpoint, and figures derived from them.

mod farms;
mod matrices;
mod power_law;
mod spectrum;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use rayon::prelude::*;

use crate::approx::low_rank::error_curve;
use crate::approx::metric::MetricPair;
use crate::checkpoint::{Checkpoint, Dtype, TensorSpec, write_file};
use crate::compress::spectra::Weighted;
use crate::error::Failure;
use crate::linalg;
use crate::model::inventory;
use crate::progress::Progress;
use crate::report::{
    AdapterRecord, ImportanceRecord, InspectReport, LRC_VERSION, SCHEMA_VERSION, Spectrum, SpectrumRecord,
};
use matrices::Matrix;
pub use spectrum::{ENERGY_SHARES, WELORE_THRESHOLDS};

/// What a report shows in a calibration metric.
pub struct InMetric {
    /// The name of the method that defines the metric.
    pub name: String,
    /// The error curves of linears, by module.
    pub curves: BTreeMap<String, Weighted>,
    /// The errors of leaving out parts of the model, if they were measured.
    pub importance: Option<ImportanceRecord>,
}

/// Computes the spectrum of every matrix, in parallel over matrices, for any safetensors checkpoint.
///
/// ```
/// use lrc::checkpoint::Checkpoint;
/// use lrc::progress::Silent;
///
/// let checkpoint = Checkpoint::open("fixtures/tiny-llama".as_ref())?;
/// let (report, spectra) = lrc::inspect::inspect(&checkpoint, "tiny-llama", None, &Silent)?;
/// for (linear, spectrum) in report.linears.iter().zip(&spectra) {
///     let figures = &linear.figures;
///     assert_eq!(spectrum.raw[0], figures.spectral_norm);
///     let stable_rank = (figures.frobenius_norm / figures.spectral_norm).powi(2);
///     assert!((figures.stable_rank - stable_rank).abs() < 1e-9 && stable_rank <= figures.rank as f64);
/// }
/// # Ok::<(), anyhow::Error>(())
/// ```
///
/// # Errors
/// There is no matrix, or a weight cannot be read.
pub fn inspect(
    checkpoint: &Checkpoint,
    model: &str,
    weighted: Option<InMetric>,
    progress: &dyn Progress,
) -> Result<(InspectReport, Vec<Spectrum>)> {
    let (matrices, unread) = (matrices::of(checkpoint), inventory::unread(checkpoint));
    if matrices.is_empty() {
        let reason = unread.unwrap_or_else(|| "none of them is a matrix of floats".into());
        let message = format!("`{model}` has no matrix to inspect among its tensors: {reason}");
        return Err(Failure::unsupported(message)
            .hint("supported dtypes are F32, F16 and BF16: convert the checkpoint to one of these")
            .into());
    }
    if let Some(unread) = unread {
        tracing::warn!("skipping matrices of unsupported dtypes: {unread}");
    }
    let stage = progress.stage("inspect", matrices.len() as u64, "matrices");
    let found = matrices.par_iter().map(|matrix| {
        stage.note(&matrix.module);
        let weighted = weighted.as_ref().and_then(|weighted| weighted.curves.get(&matrix.module));
        let found = inspect_matrix(checkpoint, matrix, weighted);
        stage.advance(1);
        found
    });
    let (linears, spectra): (Vec<_>, Vec<_>) = found.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let owned: BTreeSet<String> = matrices.iter().flat_map(Matrix::tensor_names).collect();
    let (metric, importance) = weighted.map(|weighted| (weighted.name, weighted.importance)).unzip();
    let report = InspectReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: model.into(),
        source_quantization: checkpoint.source_quantization(),
        adapter: AdapterRecord::of(checkpoint)?,
        parameters: checkpoint.n_elements(),
        size_bytes: checkpoint.n_bytes(),
        metric,
        linears,
        other_tensors: checkpoint.tensors().filter(|t| !owned.contains(&t.name)).map(|t| t.name.clone()).collect(),
        importance: importance.flatten(),
    };
    Ok((report, spectra))
}

fn inspect_matrix(
    checkpoint: &Checkpoint,
    matrix: &Matrix,
    weighted: Option<&Weighted>,
) -> Result<(SpectrumRecord, Spectrum)> {
    let values = matrix.values(checkpoint).with_context(|| format!("loading `{}`", matrix.module))?;
    let (m, n) = matrix.shape;
    let transposed = linalg::transposed_from_row_major(&values, m, n);
    drop(values);
    let context = || format!("inspecting `{}`", matrix.module);
    let curve = error_curve(transposed.transpose(), MetricPair::IDENTITY).with_context(context)?;
    let alpha_farms = farms::alpha(transposed.as_ref()).with_context(context)?;
    let spectrum = Spectrum {
        module: matrix.module.clone(),
        raw: curve.singular_values().collect(),
        weighted: weighted.map(|weighted| weighted.curve.singular_values().collect()),
    };
    Ok((spectrum::record(matrix, &curve, alpha_farms, weighted), spectrum))
}

/// Writes singular values as a safetensors file: `MODULE` (min(out, in)) in f64, and `MODULE.weighted`.
///
/// # Errors
/// The file cannot be written.
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
