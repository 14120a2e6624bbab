//! What is found out about a model before anything is written: statistics, decompositions, sensitivities, ranks.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};

use super::allocate::{self, Choice, Item, Price, Rules, Spectra};
use super::bases::{Bases, Decompose};
use super::compensate::{Compensate, CompensateRank};
use super::layouts::Layouts;
use super::metric::MetricPair;
use super::metrics::{Metrics, SharedInputs};
use super::offers::Offers;
use super::plan::Plan;
use super::recipe::{Budget, Recipe};
use super::residual::{Quantise, Residuals};
use super::sensitivity::{self, DepthWeight};
use super::{factors, pivot};
use crate::calibrate::{self, Header, Observation, Statistics, Windows};
use crate::checkpoint::{Checkpoint, Fingerprint};
use crate::error::Failure;
use crate::formats::{Entry, Matrix, Module, Parts, Source};
use crate::journal::Journal;
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::model::{Decoder, Layout, WalkLimits, fingerprint};
use crate::progress::Progress;
use crate::quantize::Quant;
use crate::report::{CalibrationRecord, Timings};
use crate::spool::Spool;

/// What a study reads besides the weights: checked before any work.
pub(super) struct Inputs {
    pub windows: Option<Windows>,
    statistics: Option<Statistics>,
}

impl Inputs {
    /// # Errors
    /// A text, a tokenizer or a file of statistics is broken or does not belong here, or the model cannot be run.
    pub fn load(checkpoint: &Checkpoint, recipe: &Recipe, plan: &Plan) -> Result<Self> {
        let windows = recipe.calibration.as_ref().map(|c| Windows::load(checkpoint, c, (1, 1))).transpose()?;
        let statistics = recipe.statistics.as_deref().map(Statistics::open).transpose()?;
        if let (Some(statistics), Some(path)) = (&statistics, &recipe.statistics) {
            let named = path.display().to_string();
            statistics.expect_model(&fingerprint(checkpoint)?, &named)?;
            statistics.expect_needs(recipe.needs(), &named)?;
            let texts = &statistics.header.parts;
            if let Some(windows) = &windows
                && texts.iter().all(|part| part.text_sha256 != windows.part.text_sha256)
            {
                return Err(Failure::unsupported(format!("`{named}` was not measured on the text of `--calibration`"))
                    .hint("give the text that was calibrated on")
                    .into());
            }
        }
        if windows.is_some() || statistics.is_some() {
            let decoder = Decoder::open(checkpoint)?;
            if recipe.probes() && !decoder.has_head() {
                return Err(Failure::unsupported(
                    "the model has no head, and so no logits for trials to be compared by",
                )
                .hint("leave `--sensitivity measured` and `--depth-weight auto` out")
                .into());
            }
            if let Some(outside) = plan.linears.iter().find(|l| l.id.is_none()) {
                return Err(Failure::unsupported(format!(
                    "`{}` is outside of the blocks, and has no calibration statistics",
                    outside.module
                ))
                .hint("compress it with `--method svd`, or leave it out")
                .into());
            }
        }
        Ok(Self { windows, statistics })
    }

    /// Measures the statistics that the method needs, where they are not read from a file.
    ///
    /// # Errors
    /// The model cannot be run, a number is not finite, or the work folder refuses.
    pub fn measure(
        &mut self,
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        limits: &WalkLimits,
        journal: &Journal,
        progress: &dyn Progress,
    ) -> Result<calibrate::Seconds> {
        if !recipe.measures_statistics() {
            return Ok(calibrate::Seconds::default());
        }
        let windows = self.windows.as_ref().expect("invariant: a recipe that needs a text has one");
        let (statistics, seconds) = measure(checkpoint, recipe, windows, limits, journal, progress)?;
        self.statistics = Some(statistics);
        Ok(seconds)
    }

    /// For the report.
    pub fn record(&self, recipe: &Recipe) -> Option<CalibrationRecord> {
        let own = self.windows.as_ref().map(|w| vec![w.part.clone()]);
        let kept = self.statistics.as_ref().map(|s| s.header.parts.clone());
        let parts = if recipe.statistics.is_some() { kept } else { own }?;
        Some(CalibrationRecord {
            text_sha256: parts.iter().map(|p| p.text_sha256.clone()).collect(),
            windows: parts.iter().map(|p| p.windows).sum(),
            tokens: parts.iter().map(|p| p.tokens).sum(),
        })
    }
}

