//! Plain data: sums over tokens, so parts measured apart add up.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use candle_core::Tensor;
use faer::Mat;

use crate::error::Failure;
use crate::linalg;
use crate::model::InputSite;

/// `Σ x xᵀ` over tokens, (n, n), of the inputs `x` of a linear.
#[derive(Debug, Clone)]
pub struct InputGram {
    /// The lower triangle.
    sum: Mat<f64>,
    pub n_tokens: usize,
}

impl InputGram {
    pub fn new(n: usize) -> Self {
        Self { sum: Mat::zeros(n, n), n_tokens: 0 }
    }

    /// Adds the rows of `x`, (n_tokens, n) row-major.
    pub fn add(&mut self, x: &[f32], n_tokens: usize) {
        linalg::add_gram_f32(&mut self.sum, x, n_tokens);
        self.n_tokens += n_tokens;
    }

    /// The mean second moment `C = Σ x xᵀ / n_tokens`, (n, n).
    ///
    /// # Errors
    /// No token was seen, or an activation was not finite.
    pub fn mean(&self) -> Result<Mat<f64>> {
        ensure!(self.n_tokens > 0, "no calibration token was seen");
        let scale = 1.0 / self.n_tokens as f64;
        let mut mean = Mat::from_fn(self.sum.nrows(), self.sum.ncols(), |i, j| self.sum[(i, j)] * scale);
        linalg::mirror_lower(&mut mean);
        if !mean.norm_max().is_finite() {
            return Err(Failure::numeric("calibration met activations that are not finite")
                .hint("the checkpoint is broken, or overflows in f32")
                .into());
        }
        Ok(mean)
    }
}

/// The statistics of one block, by the place where its linears read.
#[derive(Debug, Default)]
pub struct Observed {
    grams: BTreeMap<InputSite, InputGram>,
}

impl Observed {
    /// Collects at `sites` only.
    pub fn new(sites: impl IntoIterator<Item = (InputSite, usize)>) -> Self {
        Self { grams: sites.into_iter().map(|(site, n)| (site, InputGram::new(n))).collect() }
    }

    /// Adds a batch of inputs (batch, n_tokens, n), one window at a time, so that the sums do not depend on the batch.
    ///
    /// # Errors
    /// A shape that does not match.
    pub fn observe(&mut self, site: InputSite, x: &Tensor) -> Result<()> {
        let Some(gram) = self.grams.get_mut(&site) else { return Ok(()) };
        let (_, n_tokens, n) = x.dims3()?;
        let values = x.flatten_all()?.to_vec1::<f32>()?;
        for window in values.chunks_exact(n_tokens * n) {
            gram.add(window, n_tokens);
        }
        Ok(())
    }

    /// The mean second moment at every observed site.
    ///
    /// # Errors
    /// As [`InputGram::mean`].
    pub fn means(&self) -> Result<BTreeMap<InputSite, Mat<f64>>> {
        self.grams.iter().map(|(&site, gram)| Ok((site, gram.mean()?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_gram_is_the_mean_of_outer_products_whatever_the_batch() {
        let values: Vec<f32> = (0..4 * 3 * 5).map(|i| ((i * 37) % 19) as f32 - 9.0).collect();
        let x = Tensor::from_slice(&values, (4, 3, 5), &Device::Cpu).unwrap();
        let observe = |batches: &[(usize, usize)]| {
            let mut observed = Observed::new([(InputSite::O, 5)]);
            for &(first, count) in batches {
                observed.observe(InputSite::O, &x.narrow(0, first, count).unwrap()).unwrap();
                observed.observe(InputSite::Down, &x).unwrap();
            }
            observed.means().unwrap().remove(&InputSite::O).unwrap()
        };
        let mean = observe(&[(0, 4)]);
        assert_eq!(mean, observe(&[(0, 1), (1, 3)]));
        let expected =
            Mat::from_fn(5, 5, |i, j| values.chunks_exact(5).map(|row| f64::from(row[i] * row[j])).sum::<f64>() / 12.0);
        assert!((&mean - &expected).norm_max() < 1e-12);
    }

    #[test]
    fn infinite_activations_are_an_error() {
        let mut gram = InputGram::new(1);
        assert!(gram.mean().is_err());
        gram.add(&[f32::INFINITY], 1);
        assert!(gram.mean().is_err());
    }
}
