//! Files on disk: tensor names, dtypes, shapes and bytes. This room has no idea of layers.
//!
//! [`Checkpoint::open`] reads headers only. Tensors are mapped and cast one at a time, and their pages are given
//! back, so that memory does not grow with the size of the checkpoint.

pub mod cast;
mod described;
pub mod encoded;
mod error;
mod folder;
pub mod gguf;
mod gguf_header;
pub mod hub;
mod index;
mod job;
pub mod json;
pub mod magic;
mod moving;
mod place;
mod reader;
mod settings;
mod side;
mod strangers;
mod unfinished;
mod writer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::quantize::{Quantized, Storage};
pub use cast::Dtype;
pub use described::FORMAT_VERSION;
pub use encoded::Rows;
use encoded::{ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_FILE, ADAPTER_FOLDER, Decoded, Encoded, View};
pub(crate) use error::io;
pub use error::{CheckpointError, Result};
pub use folder::OutputFolder;
pub use index::TensorInfo;
use magic::Kind;
pub use place::{check_file, expect_apart, expect_folder};
pub(crate) use place::{create_file, folder_of};
use reader::Shard;
pub use reader::read_file;
pub use side::{LeftOut, Side};
pub use unfinished::abandon;
pub use writer::{
    SafetensorsWriter, TensorSpec, file_bytes as writer_bytes, header_entry_bytes, write_file, write_text,
};

/// Names that Hugging Face gives to the files of a checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
pub const INDEX_FILE: &str = "model.safetensors.index.json";
pub const CONFIG_FILE: &str = "config.json";

/// The report of an output of `lrc`, by which one is known.
pub const REPORT_FILE: &str = "lrc-report.json";

/// An opened checkpoint: every header read and checked, no weight loaded.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    config: Option<Map<String, Value>>,
    /// Why a config that is there is not read.
    config_error: Option<CheckpointError>,
    /// Of pairs of tensors, whether they are equal: found once.
    equal: Mutex<BTreeMap<[String; 2], bool>>,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Tensor names in the order of the files.
    order: Vec<String>,
    stacks: Vec<Stack>,
    /// A file without a config: what lies beside it belongs to others.
    is_alone: bool,
}

/// A tensor of three dimensions that is shown, or stored, as the matrices that it is a stack of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// Its name where it is whole.
    pub tensor: String,
    /// (n, rows, columns)
    pub shape: [usize; 3],
}

impl Stack {
    /// The module of a matrix: `mlp.experts.down_proj.3`.
    pub fn module(&self, index: usize) -> String {
        format!("{}.{index}", self.tensor.strip_suffix(".weight").unwrap_or(&self.tensor))
    }

    /// The tensors of its matrices.
    pub fn parts(&self) -> Vec<String> {
        (0..self.shape[0]).map(|index| format!("{}.weight", self.module(index))).collect()
    }
}

/// SHA-256 of the config and of every weight file, by file name.
pub type Fingerprint = BTreeMap<String, String>;

