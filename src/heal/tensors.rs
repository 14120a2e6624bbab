//! The floats of a student that are trained.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::job::{HealJob, Train};
use crate::checkpoint::{Checkpoint, TensorInfo, cast};
use crate::error::Failure;
use crate::model::Decoder;
use crate::report::CompressReport;
use crate::train::Variables;

/// Healed tensors by name, in the order of their values in the file.
pub(super) type Healed = BTreeMap<String, Vec<f32>>;

/// The tensors that are trained.
pub(super) struct Selected {
    /// The modules that they belong to; `None`: all.
    modules: Option<Vec<String>>,
}

impl Selected {
    /// What a job trains of the student that a report describes.
    ///
    /// # Errors
    /// There is nothing.
    pub fn of(job: &HealJob<'_>, report: &CompressReport) -> Result<Self> {
        if job.train == Train::All {
            return Ok(Self { modules: None });
        }
        let of_low_rank = report.linears.iter().filter(|linear| linear.rank.is_some_and(|rank| rank > 0));
        let modules: Vec<String> = of_low_rank.map(|linear| linear.module.clone()).collect();
        if modules.is_empty() {
            let message = format!("`{}` has no matrix of low rank to train", job.checkpoint.root().display());
            return Err(Failure::usage(message).hint("leave out `--train lrc`: then all floats learn").into());
        }
        Ok(Self { modules: Some(modules) })
    }

    fn holds(&self, tensor: &str) -> bool {
        let is_of = |module: &String| tensor.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'));
        self.modules.as_ref().is_none_or(|modules| modules.iter().any(is_of))
    }

    /// The floats of a block by name, as far as they are healed.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub fn floats(
        &self,
        student: &Decoder<'_>,
        checkpoint: &Checkpoint,
        block_idx: usize,
        healed: &Healed,
    ) -> Result<Vec<(String, Tensor)>> {
        let prefix = format!("{}.", student.block_name(block_idx));
        let is_trained = |info: &&TensorInfo| {
            info.name.starts_with(&prefix) && cast::is_float(info.dtype) && !info.is_encoded() && self.holds(&info.name)
        };
        let tensor = |info: &TensorInfo| -> Result<(String, Tensor)> {
            let values =
                healed.get(&info.name).map_or_else(|| checkpoint.values(&info.name), |values| Ok(values.clone()))?;
            Ok((info.name.clone(), Tensor::from_vec(values, info.shape.clone(), student.device())?))
        };
        checkpoint.tensors().filter(is_trained).map(tensor).collect()
    }
}

/// The values of variables as the files of the student store them.
///
/// # Errors
/// A value does not fit its dtype.
pub(super) fn rounded(checkpoint: &Checkpoint, variables: &Variables) -> Result<Vec<Vec<f32>>> {
    let values = variables.values()?;
    let round = |((name, _), values): ((&str, _), &Vec<f32>)| {
        let dtype = checkpoint.require(name)?.dtype;
        let bytes = cast::encode(dtype, values).map_err(|place| {
            Failure::numeric(format!("value {place} of `{name}` does not fit its dtype after training"))
                .hint("a smaller `--learning-rate` may help")
        })?;
        cast::decode(dtype, &bytes).context("invariant: floats are trained")
    };
    variables.iter().zip(&values).map(round).collect()
}
