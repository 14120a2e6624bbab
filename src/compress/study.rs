//! What is found out about a model before anything is written: statistics, decompositions, sensitivities, ranks.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use super::allocate::{self, Choice, Item, Price, Rules, Spectra};
use super::bases::{Bases, Decompose};
use super::metrics::Metrics;
use super::plan::Plan;
use super::recipe::{Budget, Recipe};
use super::sensitivity::{self, DepthWeight};
use crate::calibrate::{self, Header, Observation, Statistics, Windows};
use crate::checkpoint::{Checkpoint, Fingerprint, writer_bytes};
use crate::error::Failure;
use crate::model::inventory::LinearInfo;
use crate::model::{Decoder, Layout, WalkLimits};
use crate::progress::Progress;
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
            statistics.expect_model(&checkpoint.fingerprint()?, &named)?;
            statistics.expect_needs(recipe.method.needs(), &named)?;
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
            Decoder::open(checkpoint)?;
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
    /// A linear's cost to the model of a unit of squared error, before depth weights.
    pub sensitivities: Vec<f64>,
    pub timings: Timings,
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
        work_folder: &Path,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut timings = Timings::default();
        let limits = WalkLimits::new(memory_bytes, work_folder.into());
        if recipe.measures_statistics() {
            let windows = inputs.windows.as_ref().expect("invariant: a recipe that needs a text has one");
            let (statistics, seconds) = measure(checkpoint, recipe, windows, &limits, progress)?;
            (timings.calibrate_forward, timings.calibrate_backward) = (seconds.forward, seconds.backward);
            inputs.statistics = Some(statistics);
        }
        let started = Instant::now();
        let spectra = recipe.ranks.allocator().spectra();
        let max_ranks = max_ranks(recipe, plan);
        let decompose = Decompose {
            checkpoint,
            plan,
            metrics: metrics(recipe, inputs.statistics.as_ref()),
            max_ranks: &max_ranks,
            with_plain: spectra == Spectra::Plain,
        };
        let bases = decompose.run(Spool::new(limits.activation_bytes, work_folder.into()), progress)?;
        timings.decompose = started.elapsed().as_secs_f64();
        let sensitivities = vec![1.0; plan.linears.len()];
        let mut study = Self { checkpoint, recipe, plan, inputs, limits, bases, sensitivities, timings };
        let started = Instant::now();
        study.sensitivities = sensitivity::of(&study, progress)?;
        study.timings.allocate = started.elapsed().as_secs_f64();
        Ok(study)
    }

    pub fn metrics(&self) -> Metrics<'_> {
        metrics(self.recipe, self.inputs.statistics.as_ref())
    }

    /// The choices under a budget; where the recipe leaves the depth weight open, those of the best one.
    ///
    /// # Errors
    /// A size in bytes that cannot be reached, or a probe fails.
    pub fn allocate(&self, budget: Budget, progress: &dyn Progress) -> Result<Allocation> {
        let gammas = match self.recipe.depth_weight {
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
        let divergences =
            self.diverge(windows, &self.limits.one_window(), &|n| 1..n, &variants, "depth weight", progress)?;
        let kl: Vec<f64> = divergences.iter().map(|d| d.mean_kl()).collect();
        let best = (0..kl.len()).reduce(|best, i| if kl[i] < kl[best] { i } else { best }).unwrap_or(0);
        tracing::info!("depth weight {} diverges least: {:.6}", gammas[best], kl[best]);
        Ok(allocations.swap_remove(best))
    }

    fn share_out(&self, budget: Budget, sensitivities: &[f64]) -> Result<Vec<Choice>> {
        let bytes = matches!(budget, Budget::Bytes(_));
        let spectra = self.recipe.ranks.allocator().spectra();
        let items: Vec<Item<'_>> = (0..self.plan.linears.len())
            .map(|i| {
                let basis = self.bases.get(i);
                let curve = match spectra {
                    Spectra::None => None,
                    Spectra::Plain => basis.and_then(|b| b.plain.as_ref()),
                    Spectra::Metric => basis.map(|b| &b.curve),
                };
                let item = item(self.recipe, &self.plan.linears[i], bytes);
                Item { curve, sensitivity: sensitivities[i], ..item }
            })
            .collect();
        match budget {
            Budget::Bytes(target) => self.meet(target, &items),
            Budget::Keep(_) | Budget::None => {
                Ok(allocate::allocate(self.recipe.ranks, &items, &rules(self.recipe, &items, budget)))
            }
        }
    }

    /// Bytes of the weight files under choices.
    pub fn file_bytes(&self, choices: &[Choice]) -> u64 {
        let outputs = self.plan.outputs(self.checkpoint, self.recipe, choices);
        let specs: Vec<_> = outputs.into_iter().map(|t| t.spec).collect();
        writer_bytes(&specs, self.recipe.max_shard_bytes)
    }

    /// The choices whose weight files come closest to `target` bytes from below. Headers have no price of their own:
    /// the budget is corrected by what they turn out to take.
    fn meet(&self, target: u64, items: &[Item<'_>]) -> Result<Vec<Choice>> {
        const ROUNDS: usize = 16;
        let dense = vec![Choice::Dense; items.len()];
        let whole = self.file_bytes(&dense);
        if whole <= target {
            tracing::warn!("`--target-size` is not below the {whole} bytes of the source: nothing is compressed");
            return Ok(dense);
        }
        let others = i128::from(whole) - i128::from(allocate::cost(items, &dense));
        let mut budget = i128::from(target) - others;
        let mut best: Option<(u64, Vec<Choice>)> = None;
        let mut smallest = u64::MAX;
        for _ in 0..ROUNDS {
            let rules = rules(self.recipe, items, Budget::Bytes(u64::try_from(budget.max(0)).unwrap_or(0)));
            let choices = allocate::allocate(self.recipe.ranks, items, &rules);
            let bytes = self.file_bytes(&choices);
            smallest = smallest.min(bytes);
            budget += i128::from(target) - i128::from(bytes);
            if bytes <= target && best.as_ref().is_none_or(|(most, _)| bytes > *most) {
                best = Some((bytes, choices));
            } else if budget < 0 || best.is_some() {
                break;
            }
        }
        let Some((bytes, choices)) = best else {
            return Err(Failure::usage(format!(
                "`--target-size` of {target} bytes cannot be reached: {smallest} is the least"
            ))
            .hint("what is not targeted stays as it is; target more linears, or lower `--rank-floor`")
            .into());
        };
        if (target - bytes) as f64 > 0.001 * target as f64 && self.recipe.ranks.is_budgeted() {
            tracing::warn!("`--target-size` is missed by {} bytes: no step of rank is that small", target - bytes);
        }
        Ok(choices)
    }
}

/// The choices, where no spectrum is needed to know them.
pub(super) fn known_choices(recipe: &Recipe, plan: &Plan) -> Option<Vec<Choice>> {
    let is_known = recipe.ranks.allocator().spectra() == Spectra::None && !matches!(recipe.budget, Budget::Bytes(_));
    is_known.then(|| {
        let items: Vec<Item<'_>> = plan.linears.iter().map(|linear| item(recipe, linear, false)).collect();
        allocate::allocate(recipe.ranks, &items, &rules(recipe, &items, recipe.budget))
    })
}

/// The largest rank that each linear may get; 0 for those that are known to stay dense.
pub(super) fn max_ranks(recipe: &Recipe, plan: &Plan) -> Vec<usize> {
    match known_choices(recipe, plan) {
        Some(choices) => choices.iter().map(|choice| choice.rank().unwrap_or(0)).collect(),
        None => plan.linears.iter().map(|linear| recipe.layout.largest_saving_rank(linear.shape())).collect(),
    }
}

fn item(recipe: &Recipe, linear: &LinearInfo, in_bytes: bool) -> Item<'static> {
    let shape = linear.shape();
    let price = if in_bytes {
        // The order of the rows is 4 bytes each.
        let order = if recipe.layout == Layout::Pivot { 4 * shape.0 as u64 } else { 0 };
        Price { parameter: linear.dtype.bitsize() as u64 / 8, dense: 0, low_rank: order }
    } else {
        Price::PARAMETERS
    };
    Item { shape, layout: recipe.layout, curve: None, sensitivity: 1.0, price }
}

