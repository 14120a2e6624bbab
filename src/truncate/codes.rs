//! Truncation of an output with codes: factors over codes, and factors that are codes themselves, get smaller ranks.
//! Codes of bases stay as they are.
//!
//! A prefix of the factors is the best smaller pair for what the base leaves. If they are codes, their scales stay:
//! then it is the best but for the rounding of those that go.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::prelude::*;

use super::bias;
use super::job::TruncateJob;
use crate::checkpoint::{Checkpoint, OutputFolder};
use crate::compress::allocate::{self, Candidate, Candidates, Item, Pick, Ranks, Rules};
use crate::compress::{KeptCurve, linear_summary, write_curves};
use crate::error::Failure;
use crate::formats::{self, CURVES_FILES, Exporter, Files, Format, MODELING_FILES, Output, Source};
use crate::model::inventory::{self, LinearInfo};
use crate::operator::{Form, Forms, Kind, Operator};
use crate::progress::Progress;
use crate::report::card::{self, CARD_FILE, Loading};
use crate::report::page::{self, PAGE_FILE};
use crate::report::{CompressReport, REPORT_FILE, TruncationRecord, publish};

/// A compressed linear.
struct Coded {
    linear: LinearInfo,
    forms: Forms,
    /// Of factors that may become smaller.
    curve: Option<KeptCurve>,
    new_rank: usize,
}

/// Whether an output has codes.
pub(super) fn has_codes(report: &CompressReport) -> bool {
    report.linears.iter().any(|linear| linear.quant.is_some())
        || report.recipe.get("quant-factors").is_some_and(|bits| !bits.is_null())
}

/// Truncates the factors of an output with codes: the knapsack allocates their bytes over the stored curves.
///
/// # Errors
/// It has no factors, has as few bytes already, or cannot have so few; or the output cannot be written.
pub(super) fn truncate(
    job: &TruncateJob<'_>,
    mut report: CompressReport,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    let started = Instant::now();
    let source = Source::new(job.checkpoint);
    let mut all = coded(job.checkpoint, &report)?;
    allocate_bytes(&mut all, &report, job.keep)?;
    let modules = all.iter().map(|one| (one.linear.clone(), one.smaller())).collect();
    let files = Files::new(&source, Format::Factored, modules, job.max_shard_bytes);
    let (_, bytes_after) = files.n_elements_and_bytes();
    update(&mut report, &all, [bytes_after, files.file_bytes()], job)?;
    formats::warn_of_growth(job.checkpoint.file_bytes(), files.file_bytes());

    let folder = OutputFolder::create(job.output, job.existing, REPORT_FILE)?;
    let mut output = Output::create(&folder, files)?;
    write(job, &source, &all, &mut output, progress)?;
    let exporter = Format::Factored.exporter();
    let loading = Loading {
        text: formats::loading(exporter, &source.config, output.files().adapter()),
        library: exporter.library(),
    };
    let written = [REPORT_FILE, PAGE_FILE, CARD_FILE];
    let replaced = [&written[..], &MODELING_FILES, &CURVES_FILES].concat();
    report.left_out = output.finish(&folder, &replaced)?.left_out.into_iter().map(Into::into).collect();
    write_curves(&folder, &curves(&all))?;
    let card = card::render(&report, job.checkpoint, &loading);
    let pages = [(CARD_FILE, card), (PAGE_FILE, page::compress(&report, &[])?)];
    publish(&folder, &mut report, &pages, started)?;
    folder.finish()?;
    Ok(report)
}

/// The compressed linears, with the curves of those that may be truncated.
fn coded(checkpoint: &Checkpoint, report: &CompressReport) -> Result<Vec<Coded>> {
    let file = curves_file(checkpoint.root())?;
    let curves = Checkpoint::open_arrays(&file)?;
    let mut all = Vec::new();
    for linear in inventory::linears(checkpoint) {
        let Some(forms) = formats::stored_forms(checkpoint, &linear)? else { continue };
        let over = forms.over.filter(|form| form.kind == Kind::FACTORS && form.size.rank() != Some(0));
        let is_kept = curves.info(&format!("{}.energies", linear.module)).is_some();
        let curve = over.filter(|_| is_kept).map(|_| KeptCurve::read(&curves, &linear.module)).transpose()?;
        let new_rank = forms.rank().unwrap_or(0);
        let is_reported = report.linears.iter().any(|record| {
            record.module == linear.module
                && record.shape == [linear.out_features, linear.in_features]
                && record.rank == forms.rank()
        });
        let is_of_file = curve.as_ref().is_none_or(|curve| curve.energies.len() == new_rank);
        if !is_reported || !is_of_file {
            let other = if is_reported { file.clone() } else { checkpoint.root().join(REPORT_FILE) };
            let message = format!("`{}` does not belong to the tensors of `{}`", other.display(), linear.module);
            return Err(Failure::unsupported(message).hint("one of the two files was modified").into());
        }
        all.push(Coded { linear, forms, curve, new_rank });
    }
    Ok(all)
}

