//! The widths and the blocks under a budget whose errors sum to the least: one number of channels and one number of groups
//! for all blocks, or any numbers, with or without all blocks.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use anyhow::Result;

use super::super::allocate::{self, Candidate, Candidates, Item, Pick, Point, Ranks, Rules};
use super::super::budget::{forms_by_shape, known_choices};
use super::super::limit::unreachable_budget;
use super::super::plan::Plan;
use super::super::recipe::{Budget, Limit, Recipe, WidthRule};
use super::context::{Chosen, Context, Curve};
use super::ranks::RankCurves;
use super::shown;
use crate::approx::narrow::Narrowing;
use crate::formats::Source;
use crate::model::inventory::LinearInfo;
use crate::model::narrow::{NarrowUnit, UnitKind};

/// What the choice goes by.
pub(super) struct Found<'p> {
    pub curves: Vec<Curve>,
    /// The errors of leaving out blocks; empty if none may be.
    pub losses: Vec<f64>,
    /// Set if linears may become matrices of low rank too.
    pub ranks: Option<RankCurves<'p>>,
}

impl Found<'_> {
    /// Errors of which shapes alone are known: parts of the same size are of the same worth, and each that goes costs
    /// more than the one before it, so that a budget is spread evenly.
    pub fn even(context: &Context<'_>, plan: &Plan) -> Self {
        let curve = |unit: &NarrowUnit| {
            let (width, parameters) = (unit.width(), unit.parameters() as f64);
            let error = |kept: usize| parameters * (1.0 - kept as f64 / width as f64).powi(2);
            let narrowing = Narrowing { order: (0..width).collect(), errors: (0..=width).map(error).collect() };
            Curve { narrowing, seconds: 0.0 }
        };
        let losses = if context.approach.drops_blocks { parameters_of_blocks(context, plan) } else { Vec::new() };
        Self {
            curves: context.units.iter().map(curve).collect(),
            losses: losses.into_iter().map(|parameters| parameters as f64).collect(),
            ranks: None,
        }
    }
}

/// The choice under the budget of the recipe. With ranks it is of the widths and blocks alone, and what follows meets the
/// budget.
///
/// # Errors
/// The budget cannot be met.
pub(super) fn choose(context: &Context<'_>, plan: &Plan, recipe: &Recipe, found: &Found<'_>) -> Result<Chosen> {
    let n_weights = plan.linears.iter().map(LinearInfo::n_parameters).sum::<u64>();
    best(context, plan, recipe, found)?.map_err(|Least(least)| match recipe.budget() {
        Budget::Keep(keep) => unreachable_budget(recipe, Budget::Keep(keep), least as f64 / n_weights as f64),
        budget => unreachable_budget(recipe, budget, least as f64),
    })
}

/// The least size that can be reached, in the unit of the budget.
pub(super) struct Least(pub u64);

/// The same, or the least size if the budget is below it.
///
/// # Errors
/// The shapes of the model are invalid.
pub(super) fn best(
    context: &Context<'_>,
    plan: &Plan,
    recipe: &Recipe,
    found: &Found<'_>,
) -> Result<Result<Chosen, Least>> {
    let problem = Problem::new(context, plan, recipe, found);
    let losses = &found.losses;
    let found = match context.approach.widths {
        _ if found.ranks.is_some() => Some(problem.within(problem.parameters_in_budget())),
        WidthRule::Uniform | WidthRule::Whole => problem.uniform()?,
        WidthRule::ByBlock => problem.by_block()?,
    };
    if let Some(chosen) = found {
        return Ok(Ok(chosen));
    }
    let smallest = problem.smallest();
    Ok(Err(Least(problem.size(&problem.without(losses.len().saturating_sub(1), smallest))?)))
}

/// Parameters of the targeted linears of each block.
fn parameters_of_blocks(context: &Context<'_>, plan: &Plan) -> Vec<u64> {
    let mut parameters = vec![0; context.config.num_hidden_layers];
    for (id, linear) in plan.linears.iter().filter_map(|linear| Some((linear.id?, linear))) {
        parameters[id.block] += linear.n_parameters();
    }
    parameters
}

