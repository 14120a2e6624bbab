//! The plan of a run in tasks: which pieces each of them makes, and what that takes.

use std::ops::Range;

use anyhow::Result;

use super::super::budget::max_ranks;
use super::super::estimate::{self, PartSeconds};
use super::super::inputs::observation;
use super::super::job::Job;
use super::super::plan::Plan;
use super::super::recipe::Recipe;
use super::super::record;
use super::super::requirements::{fit_bytes, gram_bytes};
use super::super::run::Run;
use crate::calibrate::Parts;
use crate::error::Failure;
use crate::model::inventory::LinearInfo;
use crate::model::{Decoder, ModelConfig, WalkLimits, fingerprint};
use crate::progress::Silent;
use crate::report::{LRC_VERSION, SCHEMA_VERSION, StageName, StageRecord, TaskPlan, TaskRecord};
use crate::store::Journal;

/// How the user named the source of a plan.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// The folder of an adapter.
    pub adapter: Option<String>,
    /// A revision on the hub.
    pub revision: Option<String>,
    /// Whether codes of another tool are read as floats.
    pub dequantize: bool,
    /// The device by its name.
    pub device: String,
}

/// Plans `job` in stages of at most `n_tasks` tasks. `output` of the job is the folder of the plan.
///
/// # Errors
/// Nothing of the run can be cut into tasks, or as [`super::super::compress`] before any work.
pub fn plan(job: &Job<'_>, origin: &Origin, n_tasks: usize) -> Result<TaskPlan> {
    let recipe = job.recipe.unhealed();
    let own = Job { recipe: &recipe, ..job.clone() };
    let run = Run::of_task(&own, fingerprint(job.checkpoint)?)?;
    let seconds = estimate::parts(&own, &run.plan, run.inputs.windows.as_ref())?;
    let mut cut = Cut { run: &run, recipe: &recipe, n_tasks, stages: Vec::new(), tasks: Vec::new(), notes: Vec::new() };
    if recipe.measures_statistics() {
        cut.measuring(&seconds)?;
    }
    if recipe.needs_fits() && recipe.narrow().is_none() {
        cut.by_block(StageName::Fits, &seconds.fits);
        if rounds_by_itself(&recipe, &run.plan) {
            cut.by_block(StageName::Round, &seconds.rounds);
        }
    }
    if cut.tasks.is_empty() {
        return Err(Failure::usage("nothing of this run can be cut into tasks")
            .hint("run `lrc compress` with the same arguments, on one machine")
            .into());
    }
    cut.explain(job.recipe);
    let Cut { stages, tasks, notes, .. } = cut;
    let by_tasks = seconds.passes + seconds.grams + threaded(seconds.fits.iter().sum(), seconds.fits.len());
    Ok(TaskPlan {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        source: job.source.into(),
        adapter: origin.adapter.clone(),
        revision: origin.revision.clone(),
        dequantize: origin.dequantize,
        device: origin.device.clone(),
        memory_bytes: job.memory_bytes,
        job: record::job(job, &run.source_files, &run.inputs)?,
        stages,
        tasks,
        finish_seconds: (seconds.whole - by_tasks).max(0.0),
        notes,
    })
}

struct Cut<'a> {
    run: &'a Run<'a>,
    recipe: &'a Recipe,
    n_tasks: usize,
    stages: Vec<StageRecord>,
    tasks: Vec<TaskRecord>,
    notes: Vec<String>,
}

