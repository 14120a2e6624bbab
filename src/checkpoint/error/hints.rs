//! The consequences of an error: a hint for people, and the class that decides the exit code.

use super::super::magic::WEIGHTS;
use super::super::paths::{INDEX_FILE, folder_of, is_gguf};
use super::CheckpointError;
use crate::codecs::{registry, torch};

impl CheckpointError {
    /// A way for the user to fix it, if there is one.
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
            Torch { .. } => "the file is damaged or holds something else than the tensors of a model; get the safetensors of the model".into(),
            TorchGlobal { .. } => "weights need no such thing: do not load the file with other tools, and get the safetensors of the model".into(),
            TorchLegacy { path } => format!(
                "`torch.save(torch.load(\"{0}\", weights_only=True), \"{0}\")` in Python writes the current form, or get the safetensors of the model",
                path.display()
            ),
            GgufHeader { .. } => "the file is damaged; get it again from its source".into(),
            DuplicateTensor { .. } => "remove the shard that does not belong to this checkpoint".into(),
            Json { .. } => "the file must be valid JSON; compare it with the one in the model's repository".into(),
            MissingShard { .. } | FewShards { .. } | TensorAbsentFromShard { .. } => {
                "the download is incomplete: get the missing shard, or download the repository again".into()
            }
            LoneShard { path, .. } if is_gguf(path) => {
                "put the files that `gguf-split` made in one folder, under the names that it gave them, and give any of them".into()
            }
            LoneShard { path, .. } if [INDEX_FILE, torch::INDEX_FILE].iter().any(|name| folder_of(path).join(name).is_file()) => {
                format!("give the folder of all shards, `{}`", folder_of(path).display())
            }
            LoneShard { .. } => format!("the download is incomplete: get the other shards and `{INDEX_FILE}`, and give the folder"),
            ShardOutside { .. } => "an index may only name files beside itself; do not use this checkpoint".into(),
            TensorAbsent { tensor, .. } if tensor.starts_with("lm_head") => {
                "if the model shares its embeddings, `config.json` must say `\"tie_word_embeddings\": true`".into()
            }
            TensorAbsent { .. } => "check that all shards are there and that `model_type` in `config.json` is right".into(),
            Shape { path, fields, .. } if is_gguf(path) => {
                format!("check {fields} in `config.json`, or the metadata of the file if there is none")
            }
            Shape { fields, .. } => format!("check {fields} in `config.json`"),
            Dtype { dtype, .. } if dtype == "F64" => "cast the weights to 32 or 16 bits first: `tensor.float()` in Python".into(),
            Dtype { .. } => "dequantize quantized checkpoints first, or give unquantized 16- or 32-bit weights".into(),
            Quantized { .. } => {
                let names: Vec<&str> = registry::names().collect();
                format!("give the unquantized 16- or 32-bit checkpoint; lrc reads {} and GGUF", names.join(", "))
            }
            Packed { .. } => {
                "get `quantize_config.json` or the whole `config.json` of its repository, or give the unquantized checkpoint".into()
            }
            Encoding { .. } => "the file is damaged, or `config.json` belongs to another one".into(),
            NotAnAdapter { .. } => {
                "give the folder of a LoRA adapter as PEFT saves it, with `adapter_config.json` and `adapter_model.safetensors`".into()
            }
            NotMerged { .. } => "give the model that the adapter was trained on; `adapter_config.json` names it".into(),
            NonFinite { .. } => "the weight is broken at its source; get the file again or repair the checkpoint".into(),
            Overflow { .. } => "convert the checkpoint to a wider dtype (BF16 or F32) first".into(),
            Hub { network: true, .. } => {
                "check the network, `HF_ENDPOINT` and `HF_HUB_OFFLINE`; if a folder was meant, there is none of this name".into()
            }
            Hub { .. } => "check the path, or the name and `--revision`; private and gated repositories need `HF_TOKEN`".into(),
            HubUntrusted { .. } => "check `HF_ENDPOINT`, and report this to whoever runs that server; nothing that it sent was kept".into(),
            Revision { .. } => "give letters, digits and `._/-`, without `..`; as `main`, `v1.0` or `refs/pr/5`".into(),
            HubDisabled { .. } => "check the path, or build with `--features hub`".into(),
            Output(error) => error.hint(),
            Io { .. } => return None,
        })
    }

    /// True when the machine, not the input, is the cause: disk, memory, network.
    pub fn is_resource(&self) -> bool {
        match self {
            Self::Output(error) => error.is_resource(),
            Self::Hub { network: true, .. } => true,
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
        match self {
            Self::Output(error) => !error.is_resource(),
            Self::Revision { .. } => true,
            _ => false,
        }
    }
}
