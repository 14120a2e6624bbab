//! Compression: every targeted linear becomes `B·A`, in a metric, under a budget.
//!
//! [`compress`] is the whole algorithm on one screen. Methods are rows of [`presets`]; the mathematics is
//! [`low_rank`]; ranks come from [`allocate`].

pub mod allocate;
pub mod low_rank;
pub mod metric;
mod metrics;
mod output;
mod plan;
pub mod presets;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use faer::MatRef;
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, OutputFolder, TensorSpec};
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::{CompressReport, DryRunReport, LinearRecord, REPORT_FILE, Sizes};
use allocate::Choice;
use low_rank::{ErrorCurve, LowRank};
use metric::Metric;
use metrics::{CalibrationWindows, Metrics};
use output::Output;
use plan::Plan;

/// What is compressed, and where to.
pub struct Job<'a> {
    pub checkpoint: &'a Checkpoint,
    /// The model as the user named it.
    pub source: &'a str,
    pub recipe: &'a Recipe,
    pub output: &'a Path,
    pub force: bool,
    pub memory_bytes: u64,
}

/// Runs a compression: allocate, measure, factor, write.
///
/// # Errors
/// Anything wrong with the source, the recipe or the disk; the output folder then does not appear.
pub fn compress(job: &Job<'_>, progress: &dyn Progress) -> Result<CompressReport> {
    let started = Instant::now();
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    let plan = Plan::new(checkpoint, recipe)?;
    let windows = CalibrationWindows::load(checkpoint, recipe)?;
    let folder = OutputFolder::create(job.output, job.force, REPORT_FILE)?;
    let mut metrics =
        Metrics::start(checkpoint, recipe, &plan.linears, windows.as_ref(), job.memory_bytes, folder.path())?;
    let choices = allocate(checkpoint, recipe, &plan, progress)?;
    let ranks: BTreeMap<usize, usize> =
        choices.iter().enumerate().filter_map(|(i, choice)| Some((i, choice.rank()?))).collect();

    let mut output = Output::create(folder, checkpoint, recipe, &plan, &choices)?;
    let mut records: Vec<LinearRecord> = (0..choices.len()).map(|i| record(&plan.linears[i], choices[i])).collect();
    let indices: Vec<usize> = ranks.keys().copied().collect();
    let factor = |i: usize, target: MatRef<'_, f64>, metric: &Metric| -> Result<(ErrorCurve, LowRank)> {
        let decomposition = low_rank::decompose(target, metric, ranks[&i])?;
        let low_rank = decomposition.truncate(target, ranks[&i]);
        Ok((decomposition.curve, low_rank))
    };
    for_each_linear(
        checkpoint,
        &plan,
        &indices,
        &mut metrics,
        "factor",
        progress,
        factor,
        |i, (curve, low_rank), elapsed| {
            records[i].relative_error = Some(curve.relative_error(low_rank.rank));
            records[i].seconds = elapsed;
            output.put(&plan, i, &low_rank)
        },
    )?;

    let sizes = Sizes::of(checkpoint, &plan.linears, &choices, &output.specs());
    let calibration = windows.as_ref().map(CalibrationWindows::record);
    let mut report = CompressReport::new(job, records, sizes, calibration)?;
    let modules = ranks.iter().map(|(&i, &rank)| (plan.linears[i].module.clone(), rank)).collect();
    output.finish(recipe, &modules, &mut report, started)?;
    Ok(report)
}

/// What a compression would do: ranks, parameters, bytes, memory. Reads weights only where the allocator needs spectra.
///
/// # Errors
/// As [`compress`].
pub fn dry_run(job: &Job<'_>, progress: &dyn Progress) -> Result<DryRunReport> {
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    let plan = Plan::new(checkpoint, recipe)?;
    OutputFolder::check(job.output, job.force, REPORT_FILE)?;
    let windows = CalibrationWindows::load(checkpoint, recipe)?;
    let walk_bytes = metrics::expected_bytes(checkpoint, windows.as_ref(), job.memory_bytes)?;
    let choices = allocate(checkpoint, recipe, &plan, progress)?;
    let outputs = plan.outputs(checkpoint, recipe.format.layout(), &choices);
    let specs: Vec<TensorSpec> = outputs.into_iter().map(|t| t.spec).collect();
    let sizes = Sizes::of(checkpoint, &plan.linears, &choices, &specs);
    let records = plan.linears.iter().zip(&choices).map(|(linear, &choice)| record(linear, choice)).collect();
    Ok(DryRunReport::new(job, records, sizes, plan.decomposition_bytes(rayon::current_num_threads()) + walk_bytes))
}