/// What becomes of every linear of the plan.
pub(super) struct Allocation {
    pub choices: Vec<Choice>,
    /// What a unit of squared error was taken to cost, depth weights included.
    pub sensitivities: Vec<f64>,
}

pub(super) struct Study<'a> {
    pub checkpoint: &'a Checkpoint,
    pub recipe: &'a Recipe,
    pub plan: &'a Plan,
    pub inputs: Inputs,
    pub limits: WalkLimits,
    pub bases: Bases,
    pub layouts: Layouts,
    /// Quantised bases, where the recipe asks for them.
    pub residuals: Residuals,
    pub source: Source<'a>,
    /// A linear's cost to the model of a unit of squared error, before depth weights.
    pub sensitivities: Vec<f64>,
    pub timings: Timings,
    pub journal: Journal,
}

impl<'a> Study<'a> {
    /// Measures statistics, decomposes every linear, and scales the errors of linears against each other.
    ///
    /// # Errors
    /// A weight is broken, a number is not finite, or the work folder refuses.
    pub fn run(
        checkpoint: &'a Checkpoint,
        recipe: &'a Recipe,
        plan: &'a Plan,
        mut inputs: Inputs,
        memory_bytes: u64,
        (work_folder, journal): (PathBuf, Journal),
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut timings = Timings::default();
        let limits = WalkLimits::new(memory_bytes, work_folder.clone());
        let seconds = inputs.measure(checkpoint, recipe, &limits, &journal, progress)?;
        (timings.calibrate_forward, timings.calibrate_backward) = (seconds.forward, seconds.backward);
        let started = Instant::now();
        let spectra = recipe.ranks().allocator().spectra();
        let max_ranks = max_ranks(recipe, plan);
        let decompose = Decompose {
            checkpoint,
            plan,
            metrics: metrics(recipe, inputs.statistics.as_ref()),
            max_ranks: &max_ranks,
            with_plain: spectra == Spectra::Plain,
            journal: &journal,
        };
        let bases = decompose.run(Spool::new(limits.activation_bytes, work_folder.clone()), progress)?;
        timings.decompose = started.elapsed().as_secs_f64();
        let sensitivities = vec![1.0; plan.linears.len()];
        let residuals = Residuals::new(plan.linears.len(), Spool::new(limits.activation_bytes, work_folder));
        let source = Source::new(checkpoint);
        let mut study = Self {
            checkpoint,
            recipe,
            plan,
            inputs,
            limits,
            bases,
            layouts: Layouts::default(),
            residuals,
            source,
            sensitivities,
            timings,
            journal,
        };
        if !recipe.quant().is_empty() {
            let started = Instant::now();
            study.quantise(recipe.compensate(), &|_| recipe.quant().to_vec(), progress)?;
            study.timings.quantize = started.elapsed().as_secs_f64();
        }
        let started = Instant::now();
        study.sensitivities = sensitivity::of(&study, progress)?;
        study.timings.allocate = started.elapsed().as_secs_f64();
        Ok(study)
    }

    /// Tokens of the calibration that the expert of a linear saw.
    ///
    /// # Errors
    /// The statistics cannot be read.
    pub fn expert_tokens(&self, linear: &LinearInfo) -> Result<Option<u64>> {
        let (Some(statistics), Some(id)) = (&self.inputs.statistics, linear.id) else { return Ok(None) };
        Ok(statistics.expert_tokens(id)?.map(|seen| seen as u64))
    }