/// The `weight_map` of `model.safetensors.index.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ShardIndex {
    #[serde(default)]
    pub metadata: Map<String, Value>,
    pub weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a folder (or one `.safetensors` file) and checks every header.
    ///
    /// ```
    /// # fn main() -> Result<(), lrc::checkpoint::CheckpointError> {
    /// let checkpoint = lrc::checkpoint::Checkpoint::open("fixtures/tiny-llama".as_ref())?;
    /// let shape = &checkpoint.require("model.embed_tokens.weight")?.shape; // (vocab_size, hidden_size)
    /// assert_eq!(checkpoint.values("model.embed_tokens.weight")?.len(), shape[0] * shape[1]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// See [`CheckpointError`]: each rule of the format has its own.
    pub fn open(path: &Path) -> Result<Self> {
        let layout = Layout::find(path)?;
        let (config, config_error) = match read_config(&layout.root.join(CONFIG_FILE)) {
            Ok(config) => (config, None),
            // Text that is no JSON can be copied, and all else be done without it; GGUF files are read by it.
            Err(error @ (CheckpointError::Json { .. } | CheckpointError::LfsPointer { .. }))
                if !layout.files.iter().any(|file| is_gguf(file)) =>
            {
                (None, Some(error))
            }
            Err(error) => return Err(error),
        };
        if let Some(config) = &config {
            described::expect_known_version(config, &layout.root)?;
        }
        if let Some(error) = &config_error {
            tracing::warn!("{error}: going by the names and shapes of tensors alone");
        }
        let opened = Self::of_layout(layout, config)?;
        Ok(Self { config_error, ..opened })
    }

    /// Opens one file of arrays that are no model, whatever its name: nothing beside it is read.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_arrays(path: &Path) -> Result<Self> {
        let layout = Layout { root: folder_of(path).into(), files: vec![path.into()], index: None, is_file: true };
        Self::of_layout(layout, None)
    }

    fn of_layout(layout: Layout, config: Option<Map<String, Value>>) -> Result<Self> {
        let mut shards = layout.files.iter().map(|file| Shard::open(file)).collect::<Result<Vec<_>>>()?;

        let mut tensors = BTreeMap::new();
        let mut order = Vec::new();
        for (shard_idx, shard) in shards.iter().enumerate() {
            for info in read_header(shard, shard_idx, config.as_ref())? {
                order.push(info.name.clone());
                if let Some(first) = tensors.insert(info.name.clone(), info) {
                    let first: TensorInfo = first;
                    return Err(CheckpointError::DuplicateTensor {
                        tensor: first.name,
                        first: shards[first.shard_idx].path().to_path_buf(),
                        second: shard.path().to_path_buf(),
                    });
                }
            }
        }
        if let Some((index_path, index)) = &layout.index {
            for (tensor, shard) in &index.weight_map {
                let found = tensors.get(tensor).map(|info| &shards[info.shard_idx]);
                if found.and_then(|s| s.path().file_name()).is_none_or(|name| name != shard.as_str()) {
                    return Err(CheckpointError::TensorAbsentFromShard {
                        path: index_path.clone(),
                        tensor: tensor.clone(),
                        shard: shard.clone(),
                    });
                }
            }
        }
        if tensors.is_empty() {
            return Err(CheckpointError::NotACheckpoint { path: layout.root, reason: "it holds no tensor".into() });
        }
        let mut view = View { tensors, order };
        let quantization = settings::find(&layout.root, config.as_ref(), &view)?;
        view.decode(config.as_ref().unwrap_or(&Map::new()), quantization.as_ref(), &layout.root)?;
        // An adapter in the folder of its base is part of the model.
        if let Some(path) = layout.adapter() {
            let (shard, shard_idx) = (Shard::open(&path)?, shards.len());
            let adapter = read_header(&shard, shard_idx, config.as_ref())?;
            shards.push(shard);
            view.adapt(adapter);
        }
        let View { tensors, order } = view;
        let stacks = described::stored_stacks(config.as_ref(), tensors.len(), &layout.root)?;
        let equal = Mutex::default();
        let is_alone = layout.is_file && config.is_none();
        Ok(Self { root: layout.root, config, config_error: None, equal, shards, tensors, order, stacks, is_alone })
    }

    /// Stacks that are shown or stored as their matrices.
    pub fn stacks(&self) -> &[Stack] {
        &self.stacks
    }

    /// Shows a stack of matrices of plain floats as these, in its place.
    ///
    /// # Errors
    /// [`CheckpointError::TensorAbsent`].
    ///
    /// # Panics
    /// When it is no such stack.
    pub fn split_stack(mut self, tensor: &str) -> Result<Self> {
        let from = self.require(tensor)?.clone();
        let &[n, rows, columns] = from.shape.as_slice() else { panic!("invariant: a stack has three dimensions") };
        assert!(!from.is_encoded() && cast::is_float(from.dtype), "invariant: only plain floats are split");
        let stack = Stack { tensor: tensor.into(), shape: [n, rows, columns] };
        let place = self.order.iter().position(|name| name == tensor).unwrap_or(self.order.len());
        self.tensors.remove(tensor);
        self.order.splice(place..=place, stack.parts());
        let n_bytes = (from.end - from.begin) / n.max(1);
        for (index, name) in stack.parts().into_iter().enumerate() {
            let begin = from.begin + index * n_bytes;
            let shape = vec![rows, columns];
            let part = TensorInfo { name: name.clone(), shape, begin, end: begin + n_bytes, ..from.clone() };
            self.tensors.insert(name, part);
        }
        self.stacks.push(stack);
        Ok(self)
    }

    /// Shows a matrix of floats, (out, in) or turned, as several of some of its rows, (count, in) each, in its place.
    ///
    /// # Errors
    /// [`CheckpointError::TensorAbsent`].
    ///
    /// # Panics
    /// When it is no matrix of plain floats, or has not as many rows.
    pub fn split(mut self, tensor: &str, parts: &[(String, Rows)]) -> Result<Self> {
        let from = self.require(tensor)?.clone();
        let &[m, n] = from.shape.as_slice() else { panic!("invariant: only matrices are split") };
        assert!(!from.is_encoded() && cast::is_float(from.dtype), "invariant: only plain floats are split");
        let place = self.order.iter().position(|name| name == tensor).unwrap_or(self.order.len());
        self.tensors.remove(tensor);
        self.order.splice(place..=place, parts.iter().map(|(name, _)| name.clone()));
        for (name, rows) in parts {
            let (out, input) = if rows.is_turned { (n, m) } else { (m, n) };
            assert!(rows.indices().all(|row| row < out), "invariant: a part has rows of the whole");
            let encoded = Some(Box::new(Encoded::picked(*rows, from.clone())));
            let shape = vec![rows.count, input];
            self.tensors.insert(name.clone(), TensorInfo { name: name.clone(), shape, encoded, ..from.clone() });
        }
        Ok(self)
    }

    /// The folder of the checkpoint.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The content of `config.json` in its own order, when there is one.
    pub fn config(&self) -> Option<&Map<String, Value>> {
        self.config.as_ref()
    }

    /// Why there is no [`Self::config`], where the file is broken.
    pub fn config_error(&self) -> Option<&CheckpointError> {
        self.config_error.as_ref()
    }

    /// Every tensor, in the order of the files.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.order.iter().map(|name| &self.tensors[name])
    }

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
        self.tensors.values().map(TensorInfo::n_bytes).sum()
    }

    /// Number of elements of all tensors together.
    pub fn n_elements(&self) -> u64 {
        self.tensors.values().map(TensorInfo::n_elements).sum()
    }

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
        let shard = &self.shards[info.shard_idx];
        let value = f(&shard.bytes()[info.begin..info.end]);
        shard.release(info.begin, info.end);
        value
    }

    /// The matrix behind a tensor that is stored in codes; none for floats.
    ///
    /// # Errors
    /// The tensor is absent, or its parts are broken.
    pub fn quantized(&self, name: &str) -> Result<Option<Quantized>> {
        Ok(match self.decoded(self.require(name)?)? {
            Some(Decoded::Quantized(matrix)) => Some(matrix),
            _ => None,
        })
    }

    /// How a tensor is coded; none for floats. Read from the header where that tells all.
    ///
    /// # Errors
    /// The tensor is absent, or its parts are broken.
    pub fn storage(&self, name: &str) -> Result<Option<Storage>> {
        let info = self.require(name)?;
        match &info.encoded {
            Some(encoded) if !encoded.is_told_by_header() => Ok(self.quantized(name)?.map(|matrix| matrix.storage())),
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
        let info = self.require(name)?;
        let path = || self.file_of(info).to_path_buf();
        let not_float =
            || CheckpointError::Dtype { path: path(), tensor: name.into(), dtype: format!("{:?}", info.dtype) };
        let values = match self.decoded(info)? {
            Some(Decoded::Values(values)) => values,
            Some(Decoded::Quantized(matrix)) => matrix.dequantize(),
            None => self.stored(info, |bytes| cast::decode(info.dtype, bytes)).ok_or_else(not_float)?,
        };
        self.finite(info, values)
    }

    /// Whether every value of a float tensor is zero. Of plain tensors no more is read than tells.
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

    /// The values of one of the matrices that a float tensor of three dimensions is a stack of, row-major, every one finite.
    ///
    /// # Errors
    /// As [`Self::values`].
    pub fn slice_values(&self, name: &str, index: usize) -> Result<Vec<f32>> {
        let info = self.require(name)?;
        let len: usize = info.shape.iter().skip(1).product();
        let bits = len * info.dtype.bitsize();
        if self.decoded(info)?.is_some() || !cast::is_float(info.dtype) {
            // Codes have no place of their own for a matrix.
            return Ok(self.values(name)?[index * len..(index + 1) * len].to_vec());
        }
        let bytes = index * bits / 8..(index + 1) * bits / 8;
        let values = self.stored(info, |all| cast::decode(info.dtype, &all[bytes]));
        self.finite(info, values.expect("invariant: the dtype is a float"))
    }

    /// Whether two tensors are of one shape and hold the same values, and whether that is asked for the first time.
    ///
    /// # Errors
    /// As [`Self::values`].
    pub fn are_equal(&self, first: &str, second: &str) -> Result<(bool, bool)> {
        let key = [first, second].map(String::from);
        let mut known = self.equal.lock().expect("invariant: no holder of the list panics");
        if let Some(&is_equal) = known.get(&key) {
            return Ok((is_equal, false));
        }
        let [one, other] = [self.require(first)?, self.require(second)?];
        let is_plain = !one.is_encoded() && !other.is_encoded() && one.dtype == other.dtype;
        let is_equal = one.shape == other.shape
            && match is_plain && self.stored(one, |bytes| self.stored(other, |others| bytes == others)) {
                true => true,
                false => self.values(first)? == self.values(second)?,
            };
        known.insert(key, is_equal);
        Ok((is_equal, true))
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
        let mut fingerprint: Fingerprint = self
            .shards
            .par_iter()
            .map(|shard| {
                let mut hasher = Sha256::new();
                for (i, chunk) in shard.bytes().chunks(HASH_CHUNK).enumerate() {
                    hasher.update(chunk);
                    shard.release(i * HASH_CHUNK, i * HASH_CHUNK + chunk.len());
                }
                (file_name(shard.path()), hex(&hasher.finalize()))
            })
            .collect();
        let config = self.root.join(CONFIG_FILE);
        if self.config.is_some() {
            fingerprint.insert(CONFIG_FILE.into(), sha256_file(&config)?);
        }
        Ok(fingerprint)
    }
}

