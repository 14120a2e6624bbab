//! Narrower modules: fewer channels of feed-forward layers and fewer groups of heads, chosen in the metric of the method
//! (`approx/narrow.rs`), in every block the same number, or as many as its errors deserve; and fewer blocks.
//!
//! The result is a checkpoint: rows and columns of the source, refitted columns from files of the work folder, and a
//! config with the new widths. Everything after that, formats and quantizers included, sees a model like any other.

mod context;
mod curves;
mod importance;
mod losses;
mod part;
mod ranks;
mod refit;
mod shown;
mod units;
mod widths;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use anyhow::Result;
use serde_json::Value;

use self::context::Context;
use self::curves::Curve;
use self::ranks::RankCurves;
use self::widths::Found;
use super::plan::Plan;
use super::recipe::{Budget, Recipe};
use super::record;
use super::run::Run;
use crate::calibrate::Statistics;
use crate::checkpoint::{Checkpoint, Fingerprint, OutputFolder};
use crate::model::ModelConfig;
use crate::model::inventory::LinearInfo;
use crate::model::narrow::NarrowUnit;
use crate::progress::Progress;
use crate::report::{
    AdapterRecord, CalibrationRecord, CompressReport, LinearRecord, NarrowRecord, NarrowedUnit, Sizes, Timings,
};

pub(super) use self::context::Measure;
pub(super) use self::importance::importance;

/// A model with narrower modules, and how it came about.
pub(super) struct Narrowed {
    /// The narrower model.
    pub checkpoint: Checkpoint,
    /// Its statistics, if linears become matrices of low rank.
    pub statistics: Option<Statistics>,
    /// The recipe for its linears.
    pub then: Recipe,
    source_files: Fingerprint,
    source_quantization: Option<String>,
    adapter: Option<AdapterRecord>,
    calibration: Option<CalibrationRecord>,
    /// Tensors with fewer entries than in the source, besides weights.
    biases: BTreeSet<String>,
    /// The names of tensors in the source, of blocks with other numbers there.
    names: BTreeMap<String, String>,
    linears: Vec<LinearInfo>,
    before: Sizes,
    record: NarrowRecord,
    recipe: Value,
    timings: Timings,
    started: Instant,
}

/// Measures, chooses the widths, and refits what is kept.
///
/// # Errors
/// The model has nothing that can become narrower, the budget cannot be met, or the work folder cannot be written.
pub(super) fn narrowed(run: Run<'_>, folder: &OutputFolder, progress: &dyn Progress) -> Result<Narrowed> {
    let session = run.session(folder, progress);
    let Run { job, plan, source, mut inputs, source_files, started: begun, .. } = run;
    let (recipe, checkpoint) = (job.recipe, job.checkpoint);
    let approach = recipe.narrow().expect("invariant: the recipe is one of narrower modules");
    let then = recipe.then().expect("invariant: the recipe is one of narrower modules");
    let (config, architecture) = ModelConfig::of(checkpoint)?;
    units::check_depth(checkpoint, approach)?;
    let (units, notes) = units::of(&plan, &config, architecture, approach.widths)?;
    let calibration = inputs.record(recipe);
    let mut timings = Timings::default();
    let seconds = inputs.measure(&session, recipe)?;
    (timings.calibrate_forward, timings.calibrate_backward) = (seconds.forward, seconds.backward);
    let metrics = inputs.metrics(recipe);
    let (config, units) = (&config, units.as_slice());
    let measure = Measure { session: &session, metrics, selection: approach.selection };
    let context = Context { measure, approach, then: &then, config, architecture, units, folder };

    let started = Instant::now();
    let curves = curves::all(&measure, units)?;
    let losses = match approach.drops_blocks {
        true => losses::all(&measure, &plan.linears, config.num_hidden_layers)?,
        false => Vec::new(),
    };
    let ranks = approach.then_low_rank().then(|| RankCurves::measure(&context, &plan)).transpose()?;
    timings.decompose = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let found = Found { curves, losses, ranks };
    let chosen = widths::choose(&context, &plan, recipe, &found)?;
    let curves = found.curves;
    let widths = &chosen.widths;
    timings.allocate = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let kept: Vec<Vec<usize>> =
        widths.iter().zip(&curves).map(|(&width, curve)| curve.narrowing.first(width)).collect();
    let files = refit::all(&context, &kept)?;
    timings.decompose += started.elapsed().as_secs_f64();

    let mut narrowed = shown::selected(&context, &kept)?;
    files.iter().try_for_each(|file| narrowed.replace_by(file))?;
    let (narrowed, names) = shown::shallower(&context, narrowed, &chosen);
    let own = units.iter().zip(&curves).zip(widths).filter(|((unit, _), _)| !chosen.dropped.contains(&unit.block));
    let blocks = own.map(|((unit, curve), &kept)| unit_record(unit, curve, kept)).collect();
    let biases = biases(units, widths);
    let of_part = approach.then_low_rank().then(|| part::selected(&context, &plan.linears, &chosen, &kept));
    let then = match recipe.budget() {
        Budget::Keep(keep) if approach.then_low_rank() => then.with_keep(share_of(&narrowed, &then, &plan, keep)?),
        _ => then,
    };
    let record = NarrowRecord { blocks, dropped: chosen.dropped, notes };
    let before = record::sizes(&source, recipe, &plan, &vec![None; plan.linears.len()]);
    Ok(Narrowed {
        checkpoint: narrowed,
        statistics: of_part.and_then(|selected| Some(inputs.statistics.take()?.of_part(selected))),
        then,
        source_files,
        source_quantization: checkpoint.source_quantization(),
        adapter: AdapterRecord::of(checkpoint)?,
        biases,
        names: names.into_iter().filter_map(|(old, new)| Some((new?, old))).collect(),
        calibration,
        linears: plan.linears,
        before,
        record,
        recipe: record::recipe(recipe),
        timings,
        started: begun,
    })
}

