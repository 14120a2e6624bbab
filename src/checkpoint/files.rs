//! The files of a folder that are the checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::{CheckpointError, Result, io};
use super::json;
use super::paths::{INDEX_FILE, SINGLE_FILE, file_name, folder_of, is_gguf, is_torch, is_weight_file};
use super::reader::read_file;
use crate::codecs::{gguf, peft, torch};

/// The `weight_map` of `model.safetensors.index.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ShardIndex {
    #[serde(default)]
    pub metadata: Map<String, Value>,
    pub weight_map: BTreeMap<String, String>,
}

/// The object in a JSON file; `None` if there is no such file.
pub(super) fn read_config(path: &Path) -> Result<Option<Map<String, Value>>> {
    match read_file(path) {
        Ok(bytes) => json::parse(&bytes)
            .map(Some)
            .map_err(|e| CheckpointError::Json { path: path.into(), reason: e.to_string() }),
        Err(CheckpointError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// The files of a folder that are the checkpoint.
#[derive(Debug)]
pub(super) struct CheckpointFiles {
    pub root: PathBuf,
    pub files: Vec<PathBuf>,
    pub index: Option<(PathBuf, ShardIndex)>,
    /// The path names a file, not a folder.
    pub is_file: bool,
}

/// Number and count of a shard that is named by them: 1 and 2 of `model-00001-of-00002.safetensors`.
fn shard_number(path: &Path) -> Option<(usize, usize)> {
    let stem = path.file_stem()?.to_str()?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (_, number) = rest.rsplit_once('-')?;
    Some((number.parse().ok()?, count.parse().ok()?))
}

/// The files that a GGUF file is one of, by the number and the count in its name: llama.cpp's `gguf-split`.
///
/// # Errors
/// One of them is not in the folder.
fn split_gguf(path: &Path) -> Result<Option<Vec<PathBuf>>> {
    let Some((_, count)) = shard_number(path).filter(|(_, count)| is_gguf(path) && *count > 1) else {
        return Ok(None);
    };
    let name = file_name(path);
    let Some((rest, _)) = name.rsplit_once("-of-").and_then(|(rest, _)| rest.rsplit_once('-')) else {
        return Ok(None);
    };
    let file = |number: usize| {
        let shard = format!("{rest}-{number:05}-of-{count:05}.gguf");
        let file = folder_of(path).join(&shard);
        if file.exists() { Ok(file) } else { Err(CheckpointError::MissingShard { path: path.into(), shard }) }
    };
    (1..=count).map(file).collect::<Result<_>>().map(Some)
}

/// Refuses a single shard of several, which is not a whole model.
fn expect_whole(file: &Path) -> Result<()> {
    match shard_number(file) {
        Some((_, count)) if count > 1 => Err(CheckpointError::LoneShard { path: file.into(), count }),
        _ => Ok(()),
    }
}

impl CheckpointFiles {
    /// # Errors
    /// The path is not a checkpoint, or is an incomplete one.
    pub fn find(path: &Path) -> Result<Self> {
        let refuse = |reason: &str| Err(CheckpointError::NotACheckpoint { path: path.into(), reason: reason.into() });
        if path.is_file() {
            if path.extension().is_none_or(|e| e != "safetensors") && !is_gguf(path) && !is_torch(path) {
                return refuse("it is a file, and none of `.safetensors`, `.gguf`, `.bin`, `.pt` and `.pth`");
            }
            let root = folder_of(path).into();
            if let Some(files) = split_gguf(path)? {
                return Ok(Self { root, files, index: None, is_file: true });
            }
            expect_whole(path)?;
            return Ok(Self { root, files: vec![path.into()], index: None, is_file: true });
        }
        if !path.exists() {
            return refuse(if is_weight_file(&file_name(path)) {
                "there is no such file"
            } else {
                "there is no such folder"
            });
        }
        if !path.is_dir() {
            return refuse("it is neither a folder nor a regular file");
        }
        if path.join(peft::CONFIG_FILE).exists() {
            return refuse("it is an adapter; give the folder of its base, with the adapter in `adapter/`");
        }
        let index_path = path.join(INDEX_FILE);
        if let Some(single) =
            [SINGLE_FILE, gguf::MODEL_FILE].map(|name| path.join(name)).into_iter().find(|f| f.exists())
        {
            return Ok(Self::of_folder(path, vec![single]));
        }
        if index_path.exists() {
            return Self::sharded(path.into(), index_path);
        }
        Self::unnamed(path)
    }

    fn of_folder(root: &Path, files: Vec<PathBuf>) -> Self {
        Self { root: root.into(), files, index: None, is_file: false }
    }

    /// The only safetensors file of a folder, whatever its name; otherwise the weights of
    /// PyTorch, or the only GGUF file.
    fn unnamed(root: &Path) -> Result<Self> {
        let refuse = |reason: &str| Err(CheckpointError::NotACheckpoint { path: root.into(), reason: reason.into() });
        let names: Vec<PathBuf> = std::fs::read_dir(root)
            .map_err(io("list", root))?
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .collect();
        let of_kind =
            |kind: &str| names.iter().filter(|path| path.extension().is_some_and(|e| e == kind)).cloned().collect();
        let (weights, ggufs): (Vec<PathBuf>, Vec<PathBuf>) = (of_kind("safetensors"), of_kind("gguf"));
        match (weights.as_slice(), ggufs.as_slice()) {
            ([], _) if root.join(torch::INDEX_FILE).exists() => {
                Self::sharded(root.into(), root.join(torch::INDEX_FILE))
            }
            ([], _) if root.join(torch::SINGLE_FILE).exists() => {
                Ok(Self::of_folder(root, vec![root.join(torch::SINGLE_FILE)]))
            }
            ([], [first, ..]) if let Some(files) = split_gguf(first)?.filter(|files| files.len() == ggufs.len()) => {
                Ok(Self::of_folder(root, files))
            }
            ([only], _) | ([], [only]) => {
                expect_whole(only)?;
                Ok(Self::of_folder(root, vec![only.clone()]))
            }
            ([], [_, ..]) => refuse("it holds several `.gguf` files; give one of them"),
            ([], []) if names.iter().any(|p| is_weight_file(&file_name(p))) => {
                refuse("its weights are neither in safetensors form nor a `pytorch_model.bin`; convert them first")
            }
            ([], []) => refuse("it holds no `.safetensors` file"),
            _ => refuse("it holds several `.safetensors` files and no `model.safetensors.index.json`"),
        }
    }

    /// The adapter in the folder of its base, in the format of the base, if it names that folder as its base.
    pub fn adapter(&self) -> Option<PathBuf> {
        let is_ours = |name: &str| self.files.iter().any(|file| file.file_name().is_some_and(|n| n == name));
        if is_ours(gguf::MODEL_FILE) {
            let path = self.root.join(gguf::LORA_FILE);
            return path.exists().then_some(path);
        }
        let folder = self.root.join(peft::FOLDER);
        let config = read_config(&folder.join(peft::CONFIG_FILE)).ok()??;
        peft::is_over_its_folder(&config).then(|| folder.join(peft::WEIGHTS_FILE)).filter(|path| path.exists())
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
