//! Models with some linears replaced, run beside the original: all of them in one walk, so that weights are read once.

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::allocate::Choice;
use super::study::Study;
use crate::eval::divergence::{self, Divergence};
use crate::formats::{Format, Parts};
use crate::journal::Array;
use crate::model::linear::{BASE, LR_A, LR_B, LR_COEFFICIENTS, LR_ORDER, LR_PIVOT};
use crate::model::{Decoder, Hidden, Overlay, Scored, Walk, WalkLimits};
use crate::progress::Progress;

impl Study<'_> {
    /// How far each of `variants` (choices, one a linear) is from the original over `windows`, at their `scored` tokens. A variant shares the original's states until its first compressed block.
    ///
    /// # Errors
    /// The model cannot be run, a logit is not finite, or the work folder refuses.
    pub fn diverge(
        &self,
        windows: &[Vec<u32>],
        limits: &WalkLimits,
        scored: &[Scored],
        variants: &[Vec<Choice>],
        verb: &str,
        progress: &dyn Progress,
    ) -> Result<Vec<Divergence>> {
        let decoder = Decoder::open(self.checkpoint)?;
        let mut walk = Walk::new(&decoder, windows, limits)?;
        let mut original = walk.embed(&decoder)?;
        let mut streams: Vec<Option<Hidden>> = variants.iter().map(|_| None).collect();
        let n_steps = walk.n_tokens() * (decoder.n_blocks() + 1);
        let stage = progress.stage(verb, n_steps as u64, "tokens");
        let silent = crate::progress::Silent;
        for block_idx in 0..decoder.n_blocks() {
            stage.note(&format!("block {block_idx}"));
            let dense = decoder.block(block_idx)?;
            for (choices, stream) in variants.iter().zip(&mut streams) {
                let compressed = self.compressed_in(block_idx, choices);
                if compressed.is_empty() && stream.is_none() {
                    continue;
                }
                let overlay = self.overlay(&compressed)?;
                let block = if compressed.is_empty() {
                    dense.clone()
                } else {
                    decoder.with_weights(&overlay).block(block_idx)?
                };
                let observe = &mut |_, _: &Tensor| Ok(());
                match stream {
                    Some(hidden) => walk.advance(hidden, &decoder, &block, observe, &silent)?,
                    none => *none = Some(walk.branch(&original, &decoder, &block, observe, &silent)?),
                }
            }
            walk.advance(&mut original, &decoder, &dense, &mut |_, _| Ok(()), stage.as_ref())?;
        }
        stage.note("head");
        let head = decoder.head()?;
        let all: Vec<&Hidden> =
            std::iter::once(&original).chain(streams.iter().map(|s| s.as_ref().unwrap_or(&original))).collect();
        let mut divergences: Vec<Divergence> = variants.iter().map(|_| Divergence::default()).collect();
        let (mut scored, place) = (scored.iter().enumerate(), walk.place());
        walk.for_each_window(&all, |window, states| {
            let (window_idx, scored) = scored.next().expect("invariant: every window has its scored tokens");
            let reference = scored.rows(&states[0])?;
            for (divergence, x) in divergences.iter_mut().zip(&states[1..]) {
                let found = divergence::compare(&head, &reference, &head, &scored.rows(x)?, &scored.tokens);
                divergence.extend(found.with_context(|| place(window_idx))?);
            }
            stage.advance(window.len() as u64);
            Ok(())
        })?;
        Ok(divergences)
    }

    /// Mean KL(original ‖ variant) in nats at every token of `windows` that has context, one window at a time.
    ///
    /// # Errors
    /// As [`Self::diverge`].
    pub fn mean_kl(
        &self,
        windows: &[Vec<u32>],
        variants: &[Vec<Choice>],
        verb: &str,
        progress: &dyn Progress,
    ) -> Result<Vec<f64>> {
        let piece = self.journal.piece(&verb.replace(' ', "-"), || {
            let scored = Scored::all_but_first(windows);
            let found = self.diverge(windows, &self.limits.one_window(), &scored, variants, verb, progress)?;
            let kl: Vec<f64> = found.iter().map(Divergence::mean_kl).collect();
            Ok((serde_json::Value::Null, vec![Array::bits(&kl)]))
        })?;
        Ok(piece.arrays[0].f64s())
    }

    /// The compressed linears of a block with what becomes of them.
    pub fn compressed_in(&self, block_idx: usize, choices: &[Choice]) -> Vec<(usize, Choice)> {
        let is_here = |i: usize| self.plan.linears[i].id.is_some_and(|id| id.block == block_idx);
        let compressed = choices.iter().enumerate().filter(|(_, choice)| **choice != Choice::Dense);
        compressed.filter(|&(i, _)| is_here(i)).map(|(i, &choice)| (i, choice)).collect()
    }

    /// The checkpoint with some linears as the factored format would store them, rounding included.
    pub fn overlay(&self, compressed: &[(usize, Choice)]) -> Result<Overlay<'_>> {
        let tensors: Vec<Vec<(String, Tensor)>> =
            compressed.par_iter().map(|&(i, choice)| self.laid_over(i, choice)).collect::<Result<_>>()?;
        Ok(Overlay { below: self.checkpoint, above: tensors.into_iter().flatten().collect::<HashMap<_, _>>() })
    }

    fn laid_over(&self, i: usize, choice: Choice) -> Result<Vec<(String, Tensor)>> {
        let linear = &self.plan.linears[i];
        let (m, n) = linear.shape();
        let (Some(module), Some(entry)) = (self.module(i, choice)?, self.stored_entry(i, choice)) else {
            return Ok(Vec::new());
        };
        let name = |part: &str| format!("{}.{part}", linear.module);
        let weight = |part: &str| name(&format!("{part}.weight"));
        let mut matrices: Vec<(String, Vec<f32>, (usize, usize))> = Vec::new();
        let mut tensors = Vec::new();
        if let Some(base) = &module.base {
            let name = if module.parts.is_some() { weight(BASE) } else { linear.weight_name() };
            matrices.push((name, base.values().into_owned(), (m, n)));
        }
        let overflow = |_| anyhow::anyhow!("`{}` has a value that {:?} cannot hold", linear.module, linear.dtype);
        match module.parts.map(|parts| parts.rounded(linear.dtype)).transpose().map_err(overflow)? {
            None => {}
            Some(Parts::Factors { rank, b, a }) => {
                matrices.push((weight(LR_A), a.values().into_owned(), (rank, n)));
                matrices.push((weight(LR_B), b.values().into_owned(), (m, rank)));
            }
            Some(Parts::Pivot { rank, pivots, coefficients, order }) => {
                matrices.push((weight(LR_PIVOT), pivots.values().into_owned(), (rank, n)));
                matrices.push((weight(LR_COEFFICIENTS), coefficients.values().into_owned(), (m - rank, rank)));
                let order: Vec<u32> = order.into_iter().map(|place| place as u32).collect();
                tensors.push((name(LR_ORDER), Tensor::new(order, &Device::Cpu)?));
            }
        }
        for (name, values, shape) in matrices {
            tensors.push((name, Tensor::from_vec(values, shape, &Device::Cpu)?));
        }
        let bias = name("bias");
        if self.checkpoint.info(&bias).is_some() {
            let values = Tensor::new(self.checkpoint.values(&bias)?, &Device::Cpu)?;
            tensors.push((Format::Factored.exporter().bias_name(linear, &entry), values));
        }
        Ok(tensors)
    }
}
