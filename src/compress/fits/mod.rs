//! The fits of every unit: one driver makes them once and keeps them, so that one pass serves every budget.
//!
//! A unit is replaced as a whole: a linear, or several that share a part. A [`Fitted`] is one way to approximate it,
//! with its error at every size. `allocation` decides which sizes fit a budget, by costs and errors alone.

mod low_rank;
mod quantized;
pub(super) mod shared;
mod unit;

use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use serde_json::Value;

use super::plan::{Choice, Plan};
use crate::operator::Shape;
use crate::session::Session;
use crate::store::{Journal, Piece, Spool};

pub(super) use low_rank::Decompose;
pub(super) use quantized::{Quantize, requantized, requantized_fit};
pub(super) use shared::{Share, units_to_share};
pub(super) use unit::{Approximation, Fitted, Origin, Unit};
use unit::{Fitter, Made};

/// A fit, and the index of a linear among its members.
#[derive(Clone)]
pub(super) struct MemberFit {
    pub fitted: Arc<dyn Fitted>,
    pub member: usize,
}

/// The fits of every linear of the plan, by index.
pub(super) struct Fits {
    linears: Vec<Vec<MemberFit>>,
    /// Squared norm of every linear in the metric of the method, if a base was quantized.
    norms: Vec<f64>,
    pub spool: Mutex<Spool>,
}

impl Fits {
    pub fn new(n_linears: usize, spool: Spool) -> Self {
        let linears = (0..n_linears).map(|_| Vec::new()).collect();
        Self { linears, norms: vec![0.0; n_linears], spool: Mutex::new(spool) }
    }

    /// The fits of a linear, by index.
    pub fn of(&self, i: usize) -> &[MemberFit] {
        &self.linears[i]
    }

    /// The fit without a base, if there is one.
    pub fn low_rank(&self, i: usize) -> Option<&dyn Fitted> {
        self.linears[i].iter().map(|fit| &*fit.fitted).find(|fitted| fitted.curve().is_some())
    }

    /// The fit that was chosen.
    pub fn chosen(&self, i: usize, choice: Choice) -> Option<&MemberFit> {
        match choice {
            Choice::Fitted { fit, .. } => self.linears[i].get(fit),
            Choice::Dense | Choice::Zeros => None,
        }
    }

    /// Squared norm of a linear in the metric of the method.
    pub fn norm(&self, i: usize) -> f64 {
        self.norms[i]
    }

    /// Estimated squared error of a choice in the metric of the method.
    pub fn error(&self, i: usize, choice: Choice) -> f64 {
        let (Some(fit), Choice::Fitted { rank, .. }) = (self.chosen(i, choice), choice) else { return 0.0 };
        if let Some(curve) = fit.fitted.curve() {
            return curve.squared_error(rank);
        }
        let errors = fit.fitted.errors();
        errors.iter().find(|(available, _)| *available == rank).expect("invariant: the rank is available").1[fit.member]
    }

    /// Base and factors of a choice.
    ///
    /// # Errors
    /// The source or the work folder cannot be read.
    pub fn values(&self, i: usize, choice: Choice, origin: &Origin<'_>) -> Result<Approximation> {
        match (self.chosen(i, choice), choice) {
            (Some(fit), Choice::Fitted { rank, .. }) => fit.fitted.values(fit.member, rank, origin),
            _ => Ok(Approximation { base: None, pair: None }),
        }
    }

    /// Decomposes every linear that may become low-rank.
    ///
    /// # Errors
    /// A weight or a statistic is damaged, an eigenproblem fails, or the work folder cannot be written.
    pub fn decompose(&mut self, session: &Session<'_>, plan: &Plan, method: &Decompose<'_>) -> Result<()> {
        let wanted = (0..plan.linears.len()).filter(|&i| method.max_ranks[i] > 0);
        let units: Vec<Unit> = wanted.map(|i| Unit { members: vec![i] }).collect();
        for (unit, fitted) in units.iter().zip(fit_all(session, plan, method, &units, &self.spool)?) {
            self.add(unit, fitted);
        }
        Ok(())
    }

