//! Chooses a fit for every unit under a budget: fits are priced, an allocator chooses by cost and error, and
//! `limit` meets the budget.

use anyhow::Result;

use super::allocate::{self, Candidate, Candidates, Item, Ladder, Pick, Point, Ranks, Rules, Spectra};
use super::budget::{self, forms_by_shape, known_choices};
use super::fits::{Unit, units_to_share};
use super::limit::{self, Search};
use super::plan::{Choice, Plan};
use super::recipe::{Budget, Recipe};
use super::study::Study;
use crate::approx::low_rank::ErrorCurve;
use crate::formats::Source;
use crate::model::inventory::LinearInfo;
use crate::operator::Forms;

/// The choice for every linear of the plan.
pub(super) struct Allocation {
    pub choices: Vec<Choice>,
    /// Cost to the model of a unit of squared error, including depth weights.
    pub sensitivities: Vec<f64>,
}

/// Cost of a linear in these forms, in the unit of the budget; `None` is the unchanged linear.
type Price<'p> = dyn Fn(&LinearInfo, Option<&Forms>) -> u64 + 'p;

/// Units and their candidates, priced in the unit of the budget.
pub(super) struct Problem<'a> {
    recipe: &'a Recipe,
    plan: &'a Plan,
    units: Vec<PricedUnit>,
}

/// A unit with its costs and weighted errors.
struct PricedUnit {
    unit: Unit,
    dense_cost: u64,
    candidates: Vec<Candidate>,
    meaning: Meaning,
}

/// The meaning of a unit's candidates.
enum Meaning {
    /// Only rank 0 of a linear of zeros.
    Zeros,
    /// All ranks of a linear, with their numbers of parameters and its scores.
    Ranks { parameters: Vec<u64>, scores: Vec<f64> },
    /// The choices of all members, for each candidate.
    Choices(Vec<Vec<Choice>>),
}

impl<'a> Problem<'a> {
    /// The ranks of every linear, and the fits that several may share; in `price` if the budget is in bytes, else in
    /// parameters.
    fn of_ranks(study: &'a Study<'_>, price: Option<&Price<'_>>, sensitivities: &'a [f64]) -> Self {
        let (recipe, plan) = (study.recipe, study.plan);
        let curves: Vec<_> = (0..plan.linears.len()).map(|i| curve(study, i)).collect();
        let weighted = Weighted { curves: &curves, sensitivities };
        let one = |i: usize| match plan.linears[i].vocabulary {
            Some(_) => PricedUnit::of_fits(study, i, 0, &|linear, forms| cost(price, linear, forms), sensitivities[i]),
            None => PricedUnit::of_ranks(study, i, &weighted, price),
        };
        let mut units: Vec<PricedUnit> = (0..plan.linears.len()).map(one).collect();
        if recipe.share() {
            units = together(study, units, &weighted, price);
        }
        Self { recipe, plan, units }
    }

    /// The quantized bases of every linear from index `first` on, with their ranks.
    pub fn of_bases(
        study: &'a Study<'_>,
        first: &dyn Fn(usize) -> usize,
        price: &Price<'_>,
        sensitivities: &'a [f64],
    ) -> Self {
        let plan = study.plan;
        let one = |i: usize| PricedUnit::of_fits(study, i, first(i), price, sensitivities[i]);
        let units = (0..plan.linears.len()).map(one).collect();
        Self { recipe: study.recipe, plan, units }
    }

    /// Every linear at all ranks, or in all quantizers of the menu, before anything is measured.
    fn by_shape(recipe: &'a Recipe, plan: &'a Plan, price: Option<&Price<'_>>) -> Self {
        let units = (0..plan.linears.len()).map(|i| PricedUnit::by_shape(recipe, plan, i, price)).collect();
        Self { recipe, plan, units }
    }

