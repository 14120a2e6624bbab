//! One variant for each rule of a checkpoint that can be broken.
//!
//! Every variant names the file, the tensor where there is one, what was expected and what came.
//! [`CheckpointError::hint`] says what a person can do about it.

use std::path::PathBuf;

use thiserror::Error;

use super::magic::{Kind, WEIGHTS};
use super::paths::{INDEX_FILE, folder_of};

/// Why a checkpoint could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    #[error("`{}` is not a checkpoint: {reason}", path.display())]
    NotACheckpoint { path: PathBuf, reason: String },

    #[error("`{}` is {kind}, not a file", path.display())]
    NotAFile { path: PathBuf, kind: &'static str },

    #[error("`{}` is a Git LFS pointer: the file itself was not downloaded", path.display())]
    LfsPointer { path: PathBuf },

    #[error("`{}` is not a {expected} but {}", path.display(), found.what)]
    WrongKind { path: PathBuf, expected: &'static str, found: &'static Kind },

    #[error("`{entry}` in `{}` is {found}, but this version supports only {known}", path.display())]
    Newer { path: PathBuf, entry: String, found: String, known: String },

    #[error("`{}` was not written by lrc: {reason}; GGUF files of other tools are not supported yet", path.display())]
    ForeignGguf { path: PathBuf, reason: String },

    #[error("`{entry}` in `{}` {reason}", path.display())]
    ConfigEntry { path: PathBuf, entry: String, reason: String },

    #[error("cannot {action} `{}`", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },

    #[error("`{}` is truncated: its header describes {expected} bytes, the file has {found}", path.display())]
    Truncated { path: PathBuf, expected: u64, found: u64 },

    #[error("`{}` has {extra} bytes after the last tensor that no tensor owns", path.display())]
    TrailingBytes { path: PathBuf, extra: u64 },

    #[error("`{}` says that its header has {header} bytes, but the file has {file}", path.display())]
    HeaderLength { path: PathBuf, header: u64, file: u64 },

    #[error("`{}` has a header that cannot be parsed: {reason}", path.display())]
    Header { path: PathBuf, reason: String },

    #[error("`{}` cannot be read as a GGUF file: {reason}", path.display())]
    GgufHeader { path: PathBuf, reason: String },

    #[error("tensor `{tensor}` in `{}` has data offsets [{begin}, {end}], outside of the {available} bytes of data", path.display())]
    OffsetsOutOfRange { path: PathBuf, tensor: String, begin: u64, end: u64, available: u64 },

    #[error("tensor `{tensor}` in `{}` begins at data offset {begin}, expected {expected}: tensors overlap or leave a hole", path.display())]
    OffsetsNotContiguous { path: PathBuf, tensor: String, begin: u64, expected: u64 },

    #[error("tensor `{tensor}` in `{}` has {found} bytes, {needs}", path.display())]
    TensorSize { path: PathBuf, tensor: String, found: u64, needs: String },

    #[error("tensor `{tensor}` is defined in both `{}` and `{}`", first.display(), second.display())]
    DuplicateTensor { tensor: String, first: PathBuf, second: PathBuf },

    #[error("`{}` cannot be parsed: {reason}", path.display())]
    Json { path: PathBuf, reason: String },

    #[error("`{}` names shard `{shard}`, which is not in the folder", path.display())]
    MissingShard { path: PathBuf, shard: String },

    #[error("`{}` is only one of {count} shards of a model", path.display())]
    LoneShard { path: PathBuf, count: usize },

    #[error("`{}` names {found} shards, but `{}` is one of {count}", path.display(), first.display())]
    FewShards { path: PathBuf, count: usize, found: usize, first: PathBuf },

    #[error("`{}` names shard `{shard}`, which is not a plain file name", path.display())]
    ShardOutside { path: PathBuf, shard: String },

    #[error("tensor `{tensor}` is listed in `{}` but absent from `{shard}`", path.display())]
    TensorAbsentFromShard { path: PathBuf, tensor: String, shard: String },

    #[error("tensor `{tensor}` is in no weight file of `{}`", path.display())]
    TensorAbsent { path: PathBuf, tensor: String },

    #[error("tensor `{tensor}` in `{}` has shape {found:?}, expected {expected:?}", path.display())]
    Shape { path: PathBuf, tensor: String, found: Vec<usize>, expected: Vec<usize>, fields: String },

    #[error("tensor `{tensor}` in `{}` has dtype {dtype}, expected F32, F16 or BF16", path.display())]
    Dtype { path: PathBuf, tensor: String, dtype: String },

    #[error("`{}` is quantized by {method}, which lrc does not read", path.display())]
    Quantized { path: PathBuf, method: String },
    #[error("tensor `{tensor}` in `{}` is packed by a quantizer, and no file in the folder says which", path.display())]
    Packed { path: PathBuf, tensor: String },

    #[error("tensor `{tensor}` in `{}` cannot be decoded: {reason}", path.display())]
    Encoding { path: PathBuf, tensor: String, reason: String },
    #[error("tensor `{tensor}` in `{}` has {count} NaN or infinite values, the first at element {first}", path.display())]
    NonFinite { path: PathBuf, tensor: String, count: usize, first: usize },

    #[error("tensor `{tensor}` has a value at element {first} that {dtype} cannot hold")]
    Overflow { tensor: String, dtype: String, first: usize },

    #[error("output folder `{}` exists", path.display())]
    OutputExists { path: PathBuf },

    #[error("`{}` exists", path.display())]
    FileExists { path: PathBuf },

    #[error("`{}` cannot be the output: {reason}", path.display())]
    OutputUnusable { path: PathBuf, reason: String },

    #[error("`{}` holds `{first}`{}, which lrc did not write", path.display(), more(*others))]
    Strangers { path: PathBuf, first: String, others: usize },

    #[error("`{}` is neither a file nor a folder, and lrc makes nothing else in `{}`", path.display(), work.display())]
    StrangeWork { path: PathBuf, work: PathBuf },

    #[error("cannot move the finished output from `{}` to `{}`: {reason}", path.display(), target.display())]
    NotMoved { path: PathBuf, target: PathBuf, reason: String },

    #[error("`{}` is being written by another run", path.display())]
    OutputBusy { path: PathBuf },

    #[error("`{}` holds an unfinished compression", path.display())]
    Unfinished { path: PathBuf },

    #[error("`{}` holds an unfinished run of another job: {differences}", path.display())]
    OtherJob { path: PathBuf, differences: String },

    #[error("`{}` has {available} bytes of free disk space, {needed} are needed", path.display())]
    NoSpace { path: PathBuf, needed: u64, available: u64 },

    #[error("cannot get `{id}` (revision `{revision}`) from the hub: {reason}")]
    Hub { id: String, revision: String, reason: String, network: bool },

    #[error("`{server}` cannot be trusted with `{id}`: {reason}")]
    HubUntrusted { id: String, server: String, reason: String },

    #[error("`--revision {revision}` is not the name of a branch, a tag or a commit")]
    Revision { revision: String },

    #[error("`{id}` is neither a folder nor a hub id, and this `lrc` was built without the `hub` feature")]
    HubDisabled { id: String },
}

