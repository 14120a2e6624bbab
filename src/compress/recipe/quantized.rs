//! Quantized bases, with or without factors, from options.

use anyhow::Result;

use super::bases::{BaseSensitivity, Bases, Compensator, Factors, Quantizers};
use super::basics::{Basics, usage};
use super::low_rank::expect_bits;
use crate::compress::allocate::Ranks;
use crate::compress::compensate::CompensateRank;
use crate::compress::options::RecipeOptions;
use crate::compress::scale::{DepthWeight, Sensitivity};

/// The approach with `--quant`.
pub(super) fn quantized(options: &RecipeOptions, basics: &Basics, menu: Quantizers) -> Result<Bases> {
    check_low_rank_flags(options, basics)?;
    let method = options.compensate.and_then(Compensator::new);
    if method.is_some() && basics.anchor.is_some() {
        return Err(usage(
            "`--sequential` cannot be combined with `--compensate`: only codes alone are rounded block by block",
            "remove one of the two",
        ));
    }
    if method.is_none() && (options.compensate_rank.is_some() || options.quant_factors.is_some()) {
        let flag = if options.compensate_rank.is_some() { "--compensate-rank" } else { "--quant-factors" };
        return Err(usage(
            format!("`{flag}` has no effect without `--compensate`"),
            "did you mean `--compensate eora`?",
        ));
    }
    let bits = options.quant_factors;
    let rank = options.compensate_rank.unwrap_or(CompensateRank::Auto);
    let bases = match (basics.limit, menu.quants(), rank) {
        (Some(limit), _, _) => {
            let factors = method.map(|method| Factors { method, rank, bits });
            let (sensitivity, gamma) = weights(basics);
            Bases::Chosen { menu, factors, limit, sensitivity, gamma }
        }
        (None, &[quant], CompensateRank::Fixed(rank)) => {
            Bases::Fixed { quant, factors: method.map(|method| Factors { method, rank, bits }) }
        }
        (None, &[quant], CompensateRank::Auto) if method.is_none() => Bases::Fixed { quant, factors: None },
        (None, [_], _) if options.compensate_rank.is_some() => {
            return Err(usage(
                "`--compensate-rank auto` needs a budget from which ranks are chosen",
                "add `--bits 3.5`, or give a rank such as `--compensate-rank 16`",
            ));
        }
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
    expect_bits(bits, !basics.format.stores_all_structures())?;
    let weight = [("--sensitivity", options.sensitivity.is_some()), ("--depth-weight", options.depth_weight.is_some())];
    match weight.iter().find(|(_, is_given)| *is_given && matches!(bases, Bases::Fixed { .. })) {
        Some((flag, _)) => Err(usage(
            format!("`{flag}` has no effect on one quantizer for every linear"),
            "it weighs linears against each other: add a budget, or remove it",
        )),
        None => Ok(bases),
    }
}

/// How errors of different linears compare, and γ of the depth weight.
fn weights(basics: &Basics) -> (BaseSensitivity, f64) {
    let DepthWeight::Fixed(gamma) = basics.depth_weight else {
        unreachable!("invariant: `--depth-weight auto` was refused")
    };
    let sensitivity = match basics.sensitivity {
        Some(Sensitivity::SecondOrder) => BaseSensitivity::SecondOrder,
        Some(Sensitivity::Measured) => unreachable!("invariant: `--sensitivity measured` was refused"),
        Some(Sensitivity::Energy) | None => BaseSensitivity::Energy,
    };
    (sensitivity, gamma)
}

/// Refuses flags that only apply to low rank without a base.
fn check_low_rank_flags(options: &RecipeOptions, basics: &Basics) -> Result<()> {
    let layout = options.layout.filter(|layout| !layout.structure().takes_base());
    let given = [
        ("--ranks", basics.ranks != Ranks::Knapsack),
        ("--rank-floor", basics.steps.floor > 0.0),
        ("--rank-multiple", basics.steps.multiple.get() > 1),
        (&format!("--layout {}", layout.unwrap_or_default().name()), layout.is_some()),
        ("--elastic", options.elastic == Some(true)),
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
