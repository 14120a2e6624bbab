//! The operators that were chosen, one per compressed linear, before they are written.
//!
//! Fits are laid out and rounded when they are first read, or all at once by [`Solution::settle`]; from then on every
//! reader of a linear (the output, a trial or a sweep) gets the same values. Refinements change values, never forms.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::center::{Biases, Means};
use super::fits::{Fitted, fitting_bytes, values_key};
use super::metrics::SharedInputs;
use super::pieces;
use super::plan::Choice;
use super::storing::{self, Laid};
use super::study::Study;
use crate::approx::low_rank::{ErrorCurve, LowRank};
use crate::approx::metric::{MetricPair, PlainSides};
use crate::checkpoint::{Dtype, cast};
use crate::linalg;
use crate::model::inventory::{self, LinearInfo};
use crate::operator::{Element, Form, Forms, Kind, Matrix, Operator, Term};
use crate::progress::{Progress, Stage};
use crate::store::{Array, Piece, Spooled, Values};

/// The stored matrices, once settled.
type Kept = Vec<(Element, Spooled)>;

/// What a refinement puts in the place of a fit.
pub(super) enum Refit<A> {
    /// A pair of the same rank: `B` and `A`, unless it is already laid out.
    Pair { curve: ErrorCurve, rank: usize, pair: Option<[A; 2]> },
    /// Codes of the same quantizer.
    Base(Arc<dyn Fitted>),
}

/// A fit that replaces the chosen one after a refinement.
struct Refitted {
    refit: Refit<Spooled>,
    /// Further sides of its metric that were plain.
    plain_sides: PlainSides,
    /// The means that its bias follows from, if its linear is centered.
    means: Option<Means>,
}

/// Changes the values of a solution, never its forms.
pub(super) trait Refine: Send + Sync {
    /// Refines the whole solution once, before it is written.
    ///
    /// # Errors
    /// The refinement fails.
    fn refine(&self, _solution: &mut Solution<'_>) -> Result<()> {
        Ok(())
    }

    /// Refines the operator of the `i`-th linear of the plan whenever it is made.
    ///
    /// # Errors
    /// The refinement fails.
    fn operator(&self, _solution: &Solution<'_>, _i: usize, operator: Operator) -> Result<Operator> {
        Ok(operator)
    }
}

/// Refinements, in order of application.
pub(super) type Refinements = Arc<[Box<dyn Refine>]>;

pub(super) struct Solution<'s> {
    pub study: &'s Study<'s>,
    pub choices: Vec<Choice>,
    refinements: Refinements,
    refitted: BTreeMap<usize, Refitted>,
    laid: Mutex<BTreeMap<usize, (Laid, Option<Kept>)>>,
    pub(super) biases: Biases,
}

impl<'s> Solution<'s> {
    /// The operators of `choices`, one per linear of the plan.
    pub fn new(study: &'s Study<'s>, choices: Vec<Choice>, refinements: &Refinements) -> Self {
        let (refitted, laid, biases) = (BTreeMap::new(), Mutex::default(), Biases::default());
        Self { study, choices, refinements: Arc::clone(refinements), refitted, laid, biases }
    }

    /// Runs every refinement of the recipe on the solution as a whole.
    ///
    /// # Errors
    /// A refinement fails.
    pub fn refine(&mut self) -> Result<()> {
        Arc::clone(&self.refinements).iter().try_for_each(|refinement| refinement.refine(self))
    }

    /// Whether a linear is laid out, and its values are kept.
    pub fn is_settled(&self, i: usize) -> bool {
        let laid = self.laid.lock().expect("invariant: no holder of the layouts panics");
        laid.get(&i).is_some_and(|(_, kept)| kept.is_some())
    }

    /// Replaces the fit of a linear.
    ///
    /// # Errors
    /// The work folder cannot be written.
    pub fn refit(
        &mut self,
        i: usize,
        refit: Refit<Array>,
        plain_sides: PlainSides,
        means: Option<Means>,
    ) -> Result<()> {
        let mut spool = self.study.fits.spool.lock().expect("invariant: no holder of the spool panics");
        let (refit, is_new) = match refit {
            Refit::Base(fitted) => (Refit::Base(fitted), false),
            Refit::Pair { curve, rank, pair: None } => (Refit::Pair { curve, rank, pair: None }, false),
            Refit::Pair { curve, rank, pair: Some([b, a]) } => {
                (Refit::Pair { curve, rank, pair: Some([spool.push(b)?, spool.push(a)?]) }, true)
            }
        };
        self.biases.forget(i);
        let before = self.refitted.insert(i, Refitted { refit, plain_sides, means });
        if let Some(Refitted { refit: Refit::Pair { pair: Some(pair), .. }, .. }) = before {
            pair.into_iter().for_each(|factor| spool.release(factor));
        }
        if is_new {
            self.laid.get_mut().expect("invariant: no holder of the layouts panics").remove(&i);
        }
        Ok(())
    }

