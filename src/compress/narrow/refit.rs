//! The columns that readers keep, refitted by least squares: a file of safetensors for each unit in the work folder,
//! from which a run that was killed resumes.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use faer::Mat;

use super::curves::{bytes, transposed};
use crate::approx::narrow::refit;
use crate::checkpoint::{Checkpoint, CheckpointError, OutputFolder, TensorSpec, cast, write_file};
use crate::linalg;
use crate::model::Order;
use crate::model::narrow::NarrowUnit;
use crate::session::Session;

/// Gives the input form of the reader of a unit (in, in), positive definite.
pub(super) type Form<'f> = dyn Fn(&NarrowUnit) -> Result<Mat<f64>> + Sync + 'f;

/// Refits every unit that loses columns; `kept` are its channels or groups, in the order that they get. Returns the files.
///
/// # Errors
/// A weight or a statistic is damaged, a value does not fit the dtype, or the disk is full.
pub(super) fn all(
    session: &Session<'_>,
    units: &[NarrowUnit],
    kept: &[Vec<usize>],
    form: &Form<'_>,
    folder: &OutputFolder,
) -> Result<Vec<PathBuf>> {
    let narrower: Vec<(&NarrowUnit, &Vec<usize>)> =
        units.iter().zip(kept).filter(|(unit, kept)| !kept.is_empty() && kept.len() < unit.width()).collect();
    let stage = session.progress.stage("refit", narrower.len() as u64, "units");
    let costs: Vec<u64> = narrower.iter().map(|(unit, _)| bytes(unit)).collect();
    session.workers(&costs)?.collect(&costs, |i| {
        let (unit, kept) = narrower[i];
        stage.note(&unit.reader.module);
        let path = folder.pieces().join(format!("refit-{}-{}.safetensors", unit.block, unit.name()));
        if !path.is_file() {
            one(session.checkpoint, unit, kept, form, &path)
                .with_context(|| format!("refitting `{}`", unit.reader.module))?;
        }
        stage.advance(1);
        Ok(path)
    })
}

/// Writes the refitted reader of a unit, in the order of its family.
fn one(checkpoint: &Checkpoint, unit: &NarrowUnit, kept: &[usize], form: &Form<'_>, path: &Path) -> Result<()> {
    let reader = &unit.reader;
    let transposed = transposed(checkpoint, &unit.reader)?;
    let columns = unit.columns(kept);
    let refitted = refit(transposed.transpose(), form(unit)?.as_ref(), &columns);
    let (shape, values) = match reader.order {
        Order::OutIn => (vec![reader.out_features, columns.len()], linalg::to_row_major(refitted.as_ref())),
        Order::InOut => (vec![columns.len(), reader.out_features], linalg::to_row_major(refitted.transpose())),
    };
    let spec = TensorSpec { name: reader.weight_name(), dtype: reader.dtype, shape };
    let overflow =
        |first| CheckpointError::Overflow { tensor: spec.name.clone(), dtype: format!("{:?}", spec.dtype), first };
    let bytes = cast::encode(spec.dtype, &values).map_err(overflow)?;
    write_file(path, std::slice::from_ref(&spec), |_| Ok::<_, CheckpointError>(bytes.clone()))?;
    Ok(())
}