    pub fn metrics(&self) -> Metrics<'_> {
        metrics(self.recipe, self.inputs.statistics.as_ref())
    }

    /// Adds quantised bases to those that there are, with factors that `compensate` makes.
    ///
    /// # Errors
    /// A weight is broken, a number is not finite, or the work folder refuses.
    pub fn quantise(
        &mut self,
        compensate: Compensate,
        quants: &(dyn Fn(usize) -> Vec<Quant> + Sync),
        progress: &dyn Progress,
    ) -> Result<()> {
        let (checkpoint, plan, rank) = (self.checkpoint, self.plan, self.recipe.compensate_rank());
        let metrics = metrics(self.recipe, self.inputs.statistics.as_ref());
        Quantise { checkpoint, plan, metrics, compensate, rank, journal: &self.journal }.run(
            &mut self.residuals,
            quants,
            progress,
        )
    }

    /// What a choice is planned to make of the `i`-th linear.
    pub fn entry(&self, i: usize, choice: Choice) -> Option<Entry> {
        let quant = match choice {
            Choice::Coded { variant, .. } => Some(self.residuals.of(i)[variant].quant),
            _ => None,
        };
        Plan::entry(self.recipe, choice, quant)
    }

    /// The same for all linears.
    pub fn entries(&self, choices: &[Choice]) -> Vec<Option<Entry>> {
        choices.iter().enumerate().map(|(i, &choice)| self.entry(i, choice)).collect()
    }

    /// The `i`-th linear as `choice` makes it; none where it stays as it is.
    ///
    /// # Errors
    /// The work folder refuses, or a factor cannot be quantised.
    pub fn module(&self, i: usize, choice: Choice) -> Result<Option<Module>> {
        let (linear, shape) = (&self.plan.linears[i], self.plan.linears[i].shape());
        let (base, mut parts, metrics) = match choice {
            Choice::Dense => return Ok(None),
            Choice::Rank(0) => return Ok(Some(Module::of_parts(Parts::empty()))),
            Choice::Rank(rank) => (None, Some(self.lay_out(i, rank)?), self.metrics()),
            Choice::Coded { variant, rank } => {
                let (base, pair) = self.residuals.parts(i, variant, rank)?;
                let parts = pair.map(|pair| pivot::lay_out(Layout::Factors, pair, shape));
                (Some(base), parts, self.metrics().with_preset(self.recipe.compensate().preset()))
            }
        };
        if let (Some(found), Some(bits)) = (&parts, self.recipe.quant_factors()) {
            // What the pair stands for; the anchored mode moves targets, and there it is all that is known of them.
            let target = match (&base, self.recipe.anchor()) {
                (None, Some(_)) => found.product(shape.0, shape.1),
                (None, None) => inventory::weight(self.checkpoint, linear)?,
                (Some(base), _) => {
                    let weight = inventory::weight(self.checkpoint, linear)?;
                    weight.iter().zip(base.dequantize()).map(|(w, q)| w - q).collect()
                }
            };
            let target = linalg::transposed_from_row_major(&target, shape.0, shape.1);
            let output = metrics.output(linear)?;
            parts = Some(factors::quantise(found, target.transpose(), &output, bits.scheme())?);
        }
        Ok(Some(Module { base: base.map(Matrix::Quantized), parts }))
    }

    /// Squared error of a module, made by `choice`, in the metric of the method, over the squared norm of the weight in it.
    ///
    /// # Errors
    /// The weight or the statistics cannot be read.
    pub fn relative_squared_error(&self, i: usize, choice: Choice, module: &Module) -> Result<f64> {
        if let Choice::Coded { rank: 0, .. } = choice {
            // A base alone was measured when it was made.
            let norm = self.residuals.norm(i);
            return Ok(if norm > 0.0 { self.residuals.error(i, choice) / norm } else { 0.0 });
        }
        let linear = &self.plan.linears[i];
        let (m, n) = linear.shape();
        let weight = linalg::transposed_from_row_major(&inventory::weight(self.checkpoint, linear)?, m, n);
        let error = &weight - linalg::transposed_from_row_major(&module.product(m, n), m, n);
        let output = self.metrics().output(linear)?;
        self.metrics().with_input(linear, &SharedInputs::new(&[linear]), |input| {
            let metric = MetricPair { output: &output, input };
            let norm = metric.squared_norm(weight.transpose());
            Ok(if norm > 0.0 { metric.squared_norm(error.transpose()) / norm } else { 0.0 })
        })
    }

    /// The choices under a budget; where the recipe leaves the depth weight open, those of the best one.
    ///
    /// # Errors
    /// A size in bytes that cannot be reached, or a probe fails.
    pub fn allocate(&self, budget: Budget, progress: &dyn Progress) -> Result<Allocation> {
        let gammas = match self.recipe.depth_weight() {
            DepthWeight::Fixed(gamma) => vec![gamma],
            DepthWeight::Auto => sensitivity::GAMMAS.to_vec(),
        };
        let at = |&gamma: &f64| -> Result<Allocation> {
            let weights = sensitivity::depth_weights(self, gamma);
            let sensitivities: Vec<f64> = self.sensitivities.iter().zip(weights).map(|(s, w)| s * w).collect();
            Ok(Allocation { choices: self.share_out(budget, &sensitivities)?, sensitivities })
        };
        let mut allocations = gammas.iter().map(at).collect::<Result<Vec<_>>>()?;
        if allocations.len() == 1 {
            return Ok(allocations.remove(0));
        }
        let variants: Vec<Vec<Choice>> = allocations.iter().map(|a| a.choices.clone()).collect();
        let windows = sensitivity::probe_windows(self);
        let kl = self.mean_kl(windows, &variants, "depth weight", progress)?;
        let best = (0..kl.len()).reduce(|best, i| if kl[i] < kl[best] { i } else { best }).unwrap_or(0);
        tracing::info!("depth weight {} diverges least: {:.6}", gammas[best], kl[best]);
        Ok(allocations.swap_remove(best))
    }

    fn share_out(&self, budget: Budget, sensitivities: &[f64]) -> Result<Vec<Choice>> {
        if !self.recipe.quant().is_empty() {
            return self.share_out_coded(budget, sensitivities);
        }
        let spectra = self.recipe.ranks().allocator().spectra();
        let prices = self.byte_prices(budget);
        let items: Vec<Item<'_>> = (0..self.plan.linears.len())
            .map(|i| {
                let basis = self.bases.get(i);
                let curve = match spectra {
                    Spectra::None => None,
                    Spectra::Plain => basis.and_then(|b| b.plain.as_ref()),
                    Spectra::Metric => basis.map(|b| &b.curve),
                };
                let item = item(self.recipe, self.plan, i, prices.get(i));
                Item { curve, sensitivity: sensitivities[i], ..item }
            })
            .collect();
        match budget {
            Budget::Bytes(target) => self.meet(target, &items),
            Budget::Bits(bits) => self.within_bits(bits, &items),
            Budget::Keep(_) | Budget::None => {
                Ok(allocate::allocate(self.recipe.ranks(), &items, &rules(self.recipe, &items, budget)))
            }
        }
    }

    /// Choices among quantised bases and their ranks.
    fn share_out_coded(&self, budget: Budget, sensitivities: &[f64]) -> Result<Vec<Choice>> {
        if let Some(choices) = known_choices(self.recipe, self.plan) {
            return Ok(choices);
        }
        let format = self.recipe.format;
        let bytes_of = |linear: &LinearInfo, entry: Option<&Entry>| match (entry, budget) {
            (entry, Budget::Bytes(target)) => format.n_bytes_in_file(linear, entry, target),
            (Some(entry), _) => format.n_bytes(linear, entry),
            (None, _) => linear.n_bytes(),
        };
        let offers = Offers::new(self, &|_| 0, &bytes_of, sensitivities);
        let bytes = match budget {
            Budget::Bytes(target) => {
                return self.meet_with(target, offers.dense_bytes(), &|bytes| offers.best(bytes).0);
            }
            Budget::Bits(bits) => (bits * offers.n_weights() as f64 / 8.0 + 1e-6) as u64,
            Budget::Keep(keep) => (keep * offers.dense_bytes() as f64 + 1e-6) as u64,
            Budget::None => unreachable!("invariant: without a budget the choice is known"),
        };
        let (choices, spent) = offers.best(bytes);
        if spent > bytes {
            let least = 8.0 * spent as f64 / offers.n_weights() as f64;
            return Err(Failure::usage(format!(
                "the budget cannot be reached: {least:.3} bits a weight are the least"
            ))
            .hint("offer fewer bits with `--quant`, or target more linears")
            .into());
        }
        Ok(choices)
    }

    /// Bytes of every linear, dense and at every rank; empty where the budget does not count bytes.
    fn byte_prices(&self, budget: Budget) -> Vec<(u64, Vec<u64>)> {
        if !matches!(budget, Budget::Bytes(_) | Budget::Bits(_)) {
            return Vec::new();
        }
        let price = |linear: &LinearInfo| {
            let bytes = |rank| {
                let entry = Plan::entry(self.recipe, Choice::Rank(rank), None);
                self.recipe.format.n_bytes(linear, &entry.expect("invariant: a rank is an entry"))
            };
            (linear.n_bytes(), (0..=linear.out_features.min(linear.in_features)).map(bytes).collect())
        };
        self.plan.linears.iter().map(price).collect()
    }

    fn within_bits(&self, bits: f64, items: &[Item<'_>]) -> Result<Vec<Choice>> {
        let weights: u64 = self.plan.linears.iter().map(LinearInfo::n_parameters).sum();
        let rules = rules(self.recipe, items, Budget::Bytes((bits * weights as f64 / 8.0 + 1e-6) as u64));
        let choices = allocate::allocate(self.recipe.ranks(), items, &rules);
        let spent = allocate::cost(items, &choices);
        if spent > rules.budget {
            let least = 8.0 * spent as f64 / weights as f64;
            return Err(Failure::usage(format!("`--bits {bits}` cannot be reached: {least:.3} are the least"))
                .hint("target more linears, or lower `--rank-floor`")
                .into());
        }
        Ok(choices)
    }

    /// Bytes of the weight files under choices.
    pub fn file_bytes(&self, choices: &[Choice]) -> u64 {
        self.plan.files(&self.source, self.recipe, &self.entries(choices)).file_bytes()
    }

    /// The choices whose weight files come closest to `target` bytes from below. Headers have no price of their own:
    /// the budget is corrected by what they turn out to take.
    fn meet(&self, target: u64, items: &[Item<'_>]) -> Result<Vec<Choice>> {
        let dense = allocate::cost(items, &vec![Choice::Dense; items.len()]);
        self.meet_with(target, dense, &|bytes| {
            let rules = rules(self.recipe, items, Budget::Bytes(bytes));
            allocate::allocate(self.recipe.ranks(), items, &rules)
        })
    }

    /// The same, by `at`, which spends a number of bytes on linears that take `dense_bytes` as they are.
    fn meet_with(&self, target: u64, dense_bytes: u64, at: &dyn Fn(u64) -> Vec<Choice>) -> Result<Vec<Choice>> {
        const ROUNDS: usize = 24;
        let dense = vec![Choice::Dense; self.plan.linears.len()];
        let whole = self.file_bytes(&dense);
        if whole <= target {
            tracing::warn!("`--target-size` is not below the {whole} bytes of the source: nothing is compressed");
            return Ok(dense);
        }
        let others = i128::from(whole) - i128::from(dense_bytes);
        let mut budget = i128::from(target) - others;
        let mut best: Option<(u64, Vec<Choice>)> = None;
        let mut smallest = u64::MAX;
        // A budget that was too large, and the largest that was not: what is left lies between.
        let (mut fits, mut too_large) = (None::<i128>, None::<i128>);
        for _ in 0..ROUNDS {
            let choices = at(u64::try_from(budget.max(0)).unwrap_or(0));
            let bytes = self.file_bytes(&choices);
            smallest = smallest.min(bytes);
            if bytes <= target {
                fits = fits.max(Some(budget));
                if best.as_ref().is_none_or(|(most, _)| bytes > *most) {
                    best = Some((bytes, choices));
                }
            } else {
                too_large = Some(too_large.map_or(budget, |least| least.min(budget)));
            }
            let next = budget + i128::from(target) - i128::from(bytes);
            let is_inside = |next: i128| fits.is_none_or(|f| next > f) && too_large.is_none_or(|t| next < t);
            budget = match (fits, too_large) {
                _ if is_inside(next) => next,
                (Some(fits), Some(too_large)) if too_large - fits > 1 => (fits + too_large) / 2,
                (None, _) if budget > 0 => next.min(budget / 2),
                _ => break,
            };
        }
        let Some((bytes, choices)) = best else {
            return Err(Failure::usage(format!(
                "`--target-size` of {target} bytes cannot be reached: {smallest} is the least"
            ))
            .hint("what is not targeted stays as it is; target more linears, lower `--rank-floor`, or offer fewer bits with `--quant`")
            .into());
        };
        if (target - bytes) as f64 > 0.001 * target as f64 && self.recipe.ranks().is_budgeted() {
            tracing::warn!("`--target-size` is missed by {} bytes: no step is that small", target - bytes);
        }
        Ok(choices)
    }
}

/// The choices, where no spectrum is needed to know them.
pub(super) fn known_choices(recipe: &Recipe, plan: &Plan) -> Option<Vec<Choice>> {
    if let (&[quant], Budget::None) = (recipe.quant(), recipe.budget()) {
        let choice = |linear: &LinearInfo| {
            let rank = match (recipe.compensate(), recipe.compensate_rank()) {
                (Compensate::None, _) | (_, CompensateRank::Auto) => 0,
                (_, CompensateRank::Fixed(rank)) => rank.min(linear.out_features).min(linear.in_features),
            };
            if quant.storage().fits(linear.in_features) { Choice::Coded { variant: 0, rank } } else { Choice::Dense }
        };
        return Some(plan.linears.iter().map(choice).collect());
    }
    let is_known = recipe.quant().is_empty()
        && recipe.ranks().allocator().spectra() == Spectra::None
        && !matches!(recipe.budget(), Budget::Bytes(_) | Budget::Bits(_));
    is_known.then(|| {
        let items: Vec<Item<'_>> = (0..plan.linears.len()).map(|i| item(recipe, plan, i, None)).collect();
        allocate::allocate(recipe.ranks(), &items, &rules(recipe, &items, recipe.budget()))
    })
}

/// The largest rank that each linear may get; 0 for those that are known to stay dense, or to be all zeros.
pub(super) fn max_ranks(recipe: &Recipe, plan: &Plan) -> Vec<usize> {
    if !recipe.quant().is_empty() {
        return vec![0; plan.linears.len()];
    }
    match known_choices(recipe, plan) {
        Some(choices) => choices.iter().map(|choice| choice.rank().unwrap_or(0)).collect(),
        None => {
            let linears = plan.linears.iter().zip(&plan.are_zero);
            let largest = |(linear, is_zero): (&LinearInfo, &bool)| {
                if *is_zero { 0 } else { recipe.layout().largest_saving_rank(linear.shape()) }
            };
            linears.map(largest).collect()
        }
    }
}

/// The `i`-th linear of a plan, as allocators see it without spectra.
fn item<'a>(recipe: &Recipe, plan: &Plan, i: usize, bytes: Option<&'a (u64, Vec<u64>)>) -> Item<'a> {
    let price = match bytes {
        Some((dense, ranks)) => Price::Bytes { dense: *dense, ranks },
        None => Price::Parameters,
    };
    Item {
        shape: plan.linears[i].shape(),
        layout: recipe.layout(),
        curve: None,
        sensitivity: 1.0,
        price,
        coded: &[],
        is_zero: plan.are_zero[i],
    }
}