/// The choice for every linear; weights are read only where the allocator needs their spectra.
fn allocate(checkpoint: &Checkpoint, recipe: &Recipe, plan: &Plan, progress: &dyn Progress) -> Result<Vec<Choice>> {
    let allocator = recipe.ranks.allocator();
    if let Some(choices) = allocator.from_shapes(&plan.shapes, recipe.keep) {
        return Ok(choices);
    }
    let mut spectra = Vec::with_capacity(plan.linears.len());
    let all: Vec<usize> = (0..plan.linears.len()).collect();
    let spectrum = |_, target: MatRef<'_, f64>, metric: &Metric| Ok(low_rank::error_curve(target, metric)?);
    let mut plain = Metrics::Identity(Metric::Identity);
    for_each_linear(checkpoint, plan, &all, &mut plain, "measure", progress, spectrum, |_, curve, _| {
        spectra.push(curve);
        Ok(())
    })?;
    Ok(allocator.from_spectra(&plan.shapes, &spectra, recipe.keep))
}

/// Loads the linears at `indices` block by block, works on those of a block in parallel, and hands the results to
/// `sink` in order with the seconds that each took.
#[allow(clippy::too_many_arguments)] // two closures and what they work on
fn for_each_linear<T: Send>(
    checkpoint: &Checkpoint,
    plan: &Plan,
    indices: &[usize],
    metrics: &mut Metrics<'_>,
    verb: &str,
    progress: &dyn Progress,
    work: impl Fn(usize, MatRef<'_, f64>, &Metric) -> Result<T> + Sync,
    mut sink: impl FnMut(usize, T, f64) -> Result<()>,
) -> Result<()> {
    let stage = progress.stage(verb, indices.len() as u64, "matrices");
    for group in indices.chunk_by(|&i, &j| plan.linears[i].block == plan.linears[j].block).flat_map(|g| g.chunks(GROUP))
    {
        let linears: Vec<&LinearInfo> = group.iter().map(|&i| &plan.linears[i]).collect();
        metrics.observe(&linears, progress)?;
        let tasks: Vec<(usize, &LinearInfo, &Metric)> =
            group.iter().zip(&linears).map(|(&i, linear)| (i, *linear, metrics.of(linear))).collect();
        let one = |&(i, linear, metric): &(usize, &LinearInfo, &Metric)| -> Result<(T, f64)> {
            let started = Instant::now();
            stage.note(&linear.module);
            let values = inventory::weight(checkpoint, linear)?; // (out, in)
            let target = linalg::transposed_from_row_major(&values, linear.out_features, linear.in_features);
            drop(values);
            let result = work(i, target.transpose(), metric).with_context(|| format!("{verb} `{}`", linear.module))?;
            stage.advance(1);
            Ok((result, started.elapsed().as_secs_f64()))
        };
        let results: Vec<Result<(T, f64)>> = tasks.par_iter().map(one).collect();
        for (&i, result) in group.iter().zip(results) {
            let (value, elapsed) = result?;
            sink(i, value, elapsed)?;
        }
    }
    Ok(())
}

/// Results held at once: a mixture of experts has hundreds of linears in a block.
const GROUP: usize = 16;

fn record(linear: &LinearInfo, choice: Choice) -> LinearRecord {
    let shape = (linear.out_features, linear.in_features);
    LinearRecord {
        module: linear.module.clone(),
        block: linear.block,
        shape: [shape.0, shape.1],
        dtype: format!("{:?}", linear.dtype),
        rank: choice.rank(),
        parameters_before: linear.n_parameters(),
        parameters_after: choice.n_parameters(shape),
        relative_error: (choice == Choice::Dense).then_some(0.0),
        seconds: 0.0,
    }
}
