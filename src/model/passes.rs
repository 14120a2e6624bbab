//! Passes of all windows through one block that pause at an input site, so that its linears can change before they run.

use anyhow::Result;
use candle_core::Tensor;

use super::block::{Block, Half, Next, Paused};
use super::decoder::Decoder;
use super::ops::non_finite_window;
use super::slot::InputSite;
use super::walk::{Hidden, Walk};
use crate::device::to_host;
use crate::progress::Stage;

/// The passes of a walk through a block, paused before the linears of `site`.
pub struct Passes<'w> {
    walk: &'w Walk<'w>,
    site: InputSite,
    /// [`Paused::residual`] of each batch; [`Paused::input`] is in `input`.
    residual: Hidden,
    input: Hidden,
}

impl<'w> Passes<'w> {
    /// Begins with `states` at the first site of a block.
    ///
    /// # Errors
    /// The shapes do not match, or the work folder cannot be read or written.
    pub fn begin(walk: &'w Walk<'w>, states: Hidden, block: &Block) -> Result<Self> {
        let mut input = Vec::with_capacity(walk.n_batches());
        walk.workers().in_order(
            walk.n_batches(),
            |batch_idx| Ok(to_host(&block.begin(&walk.batch(&states, batch_idx)?)?.input)?),
            |_, values| {
                input.push(walk.spool().push(values)?);
                Ok(())
            },
        )?;
        Ok(Self { walk, site: InputSite::Qkv, residual: states, input: Hidden::new(input) })
    }

    /// The input (batch, n_tokens, in) of one batch at `site`, which is where the passes pause or the next one.
    ///
    /// # Errors
    /// The shapes do not match, or the work folder cannot be read.
    pub fn input_at(&self, site: InputSite, block: &Block, batch_idx: usize) -> Result<Tensor> {
        let input = self.walk.batch(&self.input, batch_idx)?;
        if self.site == site {
            return Ok(input);
        }
        match block.within_sublayer(self.site, &input, self.walk.rope())? {
            Some((next, input)) if next == site => Ok(input),
            _ => anyhow::bail!("invariant: `{}` comes after `{}`", site.name(), self.site.name()),
        }
    }

    /// Runs what comes before the linears of `site`, which is not an expert's.
    ///
    /// # Errors
    /// The shapes do not match, an input is not finite, or the work folder cannot be written.
    pub fn resume_to(&mut self, site: InputSite, decoder: &Decoder<'_>, block: &Block) -> Result<()> {
        while self.site != site {
            self.resume(decoder, block)?;
        }
        Ok(())
    }

    /// Runs the linears of the site, and what follows up to the next one.
    fn resume(&mut self, decoder: &Decoder<'_>, block: &Block) -> Result<()> {
        let walk = self.walk;
        let (mut reached, mut input) = (self.site, Vec::with_capacity(walk.n_batches()));
        walk.workers().in_order(
            walk.n_batches(),
            |batch_idx| {
                let (next, residual) = self.next(block, batch_idx)?;
                let values = to_host(&next.1)?;
                if let Some(window) = non_finite_window(&values, &next.1)? {
                    return Err(walk.not_finite(decoder, block, Some(next.0), (batch_idx, window)));
                }
                Ok((next.0, residual.map(|residual| to_host(&residual)).transpose()?, values))
            },
            |batch_idx, (site, residual, values)| {
                reached = site;
                let mut spool = walk.spool();
                if let Some(residual) = residual {
                    spool.set(&mut self.residual.lock(batch_idx), residual.into())?;
                }
                input.push(spool.push(values)?);
                Ok(())
            },
        )?;
        self.site = reached;
        walk.release(std::mem::replace(&mut self.input, Hidden::new(input)));
        Ok(())
    }

    /// Runs the rest of the block; the states after it.
    ///
    /// # Errors
    /// As [`Self::resume_to`].
    pub fn end(self, decoder: &Decoder<'_>, block: &Block, progress: &dyn Stage) -> Result<Hidden> {
        let walk = self.walk;
        walk.workers().in_order(
            walk.n_batches(),
            |batch_idx| {
                let mut at = self.paused(batch_idx)?;
                loop {
                    match block.resume(&at, walk.rope(), &mut |_, _| Ok(()))? {
                        Next::Site(next) => at = next,
                        Next::End(y) => {
                            let values = to_host(&y)?;
                            let Some(window) = non_finite_window(&values, &y)? else {
                                progress.advance((y.dim(0)? * y.dim(1)?) as u64);
                                return Ok(values);
                            };
                            let inputs = to_host(&at.input)?;
                            let site = non_finite_window(&inputs, &at.input)?.map(|_| at.site);
                            return Err(walk.not_finite(decoder, block, site, (batch_idx, window)));
                        }
                    }
                }
            },
            |batch_idx, values| walk.spool().set(&mut self.residual.lock(batch_idx), values.into()),
        )?;
        walk.release(self.input);
        Ok(self.residual)
    }

    /// The next site of one batch and its input, and the residual there if it changes on the way: it is not read or
    /// written otherwise.
    fn next(&self, block: &Block, batch_idx: usize) -> Result<((InputSite, Tensor), Option<Tensor>)> {
        let input = self.walk.batch(&self.input, batch_idx)?;
        if let Some(next) = block.within_sublayer(self.site, &input, self.walk.rope())? {
            return Ok((next, None));
        }
        let at = Paused { site: self.site, residual: self.walk.batch(&self.residual, batch_idx)?, input };
        match block.resume(&at, self.walk.rope(), &mut |_, _| Ok(()))? {
            Next::Site(Paused { site, residual, input }) => Ok(((site, input), Some(residual))),
            Next::End(_) => anyhow::bail!("invariant: the passes pause before `{}`", self.site.name()),
        }
    }

    fn paused(&self, batch_idx: usize) -> Result<Paused> {
        let [residual, input] = [&self.residual, &self.input].map(|states| self.walk.batch(states, batch_idx));
        Ok(Paused { site: self.site, residual: residual?, input: input? })
    }
}

impl Walk<'_> {
    /// The states after a half of `block`, from those before it.
    ///
    /// # Errors
    /// The shapes do not match, a state is not finite, or the work folder cannot be written.
    pub fn through(&self, before: &Hidden, decoder: &Decoder<'_>, block: &Block, half: Half) -> Result<Hidden> {
        let mut after = Vec::with_capacity(self.n_batches());
        self.workers().in_order(
            self.n_batches(),
            |batch_idx| {
                let y = block.through(half, &self.batch(before, batch_idx)?, self.rope(), &mut |_, _| Ok(()))?;
                let values = to_host(&y)?;
                match non_finite_window(&values, &y)? {
                    Some(window) => Err(self.not_finite(decoder, block, None, (batch_idx, window))),
                    None => Ok(values),
                }
            },
            |_, values| {
                after.push(self.spool().push(values)?);
                Ok(())
            },
        )?;
        Ok(Hidden::new(after))
    }
}
