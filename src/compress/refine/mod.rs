//! Refinements, which change the values of a solution after its forms are chosen. Each is one file and one line in
//! [`of`].

mod anchor;
mod moments;
mod quantize_factors;

use super::recipe::Recipe;
use super::solution::{Refine, Refinements};

/// The refinements of a recipe, in the order in which they are applied.
pub(super) fn of(recipe: &Recipe) -> Refinements {
    let anchor = recipe.anchor().map(|mu| Box::new(anchor::Anchor { mu }) as Box<dyn Refine>);
    let factors = recipe
        .quant_factors()
        .map(|bits| Box::new(quantize_factors::QuantizeFactors { scheme: bits.scheme() }) as Box<dyn Refine>);
    anchor.into_iter().chain(factors).collect()
}