    /// Adds quantized bases, with the factors that compensate for them.
    ///
    /// # Errors
    /// As [`Self::decompose`].
    pub fn quantize(
        &mut self,
        session: &Session<'_>,
        plan: &Plan,
        method: &Quantize<'_>,
        units: Vec<Unit>,
    ) -> Result<()> {
        for (unit, (norm, all)) in units.iter().zip(fit_all(session, plan, method, &units, &self.spool)?) {
            self.norms[unit.members[0]] = norm;
            all.into_iter().for_each(|fitted| self.add(unit, fitted));
        }
        Ok(())
    }

    /// Adds fits of several linears that share their right part.
    ///
    /// # Errors
    /// As [`Self::decompose`].
    pub fn share(&mut self, session: &Session<'_>, plan: &Plan, method: &Share<'_>, units: &[Unit]) -> Result<()> {
        for (unit, fitted) in units.iter().zip(fit_all(session, plan, method, units, &self.spool)?) {
            self.add(unit, fitted);
        }
        Ok(())
    }

    fn add(&mut self, unit: &Unit, fitted: Arc<dyn Fitted>) {
        for (member, &i) in unit.members.iter().enumerate() {
            self.linears[i].push(MemberFit { fitted: Arc::clone(&fitted), member });
        }
    }
}

/// The journal key of the values of a fit whose piece is `key`.
pub(super) fn values_key(key: &str) -> String {
    format!("{key}-values")
}

/// Bytes that the fit of a unit (m, n) takes: weight and image, the output Grams of these heights in packed form, and
/// the eigenproblem with its workspace and vectors.
pub(super) fn fitting_bytes((m, n): Shape, heights: &[usize]) -> u64 {
    let small = m.min(n);
    let grams: u64 = heights.iter().map(|&m| 2 * (m * m) as u64).sum();
    20 * (m * n) as u64 + 32 * (small * small) as u64 + 8 * (small * (m + n)) as u64 + grams
}

/// Fits units block by block; the units of a block are fitted in parallel, as far as memory allows. Finished units
/// are pieces of the journal.
fn fit_all<F: Fitter>(
    session: &Session<'_>,
    plan: &Plan,
    fitter: &F,
    units: &[Unit],
    spool: &Mutex<Spool>,
) -> Result<Vec<F::Output>> {
    let stage = session.progress.stage(fitter.verb(), units.len() as u64, "matrices");
    let first = |unit: &Unit| &plan.linears[unit.members[0]];
    let mut fits = Vec::new();
    for group in units.chunk_by(|a, b| !fitter.goes_by_block() || first(a).block == first(b).block) {
        let members = group.iter().flat_map(|unit| &unit.members);
        let shared = fitter.shared(&members.map(|&i| &plan.linears[i]).collect::<Vec<_>>());
        let one = |unit: &Unit| -> Result<F::Output> {
            let module = &first(unit).module;
            stage.note(module);
            let fit = pieces(&session.journal, fitter, unit, &shared).and_then(|(piece, values)| {
                fitter.keep(unit, piece, values, &mut spool.lock().expect("invariant: no holder of the spool panics"))
            });
            stage.advance(1);
            fit.with_context(|| format!("{} `{module}`", fitter.verb()))
        };
        let costs: Vec<u64> = group
            .iter()
            .map(|unit| {
                let (heights, n) = shared::heights(plan, unit);
                let grams: Vec<usize> = unit.members.iter().map(|&i| plan.linears[i].gram_height()).collect();
                fitting_bytes((heights.iter().sum(), n), &grams)
            })
            .collect();
        let workers = session.workers(&costs)?;
        fits.extend(workers.collect(&costs, |i| one(&group[i]))?);
        fitter.after_block(&group[0])?;
    }
    Ok(fits)
}

/// The pieces of a unit, from an earlier run or newly made.
fn pieces<F: Fitter>(journal: &Journal, fitter: &F, unit: &Unit, shared: &F::Shared) -> Result<(Piece, Option<Piece>)> {
    let key = fitter.key(unit);
    if let Some(piece) = journal.get(&key)? {
        let values = journal.unread(&values_key(&key))?;
        if values.is_some() || fitter.is_spent(unit, journal) {
            return Ok((piece, values));
        }
    }
    let Made { fields, kept, values } = fitter.fit(unit, shared)?;
    // The values come first, so that they exist if the other piece does.
    let values = journal.put(&values_key(&key), Value::Null, values)?;
    Ok((journal.put(&key, fields, kept)?, Some(values)))
}
