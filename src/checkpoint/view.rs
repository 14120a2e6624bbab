//! The tensors of a checkpoint as they are presented: quantized tensors as the weights that they encode, adapters
//! over their base.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::{CheckpointError, Result};
use super::tensor::{Codec, Encoded, TensorInfo};
use crate::codecs::cast::Dtype;
use crate::codecs::packed::{self, PackedEntry};
use crate::codecs::peft::{self, Factor};
use crate::codecs::{compressed_tensors, gguf, gptq};

/// The tensors of a checkpoint by name, and their order.
#[derive(Debug, Default)]
pub(super) struct View {
    pub tensors: BTreeMap<String, TensorInfo>,
    pub order: Vec<String>,
}

impl View {
    /// Adds a second name for each of these tensors, right after the first in the order; returns the names that were
    /// added.
    pub fn share(&mut self, shared: Vec<[String; 2]>) -> BTreeSet<String> {
        for [name, of] in &shared {
            let info = TensorInfo { name: name.clone(), ..self.tensors[of].clone() };
            self.tensors.insert(name.clone(), info);
            let at = self.order.iter().position(|other| other == of).map_or(self.order.len(), |at| at + 1);
            self.order.insert(at, name.clone());
        }
        shared.into_iter().map(|[name, _]| name).collect()
    }

    /// Replaces stored tensors, of which the first must exist, by `info`.
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

    /// Presents stored tensors as one.
    fn join(&mut self, stored: &[String], name: String, shape: [usize; 2], dtype: Dtype, codec: Codec) {
        let encoded: Vec<TensorInfo> = stored.iter().filter_map(|name| self.tensors.get(name).cloned()).collect();
        let Some(first) = encoded.first().cloned() else { return };
        let info = TensorInfo { name, dtype, shape: shape.into(), ..first };
        self.replace(stored, TensorInfo { encoded: Some(Box::new(Encoded::new(codec, encoded))), ..info });
    }

    /// Gives a tensor another name.
    fn rename(&mut self, from: &str, to: String) {
        if let Some(info) = self.tensors.get(from).cloned() {
            self.replace(&[from.to_string()], TensorInfo { name: to, ..info });
        }
    }

    /// Recognizes everything that the config and the settings of a quantizer describe.
    ///
    /// # Errors
    /// The checkpoint is quantized in a way that is not read here.
    pub fn decode(
        &mut self,
        config: &Map<String, Value>,
        quantization: Option<&Map<String, Value>>,
        path: &Path,
    ) -> Result<()> {
        self.packed(config, path)?;
        let Some(quantization) = quantization else { return Ok(()) };
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        let refused = |what: &str| {
            let method = format!("{method}{what}");
            CheckpointError::Quantized { path: path.into(), method }
        };
        match method {
            compressed_tensors::METHOD => {
                compressed_tensors::expect_settings(quantization).map_err(|what| refused(&what))?;
                let zeros = format!(".{}", compressed_tensors::ZERO_POINT);
                if self.tensors.keys().any(|name| name.ends_with(&zeros)) {
                    return Err(refused(", asymmetric"));
                }
                self.compressed_tensors(path)
            }
            gptq::METHOD => {
                let bits = gptq::bits_of(quantization).map_err(|what| refused(&what))?;
                self.gptq(bits, model_dtype(config), path)
            }
            _ => Err(refused("")),
        }
    }

    fn shape(&self, name: &str, path: &Path) -> Result<[usize; 2]> {
        let absent = || CheckpointError::TensorAbsent { path: path.into(), tensor: name.into() };
        let info = self.tensors.get(name).ok_or_else(absent)?;
        <[usize; 2]>::try_from(info.shape.as_slice()).map_err(|_| broken(path, name, "it is not a matrix"))
    }

