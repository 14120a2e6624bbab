//! How the pair of every choice is laid out and rounded. That is settled before places are planned, and every reader of a linear,
//! be it the output, a probe or a sweep, is given the same values.

use std::collections::BTreeMap;
use std::sync::Mutex;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde_json::json;

use super::allocate::Choice;
use super::metric::Metric;
use super::metrics::SharedInputs;
use super::pivot;
use super::presets::Form;
use super::rounding::{self, Rounded, Side, Sides};
use super::study::Study;
use crate::formats::{Entry, Parts};
use crate::journal::{Array, Piece};
use crate::model::Layout;
use crate::progress::Progress;
use crate::spool::{self, Spooled};

/// What a pair became.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Laid {
    pub layout: Layout,
    pub rank: usize,
    /// Error of rounding to the dtype, over the norm of the weight, in the metric.
    pub storage_error: f64,
    /// Why it is not what was asked for.
    pub note: Option<String>,
}

/// The parts that were settled on.
struct Kept {
    left: Spooled,
    right: Spooled,
    order: Vec<i32>,
}

/// A linear, and the rank that was asked for.
type Asked = (usize, usize);

#[derive(Default)]
pub(super) struct Layouts {
    made: Mutex<BTreeMap<Asked, (Laid, Option<Kept>)>>,
}

impl Layouts {
    /// Forgets everything: pairs are about to be replaced.
    pub fn clear(&mut self) {
        self.made.get_mut().expect("invariant: no holder of the layouts panics").clear();
    }
}

