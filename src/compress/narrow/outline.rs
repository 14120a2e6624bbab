//! The report of a narrower model as one of its source.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde_json::Value;

use super::super::job::Job;
use super::super::plan::Plan;
use super::super::record;
use super::context::{Curve, Widths};
use super::shown::Names;
use crate::formats::Source;
use crate::model::inventory::LinearInfo;
use crate::model::narrow::{self, NarrowUnit};
use crate::model::{ModelConfig, depth};
use crate::operator::Shape;
use crate::report::{AdapterRecord, CompressReport, DryRunReport, LinearRecord, NarrowRecord, NarrowedUnit, Sizes};

/// What a report says of the source in place of the narrower model.
pub(in crate::compress) struct Outline {
    source_quantization: Option<String>,
    adapter: Option<AdapterRecord>,
    /// Tensors with fewer entries than in the source, besides weights.
    biases: BTreeSet<String>,
    /// Every targeted linear in the source, by its name in the narrower model.
    linears: BTreeMap<String, InSource>,
    before: Sizes,
    record: NarrowRecord,
    recipe: Value,
}

/// A linear in the source.
struct InSource {
    module: String,
    shape: Shape,
}

impl InSource {
    /// From its record; `sources` are the numbers that blocks have in the source.
    fn of(linear: &LinearRecord, sources: &[usize], units: &[NarrowUnit]) -> Self {
        let ([m, n], all) = (linear.shape, linear.parameters_before as usize);
        let is_reader = units.iter().any(|unit| unit.reader.module == linear.module);
        let shape = if is_reader { (m, all / m.max(1)) } else { (all / n.max(1), n) };
        let numbers = linear.block.map(|block| (format!(".{block}."), format!(".{}.", sources[block])));
        let module = numbers.map_or(linear.module.clone(), |(own, old)| linear.module.replacen(&own, &old, 1));
        Self { module, shape }
    }
}

/// The parts of a report that say something of the source.
pub(in crate::compress) struct Parts<'r> {
    recipe: &'r mut Value,
    source_quantization: &'r mut Option<String>,
    adapter: &'r mut Option<AdapterRecord>,
    passed_through: &'r mut Vec<String>,
    keep: &'r mut f64,
    sizes: &'r mut Sizes,
    linears: &'r mut [LinearRecord],
    narrow: &'r mut Option<NarrowRecord>,
}

/// The parts of a report of either kind.
macro_rules! parts {
    ($report:ident) => {
        Self {
            recipe: &mut $report.recipe,
            source_quantization: &mut $report.source_quantization,
            adapter: &mut $report.adapter,
            passed_through: &mut $report.passed_through,
            keep: &mut $report.keep,
            sizes: &mut $report.sizes,
            linears: &mut $report.linears,
            narrow: &mut $report.narrow,
        }
    };
}

impl<'r> Parts<'r> {
    pub fn of_run(report: &'r mut CompressReport) -> Self {
        parts!(report)
    }

    pub fn of_dry_run(report: &'r mut DryRunReport) -> Self {
        parts!(report)
    }
}

impl Outline {
    /// # Errors
    /// The adapter of the source cannot be read.
    pub(super) fn new(
        job: &Job<'_>,
        plan: &Plan,
        source: &Source<'_>,
        names: Names,
        widths: Widths<'_>,
    ) -> Result<Self> {
        let Widths { units, chosen, kept, curves, notes } = widths;
        let unit = |at: usize| unit_record(&units[at], curves.map(|curves| &curves[at]), chosen.widths[at]);
        let stay = (0..units.len()).filter(|&at| !chosen.dropped.contains(&units[at].block));
        let blocks = stay.map(unit).collect();
        let linears = plan.linears.iter().filter_map(|linear| {
            let weight = linear.weight_name();
            let own = names.get(&weight).cloned().unwrap_or(Some(weight))?;
            let own = own.strip_suffix(".weight").unwrap_or(&own).to_string();
            Some((own, InSource { module: linear.module.clone(), shape: linear.shape() }))
        });
        let changed = units.iter().zip(kept).filter(|(unit, kept)| unit.is_changed(kept));
        let (_, architecture) = ModelConfig::of(job.checkpoint)?;
        let fewer = narrow::experts_that_stay(units, kept).into_keys();
        let routers = fewer.filter_map(|block| depth::router(job.checkpoint, architecture, block));
        let in_narrower = |name: String| names.get(&name).cloned().unwrap_or(Some(name));
        Ok(Self {
            source_quantization: job.checkpoint.source_quantization(),
            adapter: AdapterRecord::of(job.checkpoint)?,
            biases: changed.flat_map(|(unit, _)| biases(unit)).filter_map(in_narrower).chain(routers).collect(),
            linears: linears.collect(),
            before: record::sizes(source, job.recipe, plan, &vec![None; plan.linears.len()]),
            record: NarrowRecord { blocks, dropped: chosen.dropped.clone(), notes },
            recipe: record::recipe(job.recipe),
        })
    }

