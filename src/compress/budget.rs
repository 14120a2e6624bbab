//! Decisions that follow from shapes alone under a budget: choices without a fit, and the largest possible ranks.

use super::allocate::{self, Candidate, Candidates, Ends, Item, Ladder, Pick, Ranks, Rules, Spectra};
use super::compensate::{Compensate, CompensateRank};
use super::plan::{Choice, FitKind, Plan, largest_compensation, layout, menu};
use super::recipe::{Budget, Recipe};
use crate::model::inventory::LinearInfo;
use crate::operator::{Forms, Shape};
use crate::quantize::Quant;

/// The choices, if they can be made without a spectrum.
pub(super) fn known_choices(recipe: &Recipe, plan: &Plan) -> Option<Vec<Choice>> {
    if let (&[quant], Budget::None) = (recipe.quant(), recipe.budget()) {
        return Some(plan.linears.iter().map(|linear| quantized_choice(recipe, linear, quant)).collect());
    }
    let is_known = recipe.quant().is_empty()
        && recipe.ranks().allocator().spectra() == Spectra::None
        && !matches!(recipe.budget(), Budget::Bytes(_) | Budget::Bits(_));
    is_known.then(|| choices_by_shape(recipe, plan, recipe.ranks(), recipe.budget()))
}

/// A linear in a quantizer, if its blocks or the blocks of its fallback fit; ranks that measurements decide are 0.
fn quantized_choice(recipe: &Recipe, linear: &LinearInfo, quant: Quant) -> Choice {
    let rank = match (recipe.compensate(), recipe.compensate_rank()) {
        _ if linear.vocabulary.is_some() => 0,
        (Compensate::None, _) | (_, CompensateRank::Auto) => 0,
        (_, CompensateRank::Fixed(rank)) => rank.get().min(linear.out_features).min(linear.in_features),
    };
    match recipe.quant_for(quant, linear.in_features) {
        Some(_) => Choice::Fitted { fit: 0, rank },
        None => Choice::Dense,
    }
}

/// The choices of a linear that a budget has with quantized bases: each quantizer of its menu
/// with each rank of factors.
pub(super) fn choices_of_bases(recipe: &Recipe, linear: &LinearInfo) -> Vec<Choice> {
    let ranks = match linear.vocabulary {
        Some(_) => vec![0],
        None => compensation_ranks(recipe.compensate(), recipe.compensate_rank(), linear.shape()),
    };
    let fits = 0..menu(recipe, linear).len();
    fits.flat_map(|fit| ranks.iter().map(move |&rank| Choice::Fitted { fit, rank })).collect()
}

/// The ranks of factors over a base that are tried, ascending; rank 0 is the base alone.
pub(super) fn compensation_ranks(method: Compensate, rank: CompensateRank, shape: Shape) -> Vec<usize> {
    let most = shape.0.min(shape.1);
    let largest = largest_compensation(shape).min(most);
    match (method, rank) {
        (Compensate::None, _) => vec![0],
        (_, CompensateRank::Fixed(rank)) => vec![rank.get().min(most)],
        (method, CompensateRank::Auto) if method.turns() == 1 => (0..=largest).collect(),
        // Each rank has a base of its own.
        (_, CompensateRank::Auto) => {
            let mut ranks = vec![0, largest / 4, largest / 2, largest];
            ranks.dedup();
            ranks
        }
    }
}

/// The forms of a linear under a choice that was made by shape: fits are the quantizers of its
/// menu, or its only layout.
pub(super) fn forms_by_shape(recipe: &Recipe, linear: &LinearInfo, choice: Choice) -> Option<Forms> {
    let quant = match choice {
        Choice::Fitted { fit, .. } if !recipe.quant().is_empty() => menu(recipe, linear).get(fit).copied(),
        _ => None,
    };
    Plan::forms(recipe, linear, choice, quant.map_or(FitKind::Layout, FitKind::Base))
}

/// The choices of an allocator that needs no spectra.
fn choices_by_shape(recipe: &Recipe, plan: &Plan, ranks: Ranks, budget: Budget) -> Vec<Choice> {
    let parameters: Vec<Vec<u64>> = plan.linears.iter().map(|linear| parameters(recipe, linear)).collect();
    let candidates: Vec<Vec<Candidate>> =
        parameters.iter().map(|costs| allocate::candidates_by_rank(costs, None, 1.0)).collect();
    let item = |i: usize| {
        let n_weights = plan.linears[i].n_parameters();
        let ladder = Ladder { candidates: &candidates[i], parameters: &parameters[i], n_weights, scores: &[] };
        let candidates = if plan.are_zero[i] { Candidates::Free(candidates[i][0]) } else { Candidates::Ranks(ladder) };
        Item { dense_cost: n_weights, candidates }
    };
    let items: Vec<Item<'_>> = (0..plan.linears.len()).map(item).collect();
    let picks = allocate::allocate(ranks, &items, &rules(recipe, &items, budget));
    let choice = |(i, pick): (usize, Pick)| match pick {
        Pick::Candidate(rank) if !plan.are_zero[i] => Choice::Fitted { fit: 0, rank },
        pick => choice(pick),
    };
    picks.into_iter().enumerate().map(choice).collect()
}

