//! What a compression tells of itself, as records of `report`.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

use super::Job;
use super::allocate::Choice;
use super::output::Written;
use super::plan::Plan;
use super::recipe::Recipe;
use super::study::{Allocation, Study};
use crate::checkpoint::{Checkpoint, Fingerprint, TensorSpec, writer_bytes};
use crate::model::inventory::LinearInfo;
use crate::report::{
    CalibrationRecord, Component, CompressReport, DryRunReport, LRC_VERSION, LinearRecord, SCHEMA_VERSION, Sizes,
    Timings,
};

/// A linear before it is worked on: no error yet, no seconds.
pub(super) fn linear(recipe: &Recipe, linear: &LinearInfo, choice: Choice) -> LinearRecord {
    let shape = linear.shape();
    LinearRecord {
        module: linear.module.clone(),
        block: linear.block,
        shape: [shape.0, shape.1],
        dtype: format!("{:?}", linear.dtype),
        rank: choice.rank(),
        component: if choice == Choice::Dense { Component::NotLowRank } else { Component::LowRank },
        parameters_before: linear.n_parameters(),
        parameters_after: choice.n_parameters(recipe.layout, shape),
        relative_error: (choice == Choice::Dense).then_some(0.0),
        storage_error: None,
        sensitivity: None,
        seconds: 0.0,
    }
}

/// Every linear of a study, with its error.
pub(super) fn linears(
    study: &Study<'_>,
    allocation: &Allocation,
    written: &BTreeMap<usize, Written>,
) -> Vec<LinearRecord> {
    let choices = &allocation.choices;
    let record = |i: usize| {
        let mut record = linear(study.recipe, &study.plan.linears[i], choices[i]);
        if let Some(basis) = study.bases.get(i) {
            record.seconds = basis.seconds;
            record.relative_error = Some(choices[i].rank().map_or(0.0, |rank| basis.curve.relative_error(rank)));
        }
        record.storage_error = written.get(&i).and_then(|w| w.storage_error);
        record.sensitivity = study.recipe.sensitivity.map(|_| allocation.sensitivities[i]);
        record
    };
    (0..choices.len()).map(record).collect()
}

/// Sizes of a checkpoint whose linears are compressed by `choices`.
pub(super) fn sizes(checkpoint: &Checkpoint, recipe: &Recipe, plan: &Plan, choices: &[Choice]) -> Sizes {
    let outputs: Vec<TensorSpec> = plan.outputs(checkpoint, recipe, choices).into_iter().map(|t| t.spec).collect();
    let linears = &plan.linears;
    let before: u64 = linears.iter().map(LinearInfo::n_parameters).sum();
    let after: u64 = linears.iter().zip(choices).map(|(l, c)| c.n_parameters(recipe.layout, l.shape())).sum();
    let stored_before: u64 = linears.iter().map(|l| l.n_parameters() * l.dtype.bitsize() as u64 / 8).sum();
    let bytes_before = checkpoint.n_bytes();
    let bytes_after: u64 = outputs.iter().map(TensorSpec::n_bytes).sum();
    let stored_after = (stored_before + bytes_after).saturating_sub(bytes_before);
    Sizes {
        linear_parameters_before: before,
        linear_parameters_after: after,
        keep: after as f64 / before as f64,
        parameters_before: checkpoint.n_elements(),
        parameters_after: outputs.iter().map(TensorSpec::n_elements).sum(),
        bytes_before,
        bytes_after,
        file_bytes_after: writer_bytes(&outputs, recipe.max_shard_bytes),
        bits_per_weight_before: 8.0 * stored_before as f64 / before as f64,
        bits_per_weight_after: 8.0 * stored_after as f64 / before as f64,
    }
}

/// A report whose output is still to be written: hashes, time and memory are filled in at the end.
///
/// # Errors
/// The source cannot be read again for its fingerprint.
pub(super) fn report(
    job: &Job<'_>,
    linears: Vec<LinearRecord>,
    sizes: Sizes,
    calibration: Option<CalibrationRecord>,
    timings: Timings,
) -> Result<CompressReport> {
    Ok(CompressReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        source: job.source.into(),
        source_files: job.checkpoint.fingerprint()?,
        recipe: recipe(job.recipe),
        calibration,
        sizes,
        linears,
        truncated: None,
        output_files: Fingerprint::new(),
        timings,
        elapsed_seconds: 0.0,
        peak_memory_bytes: None,
    })
}

pub(super) fn dry_run(
    job: &Job<'_>,
    linears: Vec<LinearRecord>,
    sizes: Sizes,
    expected_memory_bytes: u64,
) -> DryRunReport {
    DryRunReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        source: job.source.into(),
        recipe: recipe(job.recipe),
        sizes,
        linears,
        expected_memory_bytes,
    }
}

pub(super) fn recipe(recipe: &Recipe) -> Value {
    json!(recipe.to_options())
}
