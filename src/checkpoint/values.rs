//! The bytes and values of the tensors of a checkpoint, one tensor at a time.

use std::collections::BTreeSet;

use rayon::prelude::*;

use super::error::{CheckpointError, Result};
use super::hash::{Fingerprint, sha256_file};
use super::open::Checkpoint;
use super::paths::CONFIG_FILE;
use super::tensor::TensorInfo;
use crate::codecs::cast::{self, Dtype};
use crate::codecs::float8;
use crate::codecs::layout::Decoded;
use crate::quantize::{Quantized, Storage};

/// The result of comparing two tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Comparison {
    /// Whether they have the same shape and values.
    pub is_equal: bool,
    /// Whether this pair was compared before.
    pub asked: Asked,
}

/// Whether a question was asked before, so that a warning appears once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// This is the first time, so a warning is due.
    First,
    /// The answer was remembered.
    Before,
}

impl Checkpoint {
    /// Calls `f` with the stored bytes of a tensor, then gives its pages back.
    ///
    /// # Errors
    /// [`CheckpointError::TensorAbsent`].
    pub fn with_bytes<T>(&self, name: &str, f: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let info = self.require(name)?;
        debug_assert!(!info.is_encoded(), "invariant: only plain tensors are passed through");
        Ok(self.stored(info, f))
    }

    fn stored<T>(&self, info: &TensorInfo, f: impl FnOnce(&[u8]) -> T) -> T {
        self.shards[info.shard_idx].with(info, f)
    }

    /// The quantized matrix of a tensor; `None` for floats.
    ///
    /// # Errors
    /// The tensor is absent, or its parts are broken.
    pub fn quantized(&self, name: &str) -> Result<Option<Quantized>> {
        Ok(match self.decoded(self.require(name)?)? {
            Some(Decoded::Quantized(matrix)) => Some(matrix),
            _ => None,
        })
    }

    /// How a tensor is quantized; `None` for floats. Reads the header only, if that decides it.
    ///
    /// # Errors
    /// The tensor is absent, or its parts are broken.
    pub fn storage(&self, name: &str) -> Result<Option<Storage>> {
        let info = self.require(name)?;
        match &info.encoded {
            Some(encoded) if !encoded.is_known_from_header() => {
                Ok(self.quantized(name)?.map(|matrix| matrix.storage()))
            }
            _ => Ok(info.storage()),
        }
    }

    fn decoded(&self, info: &TensorInfo) -> Result<Option<Decoded>> {
        let Some(encoded) = &info.encoded else { return Ok(None) };
        let decoded = encoded.decode(&info.shape, &|part| self.stored(part, <[u8]>::to_vec));
        decoded.map(Some).ok_or_else(|| self.broken(info))
    }

    fn broken(&self, info: &TensorInfo) -> CheckpointError {
        let reason = "its codes and scales do not have the sizes of its shape".into();
        CheckpointError::Encoding { path: self.file_of(info).into(), tensor: info.name.clone(), reason }
    }

