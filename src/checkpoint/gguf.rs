//! GGUF files, version 3: names, row orders, reading and writing.
//!
//! llama.cpp has its own names for tensors, and rotates neighbouring rows of a head where Hugging Face rotates halves: q and k
//! of the Llama family are stored with their rows in another order. The writer is our own, because candle's needs all tensors at
//! once; so is the reader of headers (`gguf_header`), because candle's trusts them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::cast;
use super::encoded::{Element, Encoded, model_dtype};
use super::error::{CheckpointError, Result, io};
use super::gguf_header;
use super::index::{TensorInfo, is_sane};
use super::place::open_to_write;

pub const MODEL_FILE: &str = "model.gguf";
/// Scaling of rotary frequencies, computed from the config: no tensor of the checkpoint.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";
pub const LORA_FILE: &str = "model-lora.gguf";

/// Alignment of tensor data, GGUF's default.
const ALIGNMENT: u64 = 32;

/// A family that GGUF files are written and read of.
pub struct Family {
    pub model_type: &'static str,
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Names that it has besides [`NAMES`], or otherwise.
    names: &'static [(&'static str, &'static str)],
    /// Rows of queries and keys stand in the order of pairs that rotate together.
    is_interleaved: bool,
    /// Weights of norms have 1 added, which a checkpoint leaves out.
    has_whole_norms: bool,
    /// Last parts of the modules whose weights a checkpoint stores as (in, out).
    turned: &'static [&'static str],
    /// Last parts of the names of buffers that a checkpoint may have, and GGUF files do not.
    buffers: &'static [&'static str],
    /// `tokenizer.ggml.pre` of its byte-level tokenizer, where it is no matter of the file.
    pub pre_tokenizer: Option<&'static str>,
}

const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "llama",
    names: &[],
    is_interleaved: true,
    has_whole_norms: false,
    turned: &[],
    buffers: &[],
    pre_tokenizer: None,
};
const QWEN2: Family =
    Family { model_type: "qwen2", architecture: "qwen2", is_interleaved: false, pre_tokenizer: Some("qwen2"), ..LLAMA };

pub const FAMILIES: &[Family] = &[
    LLAMA,
    Family { model_type: "mistral", ..LLAMA },
    QWEN2,
    Family {
        model_type: "qwen3",
        architecture: "qwen3",
        names: &[
            ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
            ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
        ],
        ..QWEN2
    },
    Family {
        model_type: "phi3",
        architecture: "phi3",
        names: &[
            ("model.layers.{}.self_attn.qkv_proj", "blk.{}.attn_qkv"),
            ("model.layers.{}.mlp.gate_up_proj", "blk.{}.ffn_up"),
        ],
        is_interleaved: false,
        ..LLAMA
    },
    Family {
        model_type: "gemma2",
        architecture: "gemma2",
        names: &[
            ("model.layers.{}.post_attention_layernorm", "blk.{}.post_attention_norm"),
            ("model.layers.{}.pre_feedforward_layernorm", "blk.{}.ffn_norm"),
            ("model.layers.{}.post_feedforward_layernorm", "blk.{}.post_ffw_norm"),
        ],
        is_interleaved: false,
        has_whole_norms: true,
        ..LLAMA
    },
    Family {
        model_type: "gpt2",
        architecture: "gpt2",
        names: &[
            ("transformer.wte", "token_embd"),
            ("transformer.wpe", "position_embd"),
            ("transformer.ln_f", "output_norm"),
            ("transformer.h.{}.ln_1", "blk.{}.attn_norm"),
            ("transformer.h.{}.attn.c_attn", "blk.{}.attn_qkv"),
            ("transformer.h.{}.attn.c_proj", "blk.{}.attn_output"),
            ("transformer.h.{}.ln_2", "blk.{}.ffn_norm"),
            ("transformer.h.{}.mlp.c_fc", "blk.{}.ffn_up"),
            ("transformer.h.{}.mlp.c_proj", "blk.{}.ffn_down"),
        ],
        is_interleaved: false,
        turned: &["c_attn", "c_proj", "c_fc"],
        buffers: &["attn.bias", "attn.masked_bias"],
        pre_tokenizer: Some("gpt-2"),
        ..LLAMA
    },
];

