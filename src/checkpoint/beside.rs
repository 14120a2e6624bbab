//! Files beside the weights of a model by name: in its folder, or made from the metadata of a GGUF file that is alone.

use std::path::{Path, PathBuf};

use super::error::{CheckpointError, Result};
use super::gguf::MadeFiles;
use super::open::Checkpoint;
use super::paths::CONFIG_FILE;
use super::reader::read_file;

/// A place where a model has its tokenizer, its templates and its configs.
pub trait Beside {
    /// The content of a file, by its path from the root of the model; `None` if there is no such file.
    ///
    /// # Errors
    /// The file cannot be read or made.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>>;

    /// The path of a file, for messages: of the file that it is made of, if it is made.
    fn path(&self, name: &str) -> PathBuf;
}

impl<P: AsRef<Path> + ?Sized> Beside for P {
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match read_file(&self.path(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(CheckpointError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.as_ref().join(name)
    }
}

impl Beside for Checkpoint {
    /// A file in the folder comes before one that is made, unless the checkpoint is a file to which
    /// its folder does not belong.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let found = if self.made.is_some() && self.is_alone { None } else { self.root.read(name)? };
        match found {
            Some(found) => Ok(Some(found)),
            None => Ok(self.described_files()?.and_then(|files| files.get(name).cloned())),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        match (&self.made, self.shards.first()) {
            (Some(_), Some(shard)) => shard.path().to_path_buf(),
            _ => self.root.join(name),
        }
    }
}

impl Checkpoint {
    /// The path of the config, for messages: `config.json`, or the GGUF file that describes it.
    pub fn config_path(&self) -> PathBuf {
        self.path(CONFIG_FILE)
    }

    /// Whether the config is made of the metadata of a GGUF file.
    pub fn is_described(&self) -> bool {
        self.made.is_some()
    }

    /// The files beside the weights that are not in the folder but made from the metadata of a GGUF file.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn made_files(&self) -> Result<MadeFiles> {
        let mut files = self.described_files()?.cloned().unwrap_or_default();
        files.retain(|name, _| self.is_alone || !self.root.join(name).exists());
        Ok(files)
    }

    /// Every file that the metadata of a GGUF file describes; `None` if the config is not of one.
    fn described_files(&self) -> Result<Option<&MadeFiles>> {
        match (&self.made, self.shards.first(), &self.config) {
            (Some(made), Some(shard), Some(config)) => made.files(shard.path(), shard.bytes(), config).map(Some),
            _ => Ok(None),
        }
    }
}