/// The file of the curves in a folder.
///
/// # Errors
/// There is none.
pub(super) fn curves_file(root: &Path) -> Result<PathBuf> {
    let paths = CURVES_FILES.map(|name| root.join(name));
    let found = paths.iter().find(|path| path.is_file());
    Ok(found.cloned().ok_or_else(|| {
        Failure::unsupported(format!("`{}` is missing", paths[0].display())).hint(
            "`lrc truncate` takes a folder written by `lrc compress --format factored` that has factors, with all its files",
        )
    })?)
}

/// Chooses the new ranks, at least 1, so that all linears take `keep` of the bytes that they had in the source.
fn allocate_bytes(all: &mut [Coded], report: &CompressReport, keep: f64) -> Result<()> {
    let sizes = &report.sizes;
    let bytes_of_a_bit = sizes.linear_parameters_before as f64 / 8.0;
    let whole = (bytes_of_a_bit * sizes.bits_per_weight_before).max(1.0);
    let now = bytes_of_a_bit * sizes.bits_per_weight_after;
    let menus: Vec<Vec<Candidate>> = all.iter().map(Coded::candidates).filter(|menu| !menu.is_empty()).collect();
    let item = |menu| Item { dense_cost: largest_cost(menu), candidates: Candidates::Menu(menu) };
    let items: Vec<Item<'_>> = menus.iter().map(Vec::as_slice).map(item).collect();
    // Everything but these factors keeps its bytes.
    let rest = now - items.iter().map(|item| item.dense_cost).sum::<u64>() as f64;
    if keep * whole >= now {
        let message =
            format!("`--keep {keep}` is not less than the {:.4} of the bytes that is already kept", now / whole);
        return Err(Failure::usage(message).hint("`lrc truncate` only reduces ranks").into());
    }
    let least = rest + menus.iter().map(|menu| menu[0].cost).sum::<u64>() as f64;
    if keep * whole < least {
        let message = format!("`--keep {keep}` cannot be reached: the minimum is {:.4} of the bytes", least / whole);
        return Err(Failure::usage(message).hint("codes stay as they are; compress the source again").into());
    }
    let budget = (keep * whole - rest + 1e-6).floor() as u64;
    let rules = Rules { budget, fill: false, ..Rules::of_keep(&items, 0.999) };
    let picks = allocate::allocate(Ranks::Knapsack, &items, &rules);
    for (one, pick) in all.iter_mut().filter(|one| one.curve.is_some()).zip(picks) {
        if let Pick::Candidate(at) = pick {
            one.new_rank = at + 1;
        }
    }
    Ok(())
}

/// The cost of the largest rank, at which nothing is lost.
fn largest_cost(menu: &[Candidate]) -> u64 {
    menu.last().map_or(0, |candidate| candidate.cost)
}

impl Coded {
    fn rank(&self) -> usize {
        self.forms.rank().unwrap_or(0)
    }

    /// Its forms with factors of another rank.
    fn at(&self, rank: usize) -> Forms {
        let form = |form: Form| Form { storage: form.storage, ..Form::of_rank(form.kind, rank, self.linear.shape()) };
        Forms { over: self.forms.over.map(form), ..self.forms }
    }

    /// Its new forms.
    fn smaller(&self) -> Forms {
        if self.new_rank < self.rank() { self.at(self.new_rank) } else { self.forms }
    }

    /// The bytes of its factors and what they lose, at every rank from 1; none if it has no curve.
    fn candidates(&self) -> Vec<Candidate> {
        let Some(curve) = &self.curve else { return Vec::new() };
        let candidate = |rank: usize| {
            let (_, cost) = self.linear.bytes_as(&self.at(rank));
            let lost: f64 = curve.energies[rank..].iter().map(|&energy| f64::from(energy)).sum();
            Candidate { cost, error: curve.scale * lost }
        };
        (1..=self.rank()).map(candidate).collect()
    }

    /// The operator with its new ranks, codes as they are.
    fn truncated(&self, mut operator: Operator) -> Operator {
        let (before, after, shape) = (self.forms, self.smaller(), self.linear.shape());
        if let (Some(term), Some(before), Some(after)) = (&mut operator.over, before.over, after.over) {
            let parts = before.parts(shape).into_iter().zip(after.parts(shape));
            let parts = term.parts.iter().zip(parts).map(|(matrix, (old, new))| matrix.leading(old.shape, new.shape));
            (term.parts, term.form) = (parts.collect(), after);
        }
        operator
    }
}