impl Family {
    /// Whether a tensor of a checkpoint is stored as (in, out), and turned in GGUF.
    pub fn is_turned(&self, tensor: &str) -> bool {
        let module = tensor.strip_suffix(".weight");
        module.is_some_and(|module| self.turned.iter().any(|part| module.ends_with(&format!(".{part}"))))
    }

    /// Whether a tensor of a checkpoint is a buffer that is left out.
    pub fn is_left_out(&self, tensor: &str) -> bool {
        self.buffers.iter().any(|part| tensor.ends_with(&format!(".{part}")))
    }
}

/// The family of a config.
pub fn family(config: &Map<String, Json>) -> Option<&'static Family> {
    let model_type = config.get("model_type")?.as_str()?;
    FAMILIES.iter().find(|family| family.model_type == model_type)
}

/// Names that most families share; `{}` is the number of the block.
const NAMES: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
];

/// `name` (a module) by the table, one way or the other.
fn renamed(name: &str, names: impl Iterator<Item = (&'static str, &'static str)>) -> Option<String> {
    let block = name.split('.').find(|part| part.parse::<usize>().is_ok());
    let pattern = block.map_or(name.to_string(), |block| name.replacen(&format!(".{block}."), ".{}.", 1));
    let mut names = names;
    let (_, to) = names.find(|(from, _)| *from == pattern)?;
    Some(to.replace("{}", block.unwrap_or_default()))
}

/// The GGUF name of a tensor of a checkpoint of `family`; linears have theirs without.
pub fn to_gguf(tensor: &str, family: Option<&Family>) -> Option<String> {
    let (module, suffix) = tensor.rsplit_once('.')?;
    let own = family.map_or(&[][..], |family| family.names);
    let names = || own.iter().chain(NAMES).chain(FAMILIES.iter().flat_map(|family| family.names)).copied();
    // GPT-2's first files leave the prefix out.
    let whole = renamed(module, names()).or_else(|| renamed(&format!("transformer.{module}"), names()))?;
    Some(format!("{whole}.{suffix}"))
}

/// The name in a checkpoint of this config of a tensor of a GGUF file.
fn from_gguf(tensor: &str, config: &Map<String, Json>) -> Option<String> {
    let (module, suffix) = tensor.rsplit_once('.')?;
    let own = family(config).map_or(&[][..], |family| family.names);
    let names = own.iter().chain(NAMES).map(|&(ours, theirs)| (theirs, ours));
    Some(format!("{}.{suffix}", renamed(module, names)?))
}

/// How the values of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    Same,
    /// Of each head, rows of the two halves by turns.
    Interleaved {
        heads: usize,
    },
    /// 1 is added; in f32, as GGUF stores vectors.
    PlusOne,
}

impl Arrangement {
    /// That of a tensor of a checkpoint with this config.
    pub fn of(tensor: &str, config: &Map<String, Json>) -> Self {
        if let Some(family) = family(config).filter(|family| !family.is_interleaved) {
            let is_shifted = family.has_whole_norms && tensor.ends_with("norm.weight");
            return if is_shifted { Self::PlusOne } else { Self::Same };
        }
        let number = |key: &str| config.get(key).and_then(Json::as_u64).map(|n| n as usize);
        let queries = number("num_attention_heads");
        let heads = if tensor.contains(".self_attn.q_proj.") {
            queries
        } else if tensor.contains(".self_attn.k_proj.") {
            number("num_key_value_heads").or(queries)
        } else {
            None
        };
        heads.map_or(Self::Same, |heads| Self::Interleaved { heads })
    }

