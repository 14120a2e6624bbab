//! Models with some linears replaced, run alongside the source: all in one walk, so that weights are read once.

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::Tensor;
use rayon::prelude::*;

use super::solution::Solution;
use super::study::Study;
use crate::device::HOST;
use crate::eval::divergence::{self, Divergence};
use crate::formats::Format;
use crate::model::{Hidden, Overlay, Scored, Walk, WalkLimits};
use crate::operator::{BASE, Kind, Matrix, part_name};
use crate::progress::Silent;
use crate::store::Values;

/// The text of a trial.
pub(super) struct Text<'t> {
    pub windows: &'t [Vec<u32>],
    pub scored: &'t [Scored],
    pub limits: WalkLimits,
}

/// The divergence of each of `trials` from the source at the scored tokens of a text. A trial shares the states of
/// the source until its first compressed block. `verb` names the progress bar.
///
/// # Errors
/// The model cannot be run, a logit is not finite, or the work folder cannot be written.
pub(super) fn diverge(
    study: &Study<'_>,
    text: &Text<'_>,
    trials: &[&Solution<'_>],
    verb: &str,
) -> Result<Vec<Divergence>> {
    let decoder = study.session.decoder()?;
    let walk = Walk::new(&decoder, text.windows, &text.limits)?;
    let source = walk.embed(&decoder)?;
    let mut streams: Vec<Option<Hidden>> = trials.iter().map(|_| None).collect();
    let n_steps = walk.n_tokens() * (decoder.n_blocks() + 1);
    let stage = study.session.progress.stage(verb, n_steps as u64, "tokens");
    for block_idx in 0..decoder.n_blocks() {
        stage.note(&format!("block {block_idx}"));
        let dense = decoder.block(block_idx)?;
        for (trial, stream) in trials.iter().zip(&mut streams) {
            let compressed = trial.compressed_in(block_idx);
            if compressed.is_empty() && stream.is_none() {
                continue;
            }
            let overlay = trial.overlay(&compressed)?;
            let block =
                if compressed.is_empty() { dense.clone() } else { decoder.with_weights(&overlay).block(block_idx)? };
            match stream {
                Some(hidden) => walk.advance(hidden, &decoder, &block, &Silent)?,
                none => *none = Some(walk.branch(&source, &decoder, &block, &Silent)?),
            }
        }
        walk.advance(&source, &decoder, &dense, stage.as_ref())?;
    }
    stage.note("head");
    let head = decoder.head()?;
    let all: Vec<&Hidden> =
        std::iter::once(&source).chain(streams.iter().map(|s| s.as_ref().unwrap_or(&source))).collect();
    let mut divergences: Vec<Divergence> = trials.iter().map(|_| Divergence::default()).collect();
    let place = walk.place();
    let compare = |window_idx: usize, states: &[Tensor]| {
        let scored = &text.scored[window_idx];
        let reference = scored.rows(&states[0])?;
        let one = |x| divergence::compare(&head, &reference, &head, &scored.rows(x)?, &scored.tokens);
        let found = states[1..].iter().map(one).collect::<Result<Vec<_>>>();
        stage.advance(text.windows[window_idx].len() as u64);
        found.with_context(|| place(window_idx))
    };
    walk.for_each_window(&all, compare, |_, found| {
        divergences.iter_mut().zip(found).for_each(|(divergence, found)| divergence.extend(found));
        Ok(())
    })?;
    Ok(divergences)
}

/// Mean KL(source ‖ trial) in nats over all tokens of `windows` that have context.
///
/// # Errors
/// As [`diverge`].
pub(super) fn mean_kl(
    study: &Study<'_>,
    windows: &[Vec<u32>],
    trials: &[&Solution<'_>],
    verb: &str,
) -> Result<Vec<f64>> {
    let session = study.session;
    let mut piece = session.journal.piece(&verb.replace(' ', "-"), || {
        let scored = Scored::all_but_first(windows);
        let text = Text { windows, scored: &scored, limits: session.limits.clone() };
        let found = diverge(study, &text, trials, verb)?;
        let kl: Vec<f64> = found.iter().map(Divergence::mean_kl).collect();
        Ok((serde_json::Value::Null, vec![Values::from(kl)]))
    })?;
    piece.take()?.read()?.f64s()
}

impl Solution<'_> {
    /// The checkpoint with some linears replaced as the factored format would store them, rounding included.
    pub fn overlay(&self, compressed: &[usize]) -> Result<Overlay<'_>> {
        let tensors: Vec<Vec<(String, Tensor)>> =
            compressed.par_iter().map(|&i| self.laid_over(i)).collect::<Result<_>>()?;
        Ok(Overlay {
            below: self.study.session.checkpoint,
            above: tensors.into_iter().flatten().collect::<HashMap<_, _>>(),
        })
    }

    fn laid_over(&self, i: usize) -> Result<Vec<(String, Tensor)>> {
        let linear = &self.study.plan.linears[i];
        let (Some(operator), Some(forms)) = (self.operator(i)?, self.forms(i)) else {
            return Ok(Vec::new());
        };
        let name = |part: &str| format!("{}.{part}", linear.module);
        let overflow = |_| anyhow::anyhow!("`{}` has a value that {:?} cannot hold", linear.module, linear.dtype);
        let mut tensors = Vec::new();
        for term in operator.terms() {
            // A base is used as it is, because its dequantized values are not values of the dtype.
            let term = if term.form.kind == Kind::DENSE {
                term.clone()
            } else {
                term.rounded(linear.dtype).map_err(overflow)?
            };
            let parts = term.form.parts(linear.shape());
            for (part, matrix) in parts.iter().zip(&term.parts) {
                let stored = match (term.form.kind == Kind::DENSE, &operator.over) {
                    (true, None) => "weight".to_string(),
                    (true, Some(_)) => format!("{BASE}.weight"),
                    (false, _) => part_name(part.suffix, part.element),
                };
                let tensor = match matrix {
                    Matrix::Indices(places) => {
                        Tensor::new(places.iter().map(|&place| place as u32).collect::<Vec<_>>(), &HOST)?
                    }
                    matrix => Tensor::from_vec(matrix.values().into_owned(), (part.shape[0], part.shape[1]), &HOST)?,
                };
                tensors.push((name(&stored), tensor));
            }
        }
        let bias = name("bias");
        if self.study.session.checkpoint.info(&bias).is_some() {
            let values = match self.bias(i, &operator)? {
                Some(refitted) => refitted,
                None => self.study.session.checkpoint.values(&bias)?,
            };
            tensors.push((Format::Factored.exporter().bias_name(linear, &forms), Tensor::new(values, &HOST)?));
        }
        Ok(tensors)
    }
}