    /// The fit of a linear, whose details are reported: codes of a refinement, or what was chosen.
    pub fn fitted(&self, i: usize) -> Option<&dyn Fitted> {
        let chosen = || self.study.fits.chosen(i, self.choices[i]).map(|fit| &*fit.fitted);
        self.refitted_base(i).or_else(chosen).or_else(|| self.study.fits.low_rank(i))
    }

    /// The codes of a linear that a refinement made.
    fn refitted_base(&self, i: usize) -> Option<&dyn Fitted> {
        match &self.refitted.get(&i)?.refit {
            Refit::Base(fitted) => Some(&**fitted),
            Refit::Pair { .. } => None,
        }
    }

    /// The means of a linear that a refinement fitted, if it is centered.
    pub(super) fn refitted_means(&self, i: usize) -> Option<&Means> {
        self.refitted.get(&i)?.means.as_ref()
    }

    /// The error of a linear at every rank, in its latest fit; `None` under a base.
    pub fn curve(&self, i: usize) -> Option<&ErrorCurve> {
        match self.refitted.get(&i).map(|refitted| &refitted.refit) {
            Some(Refit::Pair { curve, .. }) => Some(curve),
            Some(Refit::Base(_)) => None,
            None => match self.study.fits.chosen(i, self.choices[i]) {
                // The curve of a unit is not the curve of one of its members.
                Some(chosen) => chosen.fitted.curve(),
                None => self.study.fits.low_rank(i)?.curve(),
            },
        }
    }

    /// Sides of its metric that are plain because their form was all zeros.
    pub fn plain_sides(&self, i: usize) -> PlainSides {
        let own = self.fitted(i).map_or(PlainSides::default(), |fitted| fitted.details().plain_sides);
        self.refitted.get(&i).map_or(own, |refitted| own.union(refitted.plain_sides))
    }

    /// The compressed linears of the plan.
    pub fn compressed(&self) -> Vec<usize> {
        (0..self.choices.len()).filter(|&i| self.choices[i] != Choice::Dense).collect()
    }

    /// The compressed linears of a block.
    pub fn compressed_in(&self, block_idx: usize) -> Vec<usize> {
        let is_here = |i: &usize| self.study.plan.linears[*i].id.is_some_and(|id| id.block == block_idx);
        self.compressed().into_iter().filter(is_here).collect()
    }

    /// How the `i`-th linear is stored: as settled, or as planned.
    pub fn forms(&self, i: usize) -> Option<Forms> {
        let mut forms = self.study.planned(i, self.choices[i])?;
        let laid = self.laid.lock().expect("invariant: no holder of the layouts panics");
        if let (Some(over), Some((laid, _))) = (&mut forms.over, laid.get(&i)) {
            *over = Form { storage: over.storage, ..laid.form };
        }
        Some(forms)
    }

    /// The same for all linears.
    pub fn all_forms(&self) -> Vec<Option<Forms>> {
        (0..self.choices.len()).map(|i| self.forms(i)).collect()
    }

    /// The layout of a linear without a base, once it is made.
    pub fn laid(&self, i: usize) -> Option<Laid> {
        let laid = self.laid.lock().expect("invariant: no holder of the layouts panics");
        laid.get(&i).map(|(laid, _)| laid.clone())
    }

    /// The fit of a linear without a base: its own, or from a refinement.
    ///
    /// # Errors
    /// The work folder cannot be read.
    pub fn pair(&self, i: usize) -> Result<LowRank> {
        if let Some(Refitted { refit: Refit::Pair { rank, pair, .. }, .. }) = self.refitted.get(&i) {
            let [b, a] = pair.as_ref().context("invariant: what was laid out is not laid out again")?;
            let mut spool = self.study.fits.spool.lock().expect("invariant: no holder of the spool panics");
            return Ok(LowRank { rank: *rank, b: spool.get(b)?.f32s()?, a: spool.get(a)?.f32s()? });
        }
        let found = self.study.values(i, self.choices[i])?.pair;
        Ok(found.expect("invariant: a linear of low rank has a fit"))
    }