/// Widths and blocks to choose, with their errors, under a budget.
struct Problem<'p> {
    context: &'p Context<'p>,
    curves: &'p [Curve],
    losses: &'p [f64],
    ranks: Option<&'p RankCurves<'p>>,
    /// The blocks by their losses, the least first.
    by_loss: Vec<usize>,
    /// Parameters of the targeted linears of each block.
    parameters: Vec<u64>,
    /// Parameters of all targeted linears.
    n_weights: u64,
    /// The budget, in parameters or bytes.
    most: u64,
}

impl<'p> Problem<'p> {
    fn new(context: &'p Context<'p>, plan: &Plan, recipe: &Recipe, found: &'p Found<'p>) -> Self {
        let (curves, losses, ranks) = (&found.curves, found.losses.as_slice(), found.ranks.as_ref());
        let n_weights: u64 = plan.linears.iter().map(LinearInfo::n_parameters).sum();
        let most = match recipe.budget() {
            Budget::Bytes(bytes) => bytes,
            Budget::Keep(keep) => (keep * n_weights as f64 + 1e-6) as u64,
            Budget::Bits(_) | Budget::None => unreachable!("invariant: narrower modules have another budget"),
        };
        let parameters = parameters_of_blocks(context, plan);
        let mut by_loss: Vec<usize> = (0..losses.len()).collect();
        by_loss.sort_by(|&i, &j| losses[i].total_cmp(&losses[j]));
        Self { context, curves, losses, ranks, by_loss, parameters, n_weights, most }
    }

    /// The widths that a unit may have, ascending.
    fn options(&self, unit: usize) -> Vec<usize> {
        let unit = &self.context.units[unit];
        let step = if unit.kind == UnitKind::Groups { 1 } else { self.context.approach.multiple.get() };
        let whole = unit.width();
        let fewer = (1..).map(|i| i * step).take_while(|&width| width < whole);
        fewer.filter(|&width| self.is_loaded(unit, width)).chain([whole]).collect()
    }

    /// Whether loaders take this width of a unit if all others of its kind have it; of one block alone they take any.
    fn is_loaded(&self, unit: &NarrowUnit, width: usize) -> bool {
        let Context { architecture, config, approach, .. } = self.context;
        let is_free = unit.kind != UnitKind::Groups || approach.widths == WidthRule::ByBlock;
        is_free || architecture.head_counts.allow(unit.heads(width), config.hidden_size)
    }

    /// The same for all units of a kind; only 0 if there are none.
    fn options_of_kind(&self, kind: UnitKind) -> Vec<usize> {
        let unit = self.context.units.iter().position(|unit| unit.kind == kind);
        unit.map_or(vec![0], |unit| self.options(unit))
    }

    /// These widths without the `n` blocks of the least losses.
    fn without(&self, n: usize, widths: Vec<usize>) -> Chosen {
        let mut dropped = self.by_loss[..n].to_vec();
        dropped.sort_unstable();
        self.chosen(dropped, widths)
    }

    /// These widths, but whole in the blocks that are left out.
    fn chosen(&self, dropped: Vec<usize>, mut widths: Vec<usize>) -> Chosen {
        for (unit, width) in self.context.units.iter().zip(&mut widths) {
            if dropped.contains(&unit.block) {
                *width = unit.width();
            }
        }
        Chosen { widths, dropped }
    }

    /// Size of the model in the unit of the budget.
    fn size(&self, chosen: &Chosen) -> Result<u64> {
        match self.context.approach.limit.limit() {
            Limit::Bytes(_) => file_bytes(self.context, chosen),
            Limit::Keep(_) | Limit::Bits(_) => {
                let units = self.context.units.iter().zip(&chosen.widths);
                let narrowed = units.map(|(unit, &width)| (unit.width() - width) as u64 * unit.parameters_each());
                let dropped = chosen.dropped.iter().map(|&block| self.parameters[block]);
                Ok(self.n_weights - narrowed.sum::<u64>() - dropped.sum::<u64>())
            }
        }
    }