    fn packed(&mut self, config: &Map<String, Value>, path: &Path) -> Result<()> {
        let Some(entries) = config.get("lrc").and_then(|lrc| lrc.get("quantized")).and_then(Value::as_object) else {
            return Ok(());
        };
        for (module, entry) in entries {
            let first = format!("{module}.{}", packed::FIRST);
            let entry = PackedEntry::deserialize(entry).map_err(|e| broken(path, &first, e.to_string()))?;
            let [_, width] = self.shape(&first, path)?;
            let (scheme, dtype) = entry.read(width).map_err(|reason| broken(path, &first, reason))?;
            let mut stored = Vec::new();
            for tensor in packed::tensors(scheme, entry.shape) {
                let name = format!("{module}.{}", tensor.suffix);
                if self.shape(&name, path)?.as_slice() != tensor.shape {
                    let reason = format!("`{name}` does not have shape {:?}", tensor.shape);
                    return Err(broken(path, &first, reason));
                }
                stored.push(name);
            }
            self.join(&stored, format!("{module}.weight"), entry.shape, dtype, Codec::Packed(scheme));
        }
        Ok(())
    }

    /// The modules that have a tensor with this suffix.
    fn modules_with(&self, suffix: &str) -> Vec<String> {
        let module = |name: &String| Some(name.strip_suffix(suffix)?.strip_suffix('.')?.to_string());
        self.order.iter().filter_map(module).collect()
    }

    fn compressed_tensors(&mut self, path: &Path) -> Result<()> {
        use compressed_tensors::{PACKED, SCALE, SHAPE, SUFFIXES, describe};
        for module in self.modules_with(PACKED) {
            let name = |part: &str| format!("{module}.{part}");
            let (codes, scales) = (self.shape(&name(PACKED), path)?, self.shape(&name(SCALE), path)?);
            let shape = self.tensors.get(&name(SHAPE)).map_or(&[][..], |info| &info.row_of_i64);
            let (shape, scheme) =
                describe(codes, scales, shape).map_err(|reason| broken(path, &name(PACKED), reason))?;
            let dtype = self.tensors[&name(SCALE)].dtype;
            self.join(&SUFFIXES.map(name), name("weight"), shape, dtype, Codec::CompressedTensors(scheme));
        }
        Ok(())
    }

    fn gptq(&mut self, bits: u32, dtype: Dtype, path: &Path) -> Result<()> {
        use gptq::{CODES, GROUPS, SCALES, SUFFIXES, describe};
        for module in self.modules_with(CODES) {
            let name = |part: &str| format!("{module}.{part}");
            let (codes, scales) = (self.shape(&name(CODES), path)?, self.shape(&name(SCALES), path)?);
            let groups = self.tensors.get(&name(GROUPS)).map(|info| info.row_of_i64.as_slice());
            let (shape, scheme) =
                describe(bits, codes, scales, groups).map_err(|reason| broken(path, &name(CODES), reason))?;
            self.join(&SUFFIXES.map(name), name("weight"), shape, dtype, Codec::Gptq(scheme));
        }
        Ok(())
    }

    /// Adds an adapter to its base: the weight becomes the base of the module, and the factors become parts under the
    /// names that [`peft`] gives.
    pub fn adapt(&mut self, adapter: Vec<TensorInfo>) {
        for info in adapter {
            let of_gguf = || {
                let (weight, factor) = gguf::split_factor(&info.name)?;
                Some((weight.strip_suffix(".weight")?, factor))
            };
            let Some((module, factor)) = peft::parse(&info.name).or_else(of_gguf) else { continue };
            for tensor in ["weight", "bias"] {
                self.rename(&format!("{module}.{tensor}"), format!("{module}.{}.{tensor}", peft::SHOWN_BASE));
            }
            let part = match factor {
                Factor::A => peft::SHOWN[0],
                Factor::B => peft::SHOWN[1],
            };
            let name = format!("{module}.{part}.weight");
            self.order.push(name.clone());
            self.tensors.insert(name.clone(), TensorInfo { name, ..info });
        }
    }
}

fn broken(path: &Path, tensor: &str, reason: impl Into<String>) -> CheckpointError {
    CheckpointError::Encoding { path: path.into(), tensor: tensor.into(), reason: reason.into() }
}

/// The dtype of the weights before they were quantized, as the config gives it; f16 if it does not.
pub(super) fn model_dtype(config: &Map<String, Value>) -> Dtype {
    match ["dtype", "torch_dtype"].iter().find_map(|key| config.get(*key)?.as_str()) {
        Some("float32") => Dtype::F32,
        Some("bfloat16") => Dtype::BF16,
        _ => Dtype::F16,
    }
}
