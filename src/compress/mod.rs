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
pub mod recipe;
mod record;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result};
use faer::MatRef;
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, OutputFolder, TensorSpec};
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::progress::Progress;
use crate::report::{CompressReport, DryRunReport, LinearRecord, REPORT_FILE};
use allocate::Choice;
use low_rank::{ErrorCurve, LowRank};
use metric::Metric;
use metrics::{CalibrationWindows, Metrics};
use output::Output;
use plan::Plan;
use recipe::Recipe;

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
    let pass = Pass { checkpoint, plan: &plan, progress };
    let choices = pass.allocate(recipe)?;
    let ranks: BTreeMap<usize, usize> =
        choices.iter().enumerate().filter_map(|(i, choice)| Some((i, choice.rank()?))).collect();

    let mut output = Output::create(folder, checkpoint, recipe, &plan, &choices)?;
    let mut records: Vec<LinearRecord> =
        (0..choices.len()).map(|i| record::linear(&plan.linears[i], choices[i])).collect();
    let indices: Vec<usize> = ranks.keys().copied().collect();
    let factor = |i: usize, target: MatRef<'_, f64>, metric: &Metric| -> Result<(ErrorCurve, LowRank)> {
        let decomposition = low_rank::decompose(target, metric, ranks[&i])?;
        let low_rank = decomposition.truncate(target, ranks[&i]);
        Ok((decomposition.curve, low_rank))
    };
    pass.for_each("factor", &indices, &mut metrics, factor, |i, (curve, low_rank), seconds| {
        records[i].relative_error = Some(curve.relative_error(low_rank.rank));
        records[i].seconds = seconds;
        output.put(&plan, i, &low_rank)
    })?;

    let sizes = record::sizes(checkpoint, &plan.linears, &choices, &output.specs());
    let calibration = windows.as_ref().map(CalibrationWindows::record);
    let mut report = record::report(job, records, sizes, calibration)?;
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
    let metrics =
        Metrics::start(checkpoint, recipe, &plan.linears, windows.as_ref(), job.memory_bytes, &std::env::temp_dir())?;
    let choices = Pass { checkpoint, plan: &plan, progress }.allocate(recipe)?;
    let outputs = plan.outputs(checkpoint, recipe.format.layout(), &choices);
    let specs: Vec<TensorSpec> = outputs.into_iter().map(|t| t.spec).collect();
    let sizes = record::sizes(checkpoint, &plan.linears, &choices, &specs);
    let records = plan.linears.iter().zip(&choices).map(|(linear, &choice)| record::linear(linear, choice)).collect();
    Ok(record::dry_run(
        job,
        records,
        sizes,
        plan.decomposition_bytes(rayon::current_num_threads()) + metrics.expected_bytes(),
    ))
}

/// The linears of a checkpoint, for passes over them.
struct Pass<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    progress: &'a dyn Progress,
}

impl Pass<'_> {
    /// The choice for every linear; weights are read only where the allocator needs their spectra.
    fn allocate(&self, recipe: &Recipe) -> Result<Vec<Choice>> {
        let (allocator, shapes) = (recipe.ranks.allocator(), &self.plan.shapes);
        if let Some(choices) = allocator.by_shapes(shapes, recipe.keep) {
            return Ok(choices);
        }
        let mut spectra: BTreeMap<usize, ErrorCurve> = BTreeMap::new();
        let all: Vec<usize> = (0..shapes.len()).collect();
        let spectrum = |_, target: MatRef<'_, f64>, metric: &Metric| Ok(low_rank::error_curve(target, metric)?);
        self.for_each("measure", &all, &mut Metrics::Identity(Metric::Identity), spectrum, |i, curve, _| {
            spectra.insert(i, curve);
            Ok(())
        })?;
        let spectra: Vec<ErrorCurve> = spectra.into_values().collect();
        Ok(allocator.by_spectra(shapes, &spectra, recipe.keep))
    }

    /// Loads the linears at `indices`, works on them in parallel, each on one thread, and hands every result to `sink`
    /// with the seconds that it took. Results come in any order and are not kept. Where metrics are observed, one
    /// block follows another.
    fn for_each<T>(
        &self,
        verb: &str,
        indices: &[usize],
        metrics: &mut Metrics<'_>,
        work: impl Fn(usize, MatRef<'_, f64>, &Metric) -> Result<T> + Sync,
        sink: impl FnMut(usize, T, f64) -> Result<()> + Send,
    ) -> Result<()> {
        let stage = self.progress.stage(verb, indices.len() as u64, "matrices");
        let sink = Mutex::new(sink);
        let is_one_group = |i: &usize, j: &usize| {
            !metrics.are_observed() || self.plan.linears[*i].block == self.plan.linears[*j].block
        };
        let groups: Vec<&[usize]> = indices.chunk_by(is_one_group).collect();
        for group in groups {
            let linears: Vec<&LinearInfo> = group.iter().map(|&i| &self.plan.linears[i]).collect();
            metrics.observe(&linears, self.progress)?;
            let tasks: Vec<(usize, &LinearInfo, &Metric)> =
                group.iter().zip(&linears).map(|(&i, linear)| (i, *linear, metrics.of(linear))).collect();
            tasks.par_iter().try_for_each(|&(i, linear, metric)| -> Result<()> {
                let started = Instant::now();
                stage.note(&linear.module);
                let values = inventory::weight(self.checkpoint, linear)?; // (out, in)
                let target = linalg::transposed_from_row_major(&values, linear.out_features, linear.in_features);
                drop(values);
                let result =
                    work(i, target.transpose(), metric).with_context(|| format!("{verb} `{}`", linear.module))?;
                drop(target);
                stage.advance(1);
                let seconds = started.elapsed().as_secs_f64();
                sink.lock().expect("invariant: no holder of the sink panics")(i, result, seconds)
            })?;
        }
        Ok(())
    }
}