    fn fits(&self, chosen: &Chosen) -> Result<bool> {
        Ok(self.size(chosen)? <= self.most)
    }

    /// Sum of the errors.
    fn error(&self, chosen: &Chosen) -> f64 {
        let units = chosen.widths.iter().zip(self.curves).map(|(&width, curve)| curve.narrowing.errors[width]);
        units.sum::<f64>() + chosen.dropped.iter().map(|&block| self.losses[block]).sum::<f64>()
    }

    /// The best number of blocks, with the best single number of channels, of groups, of experts and of their channels.
    fn uniform(&self) -> Result<Option<Chosen>> {
        let [channels, of_experts] = [UnitKind::Channels, UnitKind::Experts].map(|kind| self.options_of_kind(kind));
        // The longer list is searched; all other numbers are tried.
        let is_of_experts = of_experts.len() > channels.len();
        let (tried, searched) = if is_of_experts { (channels, of_experts) } else { (of_experts, channels) };
        let mut best: Option<(f64, Chosen)> = None;
        for (n_dropped, groups, n_experts, tried) in self.grid(&tried) {
            let all = |at: usize| {
                let (channels, of_experts) = if is_of_experts { (tried, searched[at]) } else { (searched[at], tried) };
                self.without(n_dropped, self.widths_of(&Numbers { channels, groups, n_experts, of_experts }))
            };
            let Some(at) = last_that_fits(searched.len(), |at| self.fits(&all(at)))? else { continue };
            let error = self.error(&all(at));
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, all(at)));
            }
        }
        Ok(best.map(|(_, chosen)| chosen))
    }

    /// All numbers of blocks that are left out, of groups and of experts, with each of `others`.
    fn grid(&self, others: &[usize]) -> Vec<(usize, usize, usize, usize)> {
        let blocks = 0..self.losses.len().max(1);
        let groups = self.options_of_kind(UnitKind::Groups);
        let experts = self.numbers_of_experts();
        let with_groups = blocks.flat_map(|n| groups.iter().map(move |&groups| (n, groups)));
        let with_experts = with_groups.flat_map(|(n, groups)| experts.clone().map(move |experts| (n, groups, experts)));
        with_experts
            .flat_map(|(n, groups, experts)| others.iter().map(move |&other| (n, groups, experts, other)))
            .collect()
    }

    /// The numbers of experts that a block may have: as many as a token goes through, or more; only 0 if none can be left
    /// out.
    fn numbers_of_experts(&self) -> RangeInclusive<usize> {
        let units = &self.context.units;
        let first = units.iter().find(|unit| unit.kind == UnitKind::Experts);
        let all = first
            .map_or(0, |first| units.iter().filter(|unit| unit.expert.is_some() && unit.block == first.block).count());
        self.context.config.num_experts_per_tok.min(all)..=all
    }

    /// The least width of every unit.
    fn smallest(&self) -> Vec<usize> {
        let [channels, groups, of_experts] =
            [UnitKind::Channels, UnitKind::Groups, UnitKind::Experts].map(|kind| self.options_of_kind(kind)[0]);
        let n_experts = *self.numbers_of_experts().start();
        let experts = self.widths_of(&Numbers { channels, groups, n_experts, of_experts });
        let units = self.context.units.iter().enumerate();
        units.map(|(i, unit)| if unit.expert.is_some() { experts[i] } else { self.options(i)[0] }).collect()
    }

    /// The same numbers in all blocks. The experts that stay are those whose channels, so many of them, save the most error.
    fn widths_of(&self, numbers: &Numbers) -> Vec<usize> {
        let &Numbers { channels, groups, n_experts, of_experts } = numbers;
        let units = self.context.units;
        let mut widths: Vec<usize> = units
            .iter()
            .map(|unit| match unit.kind {
                UnitKind::Channels => channels,
                UnitKind::Groups => groups,
                UnitKind::Experts => 0,
            })
            .collect();
        let mut savings: BTreeMap<usize, Vec<(f64, usize)>> = BTreeMap::new();
        for (at, unit) in units.iter().enumerate().filter(|(_, unit)| unit.kind == UnitKind::Experts) {
            let errors = &self.curves[at].narrowing.errors;
            savings.entry(unit.block).or_default().push((errors[0] - errors[of_experts], at));
        }
        for mut of_block in savings.into_values() {
            of_block.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)));
            of_block.iter().take(n_experts).for_each(|&(_, at)| widths[at] = of_experts);
        }
        widths
    }

    /// The best numbers of each block.
    fn by_block(&self) -> Result<Option<Chosen>> {
        // With as many parameters as the budget has, if that is its unit.
        let most = match self.context.approach.limit.limit() {
            Limit::Keep(_) => self.most,
            _ => self.n_weights,
        };
        let chosen = self.within(most);
        if self.fits(&chosen)? {
            return Ok(Some(chosen));
        }
        let at = match self.context.approach.limit.limit() {
            Limit::Keep(_) => None,
            _ => last_that_fits(most as usize + 1, |at| self.fits(&self.within(at as u64)))?,
        };
        Ok(at.map(|at| self.within(at as u64)))
    }

    /// About as many parameters as the budget has.
    fn parameters_in_budget(&self) -> u64 {
        match self.context.approach.limit.limit() {
            Limit::Bytes(bytes) => {
                let checkpoint = self.context.checkpoint;
                let linears = self.ranks.map_or(&[][..], |ranks| ranks.linears);
                let in_linears: u64 = linears.iter().map(LinearInfo::n_bytes).sum();
                let left = (bytes + in_linears).saturating_sub(checkpoint.n_bytes());
                (left as f64 / in_linears.max(1) as f64 * self.n_weights as f64) as u64
            }
            Limit::Keep(_) | Limit::Bits(_) => self.most,
        }
    }

    /// The choice with the least error within a number of parameters; the smallest if even it has more.
    fn within(&self, parameters: u64) -> Chosen {
        let menus = self.menus();
        let items: Vec<Item<'_>> = menus.iter().map(|menu| menu.item()).collect();
        let in_menus: u64 = items.iter().map(|item| item.dense_cost).sum();
        let budget = (parameters + in_menus).saturating_sub(self.n_weights);
        let picks = allocate::allocate(Ranks::Knapsack, &items, &Rules { budget, ..Rules::of_keep(&items, 0.5) });
        let mut widths: Vec<usize> = self.context.units.iter().map(NarrowUnit::width).collect();
        let mut dropped = Vec::new();
        for (menu, pick) in menus.iter().zip(picks) {
            let Pick::Candidate(at) = pick else { continue };
            match &menu.widths[at] {
                None => dropped.push(menu.block),
                Some(own) => menu.units.iter().zip(own).for_each(|(&unit, &width)| widths[unit] = width),
            }
        }
        self.chosen(dropped, widths)
    }

    /// What may be chosen apart: each unit, or each block where it may be left out.
    fn menus(&self) -> Vec<Menu> {
        if self.losses.is_empty() {
            let units = self.context.units.iter().enumerate();
            let units = units.map(|(i, unit)| Menu::new(unit.block, vec![i], 0, &[self.points(i)]));
            let others = self.others().map(|(block, points)| Menu::new(block, Vec::new(), 0, &[points]));
            return units.chain(others).collect();
        }
        // The block with the largest loss stays.
        let largest = self.by_loss.last().copied();
        let blocks = self.losses.iter().enumerate().map(|(block, &loss)| {
            let units: Vec<usize> = (0..self.curves.len()).filter(|&i| self.context.units[i].block == block).collect();
            let others = self.others().filter(|(own, _)| *own == block).map(|(_, points)| points);
            let points: Vec<Vec<Point<usize>>> = units.iter().map(|&i| self.points(i)).chain(others).collect();
            let in_points: u64 = points.iter().map(|own| whole(own)).sum();
            let mut menu = Menu::new(block, units, self.parameters[block] - in_points, &points);
            if Some(block) != largest {
                menu.candidates.push(Candidate { cost: 0, error: loss });
                menu.widths.push(None);
            }
            menu
        });
        blocks.collect()
    }

    /// The widths of a unit with their parameters and errors.
    fn points(&self, unit: usize) -> Vec<Point<usize>> {
        let (options, errors) = (self.options(unit), &self.curves[unit].narrowing.errors);
        let unit = &self.context.units[unit];
        match self.ranks {
            Some(ranks) => ranks.of_unit(unit, &options, errors),
            None => options.into_iter().map(|w| (w as u64 * unit.parameters_each(), errors[w], w)).collect(),
        }
    }

    /// Linears outside of units that may have any rank, with their blocks.
    fn others(&self) -> impl Iterator<Item = (usize, Vec<Point<usize>>)> {
        let of_unit = |linear: &LinearInfo| {
            self.context.units.iter().any(|unit| unit.linears().any(|l| l.module == linear.module))
        };
        let ranks = self.ranks.into_iter();
        let all = ranks.flat_map(|ranks| ranks.linears.iter().enumerate().map(move |(i, linear)| (ranks, i, linear)));
        let others = all.filter(move |(.., linear)| !of_unit(linear));
        others.filter_map(|(ranks, i, linear)| Some((linear.id?.block, ranks.points(i, linear.shape()))))
    }
}

