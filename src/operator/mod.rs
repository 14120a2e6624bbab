//! Operators that replace weights: sums of structures, each a few stored matrices and a way to apply them.
//!
//! Each structure is one file and one line in `registry.rs`. Nothing outside this module matches on a structure or
//! knows the names of its parts; `docs/adding-a-structure.md` shows what a new one touches. A [`Form`] is a structure
//! before its values are known: it determines names, shapes and bytes. A [`Term`] has the values, and an [`Operator`]
//! is the sum of one or two of them.

mod blast;
mod dense;
mod factors;
mod forms;
mod matrix;
mod monarch;
mod names;
mod pivot;
mod products;
mod registry;
mod rounding;
mod structure;

pub use forms::{Form, Forms, Operator, Right, Term};
pub use matrix::Matrix;
pub use names::{BASE, all_parts, bias_parts, factors_of, first_parts, is_compressed_part, is_second_part, part_name};
pub(crate) use products::product_of;
pub(crate) use rounding::dense_with_feedback;
pub use rounding::{Rounded, Side, Sides};
pub use structure::{Element, Fit, FitValues, Fitting, FittingAlone, Kind, Part, Shape, Size, Step, Structure};

#[cfg(test)]
mod tests;