impl Study<'_> {
    /// What is known of the pair of `rank` of the `i`-th linear; as the recipe asks for it where it was not made yet.
    pub fn laid(&self, i: usize, rank: usize) -> Laid {
        let made = self.layouts.made.lock().expect("invariant: no holder of the layouts panics");
        made.get(&(i, rank)).map_or_else(|| self.asked(rank), |(laid, _)| laid.clone())
    }

    fn asked(&self, rank: usize) -> Laid {
        Laid { layout: self.recipe.layout(), rank, storage_error: 0.0, note: None }
    }

    /// How the `i`-th linear is stored, once it was settled; [`Self::entry`] is what it was planned to be.
    pub fn stored_entry(&self, i: usize, choice: Choice) -> Option<Entry> {
        let mut entry = self.entry(i, choice)?;
        if let (Choice::Rank(rank @ 1..), Some(pair)) = (choice, &mut entry.pair) {
            let laid = self.laid(i, rank);
            (pair.rank, pair.layout) = (laid.rank, laid.layout);
        }
        Some(entry)
    }

    /// The same for all linears.
    pub fn stored_entries(&self, choices: &[Choice]) -> Vec<Option<Entry>> {
        choices.iter().enumerate().map(|(i, &choice)| self.stored_entry(i, choice)).collect()
    }

    /// Lays out and rounds the pairs of `choices`, many at once, and keeps them.
    ///
    /// # Errors
    /// The statistics cannot be read, or the work folder refuses.
    pub fn settle(&self, choices: &[(usize, Choice)], progress: &dyn Progress) -> Result<()> {
        let is_kept = |key: &Asked| {
            let made = self.layouts.made.lock().expect("invariant: no holder of the layouts panics");
            made.get(key).is_some_and(|(_, kept)| kept.is_some())
        };
        let ranks = choices.iter().filter_map(|&(i, choice)| match choice {
            Choice::Rank(rank) if rank > 0 => Some((i, rank)),
            Choice::Rank(_) | Choice::Dense | Choice::Coded { .. } => None,
        });
        let is_rounded = |&(i, _): &Asked| self.recipe.rounds(self.plan.linears[i].dtype);
        let wanted: Vec<Asked> = ranks.filter(is_rounded).filter(|key| !is_kept(key)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let stage = progress.stage("round", wanted.len() as u64, "matrices");
        wanted.par_iter().try_for_each(|&(i, rank)| {
            let linear = &self.plan.linears[i];
            stage.note(&linear.module);
            let piece = self.journal.piece(&format!("rounded-{i}"), || {
                let (laid, parts) = self.make(i, rank)?;
                let (left, right, order) = match parts {
                    Parts::Factors { b, a, .. } => (b, a, Vec::new()),
                    Parts::Pivot { pivots, coefficients, order, .. } => (pivots, coefficients, order),
                };
                let order: Vec<u8> = order.iter().flat_map(|place| place.to_le_bytes()).collect();
                let arrays = [left, right].map(|matrix| matrix.values().into_owned());
                let [left, right] = arrays;
                let fields = json!([laid.layout, laid.rank, laid.note]);
                Ok((fields, vec![Array::bits(&[laid.storage_error]), left, right, spool::words(&order)]))
            });
            let (laid, kept) = self.take_rounded(piece.with_context(|| format!("round `{}`", linear.module))?)?;
            if let Some(note) = &laid.note {
                tracing::info!("`{}`: {note}", linear.module);
            }
            let mut made = self.layouts.made.lock().expect("invariant: no holder of the layouts panics");
            made.insert((i, rank), (laid, Some(kept)));
            stage.advance(1);
            Ok(())
        })
    }

    fn take_rounded(&self, piece: Piece) -> Result<(Laid, Kept)> {
        let (layout, rank, note) = serde_json::from_value(piece.fields)?;
        let [errors, left, right, order] = <[Array; 4]>::try_from(piece.arrays)
            .map_err(|_| anyhow::anyhow!("a piece has another number of arrays"))?;
        let storage_error = errors.f64s().first().copied().unwrap_or(0.0);
        let bytes = spool::bytes_of(&order.values, 4 * order.values.len());
        let order = bytes.as_chunks::<4>().0.iter().map(|&bytes| i32::from_le_bytes(bytes)).collect();
        let kept = Kept { left: self.bases.keep(left)?, right: self.bases.keep(right)?, order };
        Ok((Laid { layout, rank, storage_error, note }, kept))
    }

    /// The parts of the pair of `rank` of the `i`-th linear, as they are stored.
    ///
    /// # Errors
    /// As [`Self::settle`].
    pub fn lay_out(&self, i: usize, rank: usize) -> Result<Parts> {
        let key = (i, rank);
        if let Some((laid, Some(kept))) =
            self.layouts.made.lock().expect("invariant: no holder of the layouts panics").get(&key)
        {
            let (left, right) = (self.bases.kept(&kept.left)?.into(), self.bases.kept(&kept.right)?.into());
            return Ok(match laid.layout {
                Layout::Factors => Parts::Factors { rank: laid.rank, b: left, a: right },
                Layout::Pivot => {
                    let order = kept.order.clone();
                    Parts::Pivot { rank: laid.rank, pivots: left, coefficients: right, order }
                }
            });
        }
        let (laid, parts) = self.make(i, rank)?;
        self.layouts.made.lock().expect("invariant: no holder of the layouts panics").insert(key, (laid, None));
        Ok(parts)
    }

    fn make(&self, i: usize, rank: usize) -> Result<(Laid, Parts)> {
        let (linear, asked) = (&self.plan.linears[i], self.asked(rank));
        let (shape, pair) = (linear.shape(), self.bases.pair(i, rank)?);
        if !self.recipe.rounds(linear.dtype) {
            let parts = pivot::lay_out(asked.layout, pair, shape);
            return Ok((asked, parts));
        }
        let basis = self.bases.get(i).expect("invariant: a linear of low rank was decomposed");
        let truncated = |rank: usize| basis.curve.squared_error(rank);
        let relative = |squared: f64| if truncated(0) > 0.0 { (squared / truncated(0)).sqrt() } else { 0.0 };
        self.with_sides(i, |sides| {
            let Rounded { parts, squared_error } = rounding::lay_out(asked.layout, &pair, shape, sides, linear.dtype);
            let fewer = asked.layout.n_parameters(rank, shape) as usize / (shape.0 + shape.1);
            let fewer = fewer / self.recipe.rank_multiple() * self.recipe.rank_multiple();
            // Factors of as many parameters are worth a try where they truncate less than rounding costs.
            if asked.layout == Layout::Pivot && fewer > 0 && squared_error > truncated(fewer) - truncated(rank) {
                let factors = rounding::lay_out(Layout::Factors, &pair.prefix(fewer), shape, sides, linear.dtype);
                let errors = [truncated(rank) + squared_error, truncated(fewer) + factors.squared_error].map(relative);
                if errors[1] < errors[0] {
                    let note = format!(
                        "factors of rank {fewer} in place of pivots of rank {rank}: stored in {:?} they err by {:.2e}, and pivots by {:.2e}",
                        linear.dtype, errors[1], errors[0],
                    );
                    let storage_error = relative(factors.squared_error);
                    let laid = Laid { layout: Layout::Factors, rank: fewer, storage_error, note: Some(note) };
                    return Ok((laid, factors.parts));
                }
            }
            Ok((Laid { storage_error: relative(squared_error), ..asked.clone() }, parts))
        })
    }

    /// Calls `f` with the metric of the `i`-th linear. Of a larger input side a Gram is not read: its diagonal is kept with the
    /// pair.
    fn with_sides<T>(&self, i: usize, f: impl FnOnce(&Sides<'_>) -> Result<T>) -> Result<T> {
        let linear = &self.plan.linears[i];
        let basis = self.bases.get(i).expect("invariant: a linear of low rank was decomposed");
        let (metrics, energies) = (self.metrics(), basis.curve.energies());
        let output = &metrics.output(linear)?;
        if linear.out_features <= linear.in_features && metrics.preset.input == Form::Gram {
            let input = Side::Diagonal(Metric::diagonal(basis.diagonals.1.clone()));
            return f(&Sides { output, input, energies });
        }
        metrics.with_input(linear, &SharedInputs::new(&[linear]), |input| {
            f(&Sides { output, input: Side::Whole(input), energies })
        })
    }
}
