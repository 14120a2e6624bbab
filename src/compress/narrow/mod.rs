//! Narrower modules: fewer channels of feed-forward layers and fewer groups of heads, chosen in the metric of the method
//! (`approx/narrow.rs`), the same number in every block.
//!
//! The result is a checkpoint: rows and columns of the source, refitted columns from files of the work folder, and a
//! config with the new widths. Everything after that, formats and quantizers included, sees a model like any other.

mod context;
mod curves;
mod refit;
mod shown;
mod widths;

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::Result;
use serde_json::Value;

use self::context::{Context, Width};
use self::curves::Curve;
use super::record;
use super::run::Run;
use crate::checkpoint::{Checkpoint, Fingerprint, OutputFolder};
use crate::error::Failure;
use crate::model::ModelConfig;
use crate::model::architectures::Architecture;
use crate::model::inventory::LinearInfo;
use crate::model::narrow::{self, NarrowUnit, UnitKind};
use crate::progress::Progress;
use crate::report::{AdapterRecord, CalibrationRecord, CompressReport, NarrowRecord, NarrowedUnit, Sizes, Timings};

/// A model with narrower modules, and how it came about.
pub(super) struct Narrowed {
    /// The narrower model.
    pub checkpoint: Checkpoint,
    source_files: Fingerprint,
    source_quantization: Option<String>,
    adapter: Option<AdapterRecord>,
    calibration: Option<CalibrationRecord>,
    /// Tensors with fewer entries than in the source, besides weights.
    biases: BTreeSet<String>,
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
    let then = &recipe.then().expect("invariant: the recipe is one of narrower modules");
    let (config, architecture) = ModelConfig::of(checkpoint)?;
    let all = narrow::units(&plan.linears, &config, architecture);
    let (units, notes) = uniform_units(all, &config, architecture)?;
    let calibration = inputs.record(recipe);
    let mut timings = Timings::default();
    let seconds = inputs.measure(&session, recipe)?;
    (timings.calibrate_forward, timings.calibrate_backward) = (seconds.forward, seconds.backward);
    let metrics = inputs.metrics(recipe);
    let (config, units) = (&config, units.as_slice());
    let context = Context { session: &session, metrics, approach, then, config, architecture, units, folder };

    let started = Instant::now();
    let curves = curves::all(&context)?;
    timings.decompose = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let width = widths::uniform(&context, &plan, recipe, &curves)?;
    timings.allocate = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let kept: Vec<Vec<usize>> =
        units.iter().zip(&curves).map(|(unit, curve)| curve.narrowing.first(width.of(unit))).collect();
    let files = refit::all(&context, &kept)?;
    timings.decompose += started.elapsed().as_secs_f64();

    let mut narrowed = shown::selected(&context, width, &kept)?;
    files.iter().try_for_each(|file| narrowed.replace_by(file))?;
    let blocks = units.iter().zip(&curves).map(|(unit, curve)| unit_record(unit, curve, width)).collect();
    let record = NarrowRecord { blocks, notes };
    let before = record::sizes(&source, recipe, &plan, &vec![None; plan.linears.len()]);
    Ok(Narrowed {
        checkpoint: narrowed,
        source_files,
        source_quantization: checkpoint.source_quantization(),
        adapter: AdapterRecord::of(checkpoint)?,
        biases: biases(units, width),
        calibration,
        linears: plan.linears,
        before,
        record,
        recipe: record::recipe(recipe),
        timings,
        started: begun,
    })
}

/// The units of the kinds that every block has in the same width, and why there are none of the other kinds.
fn uniform_units(
    all: Vec<NarrowUnit>,
    config: &ModelConfig,
    architecture: &Architecture,
) -> Result<(Vec<NarrowUnit>, Vec<String>)> {
    let mut notes = Vec::new();
    let mut units = Vec::new();
    for kind in [UnitKind::Groups, UnitKind::Channels] {
        let own: Vec<NarrowUnit> = all.iter().filter(|unit| unit.kind == kind).cloned().collect();
        let widths: Vec<usize> = own.iter().map(NarrowUnit::width).collect();
        let name = kind.name();
        let reason = match (kind, own.len()) {
            (UnitKind::Groups, _) if !architecture.has_free_heads => {
                format!("the family `{}` fixes the number of heads", config.model_type)
            }
            (UnitKind::Channels, 0) if architecture.experts.is_some() => "experts cannot become narrower".into(),
            (_, 0) => "their linears are not all targeted".into(),
            (_, n) if n < config.num_hidden_layers => {
                format!("only {n} of {} blocks have linears of them that are targeted", config.num_hidden_layers)
            }
            _ if widths.iter().any(|width| *width != widths[0]) => "blocks have different numbers of them".into(),
            _ => {
                units.extend(own);
                continue;
            }
        };
        notes.push(format!("{name} stay as they are: {reason}"));
    }
    if units.is_empty() {
        return Err(Failure::unsupported(format!("nothing can become narrower: {}", notes.join("; ")))
            .hint("`--structure low-rank` compresses linears of any model")
            .into());
    }
    units.sort_by_key(|unit| (unit.block, unit.kind));
    for note in &notes {
        tracing::info!("{note}");
    }
    Ok((units, notes))
}

/// The names that biases of narrower linears may have.
fn biases(units: &[NarrowUnit], width: Width) -> BTreeSet<String> {
    let narrower = units.iter().filter(|unit| width.of(unit) < unit.width());
    narrower.flat_map(|unit| unit.makers.iter().flat_map(LinearInfo::bias_names)).collect()
}

fn unit_record(unit: &NarrowUnit, curve: &Curve, width: Width) -> NarrowedUnit {
    let errors = &curve.narrowing.errors;
    let kept = width.of(unit);
    let relative = if errors[0] > 0.0 { (errors[kept] / errors[0]).sqrt() } else { 0.0 };
    NarrowedUnit {
        block: unit.block,
        kind: unit.kind.name().into(),
        reader: unit.reader.module.clone(),
        before: unit.width(),
        after: kept,
        relative_error: relative,
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
        report.passed_through.retain(|name| !self.biases.contains(name));
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
        for linear in &mut report.linears {
            let Some(source) = self.linears.iter().find(|source| source.module == linear.module) else { continue };
            linear.parameters_before = source.n_parameters();
            let (m, n) = source.shape();
            if linear.shape == [m, n] {
                continue;
            }
            let note = format!("narrower: {m} x {n} in the source");
            linear.note = Some(linear.note.take().map_or(note.clone(), |own| format!("{own}; {note}")));
            if linear.quant.is_none() {
                let unit = self.record.blocks.iter().find(|unit| unit.reader == linear.module);
                linear.relative_error = unit.map(|unit| unit.relative_error);
            }
        }
        report.linear = record::summary(&report.linears);
        report.timings.calibrate_forward += self.timings.calibrate_forward;
        report.timings.calibrate_backward += self.timings.calibrate_backward;
        report.timings.decompose += self.timings.decompose;
        report.timings.allocate += self.timings.allocate;
        report.narrow = Some(self.record.clone());
    }
}
