//! One variant for each rule of a checkpoint that can be broken: files and tensors here, outputs in [`OutputError`].
//!
//! Every variant names the file, the tensor if there is one, what was expected and what was found.
//! [`CheckpointError::hint`] says what a person can do about it.

mod hints;
mod output;

use std::path::PathBuf;

use thiserror::Error;

use super::magic::Kind;
pub use output::OutputError;

/// Why a checkpoint could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A path that holds no weights in any layout that is read.
    #[error("`{}` is not a checkpoint: {reason}", path.display())]
    NotACheckpoint {
        /// The file or folder.
        path: PathBuf,
        /// A clause: what was looked for and not found.
        reason: String,
    },

    /// A weight file that is a folder, a device or a pipe.
    #[error("`{}` is {kind}, not a file", path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
        /// A noun phrase: what it is.
        kind: &'static str,
    },

    /// Git LFS has left its pointer in place of the file.
    #[error("`{}` is a Git LFS pointer: the file itself was not downloaded", path.display())]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },

    /// A weight file whose first bytes belong to another kind of file than its extension says.
    #[error("`{}` is not a {expected} but {}", path.display(), found.what)]
    WrongKind {
        /// The file.
        path: PathBuf,
        /// A noun phrase: the kind that the extension promises.
        expected: &'static str,
        /// The kind of the first bytes.
        found: &'static Kind,
    },

    /// An output of a later version of lrc.
    #[error("`{entry}` in `{}` is {found}, but this version supports only {known}", path.display())]
    Newer {
        /// Its `config.json` or report.
        path: PathBuf,
        /// The entry that this version does not know.
        entry: String,
        /// The value of the entry.
        found: String,
        /// The values that this version knows.
        known: String,
    },

    /// A GGUF file with a model, tensors or a tokenizer that lrc does not know.
    #[error("`{}` holds a model that lrc does not read: {reason}", path.display())]
    ForeignGguf {
        /// The file.
        path: PathBuf,
        /// A clause: what is not known.
        reason: String,
    },

    /// A file of PyTorch must be an archive of a pickle and storages.
    #[error("`{}` cannot be read as a file of PyTorch: {reason}", path.display())]
    Torch {
        /// The file.
        path: PathBuf,
        /// A clause: what is wrong.
        reason: String,
    },

    /// A pickle may name only tensors, storages and containers.
    #[error("`{}` asks for `{global}`, which is not a tensor; nothing was executed", path.display())]
    TorchGlobal {
        /// The file.
        path: PathBuf,
        /// The Python name that it would call.
        global: String,
    },

    /// A file of PyTorch in the form of versions before 1.6.
    #[error("`{}` is in the form that PyTorch wrote before version 1.6, which lrc does not read", path.display())]
    TorchLegacy {
        /// The file.
        path: PathBuf,
    },

    /// The description of an output in its config contradicts its tensors, or itself.
    #[error("`{entry}` in `{}` {reason}", path.display())]
    ConfigEntry {
        /// The config.
        path: PathBuf,
        /// The entry, with dots between keys.
        entry: String,
        /// A predicate: what is wrong with the entry.
        reason: String,
    },

    /// The operating system refused a file operation.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// The operation, as an infinitive.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },

    /// A file must be as long as its header says; this one is shorter.
    #[error("`{}` is truncated: its header describes {expected} bytes, the file has {found}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Length in bytes by the header.
        expected: u64,
        /// Length of the file in bytes.
        found: u64,
    },

    /// Tensors must cover a file to its end.
    #[error("`{}` has {extra} bytes after the last tensor that no tensor owns", path.display())]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// Bytes after the last tensor.
        extra: u64,
    },

    /// A header must fit into its file.
    #[error("`{}` says that its header has {header} bytes, but the file has {file}", path.display())]
    HeaderLength {
        /// The file.
        path: PathBuf,
        /// Length of the header in bytes, by the prefix of the file.
        header: u64,
        /// Length of the file in bytes.
        file: u64,
    },

    /// A safetensors header must be a JSON object that describes tensors.
    #[error("`{}` has a header that cannot be parsed: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The error of the parser.
        reason: String,
    },

    /// A GGUF header must be well formed.
    #[error("`{}` cannot be read as a GGUF file: {reason}", path.display())]
    GgufHeader {
        /// The file.
        path: PathBuf,
        /// A clause: the field that is wrong, and how.
        reason: String,
    },

    /// The data of a tensor must be inside of its file.
    #[error("tensor `{tensor}` in `{}` has data offsets [{begin}, {end}], outside of the {available} bytes of data", path.display())]
    OffsetsOutOfRange {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// First byte, counted from the end of the header.
        begin: u64,
        /// One past the last byte, counted likewise.
        end: u64,
        /// Bytes after the header.
        available: u64,
    },

    /// Tensors must follow each other without a hole or an overlap.
    #[error("tensor `{tensor}` in `{}` begins at data offset {begin}, expected {expected}: tensors overlap or leave a hole", path.display())]
    OffsetsNotContiguous {
        /// The file.
        path: PathBuf,
        /// The first tensor that does not.
        tensor: String,
        /// Its first byte, counted from the end of the header.
        begin: u64,
        /// The end of the tensor before it.
        expected: u64,
    },

    /// The length of a tensor must follow from its shape and dtype.
    #[error("tensor `{tensor}` in `{}` has {found} bytes, {needs}", path.display())]
    TensorSize {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its length in bytes.
        found: u64,
        /// A clause: shape, dtype, and the length that they need.
        needs: String,
    },

    /// A tensor must be in one file only.
    #[error("tensor `{tensor}` is defined in both `{}` and `{}`", first.display(), second.display())]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// One file that has it.
        first: PathBuf,
        /// Another.
        second: PathBuf,
    },

    /// A JSON file that cannot be parsed.
    #[error("`{}` cannot be parsed: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The error of the parser, with line and column.
        reason: String,
    },

    /// Every shard of an index must be in the folder.
    #[error("`{}` names shard `{shard}`, which is not in the folder", path.display())]
    MissingShard {
        /// The index.
        path: PathBuf,
        /// The file name that it lists.
        shard: String,
    },

    /// A shard that was given without the others.
    #[error("`{}` is only one of {count} shards of a model", path.display())]
    LoneShard {
        /// The shard.
        path: PathBuf,
        /// The number of shards, by its file name.
        count: usize,
    },

    /// An index must list as many shards as their file names count.
    #[error("`{}` names {found} shards, but `{}` is one of {count}", path.display(), first.display())]
    FewShards {
        /// The index.
        path: PathBuf,
        /// The number in the file names.
        count: usize,
        /// The number that the index lists.
        found: usize,
        /// A shard whose name has the larger number.
        first: PathBuf,
    },

    /// An index may list only files beside itself.
    #[error("`{}` names shard `{shard}`, which is not a plain file name", path.display())]
    ShardOutside {
        /// The index.
        path: PathBuf,
        /// The name that leads elsewhere.
        shard: String,
    },

    /// A shard must have the tensors that the index lists for it.
    #[error("tensor `{tensor}` is listed in `{}` but absent from `{shard}`", path.display())]
    TensorAbsentFromShard {
        /// The index.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard that lacks it.
        shard: String,
    },

    /// A tensor that the model needs is in no file.
    #[error("tensor `{tensor}` is in no weight file of `{}`", path.display())]
    TensorAbsent {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },

    /// A tensor must have the shape that the config implies.
    #[error("tensor `{tensor}` in `{}` has shape {found:?}, expected {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The stored shape.
        found: Vec<usize>,
        /// The shape by the config.
        expected: Vec<usize>,
        /// The fields of `config.json` that decide it, for the hint.
        fields: String,
    },

    /// Weights must have a float dtype that is read.
    #[error("tensor `{tensor}` in `{}` has dtype {dtype}, expected F32, F16 or BF16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: String,
    },

    /// The checkpoint has a quantization that is not read.
    #[error("`{}` is quantized by {method}, which lrc does not read", path.display())]
    Quantized {
        /// The checkpoint.
        path: PathBuf,
        /// The method, by the config.
        method: String,
    },

    /// Packed codes need settings that say how to unpack them.
    #[error("tensor `{tensor}` in `{}` is packed by a quantizer, and no file in the folder says which", path.display())]
    Packed {
        /// The checkpoint.
        path: PathBuf,
        /// A tensor of codes.
        tensor: String,
    },

    /// Codes that do not fit their settings, or settings that contradict the tensors.
    #[error("tensor `{tensor}` in `{}` cannot be decoded: {reason}", path.display())]
    Encoding {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// A clause: what does not fit.
        reason: String,
    },

    /// A folder that holds no adapter, or one whose settings are not read.
    #[error("`{}` is not an adapter that is read: {reason}", path.display())]
    NotAnAdapter {
        /// The folder or its config.
        path: PathBuf,
        /// A clause: what was looked for, or is not read.
        reason: String,
    },

    /// Every tensor of an adapter must have its place in the model.
    #[error("tensor `{tensor}` in `{}` cannot be merged: {reason}", path.display())]
    NotMerged {
        /// The file of the adapter.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// A clause: what does not fit.
        reason: String,
    },

    /// Values must be finite.
    #[error("tensor `{tensor}` in `{}` has {count} NaN or infinite values, the first at element {first}", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The number of values that are not.
        count: usize,
        /// The row-major index of the first of them.
        first: usize,
    },

    /// A value must be finite in the dtype that it is stored in.
    #[error("tensor `{tensor}` has a value at element {first} that {dtype} cannot hold")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The dtype.
        dtype: String,
        /// The row-major index of the first value that is not.
        first: usize,
    },

    /// An output cannot be written where it should be.
    #[error(transparent)]
    Output(#[from] OutputError),

    /// A repository could not be downloaded.
    #[error("cannot get `{id}` (revision `{revision}`) from the hub: {reason}")]
    Hub {
        /// Its hub id.
        id: String,
        /// The requested branch, tag or commit.
        revision: String,
        /// The answer of the server, or the fault of the connection.
        reason: String,
        /// Whether the connection failed, and not the request.
        network: bool,
    },

    /// A server sent names or bytes that contradict each other or would leave the cache.
    #[error("`{server}` cannot be trusted with `{id}`: {reason}")]
    HubUntrusted {
        /// The hub id.
        id: String,
        /// The address of the server.
        server: String,
        /// A clause: what it sent.
        reason: String,
    },

    /// A revision may contain only letters, digits and `._/-`, without `..`.
    #[error("`--revision {revision}` is not the name of a branch, a tag or a commit")]
    Revision {
        /// The value of `--revision`, shortened.
        revision: String,
    },

    /// A hub id was given to a build without the feature `hub`.
    #[error("`{id}` is neither a folder nor a hub id, and this `lrc` was built without the `hub` feature")]
    HubDisabled {
        /// The hub id.
        id: String,
    },
}

/// A result with a [`CheckpointError`].
pub type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// Adds the action and the path to an [`std::io::Error`].
pub(crate) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_path_buf();
    move |source| CheckpointError::Io { action, path, source }
}