/// The share of the parameters of the narrower model that a share of the source's is.
fn share_of(narrowed: &Checkpoint, then: &Recipe, plan: &Plan, keep: f64) -> Result<f64> {
    let sum = |linears: &[LinearInfo]| linears.iter().map(LinearInfo::n_parameters).sum::<u64>();
    let most = (keep * sum(&plan.linears) as f64 + 1e-6).floor();
    Ok(most / sum(&Plan::of_shapes(narrowed, then)?.linears) as f64)
}

/// The names that biases of narrower linears may have.
fn biases(units: &[NarrowUnit], widths: &[usize]) -> BTreeSet<String> {
    let narrower = units.iter().zip(widths).filter(|(unit, width)| **width < unit.width());
    narrower.flat_map(|(unit, _)| unit.makers.iter().flat_map(LinearInfo::bias_names)).collect()
}

fn unit_record(unit: &NarrowUnit, curve: &Curve, kept: usize) -> NarrowedUnit {
    let errors = &curve.narrowing.errors;
    let relative = if errors[0] > 0.0 { (errors[kept] / errors[0]).sqrt() } else { 0.0 };
    NarrowedUnit {
        block: unit.block,
        kind: unit.kind.name().into(),
        reader: unit.reader.module.clone(),
        before: unit.width(),
        after: kept,
        relative_error: relative,
        squared_error: errors[kept],
        seconds: curve.seconds,
    }
}

impl Narrowed {
    /// When the run began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Completes the report of the narrower model as the report of the source.
    pub fn complete(&self, report: &mut CompressReport) {
        report.recipe.clone_from(&self.recipe);
        report.source_files.clone_from(&self.source_files);
        report.source_quantization.clone_from(&self.source_quantization);
        report.adapter.clone_from(&self.adapter);
        report.calibration.clone_from(&self.calibration);
        report.passed_through.retain(|name| !self.biases.contains(self.names.get(name).unwrap_or(name)));
        let (before, after) = (self.before, &mut report.sizes);
        let share = after.linear_parameters_before as f64 / before.linear_parameters_before as f64;
        after.linear_parameters_before = before.linear_parameters_before;
        after.parameters_before = before.parameters_before;
        after.bytes_before = before.bytes_before;
        after.keep = after.linear_parameters_after as f64 / before.linear_parameters_before as f64;
        after.bits_per_weight_before = before.bits_per_weight_before;
        for bits in
            [&mut after.bits_per_weight_after, &mut after.bits_per_weight_base, &mut after.bits_per_weight_factors]
        {
            *bits *= share;
        }
        report.keep = report.sizes.keep;
        report.linears.iter_mut().for_each(|linear| self.complete_linear(linear));
        report.linear = record::summary(&report.linears);
        report.timings.calibrate_forward += self.timings.calibrate_forward;
        report.timings.calibrate_backward += self.timings.calibrate_backward;
        report.timings.decompose += self.timings.decompose;
        report.timings.allocate += self.timings.allocate;
        report.narrow = Some(self.record.clone());
    }

    /// Completes the record of a linear.
    fn complete_linear(&self, linear: &mut LinearRecord) {
        let stored = self.names.get(&format!("{}.weight", linear.module));
        let of_source = stored.and_then(|name| name.strip_suffix(".weight"));
        let named = of_source.unwrap_or(&linear.module).to_string();
        let Some(source) = self.linears.iter().find(|source| source.module == named) else { return };
        linear.parameters_before = source.n_parameters();
        let (m, n) = source.shape();
        let narrower = (linear.shape != [m, n]).then(|| format!("narrower: {m} x {n} in the source"));
        let moved = (named != linear.module).then(|| format!("`{named}` in the source"));
        let notes: Vec<String> = linear.note.take().into_iter().chain(narrower.clone()).chain(moved).collect();
        linear.note = (!notes.is_empty()).then(|| notes.join("; "));
        if narrower.is_some() && linear.quant.is_none() {
            let unit = self.record.blocks.iter().find(|unit| unit.reader == named);
            linear.relative_error = unit.map(|unit| unit.relative_error);
        }
    }
}
