//! Spectra of every linear of a checkpoint, and the figures drawn from them.

mod spectrum;

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::compress::low_rank::error_curve;
use crate::compress::metric::MetricPair;
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::progress::Progress;
use crate::report::{InspectReport, LRC_VERSION, SCHEMA_VERSION, SpectrumRecord};

/// Computes the spectrum of every linear, in parallel over linears; works on any safetensors checkpoint.
///
/// # Errors
/// A weight is broken.
pub fn inspect(checkpoint: &Checkpoint, model: &str, progress: &dyn Progress) -> Result<InspectReport> {
    let linears = inventory::linears(checkpoint);
    let stage = progress.stage("inspect", linears.len() as u64, "matrices");
    let record = |linear: &LinearInfo| -> Result<SpectrumRecord> {
        stage.note(&linear.module);
        let values = inventory::weight(checkpoint, linear).with_context(|| format!("load `{}`", linear.module))?;
        let transposed = linalg::transposed_from_row_major(&values, linear.out_features, linear.in_features);
        drop(values);
        let curve = error_curve(transposed.transpose(), MetricPair::IDENTITY)
            .with_context(|| format!("inspect `{}`", linear.module))?;
        stage.advance(1);
        Ok(spectrum::record(linear, &curve))
    };
    let records = linears.par_iter().map(record).collect::<Result<Vec<_>>>()?;
    let owned: BTreeSet<String> = linears.iter().flat_map(LinearInfo::tensor_names).collect();
    Ok(InspectReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: model.into(),
        parameters: checkpoint.n_elements(),
        size_bytes: checkpoint.n_bytes(),
        linears: records,
        other_tensors: checkpoint.tensors().filter(|t| !owned.contains(&t.name)).map(|t| t.name.clone()).collect(),
    })
}
