//! Opens a checkpoint: finds its files, reads their headers, and decides which tensors they contain.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value};

use super::error::{CheckpointError, Result};
use super::files::{CheckpointFiles, ShardIndex, read_config};
use super::gguf::{Made, OfGguf};
use super::joined::{Changes, Joined};
use super::magic::Kind;
use super::paths::{CONFIG_FILE, REPORT_FILE, folder_of, is_gguf, is_torch};
use super::reader::Shard;
use super::stack::Stack;
use super::tensor::TensorInfo;
use super::view::View;
use super::{described, gguf, index, settings, torch};

/// An opened checkpoint: every header read and checked, no weight loaded.
#[derive(Debug)]
pub struct Checkpoint {
    pub(super) root: PathBuf,
    pub(super) config: Option<Map<String, Value>>,
    /// Why an existing config could not be read.
    pub(super) config_error: Option<CheckpointError>,
    /// Pairs of tensors that were compared, and whether they are equal.
    pub(super) equal: Mutex<BTreeMap<[String; 2], bool>>,
    pub(super) shards: Vec<Arc<Shard>>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
    /// Tensor names in the order of the files.
    pub(super) order: Vec<String>,
    /// Names of tensors that are stored under another name.
    pub(super) borrowed: BTreeSet<String>,
    pub(super) stacks: Vec<Stack>,
    /// `quant_method` of a source that another tool quantized, if the config has one.
    pub(super) method: Option<String>,
    /// A file without a config: other files beside it do not belong to it.
    pub(super) is_alone: bool,
    /// The config and the files beside the weights are made from the metadata of a GGUF file.
    pub(super) made: Option<Made>,
    /// Files of an adapter or a base that are read too.
    pub(super) joined: Vec<Joined>,
    /// Set if matrices are presented as differences from a base.
    pub(super) changes: Option<Changes>,
}