    /// For every stored row, the row of the model.
    fn rows(self, rows: usize) -> Vec<usize> {
        match self {
            Self::Same | Self::PlusOne => (0..rows).collect(),
            // Rows that are no heads are as they are.
            Self::Interleaved { heads } if heads == 0 || !rows.is_multiple_of(heads.saturating_mul(2)) => {
                (0..rows).collect()
            }
            Self::Interleaved { heads } => {
                let width = rows / heads;
                let row = |i: usize| i / width * width + (i % 2) * (width / 2) + i % width / 2;
                (0..rows).map(row).collect()
            }
        }
    }

    /// Bytes of `rows` rows as the model has them, as the file does.
    pub fn to_file(self, bytes: Vec<u8>, rows: usize) -> Vec<u8> {
        if self == Self::PlusOne {
            return add(&bytes, 1.0);
        }
        if self == Self::Same || rows == 0 {
            return bytes;
        }
        let width = bytes.len() / rows;
        self.rows(rows).into_iter().flat_map(|row| &bytes[row * width..][..width]).copied().collect()
    }

    /// The inverse of [`Self::to_file`].
    pub fn to_model(self, bytes: &[u8], rows: usize) -> Vec<u8> {
        if self == Self::PlusOne {
            return add(bytes, -1.0);
        }
        let mut turned = bytes.to_vec();
        if self != Self::Same && rows > 0 {
            let width = bytes.len() / rows;
            for (stored, row) in self.rows(rows).into_iter().enumerate() {
                turned[row * width..][..width].copy_from_slice(&bytes[stored * width..][..width]);
            }
        }
        turned
    }
}

/// Floats with something added to each.
fn add(bytes: &[u8], shift: f32) -> Vec<u8> {
    bytes.as_chunks::<4>().0.iter().flat_map(|&b| (f32::from_le_bytes(b) + shift).to_le_bytes()).collect()
}

/// A value of a GGUF file's metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

impl Value {
    fn write(&self, to: &mut Vec<u8>) {
        let text = |to: &mut Vec<u8>, text: &str| {
            to.extend((text.len() as u64).to_le_bytes());
            to.extend(text.as_bytes());
        };
        let array = |to: &mut Vec<u8>, kind: u32, len: usize| {
            to.extend(9u32.to_le_bytes());
            to.extend(kind.to_le_bytes());
            to.extend((len as u64).to_le_bytes());
        };
        match self {
            Self::U32(v) => to.extend([4u32.to_le_bytes(), v.to_le_bytes()].as_flattened()),
            Self::F32(v) => to.extend([6u32.to_le_bytes(), v.to_le_bytes()].as_flattened()),
            Self::Bool(v) => {
                to.extend(7u32.to_le_bytes());
                to.push(u8::from(*v));
            }
            Self::Text(v) => {
                to.extend(8u32.to_le_bytes());
                text(to, v);
            }
            Self::Texts(v) => {
                array(to, 8, v.len());
                v.iter().for_each(|v| text(to, v));
            }
            Self::F32s(v) => {
                array(to, 6, v.len());
                to.extend(v.iter().flat_map(|v| v.to_le_bytes()));
            }
            Self::I32s(v) => {
                array(to, 5, v.len());
                to.extend(v.iter().flat_map(|v| v.to_le_bytes()));
            }
        }
    }
}

/// A tensor that will be written; shape (out, in) as everywhere here, GGUF turns it round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    pub name: String,
    pub element: Element,
    pub shape: Vec<usize>,
}

impl GgufTensor {
    pub fn n_bytes(&self) -> u64 {
        match (self.element, self.shape.split_last()) {
            (Element::Block(block), Some((&cols, rows))) => block.n_bytes(rows.iter().product(), cols),
            (Element::Block(_), None) => 0,
            (Element::Plain(dtype), _) => {
                cast::n_bytes(dtype, self.shape.iter().product()).expect("invariant: an output tensor fits in memory")
            }
        }
    }
}

