//! What changes the values of a solution after its forms are chosen. One refinement a file, one line in [`of`].

mod anchor;
mod quantize_factors;

use anyhow::Result;

use super::recipe::Recipe;
use super::solution::Solution;
use crate::operator::Operator;

/// Changes values, never forms.
pub(super) trait Refine: Send + Sync {
    /// Sees the solution as a whole, once, before it is written.
    ///
    /// # Errors
    /// Whatever keeps it from its work.
    fn refine(&self, _solution: &mut Solution<'_>) -> Result<()> {
        Ok(())
    }

    /// Sees the operator of the `i`-th linear of the plan whenever it is made.
    ///
    /// # Errors
    /// Whatever keeps it from its work.
    fn operator(&self, _solution: &Solution<'_>, _i: usize, operator: Operator) -> Result<Operator> {
        Ok(operator)
    }
}

/// The refinements of a recipe, in the order in which they are applied.
pub(super) fn of(recipe: &Recipe) -> Vec<Box<dyn Refine>> {
    let anchor = recipe.anchor.map(|mu| Box::new(anchor::Anchor { mu }) as Box<dyn Refine>);
    let factors = recipe
        .quant_factors
        .map(|bits| Box::new(quantize_factors::QuantizeFactors { scheme: bits.scheme() }) as Box<dyn Refine>);
    anchor.into_iter().chain(factors).collect()
}
