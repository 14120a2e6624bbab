//! What training leaves, as the files of the student store it. In 16 bits, to nearest, most of it would be lost: many
//! steps move a value by less than half a unit in its last place, and the others' errors add up to noise. With feedback in
//! the Gram of its inputs a matrix keeps together what its values lose one by one.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::Tensor;
use faer::Mat;
use rayon::prelude::*;

use super::tensors::{Healed, float_parts, has_plain_floats, term};
use crate::approx::metric::Metric;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::codecs::cast::Dtype;
use crate::device::to_host;
use crate::error::Failure;
use crate::linalg;
use crate::model::inventory::{self, LinearInfo, Stored};
use crate::model::{InputSite, LinearId, Walk};
use crate::operator::{Element, Side, Sides, dense_with_feedback, part_name};
use crate::train::{Pieces, Variables};

/// Tokens whose inputs are read, at most: several times the width of most inputs.
const TOKENS: usize = 16_384;

/// Share by which eigenvalues of Grams are drawn towards their mean, as in `compress --method kfac`.
const DAMPING: f64 = 0.01;

/// The trained windows whose inputs are read.
pub(super) fn read<'a>(pieces: &'a Pieces, walk: &Walk<'_>) -> &'a [usize] {
    let n_tokens = walk.n_tokens() / (pieces.trained.len() + pieces.held_out.len()).max(1);
    &pieces.trained[..pieces.trained.len().min(TOKENS.div_ceil(n_tokens.max(1)))]
}

/// `Xᵀ X` (in, in) of the inputs of the sites of a block.
#[derive(Debug, Default)]
pub(super) struct Inputs(BTreeMap<InputSite, Tensor>);

impl Inputs {
    /// Adds inputs `x` (..., n_tokens, in) of a site.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn add(&mut self, site: InputSite, x: &Tensor) -> Result<()> {
        let x = x.detach().flatten_to(x.rank() - 2)?;
        self.add_gram(site, x.t()?.matmul(&x)?)
    }

    /// Adds what other windows have.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn join(&mut self, other: Self) -> Result<()> {
        other.0.into_iter().try_for_each(|(site, gram)| self.add_gram(site, gram))
    }

    fn add_gram(&mut self, site: InputSite, gram: Tensor) -> Result<()> {
        let sum = match self.0.remove(&site) {
            Some(sum) => (sum + gram)?,
            None => gram,
        };
        self.0.insert(site, sum);
        Ok(())
    }

    /// The metrics of the inputs; none of a site without an input other than zero.
    fn metrics(self) -> Result<BTreeMap<InputSite, Metric>> {
        let mut metrics = BTreeMap::new();
        for (site, gram) in self.0 {
            let (n, values) = (gram.dim(0)?, to_host(&gram)?);
            if values.iter().any(|&value| value != 0.0) && values.iter().all(|value| value.is_finite()) {
                let gram = Mat::from_fn(n, n, |i, j| f64::from(values[i.max(j) * n + i.min(j)]));
                metrics.insert(site, Metric::damped(gram, DAMPING));
            }
        }
        Ok(metrics)
    }
}

/// Values on their way to the files.
pub(super) struct Rounding<'a> {
    checkpoint: &'a Checkpoint,
    linears: Vec<(LinearId, LinearInfo)>,
    exact: Healed,
    rounded: Healed,
}

impl<'a> Rounding<'a> {
    /// Rounds all variables to nearest.
    ///
    /// # Errors
    /// A value does not fit its dtype.
    pub fn new(checkpoint: &'a Checkpoint, variables: &Variables) -> Result<Self> {
        let names = variables.iter().map(|(name, _)| name.to_string());
        let mut exact: Healed = names.zip(variables.values()?).collect();
        let nearest = |(name, values): (&String, &Vec<f32>)| Ok((name.clone(), nearest(checkpoint, name, values)?));
        let rounded = exact.iter().map(nearest).collect::<Result<_>>()?;
        let linears = inventory::linears(checkpoint).into_iter().filter_map(|linear| Some((linear.id?, linear)));
        let is_variable = |name: &String| exact.contains_key(name) && has_plain_floats(checkpoint, name);
        let linears = linears.filter(|(_, linear)| float_parts(linear).iter().all(is_variable)).collect();
        for (name, values) in variables.constants() {
            exact.insert(name.clone(), to_host(values)?);
        }
        Ok(Self { checkpoint, linears, exact, rounded })
    }

    /// Rounds the linears of a block again, with feedback, as far as their inputs are known.
    ///
    /// # Errors
    /// A part cannot be read.
    pub fn feed_back(&mut self, block_idx: usize, inputs: Inputs) -> Result<()> {
        let metrics = inputs.metrics()?;
        let of_block = self
            .linears
            .par_iter()
            .filter(|(id, linear)| id.block == block_idx && matches!(linear.dtype, Dtype::F16 | Dtype::BF16));
        let parts = of_block.filter_map(|(id, linear)| Some(self.parts(linear, metrics.get(&id.slot.site())?)));
        for (name, values) in parts.collect::<Result<Vec<_>>>()?.into_iter().flatten() {
            let values = nearest(self.checkpoint, &name, &values)?;
            self.rounded.insert(name, values);
        }
        Ok(())
    }

    /// The rounded parts of a linear.
    fn parts(&self, linear: &LinearInfo, input: &Metric) -> Result<Vec<(String, Vec<f32>)>> {
        let (m, n) = linear.shape();
        let Stored::Structured { kind, size, .. } = linear.stored else {
            let (name, is_turned) = (linear.weight_name(), linear.stored == Stored::DenseTransposed);
            let values = &self.exact[&name];
            let rounded = match is_turned {
                true => dense_with_feedback(&linalg::transpose_row_major(values, n, m), (m, n), input, linear.dtype)
                    .map(|rounded| linalg::transpose_row_major(&rounded, m, n)),
                false => dense_with_feedback(values, (m, n), input, linear.dtype),
            };
            return Ok(rounded.map(|rounded| (name, rounded)).into_iter().collect());
        };
        let term = term(self.checkpoint, linear, &self.exact)?;
        let sides = Sides { output: &Metric::Identity, input: Side::Whole(input), energies: &[] };
        let rounded = kind.fitting().round_parts(&term.parts, size, (m, n), &sides, linear.dtype);
        let named = kind.structure().suffixes().iter().zip(rounded.parts);
        let floats = named.filter(|((_, element), _)| *element == Element::Float);
        let part_of = |suffix, element| format!("{}.{}", linear.module, part_name(suffix, element));
        Ok(floats.map(|(&(suffix, element), part)| (part_of(suffix, element), part.values().into_owned())).collect())
    }

    /// The rounded values, in the order of the variables.
    pub fn values(mut self, variables: &Variables) -> Vec<Vec<f32>> {
        variables.iter().map(|(name, _)| self.rounded.remove(name).unwrap_or_default()).collect()
    }
}

/// Values of a tensor, rounded to nearest.
fn nearest(checkpoint: &Checkpoint, name: &str, values: &[f32]) -> Result<Vec<f32>> {
    checkpoint.rounded(name, values).map_err(|error| match error {
        CheckpointError::Overflow { first, .. } => {
            Failure::numeric(format!("value {first} of `{name}` does not fit its dtype after training"))
                .hint("a smaller `--learning-rate` may help")
                .into()
        }
        other => other.into(),
    })
}