    /// The outline of an output that is narrowed further, from its report; errors of units are those of the report of the
    /// source.
    pub(super) fn of_earlier(earlier: &CompressReport, widths: &Widths<'_>) -> Self {
        let mut record = earlier.narrow.clone().expect("invariant: the output is one of narrower modules");
        let sources: Vec<usize> =
            (0..).filter(|block| !record.dropped.contains(block)).take(earlier.linears.len()).collect();
        let curves = widths.curves.expect("invariant: an elastic output has errors");
        for ((unit, curve), &width) in widths.units.iter().zip(curves).zip(&widths.chosen.widths) {
            let is_own = |own: &&mut NarrowedUnit| own.block == sources[unit.block] && own.kind == unit.kind.name();
            let Some(own) = record.blocks.iter_mut().find(is_own) else { continue };
            let new = unit_record(unit, Some(curve), width);
            (own.after, own.squared_error, own.relative_error) = (width, new.squared_error, new.relative_error);
        }
        let linears =
            earlier.linears.iter().map(|linear| (linear.module.clone(), InSource::of(linear, &sources, widths.units)));
        Self {
            source_quantization: earlier.source_quantization.clone(),
            adapter: earlier.adapter.clone(),
            biases: widths.units.iter().flat_map(biases).collect(),
            linears: linears.collect(),
            before: earlier.sizes,
            record,
            recipe: earlier.recipe.clone(),
        }
    }

    /// Completes a report of the narrower model.
    pub fn complete(&self, report: Parts<'_>) {
        report.recipe.clone_from(&self.recipe);
        report.source_quantization.clone_from(&self.source_quantization);
        report.adapter.clone_from(&self.adapter);
        report.passed_through.retain(|name| !self.biases.contains(name));
        let (before, after) = (self.before, report.sizes);
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
        *report.keep = after.keep;
        report.linears.iter_mut().for_each(|linear| self.complete_linear(linear));
        *report.narrow = Some(self.record.clone());
    }

    /// Completes the record of a linear.
    fn complete_linear(&self, linear: &mut LinearRecord) {
        let Some(InSource { module: named, shape: (m, n) }) = self.linears.get(&linear.module) else { return };
        linear.parameters_before = (m * n) as u64;
        let narrower = (linear.shape != [*m, *n]).then(|| format!("narrower: {m} x {n} in the source"));
        let moved = (*named != linear.module).then(|| format!("`{named}` in the source"));
        let notes: Vec<String> = linear.note.take().into_iter().chain(narrower.clone()).chain(moved).collect();
        linear.note = (!notes.is_empty()).then(|| notes.join("; "));
        // Codes and low rank have an error of their own, that of the narrower matrix.
        if narrower.is_some() && linear.quant.is_none() && linear.rank.is_none() {
            let unit = self.record.blocks.iter().find(|unit| unit.reader == *named);
            linear.relative_error = unit.and_then(|unit| unit.relative_error);
        }
    }
}

/// The names that biases of linears that lose rows may have.
fn biases(unit: &NarrowUnit) -> impl Iterator<Item = String> {
    unit.makers.iter().flat_map(LinearInfo::bias_names)
}

fn unit_record(unit: &NarrowUnit, curve: Option<&Curve>, kept: usize) -> NarrowedUnit {
    let errors = curve.map(|curve| curve.narrowing.errors.as_slice());
    let relative = |errors: &[f64]| if errors[0] > 0.0 { (errors[kept] / errors[0]).sqrt() } else { 0.0 };
    NarrowedUnit {
        block: unit.block,
        kind: unit.kind.name().into(),
        expert: unit.expert,
        reader: unit.reader.module.clone(),
        before: unit.width(),
        after: kept,
        relative_error: errors.map(relative),
        squared_error: errors.map(|errors| errors[kept]),
        seconds: curve.map_or(0.0, |curve| curve.seconds),
    }
}