/// A pick among ranks as a choice of the first fit.
pub(super) fn choice(pick: Pick) -> Choice {
    match pick {
        Pick::Dense => Choice::Dense,
        Pick::Candidate(0) => Choice::Zeros,
        Pick::Candidate(rank) => Choice::Fitted { fit: 0, rank },
    }
}

/// The largest rank that each linear can get; 0 if it is known to stay dense or is all zeros.
pub(super) fn max_ranks(recipe: &Recipe, plan: &Plan) -> Vec<usize> {
    let is_factored = |linear: &LinearInfo| match linear.vocabulary {
        Some(_) => recipe.embeddings().factors() && recipe.format().stores_all_structures(),
        None => recipe.quant().is_empty() && recipe.narrow().is_none(),
    };
    let known = known_choices(recipe, plan);
    let largest = |i: usize| match &known {
        _ if !is_factored(&plan.linears[i]) => 0,
        Some(choices) => match choices[i] {
            Choice::Fitted { rank, .. } => rank,
            Choice::Dense | Choice::Zeros => 0,
        },
        None if plan.are_zero[i] => 0,
        None if recipe.is_residual() => affordable_rank(recipe, plan, i),
        // Allocators ask for the spectrum of a matrix that is too small to save anything, too.
        None => layout(recipe, &plan.linears[i]).fitting().largest_saving_rank(plan.linears[i].shape()).max(1),
    };
    (0..plan.linears.len()).map(largest).collect()
}

/// The largest rank of a residual that does not exceed the budget by itself, at least 1.
fn affordable_rank(recipe: &Recipe, plan: &Plan, i: usize) -> usize {
    let linear = &plan.linears[i];
    let (m, n) = linear.shape();
    let bits = recipe.quant_factors().map_or(linear.dtype.bitsize(), |bits| bits.scheme().levels.bits() as usize);
    let rank_bytes = (m + n) as f64 * bits as f64 / 8.0;
    let all = |of: fn(&LinearInfo) -> u64| plan.linears.iter().map(of).sum::<u64>() as f64;
    let bytes = match recipe.budget() {
        Budget::Bytes(bytes) => bytes as f64,
        Budget::Keep(keep) => keep * all(LinearInfo::n_parameters) * linear.dtype.bitsize() as f64 / 8.0,
        Budget::Bits(bits) => bits * all(LinearInfo::n_parameters) / 8.0,
        Budget::None => f64::INFINITY,
    };
    ((bytes / rank_bytes).min(m.min(n) as f64) as usize).max(1)
}

/// Whether the values of a linear's own fit are read. The sequential mode makes its own, except for experts
/// that see too few tokens.
pub(super) fn reads_fit(recipe: &Recipe, linear: &LinearInfo) -> bool {
    recipe.anchor().is_none() || recipe.runs_trials() || linear.id.is_some_and(|id| id.slot.expert.is_some())
}

/// Parameters of a linear at every rank from 0 to full rank.
pub(super) fn parameters(recipe: &Recipe, linear: &LinearInfo) -> Vec<u64> {
    let layout = layout(recipe, linear);
    let largest = layout.fitting().largest_rank(linear.shape());
    (0..=largest).map(|rank| layout.n_parameters(rank, linear.shape())).collect()
}

/// The rules of a budget, in the unit of the items' costs.
pub(super) fn rules(recipe: &Recipe, items: &[Item<'_>], budget: Budget) -> Rules {
    let rules = match budget {
        Budget::Keep(keep) => Rules::of_keep(items, keep),
        Budget::None => Rules { budget: u64::MAX, ..Rules::of_keep(items, 1.0) },
        Budget::Bits(_) => unreachable!("invariant: bits were converted to bytes"),
        Budget::Bytes(bytes) => {
            let dense: u64 = items.iter().map(|item| item.dense_cost).sum();
            Rules { budget: bytes, fill: true, ..Rules::of_keep(items, bytes as f64 / dense as f64) }
        }
    };
    let ends = if recipe.is_residual() { Ends::Residual } else { Ends::Weight };
    Rules { floor: recipe.rank_floor(), multiple: recipe.rank_multiple(), ends, ..rules }
}
