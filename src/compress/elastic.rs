//! Elastic outputs: a compressed checkpoint is shortened again without its source.
//!
//! Beside the weights every factored output has `lrc-curves.arrays`: for each linear of low rank its relative energies
//! `σ_i² / Σ σ²` up to its rank, what all of its energy costs the model, and the diagonals of its metric. Factors are in order
//! of significance, so a prefix is the optimal smaller pair. Pivot rows have lost that order. With `--elastic` it is kept
//! beside them (r² values a matrix), and the pair is found again; else the matrix they stand for is decomposed again in
//! the diagonals of its metric, which is exact for svd, asvd and fwsvd and an approximation for metrics of full Grams.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::allocate::{self, Choice, Item, Price, Ranks, Rules};
use super::low_rank::{self, ErrorCurve, LowRank};
use super::metric::{Metric, MetricPair};
use super::output::Written;
use super::rounding::{self, Side, Sides};
use super::study::{Allocation, Study};
use super::{pivot, record};
use crate::checkpoint::{
    CONFIG_FILE, Checkpoint, CheckpointError, Dtype, OutputFolder, SafetensorsWriter, TensorSpec, cast, expect_apart,
    json, read_file, write_file, writer_bytes,
};
use crate::error::Failure;
use crate::formats::{self, CURVES_FILES, Entry, Format, Module, OutTensor, Pair, Parts, Source};
use crate::linalg;
use crate::model::config::native_config;
use crate::model::inventory::{self, LinearInfo, Stored};
use crate::model::{Layout, coverage};
use crate::progress::Progress;
use crate::report::card::{self, Loading};
use crate::report::page::{self, PAGE_FILE};
use crate::report::{CompressReport, REPORT_FILE, SCHEMA_VERSION, TruncationRecord, peak_memory_bytes};

/// What is shortened, and where to.
pub struct TruncateJob<'a> {
    pub checkpoint: &'a Checkpoint,
    /// Share of the parameters of the originally targeted linears.
    pub keep: f64,
    pub output: &'a Path,
    pub force: bool,
    pub max_shard_bytes: u64,
}

/// What is known of a linear of low rank without its source.
#[derive(Debug, Clone)]
struct Elastic {
    /// `σ_i² / Σ σ²` of the ranks that are there.
    energies: Vec<f32>,
    /// What `Σ σ²` costs the model. An f64: the squares of weights that an f32 holds are not always numbers that it holds.
    scale: f64,
    /// Diagonals of the metric: output (m) and input (n).
    output: Vec<f32>,
    input: Vec<f32>,
    /// Pivot rows in the ranks of the pair, (r, r); empty where they were not kept.
    order: Vec<f32>,
}

const PARTS: [&str; 5] = ["energies", "scale", "output_metric", "input_metric", "order"];