impl Cut<'_> {
    /// Adds a stage of consecutive units with these costs; `task` makes a task of some of them.
    fn stage(&mut self, name: StageName, costs: &[f64], task: impl Fn(Range<usize>) -> Task) {
        let ranges = divide(costs, self.n_tasks);
        if ranges.len() < self.n_tasks {
            let (n, unit) = (costs.len(), name.unit());
            self.notes.push(format!("stage `{}` has {} tasks: {n} {unit} are divided", name.name(), ranges.len()));
        }
        let is_read = |before: &&StageRecord| before.name != StageName::Walk || name == StageName::Statistics;
        let waits_for = self.stages.iter().filter(is_read).map(|before| before.name).collect();
        let first = self.tasks.len();
        self.stages.push(StageRecord { name, waits_for, first, tasks: ranges.len() });
        for (i, range) in ranges.into_iter().enumerate() {
            let Task { range, seconds, read, written } = task(range);
            self.tasks.push(TaskRecord {
                index: first + i,
                stage: name,
                range: [range.start, range.end],
                expected_seconds: seconds,
                read_bytes: read,
                written_bytes: written,
            });
        }
    }

    /// States by windows, and sums by block.
    fn measuring(&mut self, seconds: &PartSeconds) -> Result<()> {
        let (run, job, recipe) = (self.run, self.run.job, self.recipe);
        let walked = Walked::of(run, recipe)?;
        let n_blocks = walked.n_blocks;
        let costs: Vec<f64> = walked.tokens.iter().map(|&n| n as f64).collect();
        let all: f64 = costs.iter().sum();
        self.stage(StageName::Walk, &costs, |range| Task {
            seconds: seconds.passes * costs[range.clone()].iter().sum::<f64>() / all.max(1.0),
            read: job.checkpoint.n_bytes(),
            written: walked.bytes(&range),
            range,
        });
        let read = walked.bytes(&(0..costs.len())) / n_blocks.max(1) as u64;
        self.stage(StageName::Statistics, &vec![1.0; n_blocks], |range| {
            let linears = of_blocks(&run.plan, &range);
            Task {
                seconds: (seconds.passes + seconds.grams) * range.len() as f64 / n_blocks.max(1) as f64,
                read: read * range.len() as u64 + weight_bytes(linears),
                written: gram_bytes(recipe, linears).iter().sum(),
                range,
            }
        });
        Ok(())
    }

    /// Work on each linear, by block: decompositions and quantized bases; or the factors of the ranks that were chosen,
    /// rounded, for which every task makes the choice, which takes little.
    fn by_block(&mut self, name: StageName, seconds: &[f64]) {
        let (plan, recipe) = (&self.run.plan, self.recipe);
        let groups = groups(plan);
        let costs: Vec<f64> = groups.iter().map(|group| seconds[group.clone()].iter().sum()).collect();
        let bytes = fit_bytes(recipe, plan);
        self.stage(name, &costs, |range| {
            let linears = groups[range.start].start..groups[range.end - 1].end;
            let own = &plan.linears[linears.clone()];
            let fits: u64 = bytes[linears.clone()].iter().sum();
            // What is rounded was fitted, and no operator is larger than what it replaces.
            let (fits_read, written) = if name == StageName::Round { (fits, weight_bytes(own)) } else { (0, fits) };
            Task {
                seconds: threaded(costs[range].iter().sum(), own.len()),
                read: gram_bytes(recipe, own).iter().sum::<u64>() + weight_bytes(own) + fits_read,
                written,
                range: linears,
            }
        });
    }

    /// Notes what is left to the end.
    fn explain(&mut self, recipe: &Recipe) {
        let mut note = |is_so: bool, what: &str| self.notes.extend(is_so.then(|| format!("`lrc finish` {what}")));
        note(recipe.narrow().is_some(), "orders channels and heads, and refits those that stay");
        note(recipe.anchor().is_some(), "runs the sequential mode, in which a block depends on those before it");
        note(recipe.runs_trials(), "runs the trials of `--sensitivity measured` and `--depth-weight auto`");
        note(recipe.compares_at_equal_bytes(), "quantizes the equal-bytes baseline");
        note(recipe.heals(), "trains the compressed model");
    }
}

/// Whether matrices are rounded one by one, once their ranks are chosen: the values of a block depend on no other block,
/// and no trial chooses.
fn rounds_by_itself(recipe: &Recipe, plan: &Plan) -> bool {
    let is_rounded =
        plan.linears.iter().zip(max_ranks(recipe, plan)).any(|(linear, rank)| rank > 0 && recipe.rounds(linear.dtype));
    is_rounded && recipe.anchor().is_none() && !recipe.runs_trials()
}

