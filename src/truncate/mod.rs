//! Truncation of a compressed checkpoint to a smaller size, without its source.
//!
//! The left and right parts of factors are in order of significance, so a prefix of them is the best smaller pair.
//! Pivot rows have lost that order. If `--elastic` stored the matrix that restores it (r² values per matrix), the
//! pair is recovered; otherwise the product is decomposed again in the diagonals of its metric, which is exact for
//! svd, asvd and fwsvd and an approximation for metrics of full Grams.
//!
//! Factors over codes get smaller ranks too; codes stay as they are.
//!
//! A narrower model of `--elastic` has its channels and groups in order of importance, and becomes narrower still.

mod adapter;
mod bias;
mod codes;
mod factors;
mod job;
mod narrow;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::approx::low_rank::{ErrorCurve, LowRank};
use crate::approx::metric::{Metric, MetricPair};
use crate::checkpoint::{
    CONFIG_FILE, Checkpoint, CheckpointError, Dtype, OutputFolder, SafetensorsWriter, TensorSpec, cast, expect_apart,
    json, writer_bytes,
};
use crate::compress::allocate::{self, Candidate, Candidates, Item, Ladder, Pick, Ranks, Rules};
use crate::compress::{KeptCurve, linear_summary, write_curves};
use crate::error::Failure;
use crate::formats::{self, Adapter, CURVES_FILES, Format, OutTensor, Source};
use crate::linalg;
use crate::model::config::native_config;
use crate::model::coverage;
use crate::model::inventory::{self, LinearInfo, Stored};
use crate::operator::{self, Forms, Kind, Operator, Side, Sides, Term};
use crate::progress::Progress;
use crate::report::card::{self, Loading};
use crate::report::earlier::read_report;
use crate::report::page::{self, PAGE_FILE};
use crate::report::{CompressReport, REPORT_FILE, TruncationRecord, publish};

pub use adapter::{AdapterJob, AdapterSize, is_adapter, truncate_adapter};
pub use job::TruncateJob;

/// The rank that the config of an output has for a module.
fn rank_of<'c>(config: &'c mut Map<String, Value>, module: &str) -> Option<&'c mut Value> {
    config.get_mut("lrc")?.get_mut("modules")?.get_mut(module)?.get_mut("rank")
}

/// A linear of low rank that may be truncated.
struct Truncation {
    linear: LinearInfo,
    rank: usize,
    kind: Kind,
    curve: KeptCurve,
    new_rank: usize,
}

/// Truncates a compressed checkpoint: the knapsack allocates ranks over the stored curves.
///
/// # Errors
/// The checkpoint was not compressed, keeps less already, or cannot become so small; or the output cannot be written.
pub fn truncate(job: &TruncateJob<'_>, progress: &dyn Progress) -> Result<CompressReport> {
    let started = Instant::now();
    let checkpoint = job.checkpoint;
    let root = checkpoint.root();
    OutputFolder::check(job.output, job.existing, REPORT_FILE)?;
    expect_apart(job.output, [root])?;
    coverage::expect_whole(checkpoint)?;
    const TAKES: &str = "`lrc truncate` takes a folder written by `lrc compress --format factored`, or by `--structure narrow --elastic`";
    let mut report = read_report(root, TAKES)?;
    if report.healed.is_some() {
        let message = format!("`{}` was healed: what was trained has no order of significance", root.display());
        return Err(Failure::unsupported(message).hint("truncate the output that was healed, and heal it anew").into());
    }
    if report.narrow.is_some() && report.linears.iter().all(|linear| linear.rank.is_none()) {
        return narrow::truncate(job, &report, progress);
    }
    let mut config = checkpoint.config().cloned().unwrap_or_default();
    expect_own_factors(&config, root)?;
    if codes::has_codes(&report) {
        return codes::truncate(job, report, progress);
    }
    let mut truncations = truncations(checkpoint)?;
    check_report(&report, &truncations, root)?;
    check_config(&mut config, &truncations, root)?;
    allocate_ranks(&mut truncations, &report, job.keep)?;
    warn_of_diagonals(&report, &truncations);

    let folder = OutputFolder::create(job.output, job.existing, REPORT_FILE)?;
    let written = write_weights(job, &truncations, &folder, progress)?;
    update(&mut report, &truncations, checkpoint, &written.specs, job)?;
    formats::warn_of_growth(checkpoint.file_bytes(), report.sizes.file_bytes_after);
    write_curves(&folder, &truncated_curves(&truncations, written.rank_factors))?;
    let replaced = [REPORT_FILE, PAGE_FILE, "README.md", CURVES_FILES[0], CURVES_FILES[1]];
    let left_out = formats::copy_side(checkpoint, &folder, &replaced)?;
    report.left_out = left_out.into_iter().map(Into::into).collect();
    let exporter = Format::Factored.exporter();
    let loading = Loading {
        text: formats::loading(exporter, &native_config(&config), Adapter::None),
        library: exporter.library(),
    };
    let card = card::render(&report, checkpoint, &loading);
    for s in &truncations {
        *rank_of(&mut config, &s.linear.module).expect("invariant: every description was checked") = json!(s.new_rank);
    }
    let pages = [("README.md", card), (CONFIG_FILE, json::text(&config)?), (PAGE_FILE, page::compress(&report, &[])?)];
    publish(&folder, &mut report, &pages, started)?;
    folder.finish()?;
    Ok(report)
}