fn rules(recipe: &Recipe, items: &[Item<'_>], budget: Budget) -> Rules {
    let rules = match budget {
        Budget::Keep(keep) => Rules::of_keep(items, keep),
        Budget::None => Rules { budget: u64::MAX, ..Rules::of_keep(items, 1.0) },
        Budget::Bits(_) => unreachable!("invariant: bits were turned into bytes"),
        Budget::Bytes(bytes) => {
            let dense = allocate::cost(items, &vec![Choice::Dense; items.len()]);
            Rules { budget: bytes, fill: true, ..Rules::of_keep(items, bytes as f64 / dense as f64) }
        }
    };
    Rules { floor: recipe.rank_floor(), multiple: recipe.rank_multiple(), ..rules }
}

/// The metric of every linear, once its statistics are there.
pub(super) fn statistics_metrics<'a>(recipe: &Recipe, inputs: &'a Inputs) -> Metrics<'a> {
    metrics(recipe, inputs.statistics.as_ref())
}

fn metrics<'a>(recipe: &Recipe, statistics: Option<&'a Statistics>) -> Metrics<'a> {
    Metrics {
        preset: recipe.method.preset(),
        damping_output: recipe.damping_output,
        damping_input: recipe.damping_input,
        statistics,
    }
}

/// Measures the statistics that the method needs.
fn measure(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    windows: &Windows,
    limits: &WalkLimits,
    journal: &Journal,
    progress: &dyn Progress,
) -> Result<(Statistics, calibrate::Seconds)> {
    let decoder = Decoder::open(checkpoint)?;
    let observation = Observation { needs: recipe.needs(), clip_gradients: recipe.clip_gradients };
    let header = Header::new(Fingerprint::new(), observation, vec![windows.part.clone()]);
    let mut statistics = Statistics::new(header, limits.activation_bytes, &limits.work_folder);
    let keep = &mut |sums| statistics.keep(sums);
    let seconds = calibrate::observe(
        &decoder,
        (&windows.windows, &windows.targets),
        observation,
        limits,
        journal,
        progress,
        keep,
    )
    .with_context(|| format!("calibrate on `{}`", windows.text))?;
    Ok((statistics, seconds))
}
