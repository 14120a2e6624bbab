//! What every linear may become with a quantised base, priced in bytes, and the best of it for a budget.

use super::allocate::{self, Choice, Coded, Item, Price, Ranks, Rules};
use super::study::Study;
use crate::formats::Entry;
use crate::model::Layout;
use crate::model::inventory::LinearInfo;

/// The offers of a study.
pub(super) struct Offers<'a> {
    linears: &'a [LinearInfo],
    coded: Vec<Vec<Coded>>,
    dense: Vec<u64>,
    sensitivities: &'a [f64],
}

impl<'a> Offers<'a> {
    /// The variants of every linear from number `first` on, at what `price` says that they take; none: the linear as it is.
    pub fn new(
        study: &'a Study<'_>,
        first: &dyn Fn(usize) -> usize,
        price: &dyn Fn(&LinearInfo, Option<&Entry>) -> u64,
        sensitivities: &'a [f64],
    ) -> Self {
        let linears = &study.plan.linears;
        let cost = |i: usize, choice| price(&linears[i], study.entry(i, choice).as_ref());
        let coded = |i: usize| study.residuals.coded(i, first(i), |choice| cost(i, choice));
        let dense = linears.iter().map(|linear| price(linear, None)).collect();
        Self { linears, coded: (0..linears.len()).map(coded).collect(), dense, sensitivities }
    }

    fn item(&self, i: usize) -> Item<'_> {
        Item {
            shape: self.linears[i].shape(),
            layout: Layout::Factors,
            curve: None,
            sensitivity: self.sensitivities[i],
            price: Price::Bytes { dense: self.dense[i], ranks: &[] },
            coded: &self.coded[i],
            is_zero: false,
        }
    }

    /// The choices with the least error that `bytes` pay for, and what they take: more than `bytes`, if nothing is so small.
    /// What fits no quantiser stays dense.
    pub fn best(&self, bytes: u64) -> (Vec<Choice>, u64) {
        let (offered, others): (Vec<usize>, Vec<usize>) =
            (0..self.linears.len()).partition(|&i| !self.coded[i].is_empty());
        let fixed: u64 = others.iter().map(|&i| self.dense[i]).sum();
        let items: Vec<Item<'_>> = offered.iter().map(|&i| self.item(i)).collect();
        let rules = Rules { budget: bytes.saturating_sub(fixed), ..Rules::of_keep(&items, 0.5) };
        let found = allocate::allocate(Ranks::Knapsack, &items, &rules);
        let spent = fixed + allocate::cost(&items, &found);
        let mut choices = vec![Choice::Dense; self.linears.len()];
        offered.iter().zip(found).for_each(|(&i, choice)| choices[i] = choice);
        (choices, spent)
    }

    /// Bytes of all linears as they are.
    pub fn dense_bytes(&self) -> u64 {
        self.dense.iter().sum()
    }

    pub fn n_weights(&self) -> u64 {
        self.linears.iter().map(LinearInfo::n_parameters).sum()
    }
}