/// Checks that no linear shares its right factor with others.
fn expect_own_factors(config: &Map<String, Value>, root: &Path) -> Result<()> {
    let shared = config.get("lrc").and_then(|lrc| lrc.get("shared")?.as_object()?.keys().next());
    if let Some(tensor) = shared {
        let message =
            format!("`{tensor}` in `{}` is shared by several linears, and cannot be truncated", root.display());
        return Err(Failure::unsupported(message).hint("compress the source again at the smaller size").into());
    }
    Ok(())
}

/// Every linear that may be truncated is described in the config.
fn check_config(config: &mut Map<String, Value>, truncations: &[Truncation], root: &Path) -> Result<()> {
    for s in truncations {
        if rank_of(config, &s.linear.module).is_none() {
            let (path, entry) = (root.join(CONFIG_FILE), format!("lrc.modules.{}.rank", s.linear.module));
            let reason = "is missing, although its tensors are of low rank".into();
            return Err(CheckpointError::ConfigEntry { path, entry, reason }.into());
        }
    }
    Ok(())
}

/// The results of writing the weights.
struct WrittenWeights {
    specs: Vec<TensorSpec>,
    /// By module, the matrix that restores the order of its ranks; empty if it was not kept.
    rank_factors: BTreeMap<String, Vec<f32>>,
}

/// Writes the weight files: truncated linears as they are made, then all other tensors as they are.
fn write_weights(
    job: &TruncateJob<'_>,
    truncations: &[Truncation],
    folder: &OutputFolder,
    progress: &dyn Progress,
) -> Result<WrittenWeights> {
    let (checkpoint, exporter) = (job.checkpoint, Format::Factored.exporter());
    let source = Source::new(checkpoint);
    let changed: Vec<&Truncation> = truncations.iter().filter(|s| s.new_rank < s.rank).collect();
    let of = |name: &str| changed.iter().find(|s| is_part_of(name, &s.linear.module)).copied();
    let mut specs: Vec<TensorSpec> = Vec::new();
    for info in checkpoint.tensors() {
        match of(&info.name) {
            None => specs.push(TensorSpec { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() }),
            Some(s) => {
                let new = exporter.tensors(&s.linear, &Forms::of_rank(s.kind, s.new_rank, s.linear.shape()));
                specs.extend(new.iter().map(OutTensor::spec).filter(|spec| spec.name == info.name));
            }
        }
    }
    folder.require_space(specs.iter().map(TensorSpec::n_bytes).sum())?;
    let writer = Mutex::new(SafetensorsWriter::create(&folder.path(), &specs, job.max_shard_bytes)?);
    let stage = progress.stage("truncate", changed.len() as u64, "matrices");
    let truncate = |s: &&Truncation| -> Result<(String, Vec<f32>)> {
        let module = &s.linear.module;
        stage.note(module);
        let (term, factor) = s.truncate(checkpoint).with_context(|| format!("truncating `{module}`"))?;
        let refitted = s.refitted_bias(checkpoint, &term)?;
        let tensors = exporter.bytes(&source, &s.linear, &Operator::of(term))?;
        let mut writer = writer.lock().expect("invariant: no holder of the writer panics");
        tensors.iter().try_for_each(|tensor| writer.write(&tensor.name, &tensor.bytes))?;
        if let Some((name, bytes)) = refitted {
            writer.write(&name, &bytes)?;
        }
        stage.advance(1);
        Ok((module.clone(), factor))
    };
    let rank_factors = changed.par_iter().map(truncate).collect::<Result<_>>()?;
    let mut writer = writer.into_inner().expect("invariant: no holder of the writer panics");
    let mut non_finite = Vec::new();
    let refitted: BTreeSet<String> = changed.iter().filter_map(|s| s.centered_bias()).collect();
    for spec in specs.iter().filter(|spec| of(&spec.name).is_none() && !refitted.contains(&spec.name)) {
        let is_broken = checkpoint.with_bytes(&spec.name, |bytes| {
            writer.write(&spec.name, bytes).map(|()| cast::holds_non_finite(spec.dtype, bytes))
        })??;
        if is_broken {
            non_finite.push(spec.name.clone());
        }
    }
    formats::warn_of_non_finite(&non_finite);
    writer.finish()?;
    Ok(WrittenWeights { specs, rank_factors })
}