impl CheckpointError {
    /// What the user can do about it, when there is something.
    pub fn hint(&self) -> Option<String> {
        use CheckpointError::*;
        Some(match self {
            NotACheckpoint { .. } => "give a folder that holds `model.safetensors` or `model.safetensors.index.json`, or a hub id such as `org/name`".into(),
            NotAFile { .. } => "give a regular file, or a link to one".into(),
            LfsPointer { .. } => "run `git lfs pull` in the repository, or download it from the hub".into(),
            WrongKind { found, .. } => found.hint(&WEIGHTS),
            Newer { .. } => "a newer lrc wrote it: update lrc, or make it again with this one".into(),
            ForeignGguf { .. } => "give the Hugging Face checkpoint that it was converted from".into(),
            ConfigEntry { .. } => "the output was changed or damaged after it was written; make it again".into(),
            Truncated { .. } | HeaderLength { .. } | TrailingBytes { .. } => "download the file again; an interrupted copy looks like this".into(),
            Header { .. } | OffsetsOutOfRange { .. } | OffsetsNotContiguous { .. } | TensorSize { .. } => {
                "the file is damaged or was not written by a safetensors library; get it again from its source".into()
            }
            GgufHeader { .. } => "the file is damaged; get it again from its source".into(),
            DuplicateTensor { .. } => "remove the shard that does not belong to this checkpoint".into(),
            Json { .. } => "the file must be valid JSON; compare it with the one of the original repository".into(),
            MissingShard { .. } | FewShards { .. } | TensorAbsentFromShard { .. } => {
                "the download is incomplete: get the missing shard, or download the repository again".into()
            }
            LoneShard { path, .. } if folder_of(path).join(INDEX_FILE).is_file() => {
                format!("give the folder of all shards, `{}`", folder_of(path).display())
            }
            LoneShard { .. } => format!("the download is incomplete: get the other shards and `{INDEX_FILE}`, and give the folder"),
            ShardOutside { .. } => "an index may only name files beside itself; do not use this checkpoint".into(),
            TensorAbsent { tensor, .. } if tensor.starts_with("lm_head") => {
                "if the model shares its embeddings, `config.json` must say `\"tie_word_embeddings\": true`".into()
            }
            TensorAbsent { .. } => "check that all shards are there and that `model_type` in `config.json` is right".into(),
            Shape { fields, .. } => format!("check {fields} in `config.json`"),
            Dtype { .. } => "dequantize quantized checkpoints first, or give the original 16- or 32-bit weights".into(),
            Quantized { .. } => {
                "give the original 16- or 32-bit checkpoint; lrc reads its own formats, symmetric compressed-tensors and GPTQ".into()
            }
            Packed { .. } => {
                "get `quantize_config.json` or the whole `config.json` of its repository, or give the original checkpoint".into()
            }
            Encoding { .. } => "the file is damaged, or `config.json` belongs to another one".into(),
            NonFinite { .. } => "the weight is broken at its source; get the file again or repair the checkpoint".into(),
            Overflow { .. } => "convert the checkpoint to a wider dtype (BF16 or F32) first".into(),
            OutputExists { .. } => "choose another folder, or give `--force` to replace it".into(),
            FileExists { .. } => "choose another name, or replace the file with `--force`".into(),
            OutputUnusable { .. } => "choose an unused name, or an empty folder".into(),
            Strangers { .. } => "move it elsewhere, or choose another folder; `--force` replaces what lrc wrote and nothing else".into(),
            StrangeWork { work, .. } => format!("lrc does not follow links there; remove `{}` if nobody needs it", work.display()),
            NotMoved { path, .. } => format!("nothing is lost: `{}` is whole, and can be moved by hand", path.display()),
            OutputBusy { path } => format!("wait for the other run; if there is none, remove `{}`", path.display()),
            Unfinished { path } => format!("finish it with the command that began it, or remove `{}`", path.display()),
            OtherJob { .. } => "resume it with its own arguments and source, or discard it with `--restart`".into(),
            NoSpace { .. } => "free some space, or write to another disk".into(),
            Hub { network: true, .. } => {
                "check the network, `HF_ENDPOINT` and `HF_HUB_OFFLINE`; if a folder was meant, there is none of this name".into()
            }
            Hub { .. } => "check the path, or the name and `--revision`; private and gated repositories need `HF_TOKEN`".into(),
            HubUntrusted { .. } => "check `HF_ENDPOINT`, and report this to whoever runs that server; nothing that it sent was kept".into(),
            Revision { .. } => "give letters, digits and `._/-`, without `..`; as `main`, `v1.0` or `refs/pr/5`".into(),
            HubDisabled { .. } => "check the path, or build with `--features hub`".into(),
            Io { .. } => return None,
        })
    }

