//! Tensors that stand in files in another form: as codes and scales, with rows in another order, under another name.
//!
//! A checkpoint shows them as the tensors that they stand for: `X.weight`, whatever it is made of. One reader a format:
//! lrc's own packing, compressed-tensors, GPTQ, GGUF (in [`super::gguf`]), PEFT adapters.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::cast::{self, Dtype};
use super::error::{CheckpointError, Result};
use super::gguf::Arrangement;
use super::index::TensorInfo;
use crate::quantize::{BlockType, Blocks, Grouped, Levels, Quant, Quantized, Scheme, Storage, bits};

/// Suffixes of lrc's own packing of a matrix `P.weight`: codes (out, bytes), scales (out, n_groups), zeros (out, bytes).
pub const CODES: &str = "codes";
pub const SCALES: &str = "scales";
pub const ZEROS: &str = "zeros";

/// Folder of an adapter beside its base, and the files in it.
pub const ADAPTER_FOLDER: &str = "adapter";
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// What an adapter says of its base: it is the folder above. PEFT is told where that is when it loads.
pub const ADAPTER_BASE: &str = "..";
/// What PEFT puts before the names of modules.
pub const ADAPTER_PREFIX: &str = "base_model.model.";

/// What `lrc.quantized` in `config.json` says of a matrix in lrc's own packing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedEntry {
    /// `int4-g128`, `nf4-g64`.
    pub scheme: String,
    /// (out, in).
    pub shape: [usize; 2],
    /// Of the weight before.
    pub dtype: String,
}

/// How a tensor is put together from stored ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Encoded {
    codec: Codec,
    parts: Vec<TensorInfo>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codec {
    Packed(Scheme),
    CompressedTensors(Scheme),
    Gptq(Scheme),
    /// Floats or blocks as they are, arranged otherwise.
    Rows(Element, Arrangement),
    /// Some rows of a matrix of floats.
    Picked(Rows),
}

/// Rows (or, of a matrix that is stored turned, columns) of a larger matrix: runs of `run`, of which one begins every `stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    pub first: usize,
    pub count: usize,
    pub run: usize,
    pub stride: usize,
    /// The larger matrix is stored as (in, out).
    pub is_turned: bool,
}

impl Rows {
    /// The rows in order.
    pub fn indices(self) -> impl Iterator<Item = usize> {
        let run = self.run.max(1);
        (0..self.count).map(move |row| self.first + row / run * self.stride + row % run)
    }
}

/// What a tensor of a GGUF file is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    Plain(Dtype),
    Block(BlockType),
}

impl Element {
    /// GGUF's number of a type that is written.
    ///
    /// # Panics
    /// When it is no float, which callers rule out.
    pub(super) fn type_id(self) -> u32 {
        match self {
            Self::Plain(Dtype::F32) => 0,
            Self::Plain(Dtype::F16) => 1,
            Self::Plain(Dtype::BF16) => 30,
            Self::Plain(other) => unreachable!("invariant: only float tensors are written, got {other:?}"),
            Self::Block(block) => block.id,
        }
    }

    /// The inverse of [`Self::type_id`]; none of types that are not read.
    pub(super) fn of_type_id(id: u32) -> Option<Self> {
        match id {
            0 => Some(Self::Plain(Dtype::F32)),
            1 => Some(Self::Plain(Dtype::F16)),
            30 => Some(Self::Plain(Dtype::BF16)),
            id => BlockType::of_id(id).map(Self::Block),
        }
    }
}

/// A decoded tensor.
pub(super) enum Decoded {
    Quantized(Quantized),
    Values(Vec<f32>),
}

impl Encoded {
    pub fn rows(element: Element, order: Arrangement, part: TensorInfo) -> Self {
        Self { codec: Codec::Rows(element, order), parts: vec![part] }
    }

    /// The matrix of some rows of a stored one.
    pub fn picked(rows: Rows, from: TensorInfo) -> Self {
        Self { codec: Codec::Picked(rows), parts: vec![from] }
    }

    pub fn is_picked(&self) -> bool {
        matches!(self.codec, Codec::Picked(_))
    }

