//! The one number of channels and the one number of groups, of all that fit the budget, whose errors sum to the least.

use anyhow::Result;

use super::super::budget::{forms_by_shape, known_choices};
use super::super::limit::unreachable_budget;
use super::super::plan::Plan;
use super::super::recipe::{Budget, Limit, Recipe};
use super::context::{Context, Width};
use super::curves::Curve;
use super::shown;
use crate::formats::Source;
use crate::model::inventory::LinearInfo;
use crate::model::narrow::UnitKind;

/// The widths under the budget of the recipe.
///
/// # Errors
/// It cannot be met.
pub(super) fn uniform(context: &Context<'_>, plan: &Plan, recipe: &Recipe, curves: &[Curve]) -> Result<Width> {
    let limit = context.approach.limit.limit();
    let size = |width: Width| match limit {
        Limit::Bytes(_) => file_bytes(context, width),
        Limit::Keep(_) | Limit::Bits(_) => Ok(parameters(context, plan, width)),
    };
    let n_weights: u64 = plan.linears.iter().map(LinearInfo::n_parameters).sum();
    let most = match limit {
        Limit::Bytes(bytes) => bytes,
        Limit::Keep(keep) => (keep * n_weights as f64 + 1e-6) as u64,
        Limit::Bits(_) => unreachable!("invariant: bits are no budget of narrower modules"),
    };
    let channels = options(context, UnitKind::Channels, context.approach.multiple.get());
    let groups = options(context, UnitKind::Groups, 1);
    let mut best: Option<(f64, Width)> = None;
    for &groups in &groups {
        let width = |at: usize| Width { channels: channels[at], groups };
        let Some(at) = last_that_fits(channels.len(), |at| Ok(size(width(at))? <= most))? else { continue };
        let error = error(context, curves, width(at));
        if best.is_none_or(|(least, _)| error < least) {
            best = Some((error, width(at)));
        }
    }
    if let Some((_, width)) = best {
        return Ok(width);
    }
    let least = size(Width { channels: channels[0], groups: groups[0] })?;
    Err(match limit {
        Limit::Keep(keep) => unreachable_budget(recipe, Budget::Keep(keep), least as f64 / n_weights as f64),
        _ => unreachable_budget(recipe, Budget::Bytes(most), least as f64),
    })
}

/// The widths that a kind of unit may have, ascending; only `None` if there is no such unit.
fn options(context: &Context<'_>, kind: UnitKind, multiple: usize) -> Vec<Option<usize>> {
    let Some(unit) = context.units.iter().find(|unit| unit.kind == kind) else { return vec![None] };
    let whole = unit.width();
    let smaller = (1..).map(|i| i * multiple).take_while(|&width| width < whole);
    smaller.chain([whole]).map(Some).collect()
}

/// The last of `n` places that fit, which is followed by none that do.
fn last_that_fits(n: usize, fits: impl Fn(usize) -> Result<bool>) -> Result<Option<usize>> {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = (low + high) / 2;
        if fits(middle)? { low = middle + 1 } else { high = middle }
    }
    Ok(low.checked_sub(1))
}

/// Sum of the errors of all units.
fn error(context: &Context<'_>, curves: &[Curve], width: Width) -> f64 {
    context.units.iter().zip(curves).map(|(unit, curve)| curve.narrowing.errors[width.of(unit)]).sum()
}

/// Parameters of the targeted linears.
fn parameters(context: &Context<'_>, plan: &Plan, width: Width) -> u64 {
    let n_weights: u64 = plan.linears.iter().map(LinearInfo::n_parameters).sum();
    let dropped = context.units.iter().map(|unit| (unit.width() - width.of(unit)) as u64 * unit.parameters_each());
    n_weights - dropped.sum::<u64>()
}

/// Bytes of the weight files, from shapes alone.
fn file_bytes(context: &Context<'_>, width: Width) -> Result<u64> {
    let kept: Vec<Vec<usize>> = context.units.iter().map(|unit| (0..width.of(unit)).collect()).collect();
    let narrower = shown::selected(context, width, &kept)?;
    let then = context.then;
    let plan = Plan::of_shapes(&narrower, then)?;
    let source = Source::new(&narrower);
    let choices = known_choices(then, &plan).expect("invariant: what follows has no budget of its own");
    let forms: Vec<_> =
        plan.linears.iter().zip(choices).map(|(linear, choice)| forms_by_shape(then, linear, choice)).collect();
    Ok(plan.files(&source, then, &forms).file_bytes())
}