impl Checkpoint {
    /// Opens a folder of safetensors (or one such file), or of files of PyTorch, and checks every header.
    ///
    /// ```
    /// use lrc::checkpoint::Checkpoint;
    ///
    /// let checkpoint = Checkpoint::open("fixtures/tiny-llama".as_ref())?;
    /// let shape = &checkpoint.require("model.embed_tokens.weight")?.shape; // (vocab_size, hidden_size)
    /// assert_eq!(checkpoint.values("model.embed_tokens.weight")?.len(), shape[0] * shape[1]);
    /// assert!(Checkpoint::open("fixtures/text".as_ref()).is_err(), "a folder without weights");
    /// # Ok::<(), lrc::checkpoint::CheckpointError>(())
    /// ```
    ///
    /// # Errors
    /// Every rule of the format has its own [`CheckpointError`]. GGUF files need [`Self::open_with`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_files(path, None)
    }

    /// Like [`Self::open`], and opens GGUF files as well: `of` names their tensors, and makes the config of those
    /// that have none beside them.
    ///
    /// # Errors
    /// As [`Self::open`], or a GGUF file has a tensor or a model that `of` does not know.
    pub fn open_with(path: &Path, of: OfGguf) -> Result<Self> {
        Self::open_files(path, Some(of))
    }

    fn open_files(path: &Path, of: Option<OfGguf>) -> Result<Self> {
        let files = CheckpointFiles::find(path)?;
        let (config, config_error) = match read_config(&files.root.join(CONFIG_FILE)) {
            Ok(config) => (config, None),
            // A config that is not JSON can be copied, and safetensors can be read without it; GGUF files cannot.
            Err(error @ (CheckpointError::Json { .. } | CheckpointError::LfsPointer { .. }))
                if !files.files.iter().any(|file| is_gguf(file)) =>
            {
                (None, Some(error))
            }
            Err(error) => return Err(error),
        };
        if let Some(config) = &config {
            described::expect_known_version(config, &files.root)?;
        }
        if let Some(error) = &config_error {
            tracing::warn!("{error}: going by the names and shapes of tensors alone");
        }
        let opened = Self::of_files(files, config, of)?;
        Ok(Self { config_error, ..opened })
    }

    /// Opens one file of arrays that are not a model, whatever its name. Other files in its folder are not read.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_arrays(path: &Path) -> Result<Self> {
        let files =
            CheckpointFiles { root: folder_of(path).into(), files: vec![path.into()], index: None, is_file: true };
        Self::of_files(files, None, None)
    }

    fn of_files(files: CheckpointFiles, config: Option<Map<String, Value>>, of: Option<OfGguf>) -> Result<Self> {
        let mut shards = files.files.iter().map(|file| Ok(Arc::new(Shard::open(file)?))).collect::<Result<Vec<_>>>()?;
        let is_alone = files.is_file && config.is_none();
        if of.is_some() && shards.first().is_some_and(|first| is_gguf(first.path())) {
            shards.iter().try_for_each(|shard| expect_gguf(shard))?;
            gguf::expect_split(&shards)?;
        }
        let (config, made) = match (config, shards.as_slice(), of) {
            (None, [first, others @ ..], Some(of)) if is_gguf(first.path()) => {
                let config = gguf::described_config(first, others, of)?;
                (Some(config), Some(Made::new(of)))
            }
            (config, ..) => (config, None),
        };
        let mut view = View::default();
        for (shard_idx, shard) in shards.iter().enumerate() {
            for info in read_header(shard, shard_idx, config.as_ref(), of)? {
                view.order.push(info.name.clone());
                if let Some(first) = view.tensors.insert(info.name.clone(), info) {
                    return Err(CheckpointError::DuplicateTensor {
                        tensor: first.name,
                        first: shards[first.shard_idx].path().to_path_buf(),
                        second: shard.path().to_path_buf(),
                    });
                }
            }
        }
        if let Some((path, index)) = &files.index {
            expect_indexed(path, index, &view, &shards)?;
        }
        if view.tensors.is_empty() {
            return Err(CheckpointError::NotACheckpoint { path: files.root, reason: "it holds no tensor".into() });
        }
        let quantization = settings::find(&files.root, config.as_ref(), &view.order)?;
        let read = |info: &TensorInfo| shards[info.shard_idx].with(info, <[u8]>::to_vec);
        view.decode(config.as_ref().unwrap_or(&Map::new()), quantization.as_ref(), &files.root, &read)?;
        // An adapter in the folder of its base is part of the model.
        if let Some(path) = files.adapter() {
            let (shard, shard_idx) = (Shard::open(&path)?, shards.len());
            let adapter = read_header(&shard, shard_idx, config.as_ref(), of)?;
            shards.push(Arc::new(shard));
            view.adapt(adapter, &path)?;
        }
        let shared = described::shared(config.as_ref(), &view, &files.root)?;
        let borrowed = view.share(shared);
        let View { tensors, order } = view;
        let method = quantization.and_then(|settings| Some(settings.get("quant_method")?.as_str()?.to_string()));
        let stacks = described::stored_stacks(config.as_ref(), tensors.len(), &files.root)?;
        let equal = Mutex::default();
        Ok(Self {
            root: files.root,
            config,
            config_error: None,
            equal,
            shards,
            tensors,
            order,
            borrowed,
            stacks,
            method,
            is_alone,
            made,
            joined: Vec::new(),
            changes: None,
        })
    }

    /// How another tool quantized the weights, in words: `gptq: int4-g128`. `None` if none of them is
    /// quantized, or if lrc did it.
    pub fn source_quantization(&self) -> Option<String> {
        if self.root.join(REPORT_FILE).is_file()
            || self.config.as_ref().is_some_and(|config| config.contains_key("lrc"))
        {
            return None;
        }
        let words = self.tensors.values().filter_map(|info| info.encoded.as_ref()?.words());
        let words: Vec<String> = words.collect::<BTreeSet<String>>().into_iter().collect();
        let is_gguf = self.shards.iter().any(|shard| is_gguf(shard.path()));
        let method = if is_gguf { "gguf" } else { self.method.as_deref().unwrap_or("unknown") };
        (!words.is_empty()).then(|| format!("{method}: {}", words.join(", ")))
    }

    /// The checkpoint with all codes hidden: every weight is the floats that it encodes.
    pub fn dequantized(mut self) -> Self {
        for info in self.tensors.values_mut() {
            info.encoded = info.encoded.take().map(|encoded| Box::new(encoded.dequantized()));
        }
        self
    }

    /// The folder of the checkpoint.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The path of the model for messages: a GGUF file is a model by itself, others are the folder.
    pub fn shown_path(&self) -> &Path {
        match self.shards.first() {
            Some(first) if is_gguf(first.path()) && self.is_alone => first.path(),
            _ => &self.root,
        }
    }

    /// The content of `config.json` in its own order, if it is there; or the config that a GGUF file describes.
    pub fn config(&self) -> Option<&Map<String, Value>> {
        self.config.as_ref()
    }

    /// Why there is no [`Self::config`], if the file is broken.
    pub fn config_error(&self) -> Option<&CheckpointError> {
        self.config_error.as_ref()
    }

    /// Every tensor, in the order of the files.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.order.iter().map(|name| &self.tensors[name])
    }

    /// The tensors that are stored under their own name.
    fn own_tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().filter(|info| !self.borrowed.contains(&info.name))
    }

    /// A tensor by its name, fused and decoded ones included.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Like [`Self::info`], but an absent tensor is an error.
    ///
    /// # Errors
    /// [`CheckpointError::TensorAbsent`].
    pub fn require(&self, name: &str) -> Result<&TensorInfo> {
        self.info(name)
            .ok_or_else(|| CheckpointError::TensorAbsent { path: self.root.clone(), tensor: name.to_string() })
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, info: &TensorInfo) -> &Path {
        self.shards[info.shard_idx].path()
    }

    /// Bytes of the weight files, headers included.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes().len() as u64).sum()
    }

    /// Bytes of all tensors together.
    pub fn n_bytes(&self) -> u64 {
        self.own_tensors().map(TensorInfo::n_bytes).sum()
    }

    /// Number of elements of all tensors together.
    pub fn n_elements(&self) -> u64 {
        self.own_tensors().map(TensorInfo::n_elements).sum()
    }
}

