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
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use faer::MatRef;
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, OutputFolder};
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::report::{CompressReport, DryRunReport, LinearRecord, REPORT_FILE, Sizes};
use crate::spool::Spool;
use allocate::Choice;
use low_rank::{Decomposition, ErrorCurve, LowRank};
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

/// Runs a compression: measure, allocate, factor, write.
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

    let allocator = recipe.ranks.allocator();
    let mut curves: Vec<Option<ErrorCurve>> = vec![None; plan.linears.len()];
    let mut seconds = vec![0.0; plan.linears.len()];
    let (choices, bases) = match allocator.from_shapes(&plan.shapes, recipe.keep) {
        Some(choices) => (choices, None),
        None => {
            let bases = decompose_all(
                checkpoint,
                &plan,
                &mut metrics,
                folder.path(),
                job.memory_bytes,
                &mut seconds,
                progress,
            )?;
            let known: Vec<ErrorCurve> = bases.iter().map(|(curve, _)| curve.clone()).collect();
            (allocator.from_curves(&plan.shapes, &known, recipe.keep), Some(bases))
        }
    };

    let mut output = Output::create(folder, checkpoint, recipe, &plan, &choices)?;
    let todo: Vec<(usize, usize)> = choices.iter().enumerate().filter_map(|(i, c)| rank(*c).map(|r| (i, r))).collect();
    let ranks: BTreeMap<usize, usize> = todo.iter().copied().collect();
    let factor = |i: usize, target: MatRef<'_, f64>, metric: &Metric| -> Result<(ErrorCurve, LowRank)> {
        let decomposition = match &bases {
            None => low_rank::decompose(target, metric, ranks[&i])?,
            Some(bases) => bases.decomposition(i, plan.linears[i].out_features)?,
        };
        let low_rank = decomposition.truncate(target, ranks[&i]);
        Ok((decomposition.curve, low_rank))
    };
    if bases.is_some() {
        metrics = Metrics::Identity(Metric::Identity); // the bases hold all that the metrics had to say
    }
    let indices: Vec<usize> = todo.iter().map(|&(i, _)| i).collect();
    for_each_linear(
        checkpoint,
        &plan,
        &indices,
        &mut metrics,
        "factor",
        progress,
        factor,
        |i, (curve, low_rank), elapsed| {
            curves[i] = Some(curve);
            seconds[i] += elapsed;
            output.put(&plan, i, &low_rank)
        },
    )?;

    let records =
        (0..plan.linears.len()).map(|i| record(&plan.linears[i], choices[i], curves[i].as_ref(), seconds[i])).collect();
    let sizes = Sizes::of(checkpoint, &plan.linears, &choices, output.n_bytes());
    let mut report =
        CompressReport::new(job, records, sizes, windows.as_ref().map(CalibrationWindows::record), started)?;
    let modules = todo.iter().map(|&(i, r)| (plan.linears[i].module.clone(), r)).collect();
    let _stage = progress.stage("write", 1, "folder");
    output.finish(recipe, &modules, &mut report)?;
    Ok(report)
}

