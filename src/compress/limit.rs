//! Meets a budget: its size in bytes, one search for the choices that spend it, and one error if nothing is that small.

use anyhow::Result;

use super::compensate::CompensateRank;
use super::plan::{Choice, Plan};
use super::recipe::{Budget, Recipe, WidthRule};
use crate::error::Failure;
use crate::formats::Source;
use crate::model::inventory::LinearInfo;
use crate::operator::Forms;

/// The view that a search has of a model: what can be chosen, and what it takes in files.
pub(super) struct Search<'s> {
    pub recipe: &'s Recipe,
    pub plan: &'s Plan,
    pub source: &'s Source<'s>,
    /// The choices for a number of bytes of all linears, and their cost, which exceeds it if nothing is that small.
    pub choices: &'s dyn Fn(u64) -> (Vec<Choice>, u64),
    /// The forms of the linear with this index under a choice.
    pub forms: &'s dyn Fn(usize, Choice) -> Option<Forms>,
    /// Cost of all linears as they are, in bytes.
    pub dense_bytes: u64,
}

/// Bytes of a linear in these forms, as the budget counts them; `None` is the unchanged linear.
pub(super) fn price(recipe: &Recipe, budget: Budget, linear: &LinearInfo, forms: Option<&Forms>) -> u64 {
    // Files are counted where codes or small adapters make the difference: with their headers.
    match (forms, budget) {
        (forms, Budget::Bytes(target)) if !recipe.quant().is_empty() || (recipe.is_residual() && forms.is_some()) => {
            recipe.format().n_bytes_in_file(linear, forms, target)
        }
        (Some(forms), _) => recipe.format().n_bytes(linear, forms),
        (None, _) => linear.n_bytes(),
    }
}

/// Checks that the parameters that ranks keep, `spent` of `n_weights`, are the share `keep` of them or less.
///
/// # Errors
/// They are more.
pub(super) fn expect_share(recipe: &Recipe, keep: f64, spent: u64, n_weights: u64) -> Result<()> {
    match spent as f64 > (keep * n_weights as f64).ceil() {
        true => Err(unreachable_budget(recipe, Budget::Keep(keep), spent as f64 / n_weights as f64)),
        false => Ok(()),
    }
}

/// The error for a budget that is less than its minimum, in the unit of the budget.
pub(super) fn unreachable_budget(recipe: &Recipe, budget: Budget, least: f64) -> anyhow::Error {
    // Rounded up, so that the figure can be given.
    let rounded = |places: i32| (least * 10f64.powi(places)).ceil() / 10f64.powi(places);
    let (flag, given, least) = match budget {
        Budget::Keep(keep) => ("--keep", format!("`--keep {keep}`"), format!("{:.4}", rounded(4))),
        Budget::Bits(bits) => ("--bits", format!("`--bits {bits}`"), format!("{:.3}", rounded(3))),
        Budget::Bytes(target) => {
            ("--target-size", format!("`--target-size` of {target} bytes"), format!("{least} bytes"))
        }
        Budget::None => unreachable!("invariant: without a budget nothing is too large"),
    };
    let mut ways = Vec::new();
    if recipe.is_residual() && matches!(budget, Budget::Bytes(_)) {
        ways.push("leave out tensors that are not linears (`--others leave-out`)".to_string());
    } else if matches!(budget, Budget::Bytes(_)) {
        ways.push("target more linears, because the others keep their size".to_string());
    }
    if matches!(recipe.compensate_rank(), CompensateRank::Fixed(_)) {
        ways.push("lower `--compensate-rank`".into());
    }
    if !recipe.quant().is_empty() {
        ways.push("add a quantizer with fewer bits to `--quant`".into());
    }
    if recipe.rank_floor() > 0.0 {
        ways.push("lower `--rank-floor`".into());
    }
    if recipe.rank_multiple() > 1 {
        ways.push("lower `--rank-multiple`".into());
    }
    if recipe.narrow().is_some_and(|narrow| narrow.multiple.get() > 1 && narrow.widths != WidthRule::Whole) {
        ways.push("lower `--width-multiple`".into());
    }
    ways.push(format!("raise `{flag}`"));
    let hint = match ways.as_slice() {
        [one] => one.clone(),
        [first @ .., last] => format!("{}, or {last}", first.join(", ")),
        [] => String::new(),
    };
    Failure::usage(format!("{given} cannot be reached: the minimum is {least}")).hint(hint).into()
}

impl Search<'_> {
    /// The choices under a budget.
    ///
    /// # Errors
    /// It cannot be met.
    pub fn within(&self, budget: Budget) -> Result<Vec<Choice>> {
        let n_weights: u64 = self.plan.linears.iter().map(LinearInfo::n_parameters).sum();
        // The size of a unit of the budget in bytes, and how many there are.
        let (unit, n_units) = match budget {
            Budget::Bytes(target) => return self.meet(target),
            Budget::Bits(bits) => (n_weights as f64 / 8.0, bits),
            Budget::Keep(keep) => (self.dense_bytes as f64, keep),
            Budget::None => return Ok((self.choices)(u64::MAX).0),
        };
        let bytes = (n_units * unit + 1e-6) as u64;
        let (choices, spent) = (self.choices)(bytes);
        if spent > bytes {
            return Err(unreachable_budget(self.recipe, budget, spent as f64 / unit));
        }
        Ok(choices)
    }

    /// The choices whose weight files come closest to `target` bytes from below. Headers have no price of their own, so
    /// the budget of the linears is corrected by their actual size.
    fn meet(&self, target: u64) -> Result<Vec<Choice>> {
        const ROUNDS: usize = 24;
        let dense = vec![Choice::Dense; self.plan.linears.len()];
        let whole = self.file_bytes(&dense);
        let is_residual = self.recipe.is_residual();
        if whole <= target && !is_residual {
            tracing::warn!("`--target-size` is not less than the {whole} bytes of the source: nothing is compressed");
            return Ok(dense);
        }
        // A residual that stays as it is takes no bytes.
        let dense_bytes = if is_residual { 0 } else { self.dense_bytes };
        let others = i128::from(whole) - i128::from(dense_bytes);
        let mut budget = i128::from(target) - others;
        let mut best: Option<(u64, Vec<Choice>)> = None;
        let mut smallest = u64::MAX;
        // The smallest budget known to be too large, and the largest known to fit; the answer is between them.
        let (mut fits, mut too_large) = (None::<i128>, None::<i128>);
        for _ in 0..ROUNDS {
            let (choices, _) = (self.choices)(u64::try_from(budget.max(0)).unwrap_or(0));
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
            return Err(unreachable_budget(self.recipe, Budget::Bytes(target), smallest as f64));
        };
        if (target - bytes) as f64 > 0.001 * target as f64 && self.recipe.ranks().is_budgeted() && !is_residual {
            tracing::warn!("`--target-size` is missed by {} bytes: the ranks allow no smaller step", target - bytes);
        }
        Ok(choices)
    }

    /// Bytes of the weight files for these choices.
    fn file_bytes(&self, choices: &[Choice]) -> u64 {
        let forms: Vec<Option<Forms>> = choices.iter().enumerate().map(|(i, &c)| (self.forms)(i, c)).collect();
        self.plan.files(self.source, self.recipe, &forms).file_bytes()
    }
}