/// Checks that every tensor of an index is in the shard that it names.
fn expect_indexed(path: &Path, index: &ShardIndex, view: &View, shards: &[Arc<Shard>]) -> Result<()> {
    for (tensor, shard) in &index.weight_map {
        let found = view.tensors.get(tensor).and_then(|info| shards[info.shard_idx].path().file_name());
        if found.is_none_or(|name| name != shard.as_str()) {
            let (path, tensor, shard) = (path.into(), tensor.clone(), shard.clone());
            return Err(CheckpointError::TensorAbsentFromShard { path, tensor, shard });
        }
    }
    Ok(())
}

/// The header of a file in either of the formats, by its name.
fn read_header(
    shard: &Shard,
    shard_idx: usize,
    config: Option<&Map<String, Value>>,
    of: Option<OfGguf>,
) -> Result<Vec<TensorInfo>> {
    let (path, bytes) = (shard.path(), shard.bytes());
    if is_torch(path) {
        return torch::read_header(path, bytes, shard_idx);
    }
    if !is_gguf(path) {
        return index::read_header(path, bytes, shard_idx);
    }
    expect_gguf(shard)?;
    let of = of.ok_or_else(|| CheckpointError::NotACheckpoint {
        path: path.into(),
        reason: "it is a GGUF file, and the caller gave no table of its names".into(),
    })?;
    gguf::read_header(path, bytes, shard_idx, config.unwrap_or(&Map::new()), of)
}

/// Refuses a file of another kind under the name of a GGUF file.
fn expect_gguf(shard: &Shard) -> Result<()> {
    let (path, bytes) = (shard.path(), shard.bytes());
    if !crate::codecs::gguf::is_begun(bytes)
        && let Some(found) = Kind::of_no_weights(bytes)
    {
        return Err(CheckpointError::WrongKind { path: path.into(), expected: "GGUF file", found });
    }
    Ok(())
}
