//! The two files of a graph: the messages, written at once, and the values of large tensors, written as they come.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use prost::Message;

use crate::checkpoint::{CheckpointError, TensorSpec, io, open_to_write};
use crate::codecs::onnx::{ALIGNMENT, DATA_FILE, FOLDER, MODEL_FILE, Model, Tensor, data_type};

/// The file of values, and its tensors that are still to come.
pub(in super::super) struct OnnxFile {
    path: PathBuf,
    file: File,
    /// First byte and number of bytes.
    slots: BTreeMap<String, (u64, u64)>,
}

/// The first byte of each tensor in the file of values, and the size of the file.
fn places(tensors: &[TensorSpec]) -> (Vec<u64>, u64) {
    let mut end = 0u64;
    let mut place = |tensor: &TensorSpec| {
        let begin = end.next_multiple_of(ALIGNMENT);
        end = begin + tensor.n_bytes();
        begin
    };
    let places = tensors.iter().map(&mut place).collect();
    (places, end)
}

/// The message of a model with these tensors.
fn with_tensors(model: &Model, tensors: &[TensorSpec]) -> Model {
    let external = |(tensor, begin): (&TensorSpec, u64)| {
        let dims = tensor.shape.iter().map(|&size| size as i64).collect();
        let kind = data_type(tensor.dtype).expect("invariant: other dtypes are refused");
        Tensor::external(tensor.name.clone(), dims, kind, begin, tensor.n_bytes())
    };
    let mut model = model.clone();
    if let Some(graph) = &mut model.graph {
        graph.initializer.extend(tensors.iter().zip(places(tensors).0).map(external));
    }
    model
}

/// Bytes of both files.
pub(in super::super) fn file_bytes(model: &Model, tensors: &[TensorSpec]) -> u64 {
    with_tensors(model, tensors).encoded_len() as u64 + places(tensors).1
}

impl OnnxFile {
    /// Writes the messages. Values that an earlier run wrote into the same file stay there.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn create(folder: &Path, model: &Model, tensors: &[TensorSpec]) -> Result<Self, CheckpointError> {
        let folder = folder.join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(io("create", &folder))?;
        let path = folder.join(MODEL_FILE);
        let bytes = with_tensors(model, tensors).encode_to_vec();
        let mut file = open_to_write(&path)?;
        file.set_len(bytes.len() as u64).map_err(io("write", &path))?;
        file.write_all(&bytes).map_err(io("write", &path))?;
        file.sync_all().map_err(io("sync", &path))?;
        let path = folder.join(DATA_FILE);
        let (begins, n_bytes) = places(tensors);
        let file = open_to_write(&path)?;
        file.set_len(n_bytes).map_err(io("write", &path))?;
        let slots = tensors.iter().zip(begins).map(|(t, begin)| (t.name.clone(), (begin, t.n_bytes()))).collect();
        Ok(Self { path, file, slots })
    }

    /// Marks a tensor as written by an earlier run.
    pub fn skip(&mut self, name: &str) {
        self.slots.remove(name);
    }

    /// Writes the bytes of one tensor at its place.
    ///
    /// # Errors
    /// The file cannot be written.
    ///
    /// # Panics
    /// When `name` was not announced, was written before, or has another size: faults of the caller.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let slot = self.slots.remove(name);
        let (begin, n_bytes) = slot.unwrap_or_else(|| panic!("invariant: tensor `{name}` is written once"));
        assert_eq!(bytes.len() as u64, n_bytes, "invariant: tensor `{name}` has its announced size");
        self.file.seek(SeekFrom::Start(begin)).map_err(io("write", &self.path))?;
        self.file.write_all(bytes).map_err(io("write", &self.path))
    }

    /// Syncs the file, whose tensors are all written.
    ///
    /// # Errors
    /// The file cannot be written.
    ///
    /// # Panics
    /// When an announced tensor was never written: a fault of the caller.
    pub fn finish(self) -> Result<(), CheckpointError> {
        assert!(self.slots.is_empty(), "invariant: tensor `{:?}` was written", self.slots.keys().next());
        self.file.sync_all().map_err(io("sync", &self.path))
    }
}