fn rules(recipe: &Recipe, items: &[Item<'_>], budget: Budget) -> Rules {
    let rules = match budget {
        Budget::Keep(keep) => Rules::of_keep(items, keep),
        Budget::None => Rules { budget: u64::MAX, ..Rules::of_keep(items, 1.0) },
        Budget::Bytes(bytes) => {
            let dense = allocate::cost(items, &vec![Choice::Dense; items.len()]);
            Rules { budget: bytes, fill: true, ..Rules::of_keep(items, bytes as f64 / dense as f64) }
        }
    };
    Rules { floor: recipe.rank_floor, multiple: recipe.rank_multiple, ..rules }
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
    progress: &dyn Progress,
) -> Result<(Statistics, calibrate::Seconds)> {
    let decoder = Decoder::open(checkpoint)?;
    let observation = Observation { needs: recipe.method.needs(), clip_gradients: recipe.clip_gradients };
    let header = Header::new(Fingerprint::new(), observation, vec![windows.part.clone()]);
    let mut statistics = Statistics::new(header, limits.activation_bytes, &limits.work_folder);
    let seconds = calibrate::observe(&decoder, &windows.windows, observation, limits, progress, &mut |block, sums| {
        statistics.keep(block, sums)
    })?;
    Ok((statistics, seconds))
}
