//! Quantizes factors: the part that is multiplied last is quantized first, and the rest is refitted to it.

use anyhow::Result;

use crate::compress::solution::{Refine, Solution};
use crate::linalg;
use crate::model::inventory;
use crate::operator::Operator;
use crate::quantize::Scheme;

pub(super) struct QuantizeFactors {
    pub scheme: Scheme,
}

impl Refine for QuantizeFactors {
    fn operator(&self, solution: &Solution<'_>, i: usize, operator: Operator) -> Result<Operator> {
        let Operator { base, over: Some(over) } = operator else { return Ok(operator) };
        if over.form.size.rank() == Some(0) {
            return Ok(Operator { base, over: Some(over) });
        }
        let study = solution.study;
        let (linear, shape) = (&study.plan.linears[i], study.plan.linears[i].shape());
        let weight = || inventory::weight(study.session.checkpoint, linear);
        // The matrix that the factors approximate. Sequential mode shifts the target and does not keep it, so the
        // product is used.
        let target = match (&base, study.recipe.anchor()) {
            (None, Some(_)) => over.product(shape),
            (None, None) => weight()?,
            (Some(base), _) => weight()?.iter().zip(base.product(shape)).map(|(w, q)| w - q).collect(),
        };
        let metrics = match base {
            Some(_) => study.metrics().with_preset(study.recipe.compensate().preset()),
            None => study.metrics(),
        };
        let target = linalg::transposed_from_row_major(&target, shape.0, shape.1);
        let over = over.quantized(target.transpose(), &metrics.output(linear)?, self.scheme)?;
        Ok(Operator { base, over: Some(over) })
    }
}