    pub fn n_bytes(&self) -> u64 {
        let all: u64 = self.parts.iter().map(TensorInfo::n_bytes).sum();
        match (self.codec, self.parts.first().map(|from| from.shape.as_slice())) {
            (Codec::Picked(rows), Some(&[m, n])) => {
                all / (if rows.is_turned { n } else { m }).max(1) as u64 * rows.count as u64
            }
            _ => all,
        }
    }

    pub fn storage(&self) -> Option<Storage> {
        match self.codec {
            Codec::Packed(scheme) | Codec::CompressedTensors(scheme) | Codec::Gptq(scheme) => {
                Some(Storage::Grouped(scheme))
            }
            Codec::Rows(Element::Block(block_type), _) => Some(Storage::Block(block_type)),
            Codec::Rows(Element::Plain(_), _) | Codec::Picked(_) => None,
        }
    }

    /// Whether [`Self::storage`] is all that there is to know: zeros of GPTQ tell only when they are read whether it is symmetric.
    pub fn is_told_by_header(&self) -> bool {
        !matches!(self.codec, Codec::Gptq(_))
    }

    /// Decodes a tensor of `shape` from its parts, whose bytes `read` gives; none where they are broken.
    pub fn decode(&self, shape: &[usize], read: &dyn Fn(&TensorInfo) -> Vec<u8>) -> Option<Decoded> {
        let (&cols, leading) = shape.split_last()?;
        let rows = leading.iter().product();
        let part = |i: usize| self.parts.get(i).map(|info| (info.dtype, read(info)));
        let grouped = |grouped: Grouped| {
            let entries = rows * grouped.scheme.n_groups(cols);
            let zeros = if grouped.scheme.levels.has_zeros() { entries } else { 0 };
            let is_whole = (grouped.scales.len(), grouped.zeros.len()) == (entries, zeros);
            is_whole.then_some(Decoded::Quantized(Quantized::Grouped(grouped)))
        };
        match self.codec {
            Codec::Packed(scheme) => {
                let (levels, n_groups) = (scheme.levels, scheme.n_groups(cols));
                let codes = bits::unpack(&part(0)?.1, rows, cols, levels.bits(), 1)?;
                let (dtype, scales) = part(1)?;
                let zeros = match levels.has_zeros() {
                    true => bits::unpack(&part(2)?.1, rows, n_groups, levels.bits(), 1)?,
                    false => Vec::new(),
                };
                grouped(Grouped { rows, cols, scheme, codes, scales: cast::decode(dtype, &scales)?, zeros })
            }
            Codec::CompressedTensors(scheme) => {
                let codes = bits::unpack(&part(0)?.1, rows, cols, scheme.levels.bits(), 4)?;
                let (dtype, scales) = part(1)?;
                let scales = cast::decode(dtype, &scales)?;
                grouped(Grouped { rows, cols, scheme, codes, scales, zeros: Vec::new() })
            }
            Codec::Gptq(scheme) => {
                let (bits, n_groups) = (scheme.levels.bits(), scheme.n_groups(cols));
                // Stored as (in / codes per word, out): turned to words of an output, in the order of inputs.
                let words = transposed_words(&part(0)?.1, rows);
                let codes = bits::unpack(&words, rows, cols, bits, 4)?;
                let (dtype, scales) = part(1)?;
                let scales = cast::decode(dtype, &scales).filter(|scales| scales.len() == n_groups * rows)?;
                let scales = transposed(&scales, n_groups, rows);
                let top = (1u32 << bits) - 1;
                // The first version of the format stores zeros less one.
                let zeros = bits::unpack(&part(2)?.1, n_groups, rows, bits, 4)?;
                let zeros: Vec<u8> = zeros.into_iter().map(|z| ((u32::from(z) + 1) & top) as u8).collect();
                let zeros = transposed(&zeros, n_groups, rows);
                let middle = 1u8 << (bits - 1);
                let symmetric = zeros.iter().all(|&z| z == middle);
                let scheme = Scheme { levels: Levels::Int { bits, symmetric }, ..scheme };
                grouped(Grouped {
                    rows,
                    cols,
                    scheme,
                    codes,
                    scales,
                    zeros: if symmetric { Vec::new() } else { zeros },
                })
            }
            Codec::Picked(picked) => {
                let (dtype, bytes) = part(0)?;
                let values = cast::decode(dtype, &bytes)?;
                let &[_, width] = self.parts.first()?.shape.as_slice() else { return None };
                let row = |i: usize| -> Vec<f32> {
                    match picked.is_turned {
                        false => values[i * width..(i + 1) * width].to_vec(),
                        true => values.iter().skip(i).step_by(width).copied().collect(),
                    }
                };
                Some(Decoded::Values(picked.indices().flat_map(row).collect()))
            }
            Codec::Rows(element, order) => {
                // A vector is a matrix of one column.
                let (rows, cols) = if leading.is_empty() { (cols, 1) } else { (rows, cols) };
                let bytes = order.to_model(&part(0)?.1, rows);
                match element {
                    Element::Plain(dtype) => cast::decode(dtype, &bytes).map(Decoded::Values),
                    Element::Block(block_type) => {
                        let is_whole = bytes.len() as u64 == block_type.n_bytes(rows, cols);
                        is_whole.then_some(Decoded::Quantized(Quantized::Block(Blocks {
                            rows,
                            cols,
                            block_type,
                            bytes,
                        })))
                    }
                }
            }
        }
    }
}