impl Elastic {
    /// Name, dtype, length and bytes of each part.
    fn arrays(&self) -> [(&'static str, Dtype, usize, Vec<u8>); 5] {
        let [energies, scale, output, input, order] = PARTS;
        let floats = |part, values: &[f32]| {
            let bytes = cast::encode(Dtype::F32, values).expect("invariant: curves are relative, and orders finite");
            (part, Dtype::F32, values.len(), bytes)
        };
        [
            floats(energies, &self.energies),
            (scale, Dtype::F64, 1, self.scale.to_le_bytes().to_vec()),
            floats(output, &self.output),
            floats(input, &self.input),
            floats(order, &self.order),
        ]
    }

    fn read(curves: &Checkpoint, module: &str) -> Result<Self> {
        let [energies, scale, output, input, order] = PARTS.map(|part| format!("{module}.{part}"));
        let [energies, output, input, order] = [energies, output, input, order].map(|name| curves.values(&name));
        let scale = scale_of(curves, &scale)?.with_context(|| format!("the curves have no scale for `{module}`"))?;
        Ok(Self { energies: energies?, scale, output: output?, input: input?, order: order? })
    }
}

/// A scale: an f64, or an f32 as the first versions wrote it.
fn scale_of(curves: &Checkpoint, name: &str) -> Result<Option<f64>> {
    if curves.require(name)?.dtype != Dtype::F64 {
        return Ok(curves.values(name)?.first().copied().map(f64::from));
    }
    let scale = curves.with_bytes(name, |bytes| bytes.first_chunk().map(|&b| f64::from_le_bytes(b)))?;
    Ok(scale.filter(|scale| scale.is_finite()))
}

/// The curves of a compression.
pub(super) fn write_curves(
    folder: &OutputFolder,
    study: &Study<'_>,
    allocation: &Allocation,
    written: &BTreeMap<usize, Written>,
) -> Result<()> {
    let mut all = BTreeMap::new();
    for (i, choice) in allocation.choices.iter().enumerate() {
        let pair = study.stored_entry(i, *choice).and_then(|entry| entry.pair);
        let (Some(Pair { rank, .. }), Some(basis)) = (pair, study.bases.get(i)) else { continue };
        let total = basis.curve.squared_error(0);
        let relative = |energy: &f64| if total > 0.0 { (energy / total) as f32 } else { 0.0 };
        let (output, input) = &basis.diagonals;
        let order = written.get(&i).and_then(|w| w.order.as_ref());
        let elastic = Elastic {
            energies: basis.curve.energies()[..rank].iter().map(relative).collect(),
            scale: total * allocation.sensitivities[i],
            output: relative_to_mean(output),
            input: relative_to_mean(input),
            order: order.map(|order| study.bases.kept(order)).transpose()?.unwrap_or_default(),
        };
        all.insert(study.plan.linears[i].module.clone(), elastic);
    }
    write(folder, &all)
}

/// Metrics matter up to a factor: `values` over their mean, which f32 holds whatever the size of gradients.
fn relative_to_mean(values: &[f64]) -> Vec<f32> {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    values.iter().map(|v| if mean > 0.0 { (v / mean) as f32 } else { 1.0 }).collect()
}

fn write(folder: &OutputFolder, all: &BTreeMap<String, Elastic>) -> Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    let mut arrays = BTreeMap::new();
    for (module, elastic) in all {
        for (part, dtype, length, bytes) in elastic.arrays() {
            arrays.insert(format!("{module}.{part}"), (dtype, length, bytes));
        }
    }
    let spec = |(name, (dtype, length, _)): (&String, &(Dtype, usize, Vec<u8>))| TensorSpec {
        name: name.clone(),
        dtype: *dtype,
        shape: vec![*length],
    };
    let specs: Vec<TensorSpec> = arrays.iter().map(spec).collect();
    write_file(&folder.path().join(CURVES_FILES[0]), &specs, |spec| Ok(arrays[&spec.name].2.clone()))
}

/// The rank that the config of an output has for a module.
fn rank_of<'c>(config: &'c mut Map<String, Value>, module: &str) -> Option<&'c mut Value> {
    config.get_mut("lrc")?.get_mut("modules")?.get_mut(module)?.get_mut("rank")
}

/// A linear of low rank that may be shortened.
struct Shortening {
    linear: LinearInfo,
    rank: usize,
    layout: Layout,
    elastic: Elastic,
    new_rank: usize,
}

