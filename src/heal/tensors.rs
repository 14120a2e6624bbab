//! The floats of a student that are trained: values of floats, and scales of codes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use anyhow::Result;
use candle_core::Tensor;

use super::job::{HealJob, Train};
use crate::checkpoint::{Checkpoint, Floats, TensorInfo};
use crate::device::Device;
use crate::error::Failure;
use crate::model::Decoder;
use crate::model::inventory::{self, LinearInfo, Stored};
use crate::operator::{Element, Matrix, Term, part_name};
use crate::report::CompressReport;
use crate::train::{Start, Variables};

/// Floats of tensors by name, as [`Checkpoint::floats`] has them.
pub(super) type Healed = BTreeMap<String, Vec<f32>>;

/// As tensors on a device.
///
/// # Errors
/// There is no tensor of a name.
pub(super) fn tensors(healed: &Healed, checkpoint: &Checkpoint, device: &Device) -> Result<HashMap<String, Tensor>> {
    let tensor = |(name, values): (&String, &Vec<f32>)| -> Result<(String, Tensor)> {
        let shape = checkpoint.floats_shape(checkpoint.require(name)?);
        Ok((name.clone(), Tensor::from_vec(values.clone(), shape, device)?))
    };
    healed.iter().map(tensor).collect()
}

/// The tensors that are trained.
pub(super) struct Selected {
    /// The modules that they belong to; `None`: all.
    pub modules: Option<Vec<String>>,
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

    /// Whether a tensor is trained.
    pub fn holds(&self, tensor: &str) -> bool {
        let is_of = |module: &String| tensor.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'));
        self.modules.as_ref().is_none_or(|modules| modules.iter().any(is_of))
    }

    /// The variables of some blocks, as far as they are healed. What was healed and is not trained, such as the order of
    /// the rows of pivots, is constant beside them.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub fn variables(
        &self,
        student: &Decoder<'_>,
        checkpoint: &Checkpoint,
        blocks: Range<usize>,
        healed: &Healed,
    ) -> Result<Variables> {
        let (mut trained, mut constants) = (Vec::new(), Healed::new());
        for block_idx in blocks {
            let own = self.floats(student, checkpoint, block_idx, healed)?;
            let names: BTreeSet<&str> = own.iter().map(|start| start.name.as_str()).collect();
            let prefix = format!("{}.", student.block_name(block_idx));
            let of_block = healed.iter().filter(|(name, _)| name.starts_with(&prefix));
            let others = of_block.filter(|(name, _)| !names.contains(name.as_str()));
            constants.extend(others.map(|(name, values)| (name.clone(), values.clone())));
            trained.extend(own);
        }
        Ok(Variables::new(trained)?.with_constants(tensors(&constants, checkpoint, student.device())?))
    }

    /// The floats of a block, as far as they are healed.
    fn floats(
        &self,
        student: &Decoder<'_>,
        checkpoint: &Checkpoint,
        block_idx: usize,
        healed: &Healed,
    ) -> Result<Vec<Start>> {
        let tensor = |info: &TensorInfo| -> Result<Start> {
            let (Floats { shape, values, reach }, device) = (checkpoint.floats(&info.name)?, student.device());
            let values = healed.get(&info.name).cloned().unwrap_or(values);
            let reach = reach.map(|reach| Tensor::from_vec(reach, (shape[0], 1, 1), device)).transpose()?;
            Ok(Start { name: info.name.clone(), values: Tensor::from_vec(values, shape, device)?, reach })
        };
        self.of_block(student, checkpoint, block_idx).map(tensor).collect()
    }

    /// The tensors of a block whose floats are trained.
    fn of_block<'a>(
        &'a self,
        student: &Decoder<'_>,
        checkpoint: &'a Checkpoint,
        block_idx: usize,
    ) -> impl Iterator<Item = &'a TensorInfo> {
        let prefix = format!("{}.", student.block_name(block_idx));
        let is_trained = move |info: &&TensorInfo| {
            info.name.starts_with(&prefix) && checkpoint.has_own_floats(info) && self.holds(&info.name)
        };
        checkpoint.tensors().filter(is_trained)
    }

    /// The number of floats in all blocks.
    pub fn n_floats(&self, student: &Decoder<'_>, checkpoint: &Checkpoint) -> u64 {
        let of_block = |block_idx| self.of_block(student, checkpoint, block_idx);
        let infos = (0..student.n_blocks()).flat_map(of_block);
        infos.map(|info| checkpoint.floats_shape(info).iter().product::<usize>() as u64).sum()
    }
}

/// The names of the tensors of floats of a linear, without its base.
pub(super) fn float_parts(linear: &LinearInfo) -> Vec<String> {
    let Stored::Structured { kind, .. } = linear.stored else { return vec![linear.weight_name()] };
    let floats = kind.structure().suffixes().iter().filter(|(_, element)| *element == Element::Float);
    floats.map(|&(suffix, element)| format!("{}.{}", linear.module, part_name(suffix, element))).collect()
}

/// Whether a tensor is stored as the floats that it has.
pub(super) fn has_plain_floats(checkpoint: &Checkpoint, name: &str) -> bool {
    checkpoint.info(name).is_some_and(|info| info.storage().is_none() && checkpoint.has_own_floats(info))
}

/// The structure of a linear with its values so far.
///
/// # Errors
/// A tensor is absent or damaged.
pub(super) fn term(checkpoint: &Checkpoint, linear: &LinearInfo, healed: &Healed) -> Result<Term> {
    let mut term = inventory::term(checkpoint, linear)?;
    for (&(suffix, element), part) in term.form.kind.structure().suffixes().iter().zip(&mut term.parts) {
        let Some(values) = healed.get(&format!("{}.{}", linear.module, part_name(suffix, element))) else {
            continue;
        };
        *part = match element {
            Element::Float => Matrix::Float(values.clone()),
            Element::Index => Matrix::Indices(values.iter().map(|&index| index as i32).collect()),
        };
    }
    Ok(term)
}