/// What a config says that weights were before they were coded; f16 where it is silent.
pub(super) fn model_dtype(config: &Map<String, Value>) -> Dtype {
    match ["dtype", "torch_dtype"].iter().find_map(|key| config.get(*key)?.as_str()) {
        Some("float32") => Dtype::F32,
        Some("bfloat16") => Dtype::BF16,
        _ => Dtype::F16,
    }
}

/// A row-major matrix (rows, cols) as row-major (cols, rows).
fn transposed<T: Copy>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols).flat_map(|j| (0..rows).map(move |i| values[i * cols + j])).collect()
}

/// Words of a matrix (n, cols) of 32-bit words, turned.
pub fn transposed_words(bytes: &[u8], cols: usize) -> Vec<u8> {
    let words = bytes.as_chunks::<4>().0;
    transposed(words, words.len() / cols.max(1), cols).into_flattened()
}

/// The tensors of a checkpoint by name, and their order.
pub(super) struct View {
    pub tensors: BTreeMap<String, TensorInfo>,
    pub order: Vec<String>,
}

impl View {
    /// Puts `info` in the place of stored tensors, of which the first must be there.
    fn replace(&mut self, stored: &[String], info: TensorInfo) {
        for name in stored {
            self.tensors.remove(name);
        }
        if let Some(at) = self.order.iter().position(|name| Some(name) == stored.first()) {
            self.order[at].clone_from(&info.name);
        }
        self.order.retain(|name| !stored.contains(name));
        self.tensors.insert(info.name.clone(), info);
    }

    /// Makes one tensor of the stored ones.
    fn join(&mut self, stored: &[String], name: String, shape: [usize; 2], dtype: Dtype, codec: Codec) {
        let parts: Vec<TensorInfo> = stored.iter().filter_map(|name| self.tensors.get(name).cloned()).collect();
        let Some(first) = parts.first().cloned() else { return };
        let info = TensorInfo { name, dtype, shape: shape.into(), ..first };
        self.replace(stored, TensorInfo { encoded: Some(Box::new(Encoded { codec, parts })), ..info });
    }

    /// Gives a tensor another name.
    fn rename(&mut self, from: &str, to: String) {
        if let Some(info) = self.tensors.get(from).cloned() {
            self.replace(&[from.to_string()], TensorInfo { name: to, ..info });
        }
    }