    fn items(&self) -> Vec<Item<'_>> {
        self.units.iter().map(|priced| priced.item(self.plan)).collect()
    }

    fn choices(&self, picks: &[Pick]) -> Vec<Choice> {
        let mut choices = vec![Choice::Dense; self.plan.linears.len()];
        for (priced, &pick) in self.units.iter().zip(picks) {
            let members = priced.unit.members.iter();
            match (pick, &priced.meaning) {
                (Pick::Candidate(at), Meaning::Choices(of)) => {
                    members.zip(&of[at]).for_each(|(&i, &own)| choices[i] = own)
                }
                // Rank 0 leaves a residual out, which is not the same as a matrix of zeros.
                (Pick::Candidate(rank), Meaning::Ranks { .. }) => {
                    members.for_each(|&i| choices[i] = Choice::Fitted { fit: 0, rank })
                }
                (pick, _) => members.for_each(|&i| choices[i] = budget::choice(pick)),
            }
        }
        choices
    }

    /// Bytes of all linears as they are.
    fn dense_bytes(&self) -> u64 {
        self.units.iter().map(|priced| priced.dense_cost).sum()
    }

    fn n_weights(&self) -> u64 {
        self.plan.linears.iter().map(LinearInfo::n_parameters).sum()
    }

    /// The choices of an allocator under a budget of parameters or bytes, and their cost.
    fn of_allocator(&self, ranks: Ranks, budget: Budget) -> (Vec<Choice>, u64) {
        let items = self.items();
        let picks = allocate::allocate(ranks, &items, &budget::rules(self.recipe, &items, budget));
        (self.choices(&picks), allocate::cost(&items, &picks))
    }

    /// The choices under a budget; `forms` gives the forms of a linear under a choice.
    fn within(
        &self,
        budget: Budget,
        ranks: Ranks,
        source: &Source<'_>,
        forms: &dyn Fn(usize, Choice) -> Option<Forms>,
    ) -> Result<Vec<Choice>> {
        let (recipe, plan, has_bases) = (self.recipe, self.plan, !self.recipe.quant().is_empty());
        let of_bytes = |bytes: u64| match has_bases {
            true => self.least_error(bytes),
            false => self.of_allocator(ranks, Budget::Bytes(bytes)),
        };
        match budget {
            Budget::Keep(keep) if !has_bases => {
                let (choices, spent) = self.of_allocator(ranks, budget);
                limit::expect_share(recipe, keep, spent, self.n_weights())?;
                Ok(choices)
            }
            Budget::None => Ok(self.of_allocator(ranks, budget).0),
            Budget::Keep(_) | Budget::Bits(_) | Budget::Bytes(_) => {
                Search { recipe, plan, source, choices: &of_bytes, forms, dense_bytes: self.dense_bytes() }
                    .within(budget)
            }
        }
    }

    /// The choice of bases with the least error within `bytes`, and its cost, which exceeds `bytes` if nothing is that
    /// small. Linears that fit no quantizer stay dense.
    pub fn least_error(&self, bytes: u64) -> (Vec<Choice>, u64) {
        let (open, others): (Vec<&PricedUnit>, Vec<&PricedUnit>) =
            self.units.iter().partition(|priced| !priced.candidates.is_empty());
        let fixed: u64 = others.iter().map(|priced| priced.dense_cost).sum();
        let items: Vec<Item<'_>> = open.iter().map(|priced| priced.item(self.plan)).collect();
        let rules = Rules { budget: bytes.saturating_sub(fixed), ..Rules::of_keep(&items, 0.5) };
        let picks = allocate::allocate(Ranks::Knapsack, &items, &rules);
        let mut choices = vec![Choice::Dense; self.plan.linears.len()];
        for (priced, &pick) in open.iter().zip(&picks) {
            if let (Pick::Candidate(at), Meaning::Choices(of)) = (pick, &priced.meaning) {
                choices[priced.unit.members[0]] = of[at][0];
            }
        }
        (choices, fixed + allocate::cost(&items, &picks))
    }

    /// Mean bits per weight if `bytes` are spread evenly.
    pub fn bits(&self, bytes: u64) -> f64 {
        8.0 * bytes as f64 / self.n_weights() as f64
    }
}

/// The spectrum of a linear that the recipe's allocator needs.
fn curve<'a>(study: &'a Study<'_>, i: usize) -> Option<&'a ErrorCurve> {
    let fitted = study.fits.low_rank(i)?;
    match study.recipe.ranks().allocator().spectra() {
        Spectra::None => None,
        Spectra::Plain => fitted.plain_curve(),
        Spectra::Metric => fitted.curve(),
    }
}

impl PricedUnit {
    /// A linear by its shape. Its error falls with its bits per weight alone, as the error of rounding does: by
    /// a factor of four per bit.
    fn by_shape(recipe: &Recipe, plan: &Plan, i: usize, price: Option<&Price<'_>>) -> Self {
        let linear = &plan.linears[i];
        let (unit, dense_cost) = (Unit { members: vec![i] }, cost(price, linear, None));
        let cost_of = |choice: Choice| cost(price, linear, forms_by_shape(recipe, linear, choice).as_ref());
        if recipe.quant().is_empty() {
            let parameters = budget::parameters(recipe, linear);
            let choices = (0..parameters.len()).map(|rank| budget::choice(Pick::Candidate(rank)));
            let costs = if price.is_none() { parameters.clone() } else { choices.map(cost_of).collect() };
            let candidates = allocate::candidates_by_rank(&costs, None, 1.0);
            let ranks = Meaning::Ranks { parameters, scores: Vec::new() };
            return Self {
                unit,
                dense_cost,
                candidates,
                meaning: if plan.are_zero[i] { Meaning::Zeros } else { ranks },
            };
        }
        let (mut menu, n_weights) = (Menu::default(), linear.n_parameters() as f64);
        for choice in budget::choices_of_bases(recipe, linear) {
            let cost = cost_of(choice);
            menu.add(cost, n_weights * (-2.0 * 8.0 * cost as f64 / n_weights).exp2(), vec![choice]);
        }
        menu.of(unit, dense_cost)
    }