/// The cost of all, which errs nothing.
fn whole(points: &[Point<usize>]) -> u64 {
    points.iter().map(|(cost, ..)| *cost).max().unwrap_or(0)
}

/// What a few units of a block may become together.
struct Menu {
    block: usize,
    units: Vec<usize>,
    candidates: Vec<Candidate>,
    /// The widths of the units in each candidate; `None` without the block.
    widths: Vec<Option<Vec<usize>>>,
    whole: u64,
}

impl Menu {
    /// Units with these points, and `others` parameters that they always have.
    fn new(block: usize, units: Vec<usize>, others: u64, points: &[Vec<Point<usize>>]) -> Self {
        let sums = match points {
            [one] => one.iter().map(|&(cost, error, width)| (cost, error, vec![width])).collect(),
            several => allocate::frontier(several),
        };
        let whole = others + points.iter().map(|own| whole(own)).sum::<u64>();
        let candidates = sums.iter().map(|(cost, error, _)| Candidate { cost: others + cost, error: *error });
        let candidates = candidates.collect();
        Self { block, units, candidates, widths: sums.into_iter().map(|(.., own)| Some(own)).collect(), whole }
    }

    fn item(&self) -> Item<'_> {
        Item { dense_cost: self.whole, candidates: Candidates::Menu(&self.candidates) }
    }
}

/// The same numbers in all blocks.
struct Numbers {
    channels: usize,
    groups: usize,
    n_experts: usize,
    /// Channels of each expert that stays.
    of_experts: usize,
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

/// Bytes of the weight files, from shapes alone.
fn file_bytes(context: &Context<'_>, chosen: &Chosen) -> Result<u64> {
    let kept: Vec<Vec<usize>> = chosen.widths.iter().map(|&width| (0..width).collect()).collect();
    let (narrower, _) = shown::fewer(context, shown::selected(context, &kept)?, chosen, &kept);
    let then = context.then;
    let plan = Plan::of_shapes(&narrower, then)?;
    let source = Source::new(&narrower);
    let choices = known_choices(then, &plan).expect("invariant: what follows has no budget of its own");
    let forms: Vec<_> =
        plan.linears.iter().zip(choices).map(|(linear, choice)| forms_by_shape(then, linear, choice)).collect();
    Ok(plan.files(&source, then, &forms).file_bytes())
}
