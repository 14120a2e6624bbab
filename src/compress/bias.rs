//! The biases of a solution whose linears are centered.

use anyhow::{Context, Result};

use super::center::{Means, bias_name, image};
use super::plan::Choice;
use super::solution::Solution;
use crate::model::inventory::{self, LinearInfo};
use crate::operator::{Operator, Term};

impl Solution<'_> {
    /// The bias (m) of the `i`-th linear with `operator` in place of its weight, rounded as the factored format stores
    /// it; `None` if the bias stays as it is.
    ///
    /// # Errors
    /// The weight, the bias or the statistics cannot be read, or a value does not fit the dtype.
    pub fn bias(&self, i: usize, operator: &Operator) -> Result<Option<Vec<f32>>> {
        let linear = &self.study.plan.linears[i];
        if !matches!(self.choices[i], Choice::Fitted { .. }) || !self.study.metrics().is_centered(linear) {
            return Ok(None);
        }
        if let Some(bias) = self.biases.get(i) {
            return Ok(Some(bias));
        }
        let Some(Means { output, input }) = self.means(i)? else { return Ok(None) };
        let stored = self.as_stored(linear, operator)?;
        let before = self.study.session.checkpoint.values(&bias_name(linear))?;
        let changes = output.into_iter().zip(image(&stored, &input));
        let bias = before.into_iter().zip(changes).map(|(b, (whole, part))| (f64::from(b) + whole - part) as f32);
        let bias: Vec<f32> = bias.collect();
        self.biases.keep(i, bias.clone());
        Ok(Some(bias))
    }

    /// The mean of the inputs of the `i`-th linear, (n), if its bias was refitted.
    ///
    /// # Errors
    /// The statistics cannot be read.
    pub fn input_mean(&self, i: usize) -> Result<Option<Vec<f64>>> {
        match self.refitted_means(i) {
            Some(means) => Ok(Some(means.input.clone())),
            None => self.study.metrics().mean(&self.study.plan.linears[i]),
        }
    }

    /// The means of a linear: of a refinement, or of the statistics.
    fn means(&self, i: usize) -> Result<Option<Means>> {
        if let Some(means) = self.refitted_means(i) {
            return Ok(Some(means.clone()));
        }
        let linear = &self.study.plan.linears[i];
        let Some(input) = self.input_mean(i)? else { return Ok(None) };
        let output = image(&inventory::weight(self.study.session.checkpoint, linear)?, &input);
        Ok(Some(Means { output, input }))
    }

    /// The matrix (m, n) of an operator whose floats have the dtype of its linear.
    fn as_stored(&self, linear: &LinearInfo, operator: &Operator) -> Result<Vec<f32>> {
        let rounded = |term: &Term| term.rounded(linear.dtype).ok().context("a value does not fit the dtype");
        let over = operator.over.as_ref().map(rounded);
        Ok(Operator { base: operator.base.clone(), over: over.transpose()? }.product(linear.shape()))
    }
}