/// A task before it has an index.
struct Task {
    range: Range<usize>,
    seconds: f64,
    read: u64,
    written: u64,
}

/// The windows on their way through the model.
struct Walked {
    /// Tokens of each batch.
    tokens: Vec<usize>,
    /// The batches that go back.
    n_back: usize,
    n_blocks: usize,
    /// Bytes of the state of a token.
    width: u64,
}

impl Walked {
    fn of(run: &Run<'_>, recipe: &Recipe) -> Result<Self> {
        let job = run.job;
        let decoder = Decoder::open(job.model())?.on(&job.device);
        let limits = WalkLimits::new(job.memory_bytes, std::env::temp_dir());
        let (windows, observation) = (run.inputs.drawn().targeted(), observation(recipe));
        let journal = Journal::default();
        let parts =
            Parts { decoder: &decoder, windows, observation, limits: &limits, journal: &journal, progress: &Silent };
        let (tokens, n_back) = parts.batches()?;
        let n_back = if observation.needs.gradients() { n_back } else { 0 };
        let width = 4 * ModelConfig::of(job.checkpoint)?.0.hidden_size as u64;
        Ok(Self { tokens, n_back, n_blocks: decoder.n_blocks(), width })
    }

    /// Bytes of the states and gradients of some batches before every block.
    fn bytes(&self, batches: &Range<usize>) -> u64 {
        let back = batches.start.min(self.n_back)..batches.end.min(self.n_back);
        let [all, back] = [batches, &back].map(|range| self.tokens[range.clone()].iter().sum::<usize>() as u64);
        let points = self.n_blocks as u64;
        let behind = u64::from(self.n_back > 0);
        self.width * ((points + behind) * all + (points + 1) * back)
    }
}

/// The linears of some blocks.
fn of_blocks<'p>(plan: &'p Plan, blocks: &Range<usize>) -> &'p [LinearInfo] {
    let before = |end: usize| plan.linears.partition_point(|linear| linear.block.is_none_or(|block| block < end));
    &plan.linears[before(blocks.start)..before(blocks.end)]
}

fn weight_bytes(linears: &[LinearInfo]) -> u64 {
    linears.iter().map(LinearInfo::n_bytes).sum()
}

/// Linears that are fitted together: those of a block.
fn groups(plan: &Plan) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    for (i, linear) in plan.linears.iter().enumerate() {
        match groups.last_mut() {
            Some(last) if linear.block.is_some() && plan.linears[last.start].block == linear.block => last.end = i + 1,
            _ => groups.push(i..i + 1),
        }
    }
    groups
}

/// Seconds on all threads of work on `n` matrices.
fn threaded(seconds: f64, n: usize) -> f64 {
    seconds / rayon::current_num_threads().min(n).max(1) as f64
}

/// At most `n` runs of consecutive units that cost about the same.
fn divide(costs: &[f64], n: usize) -> Vec<Range<usize>> {
    let n = n.min(costs.len());
    let total: f64 = costs.iter().sum();
    let (mut begin, mut done) = (0, 0.0);
    let mut ranges = Vec::with_capacity(n);
    for i in 1..=n {
        // Each that follows has at least one.
        let most = costs.len() - (n - i);
        let share = if i == n { f64::INFINITY } else { total * i as f64 / n as f64 };
        let mut end = begin;
        while end == begin || (end < most && done + costs[end] / 2.0 <= share) {
            done += costs[end];
            end += 1;
        }
        ranges.push(begin..end);
        begin = end;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_divided_by_their_costs_and_none_is_left() {
        for (costs, n, expected) in [
            (&[1.0; 4][..], 2, &[0..2, 2..4][..]),
            (&[1.0; 3], 7, &[0..1, 1..2, 2..3]),
            (&[9.0, 1.0, 1.0, 1.0], 2, &[0..1, 1..4]),
            (&[1.0, 1.0, 1.0, 9.0], 3, &[0..2, 2..3, 3..4]),
            (&[0.0; 3], 2, &[0..2, 2..3]),
            (&[], 3, &[]),
        ] {
            assert_eq!(divide(costs, n), expected, "{costs:?} in {n}");
        }
    }
}
