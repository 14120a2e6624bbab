//! Builds the records of `report` for a compression.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde_json::{Value, json};

use super::inputs::Inputs;
use super::job::Job;
use super::output::Written;
use super::plan::{Choice, Plan};
use super::recipe::Recipe;
use super::solution::Solution;
use sha2::{Digest, Sha256};

use crate::checkpoint::{Fingerprint, hex, sha256_file};
use crate::formats::Source;
use crate::model::inventory::LinearInfo;
use crate::operator::{Forms, Right};
use crate::quantize::{Quant, Storage};
use crate::report::page::ErrorLine;
use crate::report::{
    CalibrationRecord, Component, CompressReport, DeltaRecord, DryRunReport, LRC_VERSION, LinearRecord, LinearSummary,
    RankSource, SCHEMA_VERSION, Sizes, Timings,
};

/// The record of the `i`-th linear of a plan before any work, without error and time.
pub(super) fn linear(plan: &Plan, i: usize, forms: Option<Forms>) -> LinearRecord {
    let linear = &plan.linears[i];
    let is_centered = linear.id.is_some_and(|id| plan.centered.contains(&id));
    let shape = linear.shape();
    let over = forms.and_then(|forms| forms.over);
    let rank = over.and_then(|form| form.size.rank());
    let (base, factors) = forms.map_or((linear.n_bytes(), 0), |forms| linear.bytes_as(&forms));
    let bits = |bytes: u64| 8.0 * bytes as f64 / linear.n_parameters() as f64;
    let quant = forms.and_then(|forms| forms.base?.storage).map(|storage| match storage {
        Storage::Grouped(scheme) => scheme.to_string(),
        Storage::Block(block_type) => block_type.name.to_string(),
    });
    LinearRecord {
        module: linear.module.clone(),
        block: linear.block,
        shape: [shape.0, shape.1],
        dtype: format!("{:?}", linear.dtype),
        rank,
        layout: over.map(|form| form.kind.name().to_string()),
        component: if rank.is_none() { Component::NotLowRank } else { Component::LowRank },
        quant,
        bits_base: bits(base),
        bits_factors: bits(factors),
        parameters_before: linear.n_parameters(),
        parameters_after: forms.map_or(linear.n_parameters(), |forms| linear.parameters_as(&forms)),
        relative_error: forms.is_none().then_some(0.0),
        centered: is_centered && forms.is_some() && !plan.are_zero[i],
        note: None,
        expert_tokens: None,
        storage_error: None,
        sensitivity: None,
        seconds: 0.0,
    }
}

/// Records of all linears of a solution, with their errors.
///
/// # Errors
/// The statistics cannot be read.
pub(super) fn linears(
    solution: &Solution<'_>,
    sensitivities: &[f64],
    written: &BTreeMap<usize, Written>,
) -> Result<Vec<LinearRecord>> {
    let study = solution.study;
    let one = |i: usize| -> Result<LinearRecord> {
        let linear_info = &study.plan.linears[i];
        let mut record = linear(study.plan, i, solution.forms(i));
        let mut notes: Vec<String> = Vec::new();
        if let Some(fitted) = solution.fitted(i) {
            let details = fitted.details();
            record.seconds = details.seconds;
            record.quant = fitted.quant().map(|quant| quant.to_string());
            notes.extend(fitted.quant().and_then(|quant| replaced(study.recipe, quant, linear_info.in_features)));
            notes.extend(details.fallback.map(|fallback| format!("rounded to nearest: {}", fallback.reason())));
            notes.extend(solution.plain_sides(i).note());
        }
        if let Some(curve) = solution.curve(i) {
            record.relative_error = Some(record.rank.map_or(0.0, |rank| curve.relative_error(rank)));
        }
        let is_laid = matches!(solution.choices[i], Choice::Fitted { .. }) && record.quant.is_none();
        if is_laid && study.recipe.format().stores_operators() {
            let laid = solution.laid(i);
            record.storage_error = Some(laid.as_ref().map_or(0.0, |laid| laid.storage_error));
            record.relative_error = laid.as_ref().and_then(|laid| laid.error).or(record.relative_error);
            notes.extend(laid.and_then(|laid| laid.note));
        }
        match solution.forms(i).and_then(|forms| Some(forms.over?.right)) {
            Some(Right::Lent(_)) => notes.push("shares its right factor with linears that have the same input".into()),
            Some(Right::Borrowed(unit)) => {
                notes.push(format!("uses the right factor of `{}`", study.plan.linears[unit].module));
            }
            Some(Right::Own) | None => {}
        }
        if let Some(error) = written.get(&i).and_then(|w| w.relative_error) {
            record.relative_error = Some(error);
        }
        record.centered = written.get(&i).is_some_and(|w| w.bias.is_some());
        record.expert_tokens = study.expert_tokens(linear_info)?;
        if let Some(seen) = study.metrics().too_few_tokens(linear_info)? {
            let inputs = linear_info.in_features;
            notes.push(format!("data-free metric: the expert saw {seen} tokens, fewer than its {inputs} inputs"));
        }
        if solution.choices[i] == Choice::Zeros {
            record.relative_error = Some(0.0);
            record.storage_error = (study.recipe.format().stores_operators()).then_some(0.0);
            let what = if study.recipe.is_residual() { "it was not changed" } else { "all weights are zero" };
            notes.push(what.into());
        }
        record.note = (!notes.is_empty()).then(|| notes.join("; "));
        record.sensitivity = study.recipe.sensitivity().map(|_| sensitivities[i]);
        Ok(record)
    };
    (0..solution.choices.len()).map(one).collect()
}