    /// Recognises everything that the config and the settings of a quantiser describe.
    ///
    /// # Errors
    /// The checkpoint is quantised in a way that is not read here.
    pub fn decode(
        &mut self,
        config: &Map<String, Value>,
        quantization: Option<&Map<String, Value>>,
        path: &Path,
    ) -> Result<()> {
        self.packed(config, path)?;
        let Some(quantization) = quantization else { return Ok(()) };
        let text = |key: &str| quantization.get(key).and_then(Value::as_str).unwrap_or("unknown");
        let refuse = |what: &str| {
            let method = format!("{}{what}", text("quant_method"));
            Err(CheckpointError::Quantised { path: path.into(), method })
        };
        match text("quant_method") {
            "compressed-tensors" if text("format") == "pack-quantized" => {
                if self.tensors.keys().any(|name| name.ends_with(".weight_zero_point")) {
                    return refuse(", asymmetric");
                }
                self.compressed_tensors(path)
            }
            "compressed-tensors" => refuse(&format!(" in the format `{}`", text("format"))),
            "gptq" => {
                let bits = quantization.get("bits").and_then(Value::as_u64);
                let version = quantization.get("checkpoint_format").and_then(Value::as_str).unwrap_or("gptq");
                match bits {
                    Some(bits @ (2 | 4 | 8)) if version == "gptq" => self.gptq(bits as u32, model_dtype(config), path),
                    Some(bits) => refuse(&format!(", {bits} bits, version `{version}`")),
                    None => refuse(", which does not say of how many bits"),
                }
            }
            _ => refuse(""),
        }
    }

    fn shape(&self, name: &str, path: &Path) -> Result<[usize; 2]> {
        let absent = || CheckpointError::TensorAbsent { path: path.into(), tensor: name.into() };
        let info = self.tensors.get(name).ok_or_else(absent)?;
        <[usize; 2]>::try_from(info.shape.as_slice()).map_err(|_| CheckpointError::Encoding {
            path: path.into(),
            tensor: name.into(),
            reason: "it is not a matrix".into(),
        })
    }

    fn packed(&mut self, config: &Map<String, Value>, path: &Path) -> Result<()> {
        let Some(entries) = config.get("lrc").and_then(|lrc| lrc.get("quantized")).and_then(Value::as_object) else {
            return Ok(());
        };
        for (module, entry) in entries {
            let name = |part: &str| format!("{module}.{part}");
            let broken = |reason: String| CheckpointError::Encoding { path: path.into(), tensor: name(CODES), reason };
            let entry = PackedEntry::deserialize(entry).map_err(|e| broken(e.to_string()))?;
            let scheme = match entry.scheme.parse() {
                Ok(Quant::Rtn(scheme, _)) => scheme,
                _ => return Err(broken(format!("`{}` is no scheme", entry.scheme))),
            };
            let dtype = match entry.dtype.as_str() {
                "F16" => Dtype::F16,
                "BF16" => Dtype::BF16,
                _ => Dtype::F32,
            };
            let ([rows, cols], bits) = (entry.shape, scheme.levels.bits());
            // What is sized by the entry is bounded by the codes that are there.
            let width = self.shape(&name(CODES), path)?[1];
            if rows == 0 || cols == 0 || cols > width.saturating_mul(8) {
                return Err(broken(format!(
                    "rows of {width} bytes do not hold the {cols} columns of shape {:?}",
                    entry.shape
                )));
            }
            let groups = scheme.n_groups(cols);
            let mut parts = vec![(CODES, bits::row_bytes(cols, bits, 1)), (SCALES, groups)];
            if scheme.levels.has_zeros() {
                parts.push((ZEROS, bits::row_bytes(groups, bits, 1)));
            }
            for &(part, width) in &parts {
                if self.shape(&name(part), path)? != [rows, width] {
                    return Err(broken(format!("`{}` does not have shape [{rows}, {width}]", name(part))));
                }
            }
            let stored: Vec<String> = parts.iter().map(|(part, _)| name(part)).collect();
            self.join(&stored, name("weight"), entry.shape, dtype, Codec::Packed(scheme));
        }
        Ok(())
    }

    fn with_suffix(&self, suffix: &str) -> Vec<String> {
        self.order.iter().filter_map(|name| Some(name.strip_suffix(suffix)?.to_string())).collect()
    }

