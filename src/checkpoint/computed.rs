//! Tensors of floats that are computed from stored ones as they are read: an adapter over its base, and the
//! difference of two models.

use crate::codecs::peft::{self, Factors};

/// How a tensor is computed from stored ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Computed {
    /// The first, with the product of `A`, the second, and `B`, the third, added.
    Merged(Factors),
    /// The first minus the second.
    Difference,
}

impl Computed {
    /// The values, computed from the values of the stored tensors; `None` if their sizes do not match.
    pub fn of(self, parts: Vec<Vec<f32>>) -> Option<Vec<f32>> {
        let mut parts = parts.into_iter();
        let mut values = parts.next()?;
        match self {
            Self::Merged(factors) => {
                let (a, b) = (parts.next()?, parts.next()?);
                peft::merge(&mut values, factors, &a, &b)?;
            }
            Self::Difference => {
                let base = parts.next().filter(|base| base.len() == values.len())?;
                values.iter_mut().zip(base).for_each(|(value, base)| *value -= base);
            }
        }
        Some(values)
    }
}
