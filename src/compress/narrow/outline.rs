//! The report of a narrower model as one of its source.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde_json::Value;

use super::super::job::Job;
use super::super::plan::Plan;
use super::super::record;
use super::context::Chosen;
use super::curves::Curve;
use super::shown::Names;
use crate::formats::Source;
use crate::model::inventory::LinearInfo;
use crate::model::narrow::NarrowUnit;
use crate::report::{AdapterRecord, CompressReport, DryRunReport, LinearRecord, NarrowRecord, NarrowedUnit, Sizes};

/// What a report says of the source in place of the narrower model.
pub(in crate::compress) struct Outline {
    source_quantization: Option<String>,
    adapter: Option<AdapterRecord>,
    /// Tensors with fewer entries than in the source, besides weights.
    biases: BTreeSet<String>,
    /// The names of tensors in the source, of blocks with other numbers there.
    names: BTreeMap<String, String>,
    linears: Vec<LinearInfo>,
    before: Sizes,
    record: NarrowRecord,
    recipe: Value,
}

/// The widths that were chosen.
pub(super) struct Widths<'a> {
    pub units: &'a [NarrowUnit],
    pub chosen: &'a Chosen,
    /// The errors at every width, if they were measured.
    pub curves: Option<&'a [Curve]>,
    /// What stays as it is, and why.
    pub notes: Vec<String>,
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

impl<'r> Parts<'r> {
    pub fn of_run(report: &'r mut CompressReport) -> Self {
        Self {
            recipe: &mut report.recipe,
            source_quantization: &mut report.source_quantization,
            adapter: &mut report.adapter,
            passed_through: &mut report.passed_through,
            keep: &mut report.keep,
            sizes: &mut report.sizes,
            linears: &mut report.linears,
            narrow: &mut report.narrow,
        }
    }

    pub fn of_dry_run(report: &'r mut DryRunReport) -> Self {
        Self {
            recipe: &mut report.recipe,
            source_quantization: &mut report.source_quantization,
            adapter: &mut report.adapter,
            passed_through: &mut report.passed_through,
            keep: &mut report.keep,
            sizes: &mut report.sizes,
            linears: &mut report.linears,
            narrow: &mut report.narrow,
        }
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
        let Widths { units, chosen, curves, notes } = widths;
        let stays = |at: &usize| !chosen.dropped.contains(&units[*at].block);
        let unit = |at: usize| unit_record(&units[at], curves.map(|curves| &curves[at]), chosen.widths[at]);
        let blocks = (0..units.len()).filter(stays).map(unit).collect();
        Ok(Self {
            source_quantization: job.checkpoint.source_quantization(),
            adapter: AdapterRecord::of(job.checkpoint)?,
            biases: biases(units, &chosen.widths),
            names: names.into_iter().filter_map(|(old, new)| Some((new?, old))).collect(),
            linears: plan.linears.clone(),
            before: record::sizes(source, job.recipe, plan, &vec![None; plan.linears.len()]),
            record: NarrowRecord { blocks, dropped: chosen.dropped.clone(), notes },
            recipe: record::recipe(job.recipe),
        })
    }

    /// Completes a report of the narrower model.
    pub fn complete(&self, report: Parts<'_>) {
        report.recipe.clone_from(&self.recipe);
        report.source_quantization.clone_from(&self.source_quantization);
        report.adapter.clone_from(&self.adapter);
        report.passed_through.retain(|name| !self.biases.contains(self.names.get(name).unwrap_or(name)));
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
            linear.relative_error = unit.and_then(|unit| unit.relative_error);
        }
    }
}

/// The names that biases of narrower linears may have.
fn biases(units: &[NarrowUnit], widths: &[usize]) -> BTreeSet<String> {
    let narrower = units.iter().zip(widths).filter(|(unit, width)| **width < unit.width());
    narrower.flat_map(|(unit, _)| unit.makers.iter().flat_map(LinearInfo::bias_names)).collect()
}

fn unit_record(unit: &NarrowUnit, curve: Option<&Curve>, kept: usize) -> NarrowedUnit {
    let errors = curve.map(|curve| curve.narrowing.errors.as_slice());
    let relative = |errors: &[f64]| if errors[0] > 0.0 { (errors[kept] / errors[0]).sqrt() } else { 0.0 };
    NarrowedUnit {
        block: unit.block,
        kind: unit.kind.name().into(),
        reader: unit.reader.module.clone(),
        before: unit.width(),
        after: kept,
        relative_error: errors.map(relative),
        squared_error: errors.map(|errors| errors[kept]),
        seconds: curve.map_or(0.0, |curve| curve.seconds),
    }
}
