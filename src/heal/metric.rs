//! The metric of a half's output: Grams of the gradients of the loss there, from statistics of the teacher.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::Tensor;

use crate::calibrate::Statistics;
use crate::device::Device;
use crate::linalg;
use crate::model::{Decoder, Half, LinearId, Slot};

/// Share of the mean diagonal that is added to it.
const DAMPING: f64 = 0.01;

/// The metric of every half that has one; the others are measured in the plain one.
#[derive(Default)]
pub(super) struct Metrics(BTreeMap<(usize, Half), Tensor>);

impl Metrics {
    /// `G` of each half whose output enters the residual stream as it is: the Gram of gradients at the output of its
    /// last linear, damped, with a mean diagonal of 1.
    ///
    /// # Errors
    /// The statistics lack a Gram, or the teacher cannot be read.
    pub fn of(statistics: &Statistics, teacher: &Decoder<'_>, device: &Device) -> Result<Self> {
        let n = teacher.config.hidden_size;
        let mut metrics = BTreeMap::new();
        for block_idx in 0..teacher.n_blocks() {
            let block = teacher.block(block_idx)?;
            for &half in block.halves() {
                let Some(role) = block.last_linear(half) else { continue };
                let gram =
                    statistics.output_gram(LinearId { block: block_idx, slot: Slot::shared(role) }, n)?.to_dense();
                let mean = (0..n).map(|i| gram[(i, i)]).sum::<f64>() / n as f64;
                if mean > 0.0 {
                    let damped =
                        faer::Mat::from_fn(n, n, |i, j| gram[(i, j)] / mean + if i == j { DAMPING } else { 0.0 });
                    let values = linalg::to_row_major(damped.as_ref());
                    metrics.insert((block_idx, half), Tensor::from_vec(values, (n, n), device)?);
                }
            }
        }
        Ok(Self(metrics))
    }

    pub fn get(&self, block_idx: usize, half: Half) -> Option<&Tensor> {
        self.0.get(&(block_idx, half))
    }
}
