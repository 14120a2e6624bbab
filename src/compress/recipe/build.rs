//! Builds a recipe from options: every contradiction is an error here, before a model is opened.

use anyhow::Result;

use super::{
    Allocation, Approach, Bases, DEFAULT_SAMPLES, DEFAULT_SHARD_BYTES, FactorStorage, Factors, Fused, Limit,
    LowRankApproach, Patterns, QuantizedApproach, Recipe, RecipeOptions, Rule, Sharing,
};
use crate::calibrate::{Needs, WindowSettings};
use crate::compress::allocate::Ranks;
use crate::compress::compensate::{Compensate, CompensateRank};
use crate::compress::presets::{Method, MetricForm};
use crate::compress::scale::{DepthWeight, Sensitivity};
use crate::error::Failure;
use crate::formats::Format;
use crate::quantize::Quant;
use crate::text::DEFAULT_FIELD;

const BUDGET_HINT: &str = "`--keep 0.8` keeps 80 % of the parameters of the targeted linears; `--target-size 350MiB` sets the size \
                           of the weight files; `--bits 4` sets the mean bits per weight";
const FIXED_RANKS_HINT: &str = "fixed ranks already determine the size; remove one of the two";
/// Below this share the sequential mode is the default: on SmolLM2-135M it wins at 0.6, and loses at 0.8 and 0.9
/// (docs/results.md, section 23).
const SEQUENTIAL_BELOW: f64 = 0.7;
const REMOVE_ONE: &str = "remove one of the two";
const ADD_KNAPSACK: &str = "add `--ranks knapsack`, or remove the option";

fn usage(message: impl Into<String>, hint: &str) -> anyhow::Error {
    Failure::usage(message).hint(hint).into()
}

/// `value`, checked to lie in [0, 1].
fn share(flag: &str, value: Option<f64>, default: f64) -> Result<f64> {
    match value {
        Some(value) if !(0.0..=1.0).contains(&value) => {
            Err(usage(format!("`{flag} {value}` is outside [0, 1]"), "give a fraction, for example 0.1"))
        }
        value => Ok(value.unwrap_or(default)),
    }
}

/// The settings on which others depend, with their defaults.
struct Basics {
    method: Method,
    ranks: Ranks,
    limit: Option<Limit>,
    /// Only for the knapsack.
    sensitivity: Option<Sensitivity>,
    depth_weight: DepthWeight,
    rank_floor: f64,
    rank_multiple: usize,
    anchor: Option<f64>,
    format: Format,
}

impl Basics {
    fn of(options: &RecipeOptions) -> Result<Self> {
        let is_quantized = !options.quant.is_empty();
        let has_limit = options.keep.is_some() || options.target_size.is_some() || options.bits.is_some();
        let has_data = options.calibration.is_some() || options.statistics.is_some();
        let method = options.method.unwrap_or(match has_data {
            // Without an allocation, the loss metric would only change the unit of the reported errors.
            true if is_quantized && !has_limit => Method::SvdLlm,
            true => Method::Kfac,
            false => Method::Svd,
        });
        let by_knapsack = method == Method::Kfac || is_quantized;
        let ranks = options.ranks.unwrap_or(if by_knapsack { Ranks::Knapsack } else { Ranks::Welore });
        // Excluded for fixed ranks, which may be full and leave no error to correct.
        let is_possible =
            method == Method::Kfac && options.calibration.is_some() && ranks.takes_budget() && !is_quantized;
        let pays = options.anchor.is_some() || options.keep.is_some_and(|keep| keep < SEQUENTIAL_BELOW);
        let is_sequential = options.sequential.unwrap_or(is_possible && pays && options.share != Some(true));
        if options.anchor.is_some() && !is_sequential {
            return Err(usage(
                "`--anchor` has no effect without `--sequential`",
                "add `--sequential`, or remove `--anchor`",
            ));
        }
        check_damping(options, method)?;
        let limit = limit(options, ranks)?;
        Ok(Self {
            method,
            ranks,
            limit,
            sensitivity: sensitivity(options, ranks, method)?,
            depth_weight: options.depth_weight.unwrap_or(DepthWeight::Fixed(0.0)),
            rank_floor: share("--rank-floor", options.rank_floor, 0.0)?,
            rank_multiple: options.rank_multiple.unwrap_or(1),
            anchor: is_sequential.then(|| share("--anchor", options.anchor, 0.5)).transpose()?,
            format: options.format.unwrap_or_default(),
        })
    }
}