    /// A linear at every rank.
    fn of_ranks(study: &Study<'_>, i: usize, weighted: &Weighted<'_>, price: Option<&Price<'_>>) -> Self {
        let linear = &study.plan.linears[i];
        let (unit, dense_cost) = (Unit { members: vec![i] }, cost(price, linear, None));
        let parameters = budget::parameters(study.recipe, linear);
        let of_rank = |price: &Price<'_>, rank: usize| {
            let choice = if rank == 0 { Choice::Zeros } else { Choice::Fitted { fit: 0, rank } };
            price(linear, study.planned(i, choice).as_ref())
        };
        let bytes = price.map(|price| (0..parameters.len()).map(|rank| of_rank(price, rank)).collect::<Vec<u64>>());
        let costs = bytes.as_ref().unwrap_or(&parameters);
        if study.plan.are_zero[i] {
            let candidates = vec![Candidate { cost: costs[0], error: 0.0 }];
            return Self { unit, dense_cost, candidates, meaning: Meaning::Zeros };
        }
        let spectrum = weighted.curves[i];
        let candidates = allocate::candidates_by_rank(costs, spectrum, weighted.sensitivities[i]);
        let scores = |spectrum| study.recipe.ranks().allocator().scores(spectrum, linear.shape());
        let scores = spectrum.map(scores).unwrap_or_default();
        Self { unit, dense_cost, candidates, meaning: Meaning::Ranks { parameters, scores } }
    }

    /// A linear in all of its fits from index `first` on, at all of their ranks.
    fn of_fits(study: &Study<'_>, i: usize, first: usize, price: &Price<'_>, sensitivity: f64) -> Self {
        let linear = &study.plan.linears[i];
        let mut menu = Menu::default();
        for (fit, of) in study.fits.of(i).iter().enumerate().skip(first) {
            for (rank, errors) in of.fitted.errors() {
                // Without a base, rank 0 is nothing at all.
                if rank == 0 && of.fitted.quant().is_none() {
                    continue;
                }
                let choice = Choice::Fitted { fit, rank };
                let cost = price(linear, study.planned(i, choice).as_ref());
                menu.add(cost, sensitivity * errors.iter().sum::<f64>(), vec![choice]);
            }
        }
        menu.of(Unit { members: vec![i] }, price(linear, None))
    }

    fn item<'i>(&'i self, plan: &Plan) -> Item<'i> {
        let candidates = match &self.meaning {
            Meaning::Zeros => Candidates::Free(self.candidates[0]),
            Meaning::Choices(_) => Candidates::Menu(&self.candidates),
            Meaning::Ranks { parameters, scores } => {
                let n_weights = plan.linears[self.unit.members[0]].n_parameters();
                Candidates::Ranks(Ladder { candidates: &self.candidates, parameters, n_weights, scores })
            }
        };
        Item { dense_cost: self.dense_cost, candidates }
    }
}

/// Candidates with the choices of all members that each is.
#[derive(Default)]
struct Menu {
    candidates: Vec<Candidate>,
    choices: Vec<Vec<Choice>>,
}

impl Menu {
    fn add(&mut self, cost: u64, error: f64, choices: Vec<Choice>) {
        self.candidates.push(Candidate { cost, error });
        self.choices.push(choices);
    }

    fn of(self, unit: Unit, dense_cost: u64) -> PricedUnit {
        PricedUnit { unit, dense_cost, candidates: self.candidates, meaning: Meaning::Choices(self.choices) }
    }
}

/// The curves of all linears, and the cost to the model of a unit of each.
struct Weighted<'w> {
    curves: &'w [Option<&'w ErrorCurve>],
    sensitivities: &'w [f64],
}

/// The cost of a linear in the unit of a budget; parameters without a price in bytes.
fn cost(price: Option<&Price<'_>>, linear: &LinearInfo, forms: Option<&Forms>) -> u64 {
    match (price, forms) {
        (Some(price), forms) => price(linear, forms),
        // Codes keep all parameters; they count as the parameters that would take as many bytes.
        (None, Some(forms)) if forms.is_quantized() => {
            let (base, over) = linear.bytes_as(forms);
            (base + over) * linear.n_parameters() / linear.n_bytes().max(1)
        }
        (None, Some(forms)) => linear.parameters_as(forms),
        (None, None) => linear.n_parameters(),
    }
}