/// The curves of the truncated linears.
fn truncated_curves(
    truncations: &[Truncation],
    mut rank_factors: BTreeMap<String, Vec<f32>>,
) -> BTreeMap<String, KeptCurve> {
    let curve = |s: &Truncation| {
        let rank_factor = rank_factors.remove(&s.linear.module).unwrap_or_else(|| s.curve.rank_factor.clone());
        let energies = s.curve.energies[..s.new_rank].to_vec();
        (s.linear.module.clone(), KeptCurve { energies, rank_factor, ..s.curve.clone() })
    };
    truncations.iter().map(curve).collect()
}

/// Warns when a layout that lost the order of its ranks is refactored in a diagonal approximation of its metric.
fn warn_of_diagonals(report: &CompressReport, truncations: &[Truncation]) {
    let is_full = !["svd", "asvd", "fwsvd"].iter().any(|method| report.recipe["method"] == *method);
    let is_anchored = !report.recipe["anchor"].is_null();
    let is_lost = |s: &Truncation| !s.is_prefix() && s.new_rank < s.rank;
    if (is_full || is_anchored) && truncations.iter().any(is_lost) {
        tracing::warn!(
            "matrices whose layout lost the order of ranks are refactored in a diagonal approximation of their metric, which costs accuracy; `lrc compress --elastic` avoids this by storing the order of ranks"
        );
    }
}

/// Whether a tensor is one of the low-rank parts of a module; biases stay.
fn is_part_of(name: &str, module: &str) -> bool {
    let part = name.strip_prefix(module).and_then(|rest| rest.strip_prefix('.'));
    part.is_some_and(|part| part != "weight" && operator::all_parts().iter().any(|known| known == part))
}

/// Checks that the report lists the linears of the checkpoint and that its sums match, because budgets are computed
/// from it.
fn check_report(report: &CompressReport, truncations: &[Truncation], root: &Path) -> Result<()> {
    let path = root.join(REPORT_FILE);
    let foreign = |reason: String| {
        let message = format!("`{}` does not match the tensors in its folder: {reason}", path.display());
        anyhow::Error::from(
            Failure::unsupported(message).hint("one of the two was modified; compress the source again"),
        )
    };
    let mut before = Some(0u64);
    for l in &report.linears {
        let parameters = (l.shape[0] as u64).checked_mul(l.shape[1] as u64);
        before = before.zip(parameters).and_then(|(sum, n)| sum.checked_add(n));
        if parameters.is_none_or(|n| l.parameters_after > n) {
            return Err(foreign(format!("`{}` of shape {:?} keeps {}", l.module, l.shape, l.parameters_after)));
        }
    }
    if before.is_none_or(|n| n == 0 || n != report.sizes.linear_parameters_before) {
        return Err(foreign("`linear_parameters_before` is not the sum of its linears".into()));
    }
    let is_named = |s: &Truncation| {
        let record = report.linears.iter().find(|l| l.module == s.linear.module);
        record.is_some_and(|l| l.rank == Some(s.rank) && l.shape == [s.linear.out_features, s.linear.in_features])
    };
    match truncations.iter().find(|s| !is_named(s)) {
        Some(s) => Err(foreign(format!("`{}` has rank {} in shape {:?}", s.linear.module, s.rank, s.linear.shape()))),
        None => Ok(()),
    }
}

