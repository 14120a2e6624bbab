//! Everything learned about a model before a choice is made: statistics, fits of every linear, and how their errors
//! compare.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Instant;

use anyhow::Result;

use super::allocate::Spectra;
use super::budget::{max_ranks, reads_fit};
use super::compensate::Compensate;
use super::fits::{Approximation, Decompose, Fits, Origin, Quantize, Share, Unit, units_to_share};
use super::inputs::Inputs;
use super::metrics::Metrics;
use super::plan::{Choice, FitKind, Plan, layout, menu};
use super::presets::MetricForm;
use super::recipe::Recipe;
use crate::formats::Source;
use crate::model::InputSite;
use crate::model::inventory::LinearInfo;
use crate::operator::{Forms, Right};
use crate::quantize::Quant;
use crate::report::Timings;
use crate::session::Session;

pub(super) struct Study<'a> {
    pub session: &'a Session<'a>,
    pub recipe: &'a Recipe,
    pub plan: &'a Plan,
    pub inputs: Inputs,
    pub fits: Fits,
    pub source: Source<'a>,
    pub timings: Timings,
    /// Number of times that quantized bases were added.
    rounds: usize,
}

impl<'a> Study<'a> {
    /// Measures statistics and fits every linear.
    ///
    /// # Errors
    /// A weight is damaged, a value is not finite, or the work folder cannot be written.
    pub fn run(session: &'a Session<'a>, recipe: &'a Recipe, plan: &'a Plan, mut inputs: Inputs) -> Result<Self> {
        let seconds = inputs.measure(session, recipe)?;
        let mut study = Self::fit(session, recipe, plan, inputs, None)?;
        (study.timings.calibrate_forward, study.timings.calibrate_backward) = (seconds.forward, seconds.backward);
        Ok(study)
    }