/// What a compression would do: ranks, parameters, bytes, memory. Decomposes only where the allocator needs curves.
///
/// # Errors
/// As [`compress`].
pub fn dry_run(job: &Job<'_>, progress: &dyn Progress) -> Result<DryRunReport> {
    let (checkpoint, recipe) = (job.checkpoint, job.recipe);
    let plan = Plan::new(checkpoint, recipe)?;
    OutputFolder::check(job.output, job.force, REPORT_FILE)?;
    let windows = CalibrationWindows::load(checkpoint, recipe)?;
    let work_folder = std::env::temp_dir();
    let mut metrics =
        Metrics::start(checkpoint, recipe, &plan.linears, windows.as_ref(), job.memory_bytes, &work_folder)?;
    let allocator = recipe.ranks.allocator();
    let mut curves: Vec<Option<ErrorCurve>> = vec![None; plan.linears.len()];
    let choices = match allocator.from_shapes(&plan.shapes, recipe.keep) {
        Some(choices) => choices,
        None => {
            let all: Vec<usize> = (0..plan.linears.len()).collect();
            let work = |_, target: MatRef<'_, f64>, metric: &Metric| Ok(low_rank::error_curve(target, metric)?);
            for_each_linear(checkpoint, &plan, &all, &mut metrics, "measure", progress, work, |i, curve, _| {
                curves[i] = Some(curve);
                Ok(())
            })?;
            let known: Vec<ErrorCurve> = curves.iter().flatten().cloned().collect();
            allocator.from_curves(&plan.shapes, &known, recipe.keep)
        }
    };
    let outputs = plan.outputs(checkpoint, recipe.format.layout(), &choices);
    let output_bytes = outputs.iter().map(|t| t.spec.n_bytes()).sum();
    let records =
        (0..plan.linears.len()).map(|i| record(&plan.linears[i], choices[i], curves[i].as_ref(), 0.0)).collect();
    let sizes = Sizes::of(checkpoint, &plan.linears, &choices, output_bytes);
    let n_jobs = rayon::current_num_threads().min(plan.linears.len()) as u64;
    let calibration_bytes = if windows.is_some() { job.memory_bytes } else { 0 };
    Ok(DryRunReport::new(job, records, sizes, n_jobs * plan.decomposition_bytes() + calibration_bytes))
}

/// Decompositions of all linears, kept until the ranks are known.
struct Bases {
    entries: Vec<(ErrorCurve, crate::spool::Spooled)>,
    spool: Mutex<Spool>,
}

impl Bases {
    fn iter(&self) -> impl Iterator<Item = &(ErrorCurve, crate::spool::Spooled)> {
        self.entries.iter()
    }

    fn decomposition(&self, linear_idx: usize, m: usize) -> Result<Decomposition> {
        let (curve, spooled) = &self.entries[linear_idx];
        let basis = self.spool.lock().expect("invariant: no holder of the spool panics").get(spooled)?;
        Ok(Decomposition::from_parts(curve.clone(), &basis, m))
    }
}

/// Decomposes every linear; the bases (those columns that an allocation may use) go to memory or disk.
fn decompose_all(
    checkpoint: &Checkpoint,
    plan: &Plan,
    metrics: &mut Metrics<'_>,
    work_folder: &Path,
    memory_bytes: u64,
    seconds: &mut [f64],
    progress: &dyn Progress,
) -> Result<Bases> {
    let mut spool = Spool::new(usize::try_from(memory_bytes / 4).unwrap_or(usize::MAX), work_folder.into());
    let mut entries = Vec::new();
    let all: Vec<usize> = (0..plan.linears.len()).collect();
    let work = |i: usize, target: MatRef<'_, f64>, metric: &Metric| {
        let (m, n) = plan.shapes[i];
        let decomposition = low_rank::decompose(target, metric, inventory::break_even_rank(m, n))?;
        let basis = decomposition.basis_row_major();
        Ok((decomposition.curve, basis))
    };
    for_each_linear(checkpoint, plan, &all, metrics, "decompose", progress, work, |i, (curve, basis), elapsed| {
        seconds[i] += elapsed;
        entries.push((curve, spool.push(basis)?));
        Ok(())
    })?;
    Ok(Bases { entries, spool: Mutex::new(spool) })
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

fn rank(choice: Choice) -> Option<usize> {
    match choice {
        Choice::Dense => None,
        Choice::Rank(rank) => Some(rank),
    }
}

fn record(linear: &LinearInfo, choice: Choice, curve: Option<&ErrorCurve>, seconds: f64) -> LinearRecord {
    let shape = (linear.out_features, linear.in_features);
    LinearRecord {
        module: linear.module.clone(),
        block: linear.block,
        shape: [shape.0, shape.1],
        dtype: format!("{:?}", linear.dtype),
        rank: rank(choice),
        parameters_before: linear.n_parameters(),
        parameters_after: choice.n_parameters(shape),
        relative_error: match (choice, curve) {
            (Choice::Dense, _) => Some(0.0),
            (Choice::Rank(rank), curve) => curve.map(|c| c.relative_error(rank)),
        },
        seconds,
    }
}