    /// Lays out and rounds `linears` in parallel, and keeps the results.
    ///
    /// # Errors
    /// The statistics cannot be read, or the work folder cannot be written.
    pub fn settle(&self, linears: &[usize], progress: &dyn Progress) -> Result<()> {
        let is_wanted =
            |i: &usize| self.asked(*i).is_some() && storing::is_work(self.study, *i) && !self.is_settled(*i);
        let wanted: Vec<usize> = linears.iter().copied().filter(is_wanted).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let stage = progress.stage("round", wanted.len() as u64, "matrices");
        let cost = |linear: &LinearInfo| fitting_bytes(linear.shape(), &[linear.gram_height()]);
        // A fit in another layout takes as much again.
        let copies = if self.study.recipe.second_layout().is_some() { 2 } else { 1 };
        let costs: Vec<u64> = wanted.iter().map(|&i| copies * cost(&self.study.plan.linears[i])).collect();
        let workers = self.study.session.workers(&costs)?;
        workers.collect(&costs, |at| self.settle_one(wanted[at], stage.as_ref())).map(drop)
    }

    fn settle_one(&self, i: usize, stage: &dyn Stage) -> Result<()> {
        let module = &self.study.plan.linears[i].module;
        stage.note(module);
        let (laid, kept) = self.settled(i).with_context(|| format!("rounding `{module}`"))?;
        if let Some(note) = &laid.note {
            tracing::info!("`{module}`: {note}");
        }
        self.laid.lock().expect("invariant: no holder of the layouts panics").insert(i, (laid, kept));
        stage.advance(1);
        Ok(())
    }

    /// The layout of a linear, and its values unless they are already written: from the journal, or newly made. After
    /// that its factors are not read, unless the order of its ranks is kept.
    fn settled(&self, i: usize) -> Result<(Laid, Option<Kept>)> {
        let journal = &self.study.session.journal;
        if let Some(piece) = journal.get(&pieces::laid(i))? {
            let values = journal.get(&pieces::rounded(i))?;
            if values.is_some() || journal.has(&pieces::written(i)) {
                return self.take_laid(i, piece, values);
            }
        }
        let (laid, term) = self.make(i)?;
        let fields = json!([laid.form.kind, laid.form.size.rank(), laid.note, laid.storage_error, laid.error]);
        let dtype = self.study.plan.linears[i].dtype;
        let parts = term.parts.into_iter().map(|part| narrowed(part, dtype));
        let values = journal.put(&pieces::rounded(i), Value::Null, parts.collect())?;
        let settled = self.take_laid(i, journal.put(&pieces::laid(i), fields, Vec::new())?, Some(values))?;
        if !self.study.recipe.elastic() {
            journal.remove(&values_key(&pieces::decomposed(i)));
        }
        Ok(settled)
    }

    fn take_laid(&self, i: usize, mut piece: Piece, values: Option<Piece>) -> Result<(Laid, Option<Kept>)> {
        let (kind, rank, note, storage_error, error): (Kind, usize, _, f64, _) =
            serde_json::from_value(piece.fields.take())?;
        let planned = self.asked(i).context("invariant: a linear of low rank is planned")?;
        let form = Form { right: planned.right, ..Form::of_rank(kind, rank, self.study.plan.linears[i].shape()) };
        let laid = Laid { form, storage_error, error, note };
        let Some(mut values) = values else { return Ok((laid, None)) };
        let mut spool = self.study.fits.spool.lock().expect("invariant: no holder of the spool panics");
        let mut kept = Kept::new();
        for &(_, element) in kind.structure().suffixes() {
            kept.push((element, spool.push(values.take()?)?));
        }
        Ok((laid, Some(kept)))
    }

    /// The requested form of a low-rank linear without a base.
    fn asked(&self, i: usize) -> Option<Form> {
        let Choice::Fitted { .. } = self.choices[i] else { return None };
        let forms = self.study.planned(i, self.choices[i])?;
        forms.over.filter(|_| forms.base.is_none()).map(|form| Form { storage: None, ..form })
    }