impl Recipe {
    /// Checks the options against each other and fills in the defaults.
    ///
    /// # Errors
    /// A value is out of range, or two options contradict each other.
    pub fn new(options: &RecipeOptions) -> Result<Self> {
        let basics = Basics::of(options)?;
        let preset = basics.method.preset();
        let recipe = Self {
            method: basics.method,
            damping_input: share("--damping-input", options.damping_input, preset.damping)?,
            damping_output: share("--damping-output", options.damping_output, preset.damping)?,
            clip_gradients: options.clip_gradients.unwrap_or(false),
            fused: options.fused.unwrap_or_default(),
            targets: Patterns::new("`--targets`", &options.targets)?,
            exclude: Patterns::new("`--exclude`", &options.exclude)?,
            format: basics.format,
            calibration: window_settings(options)?,
            statistics: options.statistics.clone(),
            max_shard_bytes: match options.max_shard_size {
                Some(size) if size.as_u64() == 0 => return Err(Failure::usage("`--max-shard-size` is 0").into()),
                size => size.map_or(DEFAULT_SHARD_BYTES, |s| s.as_u64()),
            },
            approach: match options.quant.as_slice() {
                [] => Approach::LowRank(low_rank(options, &basics)?),
                menu => Approach::Quantized(quantized(options, &basics, menu)?),
            },
        };
        recipe.check_format(basics.limit)?;
        recipe.check_data()?;
        Ok(recipe)
    }

    /// Checks the format against the other settings.
    fn check_format(&self, limit: Option<Limit>) -> Result<()> {
        let format = self.format.name();
        if matches!(limit, Some(Limit::Bytes(_))) && matches!(self.format, Format::Dense | Format::Peft) {
            return Err(usage(
                format!("`--target-size` cannot be combined with `--format {format}`, which stores full-size weights"),
                "choose a format that stores the compressed weights, such as `--format factored`",
            ));
        }
        if self.fused == Fused::Split && self.format != Format::Factored {
            let message = format!("`--fused split` cannot be combined with `--format {format}`");
            return Err(usage(message, "only `--format factored` stores the parts of a fused matrix separately"));
        }
        if self.fused == Fused::Split && self.statistics.is_some() {
            return Err(usage(
                "`--statistics` cannot be combined with `--fused split`: the file covers whole matrices",
                "measure the parts in this run, with `--calibration`",
            ));
        }
        Ok(())
    }

    /// Checks that the recipe uses all its data, and has all the data that it uses.
    fn check_data(&self) -> Result<()> {
        if self.statistics.is_some() && self.needs() == Needs::default() {
            return Err(usage(
                "`--statistics` has no effect in this recipe: nothing in it uses activations or gradients",
                "did you mean `--method kfac`?",
            ));
        }
        if self.clip_gradients && !(self.measures_statistics() && self.needs().output_gram) {
            return Err(usage(
                "`--clip-gradients` has no effect: this recipe measures no Gram of gradients",
                "`--method kfac` with `--calibration` measures one",
            ));
        }
        match (&self.calibration, self.uses_text()) {
            (None, true) if self.measures_statistics() => Err(usage(
                "this recipe needs `--calibration FILE`",
                "it uses activations or gradients; `--method svd`, with `rtn` or `nf4` and `lorc` or `loftq`, needs no text",
            )),
            (None, true) => Err(usage(
                "`--sensitivity measured`, `--depth-weight auto` and `--sequential` need `--calibration FILE`",
                "they run a text through the model, which `--statistics` cannot replace",
            )),
            (Some(_), false) => Err(usage(
                "`--calibration` has no effect in this recipe",
                "did you mean `--method kfac`? With `--statistics` the text is no longer needed",
            )),
            _ => Ok(()),
        }
    }
}