/// Joins the units whose members may share a part: candidates are the best fits of separate members at every
/// cost, and the joint fits.
fn together(
    study: &Study<'_>,
    alone: Vec<PricedUnit>,
    weighted: &Weighted<'_>,
    price: Option<&Price<'_>>,
) -> Vec<PricedUnit> {
    let sharing = units_to_share(study.plan);
    let mut units: Vec<PricedUnit> = sharing.iter().map(|unit| joined(study, unit, weighted, price)).collect();
    let is_joined = |i: usize| sharing.iter().any(|unit| unit.members.contains(&i));
    units.extend(alone.into_iter().filter(|priced| !is_joined(priced.unit.members[0])));
    units
}

/// A unit with its members fitted separately, and jointly.
fn joined(study: &Study<'_>, unit: &Unit, weighted: &Weighted<'_>, price: Option<&Price<'_>>) -> PricedUnit {
    let linear = |i: usize| &study.plan.linears[i];
    let dense: u64 = unit.members.iter().map(|&i| cost(price, linear(i), None)).sum();
    let mut joined = Menu::default();
    let lists: Vec<Vec<Point<Choice>>> = unit.members.iter().map(|&i| points(study, i, weighted, price)).collect();
    for (cost, error, choices) in allocate::frontier(&lists) {
        joined.add(cost, error, choices);
    }
    let first = unit.members[0];
    for (fit, of) in study.fits.of(first).iter().enumerate().filter(|(_, fit)| fit.fitted.curve().is_none()) {
        for (rank, errors) in of.fitted.errors() {
            // The joint fit has the same index in all members, after their own decomposition.
            let choice = Choice::Fitted { fit, rank };
            let costs = unit.members.iter().map(|&i| cost(price, linear(i), study.planned(i, choice).as_ref()));
            let weighted = unit.members.iter().zip(errors).map(|(&i, error)| weighted.sensitivities[i] * error);
            joined.add(costs.sum(), weighted.sum(), vec![choice; unit.members.len()]);
        }
    }
    joined.of(unit.clone(), dense)
}

/// A linear by itself: dense, and at every rank that saves.
fn points(study: &Study<'_>, i: usize, weighted: &Weighted<'_>, price: Option<&Price<'_>>) -> Vec<Point<Choice>> {
    let linear = &study.plan.linears[i];
    let (largest, step) =
        (study.recipe.layout().fitting().largest_saving_rank(linear.shape()), study.recipe.rank_multiple());
    let of = |rank: usize| {
        let choice = Choice::Fitted { fit: 0, rank };
        let error = weighted.curves[i].map_or(0.0, |curve| weighted.sensitivities[i] * curve.squared_error(rank));
        (cost(price, linear, study.planned(i, choice).as_ref()), error, choice)
    };
    let dense = (cost(price, linear, None), 0.0, Choice::Dense);
    (step..=largest).step_by(step).map(of).chain([dense]).collect()
}

/// The choices under a recipe's budget, with errors weighted by `sensitivities`.
///
/// # Errors
/// The budget cannot be met.
pub(super) fn choose(study: &Study<'_>, budget: Budget, sensitivities: &[f64]) -> Result<Vec<Choice>> {
    let (recipe, plan) = (study.recipe, study.plan);
    let price = |linear: &LinearInfo, forms: Option<&Forms>| limit::price(recipe, budget, linear, forms);
    let problem = if recipe.quant().is_empty() {
        Problem::of_ranks(study, counts_bytes(recipe, budget).then_some(&price), sensitivities)
    } else if let Some(choices) = known_choices(recipe, plan) {
        return Ok(choices);
    } else {
        Problem::of_bases(study, &|_| 0, &price, sensitivities)
    };
    problem.within(budget, recipe.ranks(), &study.source, &|i, choice| study.planned(i, choice))
}

/// The same before anything is measured: the budget is spread evenly.
///
/// # Errors
/// The budget cannot be met.
pub(super) fn choose_by_shape(recipe: &Recipe, plan: &Plan, source: &Source<'_>) -> Result<Vec<Choice>> {
    let budget = recipe.budget();
    let price = |linear: &LinearInfo, forms: Option<&Forms>| limit::price(recipe, budget, linear, forms);
    let problem = Problem::by_shape(recipe, plan, counts_bytes(recipe, budget).then_some(&price));
    let ranks = if recipe.quant().is_empty() { Ranks::Uniform } else { Ranks::Knapsack };
    problem.within(budget, ranks, source, &|i, choice| forms_by_shape(recipe, &plan.linears[i], choice))
}

/// Whether a budget is spent in bytes, and not in parameters.
fn counts_bytes(recipe: &Recipe, budget: Budget) -> bool {
    !recipe.quant().is_empty() || matches!(budget, Budget::Bytes(_) | Budget::Bits(_))
}