fn truncations(checkpoint: &Checkpoint) -> Result<Vec<Truncation>> {
    let path = codes::curves_file(checkpoint.root())?;
    let curves = Checkpoint::open_arrays(&path)?;
    let mut truncations = Vec::new();
    for linear in inventory::linears(checkpoint) {
        let Stored::Structured { kind, size, has_base: false } = linear.stored else { continue };
        let Some(rank) = size.rank() else { continue };
        // Weights of zeros have no ranks to drop.
        if rank == 0 {
            continue;
        }
        if kind.planned().is_some() {
            let message = format!("`{}` is stored as `{kind}`, whose ranks have no order", linear.module);
            let hint = "compress the source again at the smaller size, or with another `--layout`";
            return Err(Failure::unsupported(message).hint(hint).into());
        }
        let curve = KeptCurve::read(&curves, &linear.module)?;
        let (m, n) = linear.shape();
        let is_of = |length: usize, expected: usize| length == 0 || length == expected;
        let fits = (curve.energies.len(), curve.output.len(), curve.input.len()) == (rank, m, n);
        if !fits || !is_of(curve.rank_factor.len(), rank * rank) || !is_of(curve.input_mean.len(), n) {
            let message = format!("`{}` does not belong to `{}`", path.display(), linear.module);
            return Err(Failure::unsupported(message).hint("one of the two files was modified").into());
        }
        truncations.push(Truncation { linear, rank, kind, curve, new_rank: rank });
    }
    Ok(truncations)
}

/// Chooses the new ranks.
fn allocate_ranks(truncations: &mut [Truncation], report: &CompressReport, keep: f64) -> Result<()> {
    let before = report.sizes.linear_parameters_before;
    let dense: u64 = report.linears.iter().filter(|l| l.rank.is_none()).map(|l| l.parameters_after).sum();
    let parameters: Vec<Vec<u64>> = truncations.iter().map(Truncation::parameters).collect();
    let candidates: Vec<Vec<Candidate>> =
        truncations.iter().zip(&parameters).map(|(t, costs)| t.candidates(costs)).collect();
    let item = |i: usize| {
        let n_weights = truncations[i].linear.n_parameters();
        let ladder = Ladder { candidates: &candidates[i], parameters: &parameters[i], n_weights, scores: &[] };
        Item { dense_cost: n_weights, candidates: Candidates::Ranks(ladder) }
    };
    let items: Vec<Item<'_>> = (0..truncations.len()).map(item).collect();
    let budget = (keep * before as f64 + 1e-6).floor() as u64;
    let ranks = truncations.iter().map(|s| s.rank);
    let now = dense + items.iter().zip(ranks).map(|(item, rank)| item.cost(Pick::Candidate(rank))).sum::<u64>();
    let least = dense + items.iter().map(|item| item.cost(Pick::Candidate(1))).sum::<u64>();
    if budget >= now {
        let message =
            format!("`--keep {keep}` is not less than the {:.4} that is already kept", now as f64 / before as f64);
        return Err(Failure::usage(message).hint("`lrc truncate` only reduces ranks").into());
    }
    if budget < least {
        let message = format!("`--keep {keep}` cannot be reached: the minimum is {:.4}", least as f64 / before as f64);
        return Err(Failure::usage(message).hint("dense linears stay dense; compress the source again").into());
    }
    let rules = Rules { budget: budget - dense, fill: false, ..Rules::of_keep(&items, 0.999) };
    let picks = allocate::allocate(Ranks::Knapsack, &items, &rules);
    for (truncation, pick) in truncations.iter_mut().zip(picks) {
        if let Pick::Candidate(rank) = pick {
            truncation.new_rank = rank.min(truncation.rank);
        }
    }
    Ok(())
}

impl Truncation {
    /// Parameters at every rank up to the current one.
    fn parameters(&self) -> Vec<u64> {
        let shape = self.linear.shape();
        (0..=self.kind.fitting().largest_rank(shape)).map(|rank| self.kind.n_parameters(rank, shape)).collect()
    }

    /// Costs in parameters and errors at these ranks.
    fn candidates(&self, costs: &[u64]) -> Vec<Candidate> {
        let curve = ErrorCurve::new(self.curve.energies.iter().map(|&energy| f64::from(energy)).collect());
        allocate::candidates_by_rank(costs, Some(&curve), self.curve.scale)
    }

    /// The tensor of the bias, if it takes up the mean of the inputs.
    fn centered_bias(&self) -> Option<String> {
        let forms = Forms::of_rank(self.kind, self.rank, self.linear.shape());
        (!self.curve.input_mean.is_empty()).then(|| Format::Factored.exporter().bias_name(&self.linear, &forms))
    }

    /// Name and bytes of the bias, if it takes up the mean of the inputs.
    fn refitted_bias(&self, checkpoint: &Checkpoint, smaller: &Term) -> Result<Option<(String, Vec<u8>)>> {
        let Some(name) = self.centered_bias() else { return Ok(None) };
        let bytes = bias::refitted(checkpoint, &self.linear, &name, &self.curve.input_mean, smaller)?;
        Ok(Some((name, bytes)))
    }

    /// Whether the smaller fit is a selection from the larger one.
    fn is_prefix(&self) -> bool {
        self.kind.fitting().is_nested() || !self.curve.rank_factor.is_empty()
    }