fn check_damping(options: &RecipeOptions, method: Method) -> Result<()> {
    let preset = method.preset();
    for (flag, value, form, gram) in [
        ("--damping-input", options.damping_input, preset.input, "Gram of inputs"),
        ("--damping-output", options.damping_output, preset.output, "Gram of output gradients"),
    ] {
        if value.is_some() && form != MetricForm::Gram {
            let message = format!("`{flag}` has no effect with `--method {}`: its metric has no {gram}", method.name());
            return Err(usage(message, "svd-llm has a Gram of inputs, kfac Grams of both sides"));
        }
    }
    Ok(())
}

/// The approach without `--quant`.
fn low_rank(options: &RecipeOptions, basics: &Basics) -> Result<LowRankApproach> {
    let rule = rule(basics)?;
    if options.compensate.is_some() || options.compensate_rank.is_some() {
        let flag = if options.compensate.is_some() { "--compensate" } else { "--compensate-rank" };
        return Err(usage(
            format!("`{flag}` has no effect without `--quant`"),
            "it compensates the error of a quantized base; for low rank alone give `--keep` or `--ranks`",
        ));
    }
    if !basics.format.stores_low_rank() {
        let message =
            format!("`--format {}` cannot store low-rank factors without a quantized base", basics.format.name());
        return Err(usage(message, "add `--quant`, or choose `--format factored` or `--format dense`"));
    }
    check_rank_multiple(basics)?;
    if basics.depth_weight != DepthWeight::Fixed(0.0) && basics.ranks != Ranks::Knapsack {
        return Err(usage("`--depth-weight` has no effect without `--ranks knapsack`", ADD_KNAPSACK));
    }
    let allocation = match (rule, basics.ranks) {
        (Some(rule), _) => Allocation::PerLinear { rule, floor: basics.rank_floor, multiple: basics.rank_multiple },
        (None, _) if basics.rank_floor > 0.0 || basics.rank_multiple > 1 => {
            let message =
                format!("`--rank-floor` and `--rank-multiple` have no effect with `--ranks {}`", basics.ranks);
            return Err(usage(message, REMOVE_ONE));
        }
        (None, Ranks::Fixed(rank)) => Allocation::Fixed(rank),
        (None, _) => unreachable!("invariant: only fixed ranks have no rule"),
    };
    let storage = storage(options, basics.format)?;
    Ok(LowRankApproach { allocation, storage, anchor: basics.anchor, sharing: sharing(options, basics, storage)? })
}

/// The allocator with its limit; `None` for fixed ranks.
fn rule(basics: &Basics) -> Result<Option<Rule>> {
    let limit = || basics.limit.ok_or_else(|| usage("`--keep`, `--target-size` or `--bits` is missing", BUDGET_HINT));
    Ok(Some(match basics.ranks {
        Ranks::Fixed(_) => return Ok(None),
        Ranks::Energy(Some(share)) => Rule::EnergyShare(share, basics.limit),
        Ranks::Uniform => Rule::Uniform(limit()?),
        Ranks::Welore => Rule::Welore(limit()?),
        Ranks::Energy(None) => Rule::Energy(limit()?),
        Ranks::EffectiveRank => Rule::EffectiveRank(limit()?),
        Ranks::Knapsack => Rule::Knapsack {
            limit: limit()?,
            sensitivity: basics.sensitivity.unwrap_or(Sensitivity::SecondOrder),
            depth_weight: basics.depth_weight,
        },
    }))
}

fn sharing(options: &RecipeOptions, basics: &Basics, storage: FactorStorage) -> Result<Sharing> {
    if !options.share.unwrap_or(false) {
        return Ok(Sharing::None);
    }
    if basics.ranks != Ranks::Knapsack {
        return Err(usage("`--share` has no effect without `--ranks knapsack`", ADD_KNAPSACK));
    }
    let refused = [
        (basics.anchor.is_some(), "cannot be combined with `--sequential`, which fits every linear by itself"),
        (matches!(storage, FactorStorage::Quantized(..)), "cannot be combined with `--quant-factors`"),
    ];
    match refused.iter().find(|(is_refused, _)| *is_refused) {
        Some((_, reason)) => Err(usage(format!("`--share` {reason}"), REMOVE_ONE)),
        None => Ok(Sharing::Allowed),
    }
}

