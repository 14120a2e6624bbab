//! A GGUF file of an output, written tensor by tensor.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::checkpoint::{CheckpointError, io, open_to_write};
use crate::codecs::gguf::{self, GgufTensor, Value, Writer};

/// The file, and its tensors that are still to come.
pub(in super::super) struct GgufFile {
    path: PathBuf,
    writer: Writer<File>,
}

impl GgufFile {
    /// Writes the header. Tensors that an earlier run wrote into the same file stay there.
    pub fn create(path: &Path, metadata: &[(String, Value)], tensors: &[GgufTensor]) -> Result<Self, CheckpointError> {
        let file = open_to_write(path)?;
        file.set_len(gguf::file_bytes(metadata, tensors)).map_err(io("write", path))?;
        let writer = Writer::begin(file, metadata, tensors).map_err(io("write", path))?;
        Ok(Self { path: path.into(), writer })
    }

    /// Marks a tensor as written by an earlier run.
    pub fn skip(&mut self, name: &str) {
        self.writer.skip(name);
    }

    /// Writes the bytes of one tensor; see [`Writer::write`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.writer.write(name, bytes).map_err(io("write", &self.path))
    }

    /// Syncs the file, whose tensors are all written.
    pub fn finish(self) -> Result<(), CheckpointError> {
        self.writer.finish().sync_all().map_err(io("sync", &self.path))
    }
}