const HASH_CHUNK: usize = 16 << 20;

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of a file, read in pieces.
///
/// # Errors
/// The file cannot be read.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = std::fs::File::open(path).map_err(io("open", path))?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match std::io::Read::read(&mut file, &mut chunk).map_err(io("read", path))? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&chunk[..n]),
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The header of a file in either of the formats, by its name.
fn read_header(shard: &Shard, shard_idx: usize, config: Option<&Map<String, Value>>) -> Result<Vec<TensorInfo>> {
    let (path, bytes) = (shard.path(), shard.bytes());
    if !is_gguf(path) {
        return index::read_header(path, bytes, shard_idx);
    }
    if !gguf_header::is_begun(bytes)
        && let Some(found) = Kind::of_no_weights(bytes)
    {
        return Err(CheckpointError::WrongKind { path: path.into(), expected: "GGUF file", found });
    }
    let config = config.ok_or_else(|| CheckpointError::ForeignGguf {
        path: path.into(),
        reason: "there is no `config.json` beside it".into(),
    })?;
    gguf::read_header(path, bytes, shard_idx, config)
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "gguf")
}

fn read_config(path: &Path) -> Result<Option<Map<String, Value>>> {
    match read_file(path) {
        Ok(bytes) => json::parse(&bytes)
            .map(Some)
            .map_err(|e| CheckpointError::Json { path: path.into(), reason: e.to_string() }),
        Err(CheckpointError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Which files of a folder are the checkpoint.
struct Layout {
    root: PathBuf,
    files: Vec<PathBuf>,
    index: Option<(PathBuf, ShardIndex)>,
    /// A file was named, not a folder.
    is_file: bool,
}

/// Number and count of a shard that is named by them: 1 and 2 of `model-00001-of-00002.safetensors`.
fn shard_number(path: &Path) -> Option<(usize, usize)> {
    let stem = path.file_stem()?.to_str()?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (_, number) = rest.rsplit_once('-')?;
    Some((number.parse().ok()?, count.parse().ok()?))
}

/// Refuses one of several shards as if it were all of them.
fn expect_whole(file: &Path) -> Result<()> {
    match shard_number(file) {
        Some((_, count)) if count > 1 => Err(CheckpointError::LoneShard { path: file.into(), count }),
        _ => Ok(()),
    }
}

impl Layout {
    fn find(path: &Path) -> Result<Self> {
        let refuse = |reason: &str| Err(CheckpointError::NotACheckpoint { path: path.into(), reason: reason.into() });
        if path.is_file() {
            if path.extension().is_none_or(|e| e != "safetensors") && !is_gguf(path) {
                return refuse("it is a file, and neither a `.safetensors` nor a `.gguf` file");
            }
            expect_whole(path)?;
            return Ok(Self { root: folder_of(path).into(), files: vec![path.into()], index: None, is_file: true });
        }
        if !path.exists() {
            return refuse("there is no such folder");
        }
        if !path.is_dir() {
            return refuse("it is neither a folder nor a regular file");
        }
        let root = path.to_path_buf();
        if path.join(ADAPTER_CONFIG).exists() {
            return refuse("it is an adapter; give the folder of its base, with the adapter in `adapter/`");
        }
        for single in [SINGLE_FILE, gguf::MODEL_FILE].map(|name| path.join(name)) {
            if single.exists() {
                return Ok(Self { root, files: vec![single], index: None, is_file: false });
            }
        }
        let index_path = path.join(INDEX_FILE);
        if index_path.exists() {
            return Self::sharded(root, index_path);
        }
        let names: Vec<PathBuf> = std::fs::read_dir(path)
            .map_err(io("list", path))?
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .collect();
        let mut weights: Vec<PathBuf> =
            names.iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")).cloned().collect();
        weights.sort();
        match weights.len() {
            1 => {
                expect_whole(&weights[0])?;
                Ok(Self { root, files: weights, index: None, is_file: false })
            }
            0 if names.iter().any(|p| side::is_weight_file(&file_name(p))) => {
                refuse("its weights are not in safetensors form; convert them first")
            }
            0 => refuse("it holds no `.safetensors` file"),
            _ => refuse("it holds several `.safetensors` files and no `model.safetensors.index.json`"),
        }
    }

    /// The adapter in the folder of its base, in the format of the base: one that names the folder above as its base.
    fn adapter(&self) -> Option<PathBuf> {
        let is_ours = |name: &str| self.files.iter().any(|file| file.file_name().is_some_and(|n| n == name));
        if is_ours(gguf::MODEL_FILE) {
            let path = self.root.join(gguf::LORA_FILE);
            return path.exists().then_some(path);
        }
        let folder = self.root.join(ADAPTER_FOLDER);
        let config = read_config(&folder.join(ADAPTER_CONFIG)).ok()??;
        let is_of_this = config.get("base_model_name_or_path").is_some_and(|base| base == ADAPTER_BASE);
        is_of_this.then(|| folder.join(ADAPTER_FILE)).filter(|path| path.exists())
    }

    fn sharded(root: PathBuf, index_path: PathBuf) -> Result<Self> {
        let bytes = read_file(&index_path)?;
        let index: ShardIndex = json::parse(&bytes)
            .map_err(|e| CheckpointError::Json { path: index_path.clone(), reason: e.to_string() })?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        let mut files = Vec::new();
        for shard in names {
            if Path::new(shard).components().count() != 1 || Path::new(shard).file_name().is_none() {
                return Err(CheckpointError::ShardOutside { path: index_path, shard: shard.clone() });
            }
            let file = root.join(shard);
            if !file.exists() {
                return Err(CheckpointError::MissingShard { path: index_path, shard: shard.clone() });
            }
            files.push(file);
        }
        if let Some((file, (_, count))) = files.iter().find_map(|file| Some((file, shard_number(file)?)))
            && files.len() < count
        {
            return Err(CheckpointError::FewShards {
                path: index_path,
                count,
                found: files.len(),
                first: file.clone(),
            });
        }
        Ok(Self { root, files, index: Some((index_path, index)), is_file: false })
    }
}