/// Shortens a compressed checkpoint: ranks are shared out by the knapsack over the stored curves.
///
/// # Errors
/// The checkpoint was not compressed, keeps less already, or cannot become so small; or the disk refuses.
pub fn truncate(job: &TruncateJob<'_>, progress: &dyn Progress) -> Result<CompressReport> {
    let started = Instant::now();
    let checkpoint = job.checkpoint;
    let root = checkpoint.root();
    OutputFolder::check(job.output, job.force, REPORT_FILE)?;
    expect_apart(job.output, [root])?;
    coverage::expect_whole(checkpoint)?;
    let mut report = read_report(root)?;
    let mut shortenings = shortenings(checkpoint)?;
    check_report(&report, &shortenings, root)?;
    let mut config = checkpoint.config().cloned().unwrap_or_default();
    for s in &shortenings {
        if rank_of(&mut config, &s.linear.module).is_none() {
            let (path, entry) = (root.join(CONFIG_FILE), format!("lrc.modules.{}.rank", s.linear.module));
            let reason = "is absent, and its tensors are of low rank".into();
            return Err(CheckpointError::ConfigEntry { path, entry, reason }.into());
        }
    }
    share_out(&mut shortenings, &report, job.keep)?;

    warn_of_diagonals(&report, &shortenings);

    let folder = OutputFolder::create(job.output, job.force, REPORT_FILE)?;
    let (source, exporter) = (Source::new(checkpoint), Format::Factored.exporter());
    let changed: BTreeMap<&str, &Shortening> =
        shortenings.iter().filter(|s| s.new_rank < s.rank).map(|s| (s.linear.module.as_str(), s)).collect();
    let of = |name: &str| changed.iter().find(|(module, _)| is_part_of(name, module)).map(|(_, s)| *s);
    let mut specs: Vec<TensorSpec> = Vec::new();
    for info in checkpoint.tensors() {
        match of(&info.name) {
            None => specs.push(TensorSpec { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone() }),
            Some(s) => {
                let new = exporter.tensors(&s.linear, &Entry::low_rank(s.new_rank, s.layout));
                specs.extend(new.iter().map(OutTensor::spec).filter(|spec| spec.name == info.name));
            }
        }
    }
    folder.require_space(specs.iter().map(TensorSpec::n_bytes).sum())?;
    let writer = Mutex::new(SafetensorsWriter::create(&folder.path(), &specs, job.max_shard_bytes)?);
    let orders: Mutex<BTreeMap<String, Vec<f32>>> = Mutex::default();
    let stage = progress.stage("truncate", changed.len() as u64, "matrices");
    changed.par_iter().try_for_each(|(module, shortening)| -> Result<()> {
        stage.note(module);
        let (parts, order) = shortening.shorten(checkpoint).with_context(|| format!("truncate `{module}`"))?;
        orders.lock().expect("invariant: no holder of the orders panics").insert((*module).to_string(), order);
        let tensors = exporter.bytes(&source, &shortening.linear, &Module::of_parts(parts))?;
        let mut writer = writer.lock().expect("invariant: no holder of the writer panics");
        for tensor in tensors {
            writer.write(&tensor.name, &tensor.bytes)?;
        }
        stage.advance(1);
        Ok(())
    })?;
    let mut writer = writer.into_inner().expect("invariant: no holder of the writer panics");
    let mut non_finite = Vec::new();
    for spec in specs.iter().filter(|spec| of(&spec.name).is_none()) {
        let is_broken = checkpoint.with_bytes(&spec.name, |bytes| {
            writer.write(&spec.name, bytes).map(|()| cast::holds_non_finite(spec.dtype, bytes))
        })??;
        if is_broken {
            non_finite.push(spec.name.clone());
        }
    }
    formats::warn_of_non_finite(&non_finite);
    writer.finish()?;

    update(&mut report, &shortenings, checkpoint, &specs, job)?;
    formats::warn_of_growth(checkpoint.file_bytes(), report.sizes.file_bytes_after);
    let mut orders = orders.into_inner().expect("invariant: no holder of the orders panics");
    let mut elastics = BTreeMap::new();
    for s in &shortenings {
        let order = orders.remove(&s.linear.module).unwrap_or_else(|| s.elastic.order.clone());
        let elastic = Elastic { energies: s.elastic.energies[..s.new_rank].to_vec(), order, ..s.elastic.clone() };
        elastics.insert(s.linear.module.clone(), elastic);
    }
    write(&folder, &elastics)?;
    let replaced = [REPORT_FILE, PAGE_FILE, "README.md", CURVES_FILES[0], CURVES_FILES[1]];
    let left_out = formats::copy_side(checkpoint, &folder, &replaced)?;
    report.left_out = left_out.into_iter().map(Into::into).collect();
    let loading =
        Loading { text: formats::loading(exporter, &native_config(&config), false), library: exporter.library() };
    folder.write("README.md", card::render(&report, checkpoint, &loading).as_bytes())?;
    for s in &shortenings {
        *rank_of(&mut config, &s.linear.module).expect("invariant: every description was checked") = json!(s.new_rank);
    }
    folder.write(CONFIG_FILE, json::text(&config)?.as_bytes())?;
    folder.write(PAGE_FILE, page::compress(&report, &[])?.as_bytes())?;
    report.output_files = folder.hashes(REPORT_FILE)?;
    report.elapsed_seconds = started.elapsed().as_secs_f64();
    report.peak_memory_bytes = peak_memory_bytes();
    folder.write(REPORT_FILE, (serde_json::to_string_pretty(&report)? + "\n").as_bytes())?;
    folder.finish()?;
    Ok(report)
}

