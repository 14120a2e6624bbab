//! Many budgets from one decomposition: the Pareto curve of a method.

use std::time::Instant;

use anyhow::Result;

use super::plan::Plan;
use super::recipe::{Budget, Recipe};
use super::record;
use super::study::{Inputs, Study};
use crate::checkpoint::Checkpoint;
use crate::error::Failure;
use crate::eval::{EvalSettings, Prepared};
use crate::formats::Entry;
use crate::journal::Journal;
use crate::model::inventory::LinearInfo;
use crate::progress::Progress;
use crate::report::{LRC_VERSION, SCHEMA_VERSION, SweepPoint, SweepReport, peak_memory_bytes};

/// What is swept.
pub struct SweepSettings<'a> {
    pub checkpoint: &'a Checkpoint,
    /// The recipe but for its budget, which `keeps` replace.
    pub recipe: &'a Recipe,
    pub keeps: &'a [f64],
    pub eval: EvalSettings,
}

/// Decomposes once, truncates for every budget, and evaluates all of them in one walk beside the original.
///
/// # Errors
/// As [`super::compress`] and [`crate::eval::perplexity`].
pub fn sweep(settings: &SweepSettings<'_>, progress: &dyn Progress) -> Result<SweepReport> {
    let started = Instant::now();
    let &SweepSettings { checkpoint, recipe, keeps, .. } = settings;
    if recipe.anchor().is_some() {
        return Err(Failure::usage("`--sequential` decomposes anew for every budget, a sweep once for all")
            .hint("compress and evaluate the budgets one by one")
            .into());
    }
    let plan = Plan::new(checkpoint, recipe)?;
    let inputs = Inputs::load(checkpoint, recipe, &plan)?;
    let prepared = Prepared::new(checkpoint, &settings.eval)?;
    let work = tempfile::tempdir()?;
    let memory = settings.eval.memory_bytes;
    let mut study =
        Study::run(checkpoint, recipe, &plan, inputs, memory, (work.path().into(), Journal::default()), progress)?;
    let allocating = Instant::now();
    let allocate = |&keep: &f64| Ok(study.allocate(Budget::Keep(keep), progress)?.choices);
    let choices = keeps.iter().map(allocate).collect::<Result<Vec<_>>>()?;
    study.timings.allocate += allocating.elapsed().as_secs_f64();
    let evaluating = Instant::now();
    let divergences =
        study.diverge(&prepared.windows, &study.limits, &prepared.scored, &choices, "evaluate", progress)?;
    let evaluate_seconds = evaluating.elapsed().as_secs_f64();
    let mut points = Vec::new();
    for ((&keep, choices), divergence) in keeps.iter().zip(&choices).zip(&divergences) {
        // Making them has settled how they are stored.
        let entries = study.stored_entries(choices);
        let rank = |(linear, entry): (&LinearInfo, &Option<Entry>)| {
            (linear.module.clone(), entry.and_then(|entry| entry.pair).map(|pair| pair.rank))
        };
        points.push(SweepPoint {
            keep,
            ppl: divergence.perplexity(),
            divergence: divergence.record(&settings.eval.model),
            sizes: record::sizes(&study.source, recipe, &plan, &entries),
            ranks: plan.linears.iter().zip(&entries).map(rank).collect(),
        });
    }
    Ok(SweepReport {
        schema_version: SCHEMA_VERSION,
        lrc_version: LRC_VERSION.into(),
        model: settings.eval.model.clone(),
        recipe: record::recipe(recipe),
        convention: prepared.convention().into(),
        seq_len: prepared.seq_len,
        text_sha256: prepared.text.sha256.clone(),
        dense_ppl: points.first().map(|p| p.divergence.reference_ppl),
        points,
        timings: study.timings,
        evaluate_seconds,
        elapsed_seconds: started.elapsed().as_secs_f64(),
        peak_memory_bytes: peak_memory_bytes(),
    })
}