    /// True when the machine, not the input, is the cause: disk, memory, network.
    pub fn is_resource(&self) -> bool {
        match self {
            Self::NoSpace { .. }
            | Self::OutputBusy { .. }
            | Self::NotMoved { .. }
            | Self::Hub { network: true, .. } => true,
            Self::Io { source, .. } => source.kind() != std::io::ErrorKind::NotFound,
            _ => false,
        }
    }

    /// True when a number is the cause.
    pub fn is_numeric(&self) -> bool {
        matches!(self, Self::NonFinite { .. } | Self::Overflow { .. })
    }

    /// True when the command itself is the cause.
    pub fn is_usage(&self) -> bool {
        use CheckpointError::*;
        matches!(
            self,
            OutputExists { .. }
                | FileExists { .. }
                | OutputUnusable { .. }
                | Strangers { .. }
                | StrangeWork { .. }
                | Unfinished { .. }
                | OtherJob { .. }
                | Revision { .. }
        )
    }
}

/// The count of those that are not named.
fn more(others: usize) -> String {
    if others == 0 { String::new() } else { format!(" and {others} more") }
}

/// A result with a [`CheckpointError`].
pub type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// Adds the action and the path to an [`std::io::Error`].
pub(crate) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_path_buf();
    move |source| CheckpointError::Io { action, path, source }
}
