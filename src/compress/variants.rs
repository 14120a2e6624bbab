//! Models with some linears replaced, run beside the original: all of them in one walk, so that weights are read once.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::allocate::Choice;
use super::pivot;
use super::study::Study;
use crate::checkpoint::{Dtype, cast};
use crate::eval::divergence::{self, Divergence};
use crate::formats::{Entry, Format, NamedBytes};
use crate::model::{Decoder, Hidden, Overlay, Walk, WalkLimits};
use crate::progress::Progress;

impl Study<'_> {
    /// How far each of `variants` (choices, one a linear) is from the original over `windows`, at the tokens of `scored`
    /// positions. A variant shares the original's states until its first compressed block.
    ///
    /// # Errors
    /// The model cannot be run, a logit is not finite, or the work folder refuses.
    pub fn diverge(
        &self,
        windows: &[Vec<u32>],
        limits: &WalkLimits,
        scored: &dyn Fn(usize) -> Range<usize>,
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
        walk.for_each_window(&all, |window, states| {
            let range = scored(window.len());
            let rows = |x: &Tensor| Ok::<_, anyhow::Error>(x.narrow(0, range.start - 1, range.len())?);
            let reference = rows(&states[0])?;
            for (divergence, x) in divergences.iter_mut().zip(&states[1..]) {
                divergence.extend(divergence::compare(&head, &reference, &head, &rows(x)?, &window[range.clone()])?);
            }
            stage.advance(window.len() as u64);
            Ok(())
        })?;
        Ok(divergences)
    }

    /// The compressed linears of a block with their ranks.
    pub fn compressed_in(&self, block_idx: usize, choices: &[Choice]) -> Vec<(usize, usize)> {
        let is_here = |i: usize| self.plan.linears[i].id.is_some_and(|id| id.block == block_idx);
        let ranks = choices.iter().enumerate().filter_map(|(i, choice)| Some((i, choice.rank()?)));
        ranks.filter(|&(i, _)| is_here(i)).collect()
    }

    /// The checkpoint with some linears as the factored format would store them, rounding included.
    pub fn overlay(&self, compressed: &[(usize, usize)]) -> Result<Overlay<'_>> {
        let exporter = Format::Factored.exporter();
        let layout = self.recipe.layout;
        let tensors: Vec<Vec<(String, Tensor)>> = compressed
            .par_iter()
            .map(|&(i, rank)| {
                let linear = &self.plan.linears[i];
                let parts = pivot::lay_out(layout, self.bases.pair(i, rank)?, linear.shape());
                let specs = exporter.specs(linear, Entry { rank, layout });
                let mut tensors = Vec::new();
                for (spec, NamedBytes { name, bytes }) in specs.into_iter().zip(exporter.tensors(linear, &parts)?) {
                    let tensor = match spec.dtype {
                        Dtype::I32 => Tensor::new(places(&bytes), &Device::Cpu)?,
                        dtype => {
                            let values = cast::decode(dtype, &bytes).context("invariant: parts are floats")?;
                            Tensor::from_vec(values, spec.shape, &Device::Cpu)?
                        }
                    };
                    tensors.push((name, tensor));
                }
                let bias = format!("{}.bias", linear.module);
                if self.checkpoint.info(&bias).is_some() {
                    let values = self.checkpoint.values(&bias)?;
                    tensors.push((exporter.bias_name(linear, layout), Tensor::new(values, &Device::Cpu)?));
                }
                Ok(tensors)
            })
            .collect::<Result<_>>()?;
        Ok(Overlay { below: self.checkpoint, above: tensors.into_iter().flatten().collect::<HashMap<_, _>>() })
    }
}

fn places(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
}
