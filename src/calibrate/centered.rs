//! Means of inputs, and Grams without them: what a linear with a free bias is measured in.

use anyhow::Result;

use super::needs::Key;
use super::store::Statistics;
use crate::linalg::Packed;
use crate::model::LinearId;

impl Statistics {
    /// `μ = Σ x / n_seen`, (n), of the inputs of a linear: a mean over the tokens that it saw.
    ///
    /// # Errors
    /// The sum was not measured, or has another size.
    pub fn input_mean(&self, id: LinearId, n: usize) -> Result<Vec<f64>> {
        let scale = 1.0 / self.n_seen(id)?;
        Ok(self.vector(Key::InputSum(id.slot.site()), id.block, n)?.into_iter().map(|sum| sum * scale).collect())
    }

    /// `Σ (x − μ)(x − μ)ᵀ / n_tokens`, (n, n), of the inputs of a linear: [`Self::input_gram`] without their mean.
    ///
    /// # Errors
    /// A sum was not measured, or has another size.
    pub fn centered_input_gram(&self, id: LinearId, n: usize) -> Result<Packed> {
        let sum = self.vector(Key::InputSum(id.slot.site()), id.block, n)?;
        Ok(self.input_gram(id, n)?.centered(&sum, self.n_seen(id)?))
    }
}
