//! Files of PyTorch: the tensors of a mapped file. Their bytes are [`crate::codecs::torch`].

use std::collections::BTreeSet;
use std::path::Path;

use super::error::{CheckpointError, Result};
use super::magic::Kind;
use super::tensor::{TensorInfo, is_sane};
use crate::codecs::torch::{self, Entry, Refusal};

/// The tensors of a mapped file, in the order of their data.
///
/// # Errors
/// The file is damaged or another kind of file, or its pickle asks for something that is not a tensor.
pub(super) fn read_header(path: &Path, file: &[u8], shard_idx: usize) -> Result<Vec<TensorInfo>> {
    let broken = |reason: String| CheckpointError::Torch { path: path.into(), reason };
    if torch::is_legacy(file) {
        return Err(CheckpointError::TorchLegacy { path: path.into() });
    }
    if !torch::is_begun(file) {
        return Err(match Kind::of_no_weights(file) {
            Some(found) => CheckpointError::WrongKind { path: path.into(), expected: "file of PyTorch", found },
            None => broken("it is not an archive".into()),
        });
    }
    let entries = torch::read(file).map_err(|refusal| match refusal {
        Refusal::Global(global) => CheckpointError::TorchGlobal { path: path.into(), global },
        Refusal::Broken(reason) => broken(reason),
    })?;
    let mut seen = BTreeSet::new();
    for Entry { name, shape, .. } in &entries {
        if !seen.insert(name) {
            return Err(broken(format!("tensor `{name}` is defined twice")));
        }
        if !is_sane(shape) {
            return Err(broken(format!("tensor `{name}` is empty, and has shape {shape:?}")));
        }
    }
    let info = |Entry { name, dtype, shape, begin, end, strides }| {
        let strides = strides.map(Vec::into_boxed_slice);
        TensorInfo { name, dtype, shape, shard_idx, begin, end, encoded: None, strides }
    };
    let mut tensors: Vec<TensorInfo> = entries.into_iter().map(info).collect();
    tensors.sort_by(|x, y| (x.begin, x.end, &x.name).cmp(&(y.begin, y.end, &y.name)));
    Ok(tensors)
}