fn storage(options: &RecipeOptions, format: Format) -> Result<FactorStorage> {
    let layout = options.layout.unwrap_or_default();
    match (options.elastic.unwrap_or(false), options.quant_factors) {
        (true, Some(_)) => Err(usage(
            "`--elastic` cannot be combined with `--quant-factors`: quantized factors cannot be truncated by rank",
            REMOVE_ONE,
        )),
        (true, None) if layout.fitting().is_nested() => {
            let message = format!("`--elastic` has no effect with `--layout {}`", layout.name());
            Err(usage(message, "this layout can be truncated as it is"))
        }
        (true, None) if format != Format::Factored => {
            let message = format!("`--elastic` has no effect with `--format {}`", format.name());
            Err(usage(message, "only `--format factored` stores ranks that can be truncated"))
        }
        (true, None) => Ok(FactorStorage::Elastic(layout)),
        (false, Some(bits)) => Ok(FactorStorage::Quantized(layout, bits)),
        (false, None) => Ok(FactorStorage::Plain(layout)),
    }
}

fn check_rank_multiple(basics: &Basics) -> Result<()> {
    if basics.rank_multiple > 0 {
        return Ok(());
    }
    Err(Failure::usage("`--rank-multiple` must be at least 1").into())
}

/// The approach with `--quant`.
fn quantized(options: &RecipeOptions, basics: &Basics, menu: &[Quant]) -> Result<QuantizedApproach> {
    check_low_rank_flags(options, basics)?;
    check_rank_multiple(basics)?;
    let method = options.compensate.unwrap_or_default();
    if method == Compensate::None && (options.compensate_rank.is_some() || options.quant_factors.is_some()) {
        let flag = if options.compensate_rank.is_some() { "--compensate-rank" } else { "--quant-factors" };
        return Err(usage(
            format!("`{flag}` has no effect without `--compensate`"),
            "did you mean `--compensate eora`?",
        ));
    }
    let bits = options.quant_factors;
    let rank = options.compensate_rank.unwrap_or(CompensateRank::Auto);
    let has_factors = method != Compensate::None;
    let bases = match (basics.limit, menu, rank) {
        (Some(limit), _, _) => {
            Bases::Chosen { menu: menu.to_vec(), factors: has_factors.then_some(Factors { method, rank, bits }), limit }
        }
        (None, &[quant], CompensateRank::Fixed(rank)) if has_factors => {
            Bases::Fixed { quant, factors: Some(Factors { method, rank, bits }) }
        }
        (None, &[quant], _) if !has_factors => Bases::Fixed { quant, factors: None },
        (None, [_], _) => {
            return Err(usage(
                "`--compensate` needs `--compensate-rank`, or a budget from which ranks are chosen",
                "add `--compensate-rank 16` or `--bits 3.5`",
            ));
        }
        (None, ..) => {
            return Err(usage(
                "choosing among several quantizers needs a budget",
                "add `--bits`, `--target-size` or `--keep`",
            ));
        }
    };
    if bits.is_some() && !basics.format.stores_low_rank() {
        return Err(usage(
            format!("`--quant-factors` cannot be combined with `--format {}`", basics.format.name()),
            "adapters hold unquantized factors: remove `--quant-factors`, or choose `--format factored`",
        ));
    }
    let DepthWeight::Fixed(gamma) = basics.depth_weight else {
        unreachable!("invariant: `--depth-weight auto` was refused")
    };
    Ok(QuantizedApproach { bases, sensitivity: basics.sensitivity.unwrap_or(Sensitivity::Energy), gamma })
}

/// Refuses flags that only apply to low rank without a base.
fn check_low_rank_flags(options: &RecipeOptions, basics: &Basics) -> Result<()> {
    let layout = options.layout.filter(|layout| !layout.structure().takes_base());
    let given = [
        ("--ranks", basics.ranks != Ranks::Knapsack),
        ("--rank-floor", basics.rank_floor > 0.0),
        ("--rank-multiple", basics.rank_multiple > 1),
        (&format!("--layout {}", layout.unwrap_or_default().name()), layout.is_some()),
        ("--elastic", options.elastic == Some(true)),
        ("--sequential", basics.anchor.is_some()),
        ("--share", options.share == Some(true)),
        ("--sensitivity measured", basics.sensitivity == Some(Sensitivity::Measured)),
        ("--depth-weight auto", basics.depth_weight == DepthWeight::Auto),
    ];
    match given.iter().find(|(_, is_given)| *is_given) {
        Some((flag, _)) => Err(usage(
            format!("`{flag}` cannot be combined with `--quant`"),
            "it applies to low rank without a quantized base",
        )),
        None => Ok(()),
    }
}