fn write(
    job: &TruncateJob<'_>,
    source: &Source<'_>,
    all: &[Coded],
    output: &mut Output<'_>,
    progress: &dyn Progress,
) -> Result<()> {
    let (checkpoint, exporter) = (job.checkpoint, Format::Factored.exporter());
    let stage = progress.stage("truncate", all.len() as u64, "matrices");
    let encode = |one: &Coded| {
        stage.note(&one.linear.module);
        let operator = formats::load(checkpoint, &one.linear)?.context("invariant: the linear is compressed")?;
        let operator = one.truncated(operator);
        let bytes = exporter.bytes(source, &one.linear, &operator);
        let bytes = bytes.with_context(|| format!("truncating `{}`", one.linear.module))?;
        anyhow::Ok((bytes, refitted_bias(checkpoint, exporter, one, &operator)?))
    };
    for some in all.chunks(rayon::current_num_threads().max(1)) {
        for (tensors, bias) in some.par_iter().map(encode).collect::<Result<Vec<_>>>()? {
            output.put(&tensors)?;
            if let Some((name, values)) = bias {
                output.replace(name, values);
            }
            stage.advance(1);
        }
    }
    Ok(())
}

/// Name and values of the bias, if it takes up the mean of the inputs: also what truncation changes in it.
fn refitted_bias(
    checkpoint: &Checkpoint,
    exporter: &dyn Exporter,
    one: &Coded,
    operator: &Operator,
) -> Result<Option<(String, Vec<f32>)>> {
    let Some(curve) = one.curve.as_ref().filter(|curve| !curve.input_mean.is_empty()) else { return Ok(None) };
    let Some(over) = &operator.over else { return Ok(None) };
    let name = exporter.bias_name(&one.linear, &one.forms);
    let values = bias::refitted_values(checkpoint, &one.linear, &name, &curve.input_mean, over)?;
    Ok(Some((name, values)))
}

/// The curves of the smaller factors.
fn curves(all: &[Coded]) -> BTreeMap<String, KeptCurve> {
    let kept = |one: &Coded| {
        let curve = one.curve.as_ref()?;
        let energies = curve.energies[..one.new_rank].to_vec();
        Some((one.linear.module.clone(), KeptCurve { energies, ..curve.clone() }))
    };
    all.iter().filter_map(kept).collect()
}

/// The report of the truncated checkpoint, whose tensors and whose files have these bytes.
fn update(
    report: &mut CompressReport,
    all: &[Coded],
    [bytes_after, file_bytes]: [u64; 2],
    job: &TruncateJob<'_>,
) -> Result<()> {
    for one in all.iter().filter(|one| one.new_rank < one.rank()) {
        let Some(record) = report.linears.iter_mut().find(|l| l.module == one.linear.module) else { continue };
        let forms = one.smaller();
        (record.rank, record.storage_error) = (Some(one.new_rank), None);
        record.parameters_after = one.linear.parameters_as(&forms);
        record.bits_factors = 8.0 * one.linear.bytes_as(&forms).1 as f64 / record.parameters_before as f64;
        let energies = one.curve.iter().flat_map(|curve| &curve.energies);
        let (mut left, mut more) = (1.0, 0.0);
        for (at, &energy) in energies.enumerate() {
            left -= f64::from(energy);
            more += if at < one.new_rank { 0.0 } else { f64::from(energy) };
        }
        // What was left of the error of the base alone is a small difference of f32 numbers.
        let grown = (left > 1e-4).then(|| ((left + more) / left).sqrt());
        record.relative_error = record.relative_error.zip(grown).map(|(error, grown)| error * grown);
    }
    let sizes = &mut report.sizes;
    let parameters: u64 = report.linears.iter().map(|l| l.parameters_after).sum();
    let saved = 8.0 * (sizes.bytes_after as f64 - bytes_after as f64) / sizes.linear_parameters_before as f64;
    sizes.bits_per_weight_after -= saved;
    // Bases and dense weights stay.
    sizes.bits_per_weight_factors -= saved;
    sizes.parameters_after = sizes.parameters_after.saturating_sub(sizes.linear_parameters_after) + parameters;
    sizes.linear_parameters_after = parameters;
    sizes.keep = parameters as f64 / sizes.linear_parameters_before as f64;
    (sizes.bytes_after, sizes.file_bytes_after) = (bytes_after, file_bytes);
    (report.size_bytes, report.keep) = (file_bytes, sizes.keep);
    report.linear = linear_summary(&report.linears);
    report.equal_bytes_baseline = None;
    report.truncated = Some(TruncationRecord { keep: job.keep, source_files: job.checkpoint.fingerprint()? });
    Ok(())
}