/// Writes a GGUF file tensor by tensor, in any order.
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    file: File,
    /// Offset and size of every tensor that is still to come.
    slots: BTreeMap<String, (u64, u64)>,
}

/// Metadata and table of tensors, padded, and every tensor's offset in the file.
fn header(metadata: &[(String, Value)], tensors: &[GgufTensor]) -> (Vec<u8>, Vec<u64>) {
    let mut bytes = b"GGUF".to_vec();
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut bytes, key);
        value.write(&mut bytes);
    }
    let (mut offset, mut offsets) = (0u64, Vec::new());
    for tensor in tensors {
        text(&mut bytes, &tensor.name);
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&d| bytes.extend((d as u64).to_le_bytes()));
        bytes.extend(tensor.element.type_id().to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        offsets.push(offset);
        offset = (offset + tensor.n_bytes()).next_multiple_of(ALIGNMENT);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
    let begin = bytes.len() as u64;
    (bytes, offsets.into_iter().map(|offset| begin + offset).collect())
}

/// Bytes of the file that a [`GgufWriter`] makes.
pub fn file_bytes(metadata: &[(String, Value)], tensors: &[GgufTensor]) -> u64 {
    let (header, offsets) = header(metadata, tensors);
    let end = |(offset, tensor): (&u64, &GgufTensor)| (offset + tensor.n_bytes()).next_multiple_of(ALIGNMENT);
    offsets.iter().zip(tensors).next_back().map_or(header.len() as u64, end)
}

impl GgufWriter {
    /// Writes the header of a file whose tensors come later.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn create(path: &Path, metadata: &[(String, Value)], tensors: &[GgufTensor]) -> Result<Self> {
        let (header, offsets) = header(metadata, tensors);
        let mut file = open_to_write(path)?;
        file.write_all(&header).map_err(io("write", path))?;
        file.set_len(file_bytes(metadata, tensors)).map_err(io("write", path))?;
        let slots = tensors.iter().zip(offsets).map(|(t, offset)| (t.name.clone(), (offset, t.n_bytes()))).collect();
        Ok(Self { path: path.into(), file, slots })
    }

    /// Takes a tensor for written: an earlier run did.
    pub fn skip(&mut self, name: &str) {
        self.slots.remove(name);
    }

    /// Writes the bytes of one tensor at its place.
    ///
    /// # Errors
    /// The disk refuses.
    ///
    /// # Panics
    /// When `name` was not announced, was written before, or has another size: faults of the caller.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (offset, len) =
            self.slots.remove(name).unwrap_or_else(|| panic!("invariant: tensor `{name}` is written once"));
        assert_eq!(bytes.len() as u64, len, "invariant: tensor `{name}` has its announced size");
        self.file.seek(SeekFrom::Start(offset)).map_err(io("write", &self.path))?;
        self.file.write_all(bytes).map_err(io("write", &self.path))
    }

    /// Syncs the file.
    ///
    /// # Errors
    /// The disk refuses.
    ///
    /// # Panics
    /// When an announced tensor was never written: a fault of the caller.
    pub fn finish(self) -> Result<()> {
        assert!(self.slots.is_empty(), "invariant: tensor `{:?}` was written", self.slots.keys().next());
        self.file.sync_all().map_err(io("sync", &self.path))
    }
}