    fn compressed_tensors(&mut self, path: &Path) -> Result<()> {
        for module in self.with_suffix(".weight_packed") {
            let name = |part: &str| format!("{module}.{part}");
            let broken = |reason: &str| CheckpointError::Encoding {
                path: path.into(),
                tensor: name("weight_packed"),
                reason: reason.into(),
            };
            let [rows, words] = self.shape(&name("weight_packed"), path)?;
            let [_, groups] = self.shape(&name("weight_scale"), path)?;
            let cols = self.tensors.get(&name("weight_shape")).and_then(|info| info.row_of_i64.get(1).copied());
            let cols = cols.ok_or_else(|| broken("its `weight_shape` is absent"))?;
            if rows == 0 || cols == 0 || cols > words.saturating_mul(8) {
                return Err(broken("its codes do not have the columns of its `weight_shape`"));
            }
            let bits = [4u32, 8].into_iter().find(|&bits| bits::row_bytes(cols, bits, 4) == 4 * words);
            let bits = bits.ok_or_else(|| broken("it does not have 4 or 8 bits a weight"))?;
            if groups == 0 || !cols.is_multiple_of(groups) {
                return Err(broken("its scales do not divide its columns"));
            }
            let group = (groups > 1).then(|| cols / groups);
            let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group };
            let dtype = self.tensors[&name("weight_scale")].dtype;
            let stored = ["weight_packed", "weight_scale", "weight_shape"].map(name);
            self.join(&stored, name("weight"), [rows, cols], dtype, Codec::CompressedTensors(scheme));
        }
        Ok(())
    }

    fn gptq(&mut self, bits: u32, dtype: Dtype, path: &Path) -> Result<()> {
        for module in self.with_suffix(".qweight") {
            let name = |part: &str| format!("{module}.{part}");
            let [words, rows] = self.shape(&name("qweight"), path)?;
            let [groups, _] = self.shape(&name("scales"), path)?;
            let cols = words * 32 / bits as usize;
            let broken = |reason: &str| CheckpointError::Encoding {
                path: path.into(),
                tensor: name("qweight"),
                reason: reason.into(),
            };
            if groups == 0 || rows == 0 || cols == 0 || !cols.is_multiple_of(groups) {
                return Err(broken("its scales do not divide its columns"));
            }
            let group = cols / groups;
            let order = self.tensors.get(&name("g_idx")).map(|info| &info.row_of_i64);
            if order.is_some_and(|order| order.iter().enumerate().any(|(i, &g)| g != i / group)) {
                return Err(broken("its groups are out of order (`desc_act`)"));
            }
            let scheme = Scheme { levels: Levels::Int { bits, symmetric: true }, group: (groups > 1).then_some(group) };
            let stored = ["qweight", "scales", "qzeros", "g_idx"].map(name);
            self.join(&stored, name("weight"), [rows, cols], dtype, Codec::Gptq(scheme));
        }
        Ok(())
    }

    /// Lays an adapter over its base: `X.weight` becomes `X.base.weight`, beside `X.lr_a.weight` and `X.lr_b.weight`.
    pub fn adapt(&mut self, adapter: Vec<TensorInfo>) {
        for info in adapter {
            // PEFT's names, and those of GGUF under the names of the checkpoint.
            let rest = info.name.strip_prefix(ADAPTER_PREFIX).unwrap_or(&info.name);
            let suffixes = [(".lora_A.weight", "lr_a"), (".lora_B.weight", "lr_b")];
            let others = [(".weight.lora_a", "lr_a"), (".weight.lora_b", "lr_b")];
            let found = suffixes
                .into_iter()
                .chain(others)
                .find_map(|(theirs, ours)| Some((rest.strip_suffix(theirs)?.to_string(), ours)));
            let Some((module, part)) = found else { continue };
            self.add_pair_part(&module, part, info);
        }
    }

    /// Adds one factor of a pair over a base.
    fn add_pair_part(&mut self, module: &str, part: &str, info: TensorInfo) {
        for tensor in ["weight", "bias"] {
            self.rename(&format!("{module}.{tensor}"), format!("{module}.base.{tensor}"));
        }
        let name = format!("{module}.{part}.weight");
        self.order.push(name.clone());
        self.tensors.insert(name.clone(), TensorInfo { name, ..info });
    }
}