    /// Fits every linear, or those of a task, with statistics that are there. Linears of a block belong to one task.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn fit(
        session: &'a Session<'a>,
        recipe: &'a Recipe,
        plan: &'a Plan,
        inputs: Inputs,
        task: Option<Range<usize>>,
    ) -> Result<Self> {
        let mut timings = Timings::default();
        let started = Instant::now();
        let mut fits = Fits::new(plan.linears.len(), session.spool());
        let mut max_ranks = max_ranks(recipe, plan);
        let linears = task.clone().unwrap_or(0..plan.linears.len());
        let outside = (0..max_ranks.len()).filter(|i| !linears.contains(i));
        outside.for_each(|i| max_ranks[i] = 0);
        // The Grams are those of another task.
        let forget = |block: Option<usize>| match task {
            None => forget_inputs(session, recipe, plan, &inputs, block),
            Some(_) => Ok(()),
        };
        let decompose = Decompose {
            checkpoint: session.checkpoint,
            plan,
            metrics: inputs.metrics(recipe),
            max_ranks: &max_ranks,
            with_plain: recipe.ranks().allocator().spectra() == Spectra::Plain,
            layout: &|linear| layout(recipe, linear),
            keeps_values: &|linear| reads_fit(recipe, linear),
            after_block: &forget,
        };
        fits.decompose(session, plan, &decompose)?;
        if recipe.share() {
            let share = Share { checkpoint: session.checkpoint, plan, metrics: inputs.metrics(recipe) };
            let mut units = units_to_share(plan);
            units.retain(|unit| linears.contains(&unit.members[0]));
            fits.share(session, plan, &share, &units)?;
        }
        timings.decompose = started.elapsed().as_secs_f64();
        let source = Source::new(session.checkpoint);
        let mut study = Self { session, recipe, plan, inputs, fits, source, timings, rounds: 0 };
        if !recipe.quant().is_empty() || recipe.embeddings().quantizes() {
            let started = Instant::now();
            study.quantize(recipe.compensate(), linears, &|i| menu(recipe, &plan.linears[i]))?;
            study.timings.quantize = started.elapsed().as_secs_f64();
        }
        Ok(study)
    }

    /// Number of calibration tokens that the expert of a linear saw.
    ///
    /// # Errors
    /// The statistics cannot be read.
    pub fn expert_tokens(&self, linear: &LinearInfo) -> Result<Option<u64>> {
        let (Some(statistics), Some(id)) = (&self.inputs.statistics, linear.id) else { return Ok(None) };
        Ok(statistics.expert_tokens(id)?.map(|seen| seen as u64))
    }

    pub fn metrics(&self) -> Metrics<'_> {
        self.inputs.metrics(self.recipe)
    }

    /// Adds quantized bases of some linears to the existing ones, with factors fitted by `compensate`.
    ///
    /// # Errors
    /// A weight is damaged, a value is not finite, or the work folder cannot be written.
    pub fn quantize(
        &mut self,
        compensate: Compensate,
        linears: Range<usize>,
        quants: &(dyn Fn(usize) -> Vec<Quant> + Sync),
    ) -> Result<()> {
        let method = Quantize {
            checkpoint: self.session.checkpoint,
            plan: self.plan,
            metrics: self.inputs.metrics(self.recipe),
            compensate,
            rank: self.recipe.compensate_rank(),
            quants,
            round: self.rounds,
        };
        // In a recipe of low rank only matrices of the vocabulary have a menu. Later rounds compare
        // with all of their norms.
        let is_wanted = |i: &usize| self.rounds > 0 || !self.recipe.quant().is_empty() || !quants(*i).is_empty();
        let units = linears.filter(is_wanted).map(|i| Unit { members: vec![i] }).collect();
        self.rounds += 1;
        self.fits.quantize(self.session, self.plan, &method, units)
    }

    /// Base and factors of the `i`-th linear under a choice.
    ///
    /// # Errors
    /// The source or the work folder cannot be read.
    pub fn values(&self, i: usize, choice: Choice) -> Result<Approximation> {
        self.fits.values(i, choice, &self.origin())
    }

    /// The places that the values of fits are read from.
    pub fn origin(&self) -> Origin<'_> {
        Origin { checkpoint: self.session.checkpoint, plan: self.plan, spool: &self.fits.spool }
    }

    /// The planned forms of the `i`-th linear under a choice.
    pub fn planned(&self, i: usize, choice: Choice) -> Option<Forms> {
        let fitted = match self.fits.chosen(i, choice) {
            Some(fit) => match (fit.fitted.quant(), fit.fitted.unit()) {
                (Some(quant), _) => FitKind::Base(quant),
                (None, [first, _, ..]) if fit.member == 0 => FitKind::Shared(Right::Lent(*first)),
                (None, [first, _, ..]) => FitKind::Shared(Right::Borrowed(*first)),
                (None, _) => FitKind::Layout,
            },
            None => FitKind::Layout,
        };
        Plan::forms(self.recipe, &self.plan.linears[i], choice, fitted)
    }
}

/// Drops the input Grams of a block that rounding will not read.
fn forget_inputs(
    session: &Session<'_>,
    recipe: &Recipe,
    plan: &Plan,
    inputs: &Inputs,
    block: Option<usize>,
) -> Result<()> {
    let (Some(statistics), Some(block)) = (&inputs.statistics, block) else { return Ok(()) };
    // Factors over a base, shared parts and later bases need the Grams of all inputs.
    if recipe.method().preset().input != MetricForm::Gram || !recipe.quant().is_empty() || recipe.share() {
        return Ok(());
    }
    let here: Vec<&LinearInfo> = plan.linears.iter().filter(|linear| linear.block == Some(block)).collect();
    let mut done: BTreeSet<InputSite> = here.iter().filter_map(|linear| site(linear)).collect();
    // Rounding reads the full Gram of the smaller side; errors of quantized factors, and fits in a second layout, are
    // measured in both.
    let is_kept = |linear: &&&LinearInfo| {
        recipe.quant_factors().is_some()
            || recipe.second_layout().is_some()
            || recipe.rounds(linear.dtype) && linear.out_features > linear.in_features
    };
    here.iter().filter(is_kept).filter_map(|linear| site(linear)).for_each(|kept| {
        done.remove(&kept);
    });
    statistics.forget_inputs(&session.journal, block, &done)
}

fn site(linear: &LinearInfo) -> Option<InputSite> {
    linear.id.map(|id| id.slot.site())
}
