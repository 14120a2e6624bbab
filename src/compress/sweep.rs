//! Many budgets from a single decomposition: the Pareto curve of a method.

use std::time::Instant;

use anyhow::Result;

use super::inputs::Inputs;
use super::knee::knee;
use super::plan::Plan;
use super::recipe::{Budget, Recipe};
use super::record;
use super::refine;
use super::sensitivity;
use super::solution::Solution;
use super::study::Study;
use super::trials::{Text, diverge};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::eval::{EvalSettings, Prepared};
use crate::formats::Source;
use crate::model::inventory::LinearInfo;
use crate::operator::Forms;
use crate::progress::Progress;
use crate::report::{AdapterRecord, LRC_VERSION, SCHEMA_VERSION, SweepPoint, SweepReport, peak_memory_bytes};
use crate::session::Session;
use crate::store::Journal;

/// The settings of a sweep.
pub struct SweepSettings<'a> {
    /// The source.
    pub checkpoint: &'a Checkpoint,
    /// The recipe; `budgets` replace its own.
    pub recipe: &'a Recipe,
    /// Shares of the targeted linears, each in (0, 1], or bits of their weights.
    pub budgets: &'a [Budget],
    /// The evaluation of every trial and of the source.
    pub eval: EvalSettings,
}

/// The failure for a flag of the sequential mode.
pub(crate) fn not_in_a_sweep(flag: &str) -> Failure {
    Failure::usage(format!(
        "`{flag}` cannot be used in a sweep: the sequential mode must redo the decomposition for each budget"
    ))
    .hint("run `lrc compress` and `lrc eval` for each budget")
}

/// Refuses recipes without ranks that budgets could determine.
fn expect_ranks(recipe: &Recipe, budgets: &[Budget]) -> Result<()> {
    if recipe.narrow().is_some() {
        return Err(Failure::usage("`--structure narrow` cannot be used in a sweep, which compares ranks")
            .hint("run `lrc compress` and `lrc eval` for each budget")
            .into());
    }
    if recipe.is_dense() && budgets.iter().any(|&budget| budget != Budget::Keep(1.0)) {
        return Err(Failure::usage("a recipe that keeps everything decomposes nothing")
            .hint("give the recipe a budget below 1")
            .into());
    }
    Ok(())
}

/// Decomposes once, truncates for every budget, and evaluates all trials in one walk alongside the source.
///
/// # Errors
/// As [`super::compress`] and [`crate::eval::perplexity`].
pub fn sweep(settings: &SweepSettings<'_>, progress: &dyn Progress) -> Result<SweepReport> {
    let started = Instant::now();
    let &SweepSettings { checkpoint, recipe, budgets, .. } = settings;
    if recipe.anchor().is_some() {
        return Err(not_in_a_sweep("--sequential").into());
    }
    expect_ranks(recipe, budgets)?;
    let plan = Plan::new(checkpoint, recipe)?;
    plan.check_format(&Source::new(checkpoint), recipe)?;
    let inputs = Inputs::load(checkpoint, recipe, &plan)?;
    let prepared = Prepared::new(checkpoint, &settings.eval)?;
    let work = tempfile::tempdir()?;
    let (device, memory) = (&settings.eval.device, settings.eval.memory_bytes);
    let session = Session::new(checkpoint, device, memory, work.path().into(), Journal::default(), progress);
    let study = Study::run(&session, recipe, &plan, inputs)?;
    let mut timings = study.timings;
    let allocating = Instant::now();
    let sensitivities = sensitivity::of(&study)?;
    let refinements = refine::of(recipe);
    let solve = |&budget: &Budget| {
        let allocation = sensitivity::allocate(&study, &sensitivities, budget)?;
        Ok(Solution::new(&study, allocation.choices, &refinements))
    };
    let solutions = budgets.iter().map(solve).collect::<Result<Vec<_>>>()?;
    timings.allocate += allocating.elapsed().as_secs_f64();
    let evaluating = Instant::now();
    let text = Text { windows: &prepared.windows, scored: &prepared.scored, limits: session.limits.clone() };
    let divergences = diverge(&study, &text, &solutions.iter().collect::<Vec<_>>(), "evaluate")?;
    let evaluate_seconds = evaluating.elapsed().as_secs_f64();
    let mut points = Vec::new();
    for ((&budget, solution), divergence) in budgets.iter().zip(&solutions).zip(&divergences) {
        // The forms are settled now that the operators are made.
        let forms = solution.all_forms();
        let rank = |(linear, forms): (&LinearInfo, &Option<Forms>)| {
            (linear.module.clone(), forms.and_then(|forms| forms.rank()))
        };
        points.push(SweepPoint {
            keep: if let Budget::Keep(keep) = budget { Some(keep) } else { None },
            bits: if let Budget::Bits(bits) = budget { Some(bits) } else { None },
            ppl: divergence.perplexity(),
            divergence: divergence.record(&settings.eval.model),
            sizes: record::sizes(&study.source, recipe, &plan, &forms),
            ranks: plan.linears.iter().zip(&forms).map(rank).collect(),
        });
    }
    Ok(SweepReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: settings.eval.model.clone(),
        source_quantization: checkpoint.source_quantization(),
        adapter: AdapterRecord::of(checkpoint)?,
        recipe: record::recipe(recipe),
        convention: prepared.convention().into(),
        seq_len: prepared.seq_len,
        text_sha256: prepared.text.sha256.clone(),
        knee: knee(&points.iter().map(|p| (p.sizes.bytes_after as f64, p.ppl)).collect::<Vec<_>>()),
        dense_ppl: points.first().map(|p| p.divergence.reference_ppl),
        points,
        timings,
        evaluate_seconds,
        output_files: Default::default(),
        elapsed_seconds: started.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory_bytes(),
    })
}