    /// The values of a float tensor, row-major, every one finite.
    ///
    /// # Errors
    /// The tensor is absent, not a float tensor, or holds NaN or infinity.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        self.values_of(self.require(name)?)
    }

    /// [`Self::values`] of a factor of an adapter, which may have 8-bit floats without a scale.
    ///
    /// # Errors
    /// As [`Self::values`].
    pub fn factor(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.require(name)?;
        match info.dtype {
            Dtype::F8_E4M3 => {
                let values = self.stored(info, |bytes| float8::decode(info.dtype, bytes));
                self.finite(info, values.expect("invariant: codes of one byte have values"))
            }
            _ => self.values_of(info),
        }
    }

    fn values_of(&self, info: &TensorInfo) -> Result<Vec<f32>> {
        let not_float = || CheckpointError::Dtype {
            path: self.file_of(info).into(),
            tensor: info.name.clone(),
            dtype: format!("{:?}", info.dtype),
        };
        let values = match self.decoded(info)? {
            Some(Decoded::Values(values)) => values,
            Some(Decoded::Quantized(matrix)) => matrix.dequantize(),
            None => self.stored(info, |bytes| cast::decode(info.dtype, bytes)).ok_or_else(not_float)?,
        };
        self.finite(info, values)
    }

    /// Whether every value of a float tensor is zero. Reading stops at the first that is not.
    ///
    /// # Errors
    /// As [`Self::values`].
    pub fn is_zero(&self, name: &str) -> Result<bool> {
        let info = self.require(name)?;
        let plain = if info.is_encoded() { None } else { self.stored(info, |bytes| cast::is_zero(info.dtype, bytes)) };
        match plain {
            Some(is_zero) => Ok(is_zero),
            None => Ok(self.values(name)?.iter().all(|&v| v == 0.0)),
        }
    }

    /// The values of one matrix of a float tensor of three dimensions, row-major, every one finite.
    ///
    /// # Errors
    /// As [`Self::values`].
    pub fn slice_values(&self, name: &str, index: usize) -> Result<Vec<f32>> {
        let info = self.require(name)?;
        match info.matrix(index, name.into()) {
            Some(matrix) => self.values_of(&matrix),
            None => {
                let len: usize = info.shape.iter().skip(1).product();
                Ok(self.values(name)?[index * len..(index + 1) * len].to_vec())
            }
        }
    }

    /// Compares the shapes and values of two tensors. Answers are remembered.
    ///
    /// # Errors
    /// As [`Self::values`].
    pub fn compare(&self, first: &str, second: &str) -> Result<Comparison> {
        let key = [first, second].map(String::from);
        let mut known = self.equal.lock().expect("invariant: no holder of the list panics");
        if let Some(&is_equal) = known.get(&key) {
            return Ok(Comparison { is_equal, asked: Asked::Before });
        }
        let [one, other] = [self.require(first)?, self.require(second)?];
        let is_plain = !one.is_encoded() && !other.is_encoded() && one.dtype == other.dtype;
        let is_equal = one.shape == other.shape
            && match is_plain && self.stored(one, |bytes| self.stored(other, |others| bytes == others)) {
                true => true,
                false => self.values(first)? == self.values(second)?,
            };
        known.insert(key, is_equal);
        Ok(Comparison { is_equal, asked: Asked::First })
    }

    fn finite(&self, info: &TensorInfo, values: Vec<f32>) -> Result<Vec<f32>> {
        let is_broken = |v: &f32| !v.is_finite();
        if let Some(first) = values.iter().position(is_broken) {
            let count = values.iter().filter(|v| is_broken(v)).count();
            let path = self.file_of(info).to_path_buf();
            return Err(CheckpointError::NonFinite { path, tensor: info.name.clone(), count, first });
        }
        Ok(values)
    }

    /// Checks a tensor's shape; `fields` names the config fields that decide it, for the hint.
    ///
    /// # Errors
    /// The tensor is absent or has another shape.
    pub fn expect_shape(&self, name: &str, expected: &[usize], fields: &str) -> Result<()> {
        let info = self.require(name)?;
        if info.shape == expected {
            return Ok(());
        }
        Err(CheckpointError::Shape {
            path: self.file_of(info).to_path_buf(),
            tensor: name.into(),
            found: info.shape.clone(),
            expected: expected.to_vec(),
            fields: fields.into(),
        })
    }

    /// SHA-256 of the config and of every weight file.
    ///
    /// # Errors
    /// The config cannot be read.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        self.fingerprint_of(&|_| true)
    }

    /// The same without weight files in which `is_read` says no of every tensor.
    ///
    /// # Errors
    /// As [`Self::fingerprint`].
    pub fn fingerprint_of(&self, is_read: &dyn Fn(&str) -> bool) -> Result<Fingerprint> {
        // What a tensor is decoded from may be in several files.
        let is_spread = self.tensors().any(TensorInfo::is_encoded);
        let read = self.tensors().filter(|info| is_spread || is_read(&info.name)).map(|info| info.shard_idx);
        let read: BTreeSet<usize> = if is_spread { (0..self.shards.len()).collect() } else { read.collect() };
        let mut fingerprint: Fingerprint = self
            .shards
            .par_iter()
            .enumerate()
            .filter(|(shard_idx, _)| read.contains(shard_idx))
            .map(|(shard_idx, shard)| (self.shard_name(shard_idx), shard.sha256().to_string()))
            .collect();
        let config = self.root.join(CONFIG_FILE);
        // A config that was made of a weight file is part of that file.
        if self.config.is_some() && self.made.is_none() {
            fingerprint.insert(CONFIG_FILE.into(), sha256_file(&config)?);
        }
        for joined in &self.joined {
            for file in &joined.files {
                fingerprint.insert(joined.named(file), sha256_file(file)?);
            }
        }
        Ok(fingerprint)
    }
}