    /// A low-rank linear without a base, as it is stored.
    fn lay_out(&self, i: usize) -> Result<Term> {
        let settled = self.laid.lock().expect("invariant: no holder of the layouts panics");
        if let Some((laid, Some(kept))) = settled.get(&i) {
            let mut spool = self.study.fits.spool.lock().expect("invariant: no holder of the spool panics");
            let dtype = self.study.plan.linears[i].dtype;
            let matrix = |(element, array): &(Element, Spooled)| -> Result<Matrix> {
                let values = spool.get(array)?;
                Ok(match element {
                    Element::Float => widened(values, dtype)?.into(),
                    Element::Index => Matrix::Indices(values.i32s()?),
                })
            };
            return Ok(Term { form: laid.form, parts: kept.iter().map(matrix).collect::<Result<_>>()? });
        }
        drop(settled);
        let (laid, term) = self.make(i)?;
        self.laid.lock().expect("invariant: no holder of the layouts panics").insert(i, (laid, None));
        Ok(term)
    }

    fn make(&self, i: usize) -> Result<(Laid, Term)> {
        let form = self.asked(i).context("invariant: a linear of low rank is planned")?;
        storing::lay_out(self.study, (i, self.curve(i)), form, self.pair(i)?)
    }

    /// The operator that replaces the `i`-th linear; `None` if the linear stays as it is.
    ///
    /// # Errors
    /// The work folder cannot be read, or a refinement fails.
    pub fn operator(&self, i: usize) -> Result<Option<Operator>> {
        let choice = self.choices[i];
        let Some(forms) = self.study.planned(i, choice) else { return Ok(None) };
        let mut operator = match (choice, forms.base) {
            (Choice::Zeros | Choice::Dense, _) => return Ok(Some(Operator::of(Term::zeros()))),
            (_, None) => Operator::of(self.lay_out(i)?),
            (_, Some(_)) => {
                let found = match self.refitted_base(i) {
                    Some(base) => base.values(0, 0, &self.study.origin())?,
                    None => self.study.values(i, choice)?,
                };
                let base = found.base.expect("invariant: a quantized base has codes");
                let storage = Some(base.storage());
                let over =
                    found.pair.map(|pair| Term::laid_out(Kind::FACTORS, pair, self.study.plan.linears[i].shape()));
                Operator { base: Some(Term::base(Matrix::Quantized(base), storage)), over }
            }
        };
        for refinement in self.refinements.iter() {
            operator = refinement.operator(self, i, operator)?;
        }
        Ok(Some(operator))
    }

    /// Squared error of an operator of the `i`-th linear in the metric of the method, over the squared
    /// norm of the weight in it.
    ///
    /// # Errors
    /// The weight or the statistics cannot be read.
    pub fn relative_squared_error(&self, i: usize, operator: &Operator) -> Result<f64> {
        let study = self.study;
        if operator.over.is_none() && self.refitted_base(i).is_none() {
            // The error of a base alone was measured when it was made.
            let norm = study.fits.norm(i);
            return Ok(if norm > 0.0 { study.fits.error(i, self.choices[i]) / norm } else { 0.0 });
        }
        let linear = &study.plan.linears[i];
        let (m, n) = linear.shape();
        let values = inventory::weight(study.session.checkpoint, linear)?;
        let weight = linalg::transposed_from_row_major(&values, m, n);
        let error = &weight - linalg::transposed_from_row_major(&operator.product((m, n)), m, n);
        let output = study.metrics().output(linear)?;
        study.metrics().with_input(linear, &SharedInputs::new(&[linear]), |input| {
            let metric = MetricPair { output: &output, input };
            let norm = metric.squared_norm(weight.transpose());
            Ok(if norm > 0.0 { metric.squared_norm(error.transpose()) / norm } else { 0.0 })
        })
    }
}

/// The values of a rounded part, in the dtype that they were rounded to.
fn narrowed(matrix: Matrix, dtype: Dtype) -> Values {
    match matrix {
        Matrix::Float(values) => {
            let is_exact = |bytes: &Vec<u8>| cast::decode(dtype, bytes).is_some_and(|back| back == *values);
            cast::encode(dtype, &values).ok().filter(is_exact).map_or_else(|| values.into(), Values::from)
        }
        Matrix::Quantized(codes) => codes.dequantize().into(),
        Matrix::Indices(indices) => indices.into(),
    }
}

/// The values of [`narrowed`] in f32.
fn widened(values: Values, dtype: Dtype) -> Result<Vec<f32>> {
    match values {
        Values::U8(bytes) => cast::decode(dtype, &bytes).context("invariant: what was narrowed is a float"),
        values => values.f32s(),
    }
}
