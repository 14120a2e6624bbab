//! The floats behind the tensors of a checkpoint that may change while its codes stay: the values of floats, and the
//! scales (with minima) of codes, as they are in the files.

use std::path::Path;

use super::error::{CheckpointError, Result};
use super::open::Checkpoint;
use super::tensor::{Behind, Place, TensorInfo};
use crate::codecs::cast::{self, Dtype};
use crate::codecs::gguf::Arrangement;
use crate::linalg;
use crate::quantize::Quantized;

/// Values of a tensor of floats, or scales of codes.
#[derive(Debug, Clone, PartialEq)]
pub struct Floats {
    /// The shape of the tensor; of scales the kinds (scale, and minimum if there are any), rows, and runs of columns.
    pub shape: Vec<usize>,
    /// Row-major.
    pub values: Vec<f32>,
    /// Of scales of codes, for each kind: how far one moves its weights, the root mean square of their levels.
    pub reach: Option<Vec<f32>>,
}

/// Bytes in place of others in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch<'a> {
    /// The file.
    pub file: &'a Path,
    /// The first of the bytes that they replace.
    pub begin: usize,
    /// As many as there were.
    pub bytes: Vec<u8>,
}

impl Checkpoint {
    /// Whether [`Self::floats`] are known of a tensor, and no other module has the same.
    pub fn has_own_floats(&self, info: &TensorInfo) -> bool {
        self.behind(info).is_some() && !self.is_shared(info)
    }

    /// Whether several modules have a tensor.
    fn is_shared(&self, info: &TensorInfo) -> bool {
        let place = |info: &TensorInfo| (info.shard_idx, info.begin);
        self.borrowed.iter().filter_map(|name| self.info(name)).any(|borrowed| place(borrowed) == place(info))
    }

    /// The shape of [`Self::floats`] of a tensor, from its header.
    pub fn floats_shape(&self, info: &TensorInfo) -> Vec<usize> {
        match (info.storage(), info.shape.as_slice()) {
            (Some(storage), &[rows, cols]) => storage.scales_shape(rows, cols).map_or(Vec::new(), Vec::from),
            _ => info.shape.clone(),
        }
    }

    fn behind<'a>(&'a self, info: &'a TensorInfo) -> Option<Behind<'a>> {
        match &info.encoded {
            Some(encoded) => encoded.behind(&info.shape),
            None if cast::is_float(info.dtype) && info.is_in_order() => {
                Some(Behind { info, place: Place::Rows(info.dtype, Arrangement::Same) })
            }
            None => None,
        }
    }

    /// The values of a tensor of floats, or the scales of codes.
    ///
    /// # Errors
    /// The tensor is absent or broken.
    pub fn floats(&self, name: &str) -> Result<Floats> {
        match self.quantized(name)?.and_then(|matrix| matrix.scaled()) {
            Some(scaled) => {
                let reach = Some(scaled.levels.iter().map(|levels| root_mean_square(levels)).collect());
                Ok(Floats { shape: scaled.shape.into(), values: scaled.scales, reach })
            }
            None => Ok(Floats { shape: self.require(name)?.shape.clone(), values: self.values(name)?, reach: None }),
        }
    }

    /// The bytes of a file that give a tensor other floats, in the order of [`Self::floats`], rounded to what is
    /// stored; or other indices.
    ///
    /// # Errors
    /// The tensor is broken, or a value does not fit.
    ///
    /// # Panics
    /// If its floats are not known.
    pub fn patch(&self, name: &str, floats: &[f32]) -> Result<Patch<'_>> {
        let info = self.require(name)?;
        if info.dtype == Dtype::I32 && !info.is_encoded() {
            let bytes = floats.iter().flat_map(|&index| (index as i32).to_le_bytes()).collect();
            return Ok(Patch { file: self.file_of(info), begin: info.begin, bytes });
        }
        let Behind { info: stored, place } = self.behind(info).expect("invariant: the floats of the tensor are known");
        let overflow =
            |first| CheckpointError::Overflow { tensor: name.into(), dtype: format!("{:?}", stored.dtype), first };
        // Scales have values of f16, whatever the file has them in.
        let codes = self.quantized(name)?.map(|codes| codes.with_scales(floats).map_err(overflow)).transpose()?;
        let scales = codes.as_ref().and_then(Quantized::scaled).map(|scaled| scaled.scales);
        let values = scales.as_deref().unwrap_or(floats);
        let rows = info.shape.first().copied().unwrap_or(1);
        let bytes = match (place, codes) {
            (Place::Rows(dtype, arrangement), _) => {
                arrangement.to_file(cast::encode(dtype, values).map_err(overflow)?, rows)
            }
            (Place::Transposed(dtype), _) => {
                let n_rows = rows.max(1);
                let turned = linalg::transpose_row_major(values, n_rows, values.len() / n_rows);
                cast::encode(dtype, &turned).map_err(overflow)?
            }
            (Place::Blocks(arrangement), Some(Quantized::Block(blocks))) => arrangement.to_file(blocks.bytes, rows),
            (Place::Blocks(_), _) => unreachable!("invariant: blocks are in blocks"),
        };
        Ok(Patch { file: self.file_of(stored), begin: stored.begin, bytes })
    }

    /// The floats that a tensor has after [`Self::patch`].
    ///
    /// # Errors
    /// As [`Self::patch`].
    pub fn rounded(&self, name: &str, floats: &[f32]) -> Result<Vec<f32>> {
        let patch = self.patch(name, floats)?;
        let info = self.require(name)?;
        let Behind { place, .. } = self.behind(info).expect("invariant: the floats of the tensor are known");
        let rows = info.shape.first().copied().unwrap_or(1);
        let decoded = match place {
            Place::Rows(dtype, arrangement) => cast::decode(dtype, &arrangement.to_model(&patch.bytes, rows)),
            Place::Transposed(dtype) => cast::decode(dtype, &patch.bytes)
                .map(|turned| linalg::transpose_row_major(&turned, turned.len() / rows.max(1), rows)),
            Place::Blocks(_) => {
                self.quantized(name)?.and_then(|codes| Some(codes.with_scales(floats).ok()?.scaled()?.scales))
            }
        };
        Ok(decoded.expect("invariant: what was encoded is decoded"))
    }
}

/// 1 for zeros, which no scale moves.
fn root_mean_square(levels: &[f32]) -> f32 {
    let squares: f64 = levels.iter().map(|&level| f64::from(level) * f64::from(level)).sum();
    if squares > 0.0 { (squares / levels.len() as f64).sqrt() as f32 } else { 1.0 }
}