/// A note if `quant` took the place of a quantizer of the menu whose blocks or groups do not divide `cols` inputs.
fn replaced(recipe: &Recipe, quant: Quant, cols: usize) -> Option<String> {
    let is_asked_for = recipe.quant().contains(&quant);
    let asked = recipe.quant().iter().find(|&&asked| recipe.quant_for(asked, cols) == Some(quant));
    asked.filter(|_| !is_asked_for).map(|asked| format!("in {quant}, because {asked} does not divide {cols} inputs"))
}

/// Sizes of a checkpoint before and after its linears take the forms `all`.
pub(super) fn sizes(source: &Source<'_>, recipe: &Recipe, plan: &Plan, all: &[Option<Forms>]) -> Sizes {
    let files = plan.files(source, recipe, all);
    let linears = &plan.linears;
    let before: u64 = linears.iter().map(LinearInfo::n_parameters).sum();
    let parameters = linears
        .iter()
        .zip(all)
        .map(|(linear, forms)| forms.map_or(linear.n_parameters(), |forms| linear.parameters_as(&forms)));
    let after: u64 = parameters.sum();
    let stored_before: u64 = linears.iter().map(LinearInfo::n_bytes).sum();
    let bytes = |(linear, forms): (&LinearInfo, &Option<Forms>)| match forms {
        None => (linear.n_bytes(), 0),
        Some(forms) => {
            // A format may pad, or store matrices that it cannot pack; the difference counts as the base's.
            let (_, factors) = linear.bytes_as(forms);
            (recipe.format().n_bytes(linear, forms).saturating_sub(factors), factors)
        }
    };
    let stored = linears.iter().zip(all).map(bytes);
    let (base, factors) = stored.fold((0, 0), |sum, bytes| (sum.0 + bytes.0, sum.1 + bytes.1));
    let (elements_after, bytes_after) = files.n_elements_and_bytes();
    // Packed codes are not parameters.
    let parameters_before = source.checkpoint.n_elements();
    let parameters_after =
        if all.iter().flatten().any(Forms::is_quantized) { parameters_before - before + after } else { elements_after };
    let bits = |bytes: u64| 8.0 * bytes as f64 / before as f64;
    Sizes {
        linear_parameters_before: before,
        linear_parameters_after: after,
        keep: after as f64 / before as f64,
        parameters_before,
        parameters_after,
        bytes_before: source.checkpoint.n_bytes(),
        bytes_after,
        file_bytes_after: files.file_bytes(),
        bits_per_weight_before: bits(stored_before),
        bits_per_weight_after: bits(base + factors),
        bits_per_weight_base: bits(base),
        bits_per_weight_factors: bits(factors),
    }
}

/// Error by rank of every decomposed linear, for the report page.
pub(super) fn error_lines(solution: &Solution<'_>) -> Vec<ErrorLine> {
    let line = |i: usize| {
        let (study, linear) = (solution.study, &solution.study.plan.linears[i]);
        let (curve, largest, full_rank) = match solution.curve(i) {
            Some(curve) => (curve, curve.energies().len(), curve.energies().len()),
            // The last energy is what all ranks of a shared factor leave.
            None => {
                let fit = study.fits.chosen(i, solution.choices[i])?;
                let curve = fit.fitted.shared_curve(fit.member)?;
                (curve, curve.energies().len() - 1, linear.out_features.min(linear.in_features))
            }
        };
        let at = |rank: usize| (rank, curve.relative_error(rank));
        let rank = solution.forms(i).and_then(|forms| forms.rank());
        let chosen = match (solution.laid(i).and_then(|laid| laid.error), solution.choices[i]) {
            // In the place of the rank that was planned.
            (Some(error), Choice::Fitted { rank, .. }) => Some((rank, error)),
            _ => rank.map(at),
        };
        Some(ErrorLine {
            module: linear.module.clone(),
            block: linear.block,
            points: ErrorLine::ranks(largest).into_iter().map(at).collect(),
            full_rank,
            chosen,
            break_even_rank: linear.break_even_rank(),
        })
    };
    (0..solution.choices.len()).filter_map(line).collect()
}

