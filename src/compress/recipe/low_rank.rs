//! Low rank without a base, from options.

use anyhow::Result;

use super::allocation::{KnapsackSettings, RankAllocation, RankSteps, Rule};
use super::approach::LowRankApproach;
use super::basics::{ADD_KNAPSACK, BUDGET_HINT, Basics, REMOVE_ONE, RESIDUAL_HINT, usage};
use super::limit::Reduction;
use super::storage::{FactorStorage, FloatStorage, Unordered};
use crate::compress::allocate::Ranks;
use crate::compress::options::{FactorBits, RecipeOptions};
use crate::compress::scale::{DepthWeight, Sensitivity};
use crate::formats::Format;
use crate::operator::Kind;

/// The approach without `--quant`.
pub(super) fn low_rank(options: &RecipeOptions, basics: &Basics) -> Result<LowRankApproach> {
    let allocation = allocation(basics)?;
    if options.compensate.is_some() || options.compensate_rank.is_some() {
        let flag = if options.compensate.is_some() { "--compensate" } else { "--compensate-rank" };
        return Err(usage(
            format!("`{flag}` has no effect without `--quant`"),
            "it compensates the error of a quantized base; for low rank alone give `--keep` or `--ranks`",
        ));
    }
    if !basics.format.stores_all_structures() && !basics.format.stores_residuals() {
        let message =
            format!("`--format {}` cannot store low-rank factors without a quantized base", basics.format.name());
        return Err(usage(message, "add `--quant`, or choose `--format factored` or `--format dense`"));
    }
    if basics.depth_weight != DepthWeight::Fixed(0.0) && basics.ranks != Ranks::Knapsack {
        return Err(usage("`--depth-weight` has no effect without `--ranks knapsack`", ADD_KNAPSACK));
    }
    let storage = storage(options, basics.format)?;
    if basics.anchor.is_some()
        && let Some(layout) = options.layout.filter(|layout| layout.planned().is_some())
    {
        return Err(usage(format!("`--layout {layout}` cannot be combined with `--sequential`"), REMOVE_ONE));
    }
    if options.share.unwrap_or(false) {
        return shared(basics, allocation, storage);
    }
    Ok(LowRankApproach::Separate { allocation, storage, anchor: basics.anchor })
}

/// The approach with `--share`.
fn shared(basics: &Basics, allocation: RankAllocation, storage: FactorStorage) -> Result<LowRankApproach> {
    let refused = |reason: &str| Err(usage(format!("`--share` cannot be combined with {reason}"), REMOVE_ONE));
    if let Some(planned) = storage.layout().planned() {
        return refused(&format!("`--layout {}`: give `--layout {planned}`", storage.layout()));
    }
    let RankAllocation::PerLinear { rule: Rule::Knapsack(knapsack), steps } = allocation else {
        return Err(usage("`--share` has no effect without `--ranks knapsack`", ADD_KNAPSACK));
    };
    match (storage, basics.anchor) {
        (_, Some(_)) => refused("`--sequential`, which fits every linear by itself"),
        (FactorStorage::Quantized(..), None) => refused("`--quant-factors`"),
        (FactorStorage::Float(storage), None) => Ok(LowRankApproach::Shared { knapsack, steps, storage }),
    }
}

/// The allocator with its limit and the ranks that it may choose.
fn allocation(basics: &Basics) -> Result<RankAllocation> {
    let steps @ RankSteps { floor, multiple } = basics.steps;
    let limit = || {
        let limit = basics.limit.and_then(Reduction::new);
        limit.ok_or_else(|| match basics.format.stores_residuals() {
            true => usage("`--target-size`, `--keep` or `--ranks` is missing", RESIDUAL_HINT),
            false => usage("`--keep`, `--target-size` or `--bits` is missing", BUDGET_HINT),
        })
    };
    let rule = match basics.ranks {
        Ranks::Fixed(_) if floor > 0.0 || multiple.get() > 1 => {
            let flag = if floor > 0.0 { "--rank-floor" } else { "--rank-multiple" };
            let message = format!("`{flag}` has no effect with `--ranks {}`", basics.ranks);
            return Err(usage(message, "remove it: the rank is fixed"));
        }
        Ranks::Fixed(rank) => return Ok(RankAllocation::Fixed(rank)),
        Ranks::Uniform => return Ok(RankAllocation::Uniform { limit: limit()?, multiple }),
        Ranks::Energy(Some(share)) => Rule::EnergyShare(share, basics.limit),
        Ranks::Welore => Rule::Welore(limit()?),
        Ranks::Energy(None) => Rule::Energy(limit()?),
        Ranks::EffectiveRank => Rule::EffectiveRank(limit()?),
        Ranks::Knapsack => Rule::Knapsack(KnapsackSettings {
            limit: limit()?,
            sensitivity: basics.sensitivity.unwrap_or(Sensitivity::SecondOrder),
            depth_weight: basics.depth_weight,
        }),
    };
    Ok(RankAllocation::PerLinear { rule, steps })
}

/// Checks that factors can be quantized so, in an adapter or elsewhere.
///
/// # Errors
/// Adapters hold floats, and nothing else holds 8-bit floats.
pub(super) fn expect_bits(bits: Option<FactorBits>, is_adapter: bool) -> Result<()> {
    match bits {
        Some(FactorBits::Int8 | FactorBits::Int4) if is_adapter => Err(usage(
            "`--quant-factors` of an adapter is `float8`: no reader of adapters takes integers",
            "give `--quant-factors float8`, or remove it",
        )),
        Some(FactorBits::Float8) if !is_adapter => Err(usage(
            "`--quant-factors float8` is for adapters",
            "give `int8`, which is more accurate in as many bytes",
        )),
        _ => Ok(()),
    }
}

fn storage(options: &RecipeOptions, format: Format) -> Result<FactorStorage> {
    let layout = match options.layout {
        None if format.stores_residuals() => Kind::FACTORS,
        layout => layout.unwrap_or_default(),
    };
    if format.stores_residuals() && layout != Kind::FACTORS {
        return Err(usage("adapters store factors", "remove `--layout`"));
    }
    expect_bits(options.quant_factors, format.stores_residuals())?;
    let unordered = match Unordered::new(layout) {
        _ if options.elastic == Some(true) && layout.planned().is_some() => {
            return Err(usage(
                format!("`--elastic` cannot be combined with `--layout {layout}`: its ranks have no order"),
                REMOVE_ONE,
            ));
        }
        _ if !options.elastic.unwrap_or(false) => {
            return Ok(match options.quant_factors {
                Some(bits) => FactorStorage::Quantized(layout, bits, format),
                None => FactorStorage::Float(FloatStorage::Plain(layout, format)),
            });
        }
        _ if options.quant_factors.is_some() => {
            return Err(usage(
                "`--elastic` cannot be combined with `--quant-factors`: quantized factors cannot be truncated by rank",
                REMOVE_ONE,
            ));
        }
        None => {
            let message = format!("`--elastic` has no effect with `--layout {}`", layout.name());
            return Err(usage(message, "this layout can be truncated as it is"));
        }
        Some(unordered) => unordered,
    };
    if !format.is_truncatable() {
        let message = format!("`--elastic` has no effect with `--format {}`", format.name());
        return Err(usage(message, "only `--format factored` stores ranks that can be truncated"));
    }
    Ok(FactorStorage::Float(FloatStorage::Elastic(unordered)))
}