/// Says so where pivots without their order stand for a metric that diagonals do not hold.
fn warn_of_diagonals(report: &CompressReport, shortenings: &[Shortening]) {
    let is_full = !["svd", "asvd", "fwsvd"].iter().any(|method| report.recipe["method"] == *method);
    let is_anchored = !report.recipe["anchor"].is_null();
    let is_lost = |s: &Shortening| s.layout == Layout::Pivot && s.elastic.order.is_empty() && s.new_rank < s.rank;
    if (is_full || is_anchored) && shortenings.iter().any(is_lost) {
        tracing::warn!(
            "pivots are decomposed again in the diagonals of their metric, which costs accuracy; outputs of `lrc compress --elastic` keep the order of their ranks"
        );
    }
}

/// Whether a tensor is one of the low-rank parts of a module; biases stay.
fn is_part_of(name: &str, module: &str) -> bool {
    name.strip_prefix(module).is_some_and(|rest| rest.starts_with(".lr_") && !rest.ends_with(".bias"))
}

fn read_report(root: &Path) -> Result<CompressReport> {
    let path = root.join(REPORT_FILE);
    let unusable = |reason: String| {
        Failure::unsupported(format!("`{}` cannot be read: {reason}", path.display()))
            .hint("`lrc truncate` shortens a folder that `lrc compress --format factored` wrote")
    };
    let bytes = read_file(&path).map_err(|error| match error {
        CheckpointError::Io { source, .. } => unusable(source.to_string()).into(),
        error => anyhow::Error::from(error),
    })?;
    let report: Value = serde_json::from_slice(&bytes).map_err(|e| unusable(e.to_string()))?;
    if let Some(version) = report["schema_version"].as_u64().filter(|&version| version > SCHEMA_VERSION.into()) {
        let (found, known) = (version.to_string(), SCHEMA_VERSION.to_string());
        return Err(CheckpointError::Newer { path, entry: "schema_version".into(), found, known }.into());
    }
    Ok(serde_json::from_value(report).map_err(|e| unusable(e.to_string()))?)
}

