//! Tensors of floats that are computed from stored ones as they are read: an adapter over its base, the difference
//! of two models, and some entries of a larger tensor.

use std::sync::Arc;

use crate::codecs::peft::{self, Factors};

/// How a tensor is computed from stored ones.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Computed {
    /// The first, with the product of `A`, the second, and `B`, the third, added.
    Merged(Factors),
    /// The first minus the second.
    Difference,
    /// Some entries of the first.
    Selected(Entries),
}

/// Some entries of one dimension of a tensor, with all of the others.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entries {
    /// Those that are there, in order.
    pub indices: Arc<[usize]>,
    /// Entries of the dimension in the whole tensor.
    pub of: usize,
    /// Elements from one entry to the next: the product of the dimensions after it.
    pub stride: usize,
}

impl Entries {
    /// The values of these entries, row-major; `None` if there are others than whole dimensions.
    fn pick(&self, values: &[f32]) -> Option<Vec<f32>> {
        let whole = self.of * self.stride;
        let is_whole = whole > 0 && values.len().is_multiple_of(whole);
        let entry = |outer: &'_ [f32], i: usize| outer[i * self.stride..(i + 1) * self.stride].to_vec();
        is_whole
            .then(|| values.chunks(whole).flat_map(|o| self.indices.iter().flat_map(move |&i| entry(o, i))).collect())
    }
}

impl Computed {
    /// The values, computed from the values of the stored tensors; `None` if their sizes do not match.
    pub fn of(&self, parts: Vec<Vec<f32>>) -> Option<Vec<f32>> {
        let mut parts = parts.into_iter();
        let mut values = parts.next()?;
        match self {
            Self::Merged(factors) => {
                let (a, b) = (parts.next()?, parts.next()?);
                peft::merge(&mut values, *factors, &a, &b)?;
            }
            Self::Difference => {
                let base = parts.next().filter(|base| base.len() == values.len())?;
                values.iter_mut().zip(base).for_each(|(value, base)| *value -= base);
            }
            Self::Selected(entries) => values = entries.pick(&values)?,
        }
        Some(values)
    }
}