pub(crate) fn summary(linears: &[LinearRecord]) -> LinearSummary {
    let is_compressed = |linear: &&LinearRecord| linear.rank.is_some() || linear.quant.is_some();
    let is_known = linears.iter().filter(is_compressed).all(|linear| linear.relative_error.is_some());
    let errors: Vec<f64> = linears.iter().filter_map(|l| l.relative_error).collect();
    LinearSummary {
        count: linears.len(),
        compressed: linears.iter().filter(is_compressed).count(),
        max_error: is_known.then(|| errors.iter().copied().fold(0.0, f64::max)),
        mean_error: is_known.then(|| errors.iter().sum::<f64>() / errors.len().max(1) as f64),
    }
}

/// A report of an output that is not written yet: hashes, time and memory are filled in at the end.
pub(super) fn report(
    job: &Job<'_>,
    source_files: Fingerprint,
    linears: Vec<LinearRecord>,
    sizes: Sizes,
    calibration: Option<CalibrationRecord>,
    timings: Timings,
) -> CompressReport {
    CompressReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        source: job.source.into(),
        source_files,
        source_quantization: job.checkpoint.source_quantization(),
        recipe: recipe(job.recipe),
        calibration,
        size_bytes: sizes.file_bytes_after,
        keep: sizes.keep,
        sizes,
        linear: summary(&linears),
        passed_through: passed_through(job, &linears),
        non_finite: Vec::new(),
        left_out: Vec::new(),
        linears,
        equal_bytes_baseline: None,
        adapter: None,
        delta: None,
        narrow: None,
        truncated: None,
        healed: None,
        healed_before: Vec::new(),
        output_files: Fingerprint::new(),
        timings,
        elapsed_seconds: 0.0,
        peak_memory_bytes: None,
    }
}

/// The base of a difference, and what was changed besides its linears.
pub(super) fn delta(job: &Job<'_>, plan: &Plan) -> Option<DeltaRecord> {
    let changes = job.checkpoint.changes()?;
    let bytes =
        |name: &String| job.checkpoint.info(name).map_or(0, |info| info.n_elements() * info.dtype.bitsize() as u64 / 8);
    Some(DeltaRecord {
        base: changes.base.clone(),
        stored: changes.changed.iter().cloned().collect(),
        stored_bytes: changes.changed.iter().map(bytes).sum(),
        left_out: changes.unmatched.clone(),
        unchanged: plan.are_zero.iter().filter(|&&is_zero| is_zero).count(),
    })
}

/// Tensors of the source that are neither the matrix of a targeted linear nor a refitted bias, in the order of its
/// files.
fn passed_through(job: &Job<'_>, linears: &[LinearRecord]) -> Vec<String> {
    // An adapter has nothing of its base.
    if job.checkpoint.changes().is_some() {
        return Vec::new();
    }
    let weights = linears.iter().map(|linear| format!("{}.weight", linear.module));
    let biases = linears.iter().filter(|linear| linear.centered).map(|linear| format!("{}.bias", linear.module));
    let changed: BTreeSet<String> = weights.chain(biases).collect();
    job.checkpoint.tensors().map(|info| info.name.clone()).filter(|name| !changed.contains(name)).collect()
}

/// The identity of a job: a run resumes an earlier one only if all of this is equal.
///
/// # Errors
/// The statistics file cannot be read.
pub(super) fn job(job: &Job<'_>, source_files: &Fingerprint, inputs: &Inputs) -> Result<Value> {
    let windows = inputs.windows.as_ref().map(|w| {
        let ids: Vec<u8> = w.windows.iter().flatten().flat_map(|id| id.to_le_bytes()).collect();
        json!({"text_sha256": w.part.text_sha256, "tokens_sha256": hex(&Sha256::digest(&ids))})
    });
    let mut description = json!({
        "lrc_version": LRC_VERSION,
        "source": job.source,
        "source_files": source_files,
        "recipe": recipe(job.recipe),
        "calibration": windows,
        "statistics_sha256": job.recipe.statistics().map(sha256_file).transpose()?,
        "memory_bytes": job.memory_bytes,
    });
    // Tensors that are stored whole have places of their own.
    if let Some(changes) = job.checkpoint.changes() {
        description["delta"] = json!({"base": changes.base, "stored": changes.changed});
    }
    // Measurements on another device differ in their last digits.
    if !job.device.is_cpu() {
        description["device"] = json!("gpu");
    }
    Ok(description)
}

/// The report of a dry run, before its estimates.
pub(super) fn dry_run(job: &Job<'_>, linears: Vec<LinearRecord>, sizes: Sizes, ranks: RankSource) -> DryRunReport {
    DryRunReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        source: job.source.into(),
        source_quantization: job.checkpoint.source_quantization(),
        adapter: None,
        recipe: recipe(job.recipe),
        size_bytes: sizes.file_bytes_after,
        keep: sizes.keep,
        sizes,
        ranks,
        passed_through: passed_through(job, &linears),
        linears,
        left_out: Vec::new(),
        expected_memory_bytes: 0,
        expected_disk_bytes: 0,
        expected_seconds: 0.0,
        narrow: None,
        kept_in: None,
    }
}

pub(super) fn recipe(recipe: &Recipe) -> Value {
    json!(recipe.to_options())
}