/// The report tells of the linears that are there, and its sums are theirs: budgets are computed from it.
fn check_report(report: &CompressReport, shortenings: &[Shortening], root: &Path) -> Result<()> {
    let path = root.join(REPORT_FILE);
    let foreign = |reason: String| {
        let message = format!("`{}` does not describe the tensors beside it: {reason}", path.display());
        anyhow::Error::from(
            Failure::unsupported(message).hint("one of the two was changed; compress the original anew"),
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
    let is_told = |s: &Shortening| {
        let record = report.linears.iter().find(|l| l.module == s.linear.module);
        record.is_some_and(|l| l.rank == Some(s.rank) && l.shape == [s.linear.out_features, s.linear.in_features])
    };
    match shortenings.iter().find(|s| !is_told(s)) {
        Some(s) => Err(foreign(format!("`{}` has rank {} in shape {:?}", s.linear.module, s.rank, s.linear.shape()))),
        None => Ok(()),
    }
}

fn shortenings(checkpoint: &Checkpoint) -> Result<Vec<Shortening>> {
    let paths = CURVES_FILES.map(|name| checkpoint.root().join(name));
    let Some(path) = paths.iter().find(|path| path.is_file()) else {
        return Err(Failure::unsupported(format!("`{}` is missing", paths[0].display()))
            .hint("`lrc truncate` shortens a folder that `lrc compress --format factored` wrote")
            .into());
    };
    let curves = Checkpoint::open_arrays(path)?;
    let mut shortenings = Vec::new();
    for linear in inventory::linears(checkpoint) {
        let Stored::LowRank { rank, layout, has_base: false } = linear.stored else { continue };
        // Weights of zeros: there is nothing to drop, and nothing to drop it by.
        if rank == 0 {
            continue;
        }
        let elastic = Elastic::read(&curves, &linear.module)?;
        let (m, n) = linear.shape();
        let is_of = |length: usize, expected: usize| length == 0 || length == expected;
        let fits = (elastic.energies.len(), elastic.output.len(), elastic.input.len()) == (rank, m, n);
        if !fits || !is_of(elastic.order.len(), rank * rank) {
            let message = format!("`{}` does not belong to `{}`", path.display(), linear.module);
            return Err(Failure::unsupported(message).hint("one of the two files was changed").into());
        }
        shortenings.push(Shortening { linear, rank, layout, elastic, new_rank: rank });
    }
    Ok(shortenings)
}

/// Chooses the new ranks.
fn share_out(shortenings: &mut [Shortening], report: &CompressReport, keep: f64) -> Result<()> {
    let before = report.sizes.linear_parameters_before;
    let dense: u64 = report.linears.iter().filter(|l| l.rank.is_none()).map(|l| l.parameters_after).sum();
    let curve = |s: &Shortening| ErrorCurve::new(s.elastic.energies.iter().map(|&e| f64::from(e)).collect());
    let curves: Vec<ErrorCurve> = shortenings.iter().map(curve).collect();
    let items: Vec<Item<'_>> = shortenings
        .iter()
        .zip(&curves)
        .map(|(s, curve)| Item {
            shape: s.linear.shape(),
            layout: s.layout,
            curve: Some(curve),
            sensitivity: s.elastic.scale,
            price: Price::Parameters,
            coded: &[],
            is_zero: false,
        })
        .collect();
    let cost = |rank: &dyn Fn(&Shortening) -> usize| -> u64 {
        dense + shortenings.iter().zip(&items).map(|(s, item)| item.cost(Choice::Rank(rank(s)))).sum::<u64>()
    };
    let budget = (keep * before as f64 + 1e-6).floor() as u64;
    let (now, least) = (cost(&|s| s.rank), cost(&|_| 1));
    let share = |parameters: u64| parameters as f64 / before as f64;
    if budget >= now {
        return Err(Failure::usage(format!(
            "`--keep {keep}` is not less than the {:.4} that is kept already",
            share(now)
        ))
        .hint("`lrc truncate` only shortens")
        .into());
    }
    if budget < least {
        let message = format!("`--keep {keep}` cannot be reached: {:.4} is the least", share(least));
        return Err(Failure::usage(message).hint("what was left dense stays dense; compress the original anew").into());
    }
    let rules = Rules { budget: budget - dense, fill: false, ..Rules::of_keep(&items, 0.999) };
    let choices = allocate::allocate(Ranks::Knapsack, &items, &rules);
    for (shortening, choice) in shortenings.iter_mut().zip(choices) {
        shortening.new_rank = choice.rank().unwrap_or(usize::MAX).min(shortening.rank);
    }
    Ok(())
}

impl Shortening {
    /// The new parts, and the new order of their ranks if the old one was kept.
    fn shorten(&self, checkpoint: &Checkpoint) -> Result<(Parts, Vec<f32>)> {
        let (m, n) = self.linear.shape();
        let (rank, b, a) = inventory::factors(checkpoint, &self.linear)?;
        let pair = LowRank { rank, b, a };
        let diagonal = |values: &[f32]| Metric::diagonal(values.iter().map(|&v| f64::from(v)).collect());
        let (output, input) = (diagonal(&self.elastic.output), diagonal(&self.elastic.input));
        let pair = match self.layout {
            Layout::Factors => pair.prefix(self.new_rank),
            Layout::Pivot if !self.elastic.order.is_empty() => {
                let pair = pivot::reordered(pair, &self.elastic.order, (m, n));
                pair.context("the order of its ranks is singular")?.prefix(self.new_rank)
            }
            Layout::Pivot => {
                let values = linalg::product_row_major(&pair.b, &pair.a, m, rank, n);
                let transposed = linalg::transposed_from_row_major(&values, m, n);
                let metric = MetricPair { output: &output, input: &input };
                let decomposition = low_rank::decompose(transposed.transpose(), metric, self.new_rank)?;
                decomposition.truncate(transposed.transpose(), self.new_rank)
            }
        };
        let b = pair.b.clone();
        let parts = match (self.layout, self.linear.dtype) {
            (Layout::Pivot, dtype @ (Dtype::F16 | Dtype::BF16)) => {
                let sides = Sides { output: &output, input: Side::Whole(&input), energies: &[] };
                rounding::lay_out(self.layout, &pair, (m, n), &sides, dtype).parts
            }
            _ => pivot::lay_out(self.layout, pair, (m, n)),
        };
        let order = if self.elastic.order.is_empty() { None } else { pivot::order_of_ranks(&parts, &b) };
        Ok((parts, order.unwrap_or_default()))
    }
}

/// The report of the shortened checkpoint.
fn update(
    report: &mut CompressReport,
    shortenings: &[Shortening],
    checkpoint: &Checkpoint,
    specs: &[TensorSpec],
    job: &TruncateJob<'_>,
) -> Result<()> {
    for s in shortenings.iter().filter(|s| s.new_rank < s.rank) {
        let Some(record) = report.linears.iter_mut().find(|l| l.module == s.linear.module) else { continue };
        (record.rank, record.storage_error) = (Some(s.new_rank), None);
        record.parameters_after = s.layout.n_parameters(s.new_rank, s.linear.shape());
        let dropped: f64 = s.elastic.energies[s.new_rank..].iter().map(|&e| f64::from(e)).sum();
        // Pivots were decomposed again in another metric: the curve is a bound no more.
        let is_prefix = s.layout == Layout::Factors || !s.elastic.order.is_empty();
        record.relative_error = record.relative_error.filter(|_| is_prefix).map(|e| (e * e + dropped).sqrt());
    }
    let sizes = &mut report.sizes;
    let bytes_after: u64 = specs.iter().map(TensorSpec::n_bytes).sum();
    let saved_bits = 8.0 * (sizes.bytes_after as f64 - bytes_after as f64);
    sizes.bits_per_weight_after -= saved_bits / sizes.linear_parameters_before as f64;
    sizes.linear_parameters_after = report.linears.iter().map(|l| l.parameters_after).sum();
    sizes.keep = sizes.linear_parameters_after as f64 / sizes.linear_parameters_before as f64;
    sizes.parameters_after = specs.iter().map(TensorSpec::n_elements).sum();
    sizes.bytes_after = bytes_after;
    sizes.file_bytes_after = writer_bytes(specs, job.max_shard_bytes);
    (report.size_bytes, report.keep) = (sizes.file_bytes_after, sizes.keep);
    report.linear = record::summary(&report.linears);
    report.truncated = Some(TruncationRecord { keep: job.keep, source_files: checkpoint.fingerprint()? });
    Ok(())
}