/// The tensors of a mapped GGUF file under the names of a checkpoint, in the order of their data; `config` tells the heads.
///
/// # Errors
/// The file is damaged, or holds a tensor of an unknown name or type.
pub(super) fn read_header(
    path: &Path,
    file: &[u8],
    shard_idx: usize,
    config: &Map<String, Json>,
) -> Result<Vec<TensorInfo>> {
    let broken = |reason: String| CheckpointError::GgufHeader { path: path.into(), reason };
    let foreign = |reason: String| CheckpointError::ForeignGguf { path: path.into(), reason };
    let header = gguf_header::read(file).map_err(broken)?;
    let (mut tensors, mut places) = (Vec::new(), Vec::new());
    for stored in header.tensors.iter().filter(|stored| stored.name != ROPE_FACTORS) {
        let (name, shape) = (&stored.name, stored.shape.clone());
        // Factors of an adapter have their own suffixes, and the row order of what they add to.
        let (stem, suffix) = match name.rsplit_once('.') {
            Some((stem, suffix @ ("lora_a" | "lora_b"))) => (stem, suffix),
            _ => (name.as_str(), ""),
        };
        let ours = from_gguf(stem, config)
            .ok_or_else(|| foreign(format!("tensor `{name}` has no name in a checkpoint of this `model_type`")))?;
        let element = Element::of_type_id(stored.type_id)
            .ok_or_else(|| foreign(format!("tensor `{name}` is of type {}", stored.type_id)))?;
        let n_elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if !is_sane(&shape) || n_elements.is_none_or(|n| n > file.len() * 8) {
            return Err(broken(format!("tensor `{name}` of shape {shape:?} is larger than the file")));
        }
        if let (Element::Block(block), cols) = (element, shape.last().copied().unwrap_or(1))
            && !block.divides(cols)
        {
            return Err(broken(format!(
                "rows of {cols} values of tensor `{name}` are no whole blocks of `{}`",
                block.name
            )));
        }
        let plain = GgufTensor { name: name.clone(), element, shape: shape.clone() };
        let begin = header.data_begin.saturating_add(stored.offset).min(file.len() as u64) as usize;
        let end = begin + plain.n_bytes() as usize;
        if end > file.len() {
            return Err(CheckpointError::Truncated {
                path: path.into(),
                expected: end as u64,
                found: file.len() as u64,
            });
        }
        places.push((begin, end, stored.name.as_str()));
        let order = if suffix == "lora_a" { Arrangement::Same } else { Arrangement::of(&ours, config) };
        let dtype = match element {
            Element::Plain(dtype) => dtype,
            Element::Block(_) => model_dtype(config),
        };
        let name = match suffix {
            "" => ours,
            suffix => format!("{ours}.{suffix}"),
        };
        let info = TensorInfo { name, dtype, shape, shard_idx, begin, end, encoded: None, row_of_i64: Vec::new() };
        // What is turned is no longer as its family stores it: that is told by its being encoded.
        let is_turned = family(config).is_some_and(|family| family.is_turned(&info.name));
        let is_plain = order == Arrangement::Same && matches!(element, Element::Plain(_)) && !is_turned;
        let encoded = (!is_plain).then(|| Box::new(Encoded::rows(element, order, info.clone())));
        tensors.push(TensorInfo { encoded, ..info });
    }
    tensors.sort_by_key(|info| info.begin);
    places.sort_unstable();
    if let Some([(.., first), (.., second)]) = places.array_windows().find(|[(_, end, _), (begin, ..)]| begin < end) {
        return Err(broken(format!("tensors `{first}` and `{second}` overlap")));
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::Content;

    use super::super::cast::Dtype;
    use super::*;
    use crate::quantize::BlockType;

    #[test]
    fn names_go_both_ways() {
        for (ours, theirs) in [
            ("model.layers.12.self_attn.q_proj.weight", "blk.12.attn_q.weight"),
            ("model.layers.3.mlp.down_proj.bias", "blk.3.ffn_down.bias"),
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
        ] {
            assert_eq!(to_gguf(ours, None).as_deref(), Some(theirs));
            assert_eq!(from_gguf(theirs, &Map::new()).as_deref(), Some(ours));
        }
        for (model_type, ours) in
            [("phi3", "model.layers.1.mlp.gate_up_proj.weight"), ("qwen2", "model.layers.1.mlp.up_proj.weight")]
        {
            let config = serde_json::json!({"model_type": model_type});
            assert_eq!(to_gguf(ours, None).as_deref(), Some("blk.1.ffn_up.weight"));
            assert_eq!(from_gguf("blk.1.ffn_up.weight", config.as_object().unwrap()).as_deref(), Some(ours));
        }
        assert_eq!(to_gguf("model.layers.3.self_attn.rotary.weight", None), None);
        // A name that two families give to different things, and one without its prefix.
        let family = |model_type| FAMILIES.iter().find(|family| family.model_type == model_type);
        let norm = |model_type| to_gguf("model.layers.3.post_attention_layernorm.weight", family(model_type));
        assert_eq!(norm("llama").as_deref(), Some("blk.3.ffn_norm.weight"));
        assert_eq!(norm("gemma2").as_deref(), Some("blk.3.post_attention_norm.weight"));
        for name in ["transformer.h.2.attn.c_attn.bias", "h.2.attn.c_attn.bias"] {
            assert_eq!(to_gguf(name, family("gpt2")).as_deref(), Some("blk.2.attn_qkv.bias"));
        }
    }

    #[test]
    fn rows_of_halves_are_interleaved_and_back() {
        let order = Arrangement::Interleaved { heads: 2 };
        let bytes: Vec<u8> = (0..24).collect();
        // Heads of 4 rows of 3 bytes: rows 0, 2, 1, 3, then 4, 6, 5, 7.
        let stored = order.to_file(bytes.clone(), 8);
        let firsts: Vec<u8> = stored.chunks(3).map(|row| row[0] / 3).collect();
        assert_eq!(firsts, [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(order.to_model(&stored, 8), bytes);
    }

    #[test]
    fn files_come_back_and_have_their_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(MODEL_FILE);
        let block = BlockType::named("q8_0").unwrap();
        let tensors = [
            GgufTensor { name: "token_embd.weight".into(), element: Element::Plain(Dtype::F32), shape: vec![3, 5] },
            GgufTensor { name: "blk.0.attn_q.weight".into(), element: Element::Block(block), shape: vec![4, 64] },
        ];
        let metadata = [
            ("general.architecture".to_string(), Value::Text("llama".into())),
            ("a".into(), Value::Texts(vec!["x".into(), "yz".into()])),
            ("b".into(), Value::F32s(vec![1.0])),
            ("c".into(), Value::I32s(vec![-1, 2])),
            ("d".into(), Value::Bool(true)),
            ("e".into(), Value::U32(7)),
            ("f".into(), Value::F32(0.5)),
        ];
        let mut writer = GgufWriter::create(&path, &metadata, &tensors).unwrap();
        for (i, tensor) in tensors.iter().enumerate().rev() {
            writer.write(&tensor.name, &vec![i as u8 + 1; tensor.n_bytes() as usize]).unwrap();
        }
        writer.finish().unwrap();
        let file = std::fs::read(&path).unwrap();
        assert_eq!(file.len() as u64, file_bytes(&metadata, &tensors));
        // Another reader agrees.
        let content = Content::read(&mut std::io::Cursor::new(&file)).unwrap();
        assert_eq!(content.metadata["e"].to_u32().unwrap(), 7);
        let header = gguf_header::read(&file).unwrap();
        assert_eq!(content.tensor_data_offset, header.data_begin);
        for entry in &header.tensors {
            let theirs = &content.tensor_infos[&entry.name];
            assert_eq!((theirs.shape.dims(), theirs.offset), (entry.shape.as_slice(), entry.offset));
        }
        assert_eq!(content.metadata["c"].to_vec().unwrap().len(), 2);
        let config = serde_json::json!({"num_attention_heads": 2});
        let infos = read_header(&path, &file, 0, config.as_object().unwrap()).unwrap();
        assert_eq!(infos[0].name, "model.embed_tokens.weight");
        assert!(infos[0].encoded.is_none() && infos[1].encoded.is_some());
        assert!(file[infos[1].begin..infos[1].end].iter().all(|&b| b == 2));
        assert!(infos.iter().all(|info| info.begin % 32 == 0));
        assert!(read_header(&path, &file[..file.len() - 64], 0, config.as_object().unwrap()).is_err());
    }
}