    /// The smaller structure, and the matrix that restores the order of its ranks if the larger one had it.
    fn truncate(&self, checkpoint: &Checkpoint) -> Result<(Term, Vec<f32>)> {
        let (shape, fitting) = (self.linear.shape(), self.kind.fitting());
        let stored = inventory::term(checkpoint, &self.linear)?;
        let pair = fitting.pair(&stored.parts, stored.form.size, shape);
        let diagonal = |values: &[f32]| Metric::diagonal(values.iter().map(|&v| f64::from(v)).collect());
        let (output, input) = (diagonal(&self.curve.output), diagonal(&self.curve.input));
        let pair = if fitting.is_nested() {
            fitting.prefix(&pair, self.new_rank, shape)
        } else if self.is_prefix() {
            let whole = fitting.restored(pair, &self.curve.rank_factor, shape);
            fitting.prefix(&whole.context("its stored order of ranks is singular")?, self.new_rank, shape)
        } else {
            let LowRank { rank, b, a } = pair;
            let values = linalg::product_row_major(&b, &a, shape.0, rank, shape.1);
            let transposed = linalg::transposed_from_row_major(&values, shape.0, shape.1);
            let metric = MetricPair { output: &output, input: &input };
            let fit = fitting.fit(transposed.transpose(), metric, self.new_rank)?;
            fit.pair(self.kind, transposed.transpose(), self.new_rank)
        };
        let b = pair.b.clone();
        let term = match self.linear.dtype {
            // Nested parts are a selection and keep their rounded values.
            dtype @ (Dtype::F16 | Dtype::BF16) if !fitting.is_nested() => {
                let sides = Sides { output: &output, input: Side::Whole(&input), energies: &[] };
                let form = operator::Form::of_rank(self.kind, self.new_rank, shape);
                Term { form, parts: fitting.round(&pair, shape, &sides, dtype).parts }
            }
            _ => Term::laid_out(self.kind, pair, shape),
        };
        let is_kept = !self.curve.rank_factor.is_empty();
        let rank_factor = if is_kept { fitting.rank_factor(&term.parts, &b) } else { None };
        Ok((term, rank_factor.unwrap_or_default()))
    }
}

/// The report of the truncated checkpoint.
fn update(
    report: &mut CompressReport,
    truncations: &[Truncation],
    checkpoint: &Checkpoint,
    specs: &[TensorSpec],
    job: &TruncateJob<'_>,
) -> Result<()> {
    for s in truncations.iter().filter(|s| s.new_rank < s.rank) {
        let Some(record) = report.linears.iter_mut().find(|l| l.module == s.linear.module) else { continue };
        (record.rank, record.storage_error) = (Some(s.new_rank), None);
        record.parameters_after = s.kind.n_parameters(s.new_rank, s.linear.shape());
        let (_, bytes) = s.linear.bytes_as(&Forms::of_rank(s.kind, s.new_rank, s.linear.shape()));
        record.bits_factors = 8.0 * bytes as f64 / record.parameters_before as f64;
        let dropped: f64 = s.curve.energies[s.new_rank..].iter().map(|&e| f64::from(e)).sum();
        // Pivots were decomposed again in another metric, so the curve is no longer a bound.
        record.relative_error = record.relative_error.filter(|_| s.is_prefix()).map(|e| (e * e + dropped).sqrt());
    }
    let sizes = &mut report.sizes;
    let bytes_after: u64 = specs.iter().map(TensorSpec::n_bytes).sum();
    let saved_bits = 8.0 * (sizes.bytes_after as f64 - bytes_after as f64);
    let saved = saved_bits / sizes.linear_parameters_before as f64;
    sizes.bits_per_weight_after -= saved;
    // Bases and dense weights stay.
    sizes.bits_per_weight_factors -= saved;
    sizes.linear_parameters_after = report.linears.iter().map(|l| l.parameters_after).sum();
    sizes.keep = sizes.linear_parameters_after as f64 / sizes.linear_parameters_before as f64;
    sizes.parameters_after = specs.iter().map(TensorSpec::n_elements).sum();
    sizes.bytes_after = bytes_after;
    sizes.file_bytes_after = writer_bytes(specs, job.max_shard_bytes);
    (report.size_bytes, report.keep) = (sizes.file_bytes_after, sizes.keep);
    report.linear = linear_summary(&report.linears);
    report.truncated = Some(TruncationRecord { keep: job.keep, source_files: checkpoint.fingerprint()? });
    Ok(())
}