fn limit(options: &RecipeOptions, ranks: Ranks) -> Result<Option<Limit>> {
    if let Some(bits) = options.bits {
        return match options.keep.is_some() || options.target_size.is_some() {
            true => Err(usage("`--bits` cannot be combined with another budget", REMOVE_ONE)),
            false if !ranks.takes_budget() => {
                Err(usage(format!("`--bits` cannot be combined with `--ranks {ranks}`"), FIXED_RANKS_HINT))
            }
            false if bits > 0.0 && bits <= 32.0 => Ok(Some(Limit::Bits(bits))),
            false => {
                Err(usage(format!("`--bits {bits}` is outside (0, 32]"), "give the mean bits per weight, such as 3.5"))
            }
        };
    }
    match (options.keep, options.target_size) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(usage("`--keep` cannot be combined with `--target-size`", REMOVE_ONE)),
        (Some(_), _) | (_, Some(_)) if !ranks.takes_budget() => {
            let flag = if options.keep.is_some() { "--keep" } else { "--target-size" };
            Err(usage(format!("`{flag}` cannot be combined with `--ranks {ranks}`"), FIXED_RANKS_HINT))
        }
        (Some(keep), None) if !(keep > 0.0 && keep <= 1.0) => {
            Err(usage(format!("`--keep {keep}` is outside (0, 1]"), BUDGET_HINT))
        }
        (Some(keep), None) => Ok(Some(Limit::Keep(keep))),
        (None, Some(size)) if size.as_u64() == 0 => Err(usage("`--target-size` is 0", BUDGET_HINT)),
        (None, Some(size)) => Ok(Some(Limit::Bytes(size.as_u64()))),
    }
}

fn sensitivity(options: &RecipeOptions, ranks: Ranks, method: Method) -> Result<Option<Sensitivity>> {
    if ranks == Ranks::Knapsack {
        let default = match method {
            Method::Kfac => Sensitivity::SecondOrder,
            _ if options.calibration.is_some() && options.quant.is_empty() => Sensitivity::Measured,
            _ => Sensitivity::Energy,
        };
        return Ok(Some(options.sensitivity.unwrap_or(default)));
    }
    match options.sensitivity {
        Some(_) => Err(usage("`--sensitivity` has no effect without `--ranks knapsack`", ADD_KNAPSACK)),
        None => Ok(None),
    }
}

fn window_settings(options: &RecipeOptions) -> Result<Option<WindowSettings>> {
    let Some(text) = options.calibration.clone() else {
        let counts = [options.samples, options.gradient_samples, options.seq_len];
        if counts.iter().any(Option::is_some) || options.seed.is_some() {
            return Err(Failure::usage(
                "`--samples`, `--gradient-samples`, `--seq-len` and `--seed` have no effect without `--calibration FILE`",
            )
            .into());
        }
        return Ok(None);
    };
    let settings = WindowSettings {
        text,
        field: options.field.clone().unwrap_or_else(|| DEFAULT_FIELD.into()),
        samples: options.samples.unwrap_or(DEFAULT_SAMPLES),
        gradient_samples: options.gradient_samples,
        seq_len: options.seq_len,
        seed: options.seed.unwrap_or(0),
    };
    if settings.samples == 0 {
        return Err(Failure::usage("`--samples` must be at least 1").into());
    }
    if settings.gradient_samples == Some(0) {
        return Err(Failure::usage("`--gradient-samples` must be at least 1").into());
    }
    if let Some(seq_len) = settings.seq_len.filter(|&n| n < 2) {
        let message = format!("`--seq-len {seq_len}` is too short: a window needs 2 tokens to predict one");
        return Err(Failure::usage(message)
            .hint("remove it for windows of 512 tokens, or of the model's context if that is shorter")
            .into());
    }
    Ok(Some(settings))
}
