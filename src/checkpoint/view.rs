//! The tensors of a checkpoint as they are presented: quantized tensors as the weights that they encode, adapters
//! over their base.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::{CheckpointError, Result};
use super::tensor::{Arithmetic, Codec, Encoded, TensorInfo, is_sane};
use crate::codecs::cast::Dtype;
use crate::codecs::layout::{CodeLayout, Described, Field, Fields, name_of};
use crate::codecs::packed::{self, PackedEntry};
use crate::codecs::peft::{self, Factor};
use crate::codecs::{gguf, registry};
use crate::operator::{BASE, factors_of};

const TOO_LARGE: &str = "its shape is too large";

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
        // The weight may have the name of one of them.
        self.order.retain(|name| Some(name) == stored.first() || !stored.contains(name));
        if let Some(at) = self.order.iter().position(|name| Some(name) == stored.first()) {
            self.order[at].clone_from(&info.name);
        }
        self.tensors.insert(info.name.clone(), info);
    }

    /// Presents stored tensors as one.
    ///
    /// # Errors
    /// A clause: another tensor has its name.
    fn join(
        &mut self,
        stored: &[String],
        name: String,
        shape: Vec<usize>,
        dtype: Dtype,
        codec: Codec,
    ) -> Result<(), String> {
        if !stored.contains(&name) {
            self.expect_free(&name)?;
        }
        let encoded: Vec<TensorInfo> = stored.iter().filter_map(|name| self.tensors.get(name).cloned()).collect();
        let Some(first) = encoded.first().cloned() else { return Ok(()) };
        let info = TensorInfo { name, dtype, shape, strides: None, ..first };
        self.replace(stored, TensorInfo { encoded: Some(Box::new(Encoded::new(codec, encoded))), ..info });
        Ok(())
    }

    /// Refuses a name that a tensor has already.
    fn expect_free(&self, name: &str) -> Result<(), String> {
        if self.tensors.contains_key(name) {
            return Err(format!("it is presented as `{name}`, which is in the files too"));
        }
        Ok(())
    }

    /// Gives a tensor another name, if it is there.
    fn rename(&mut self, from: &str, to: String) -> Result<(), String> {
        if let Some(info) = self.tensors.get(from).cloned() {
            self.expect_free(&to)?;
            self.replace(&[from.to_string()], TensorInfo { name: to, ..info });
        }
        Ok(())
    }

    /// Recognizes everything that the config and the settings of a quantizer describe. `read` gives the
    /// bytes of a stored tensor.
    ///
    /// # Errors
    /// The checkpoint is quantized in a way that is not read here, or its tensors contradict each other.
    pub fn decode(
        &mut self,
        config: &Map<String, Value>,
        quantization: Option<&Map<String, Value>>,
        path: &Path,
        read: &dyn Fn(&TensorInfo) -> Vec<u8>,
    ) -> Result<()> {
        self.packed(config, path)?;
        let Some(settings) = quantization else { return Ok(()) };
        let name = settings.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        let refused = |what: String| CheckpointError::Quantized { path: path.into(), method: format!("{name}{what}") };
        let method = registry::method(name).ok_or_else(|| refused(String::new()))?;
        (method.expect)(settings).map_err(refused)?;
        for layout in method.layouts {
            for stem in self.stems_with(layout.key) {
                let described = self
                    .describe(layout, &stem, settings, read)
                    .and_then(|described| if is_sane(&described.shape) { Ok(described) } else { Err(TOO_LARGE.into()) })
                    .map_err(|reason| broken(path, &format!("{stem}{}", layout.key), reason))?;
                self.join_parts(layout, &stem, described, model_dtype(config))
                    .map_err(|reason| broken(path, &format!("{stem}{}", layout.key), reason))?;
            }
        }
        // Codes that no layout took are not weights.
        let is_left = |info: &&TensorInfo| {
            let is_code = matches!(info.dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::I8 | Dtype::U8);
            is_code && !info.is_encoded() && info.shape.len() > 1 && info.name.ends_with(".weight")
        };
        if let Some(left) = self.tensors.values().find(is_left) {
            return Err(broken(path, &left.name, format!("it has dtype {:?}, and its scales are absent", left.dtype)));
        }
        method.layouts.iter().try_for_each(|layout| self.expect_no_rest(layout, path))
    }

    /// Refuses parts of codes without the tensor that every weight in their layout has.
    fn expect_no_rest(&self, layout: &CodeLayout, path: &Path) -> Result<()> {
        // Scales of activations may be on their own.
        let is_of_codes = |part: &&&str| {
            ![layout.key, layout.shown].contains(part)
                && !["input", "activation"].iter().any(|word| part.contains(word))
        };
        let parts = layout.parts.iter().filter(is_of_codes);
        let left = parts.flat_map(|part| self.stems_with(part).into_iter().map(move |stem| format!("{stem}{part}")));
        match left.into_iter().next() {
            Some(left) => Err(broken(path, &left, format!("its `{}` is absent", name_of(layout.key)))),
            None => Ok(()),
        }
    }

    fn describe(
        &self,
        layout: &CodeLayout,
        stem: &str,
        settings: &Map<String, Value>,
        read: &dyn Fn(&TensorInfo) -> Vec<u8>,
    ) -> Result<Described, String> {
        let part = |suffix: &str| self.tensors.get(&format!("{stem}{suffix}"));
        (layout.describe)(&Fields {
            settings,
            find: &|suffix| part(suffix).map(|info| Field { dtype: info.dtype, shape: info.shape.clone() }),
            read: &|suffix| part(suffix).map_or(Vec::new(), read),
        })
    }

    /// Presents the stored tensors of a weight as the weight.
    fn join_parts(
        &mut self,
        layout: &CodeLayout,
        stem: &str,
        described: Described,
        dtype: Dtype,
    ) -> Result<(), String> {
        let name = |suffix: &&'static str| format!("{stem}{suffix}");
        let suffixes: Vec<&'static str> =
            layout.parts.iter().filter(|part| self.tensors.contains_key(&name(part))).copied().collect();
        let stored: Vec<String> = suffixes.iter().map(name).collect();
        let codec = Codec::Foreign(Arithmetic(described.decoder), suffixes);
        self.join(&stored, name(&layout.shown), described.shape, described.dtype.unwrap_or(dtype), codec)
    }

    /// The stems of names with this suffix.
    fn stems_with(&self, suffix: &str) -> Vec<String> {
        self.order.iter().filter_map(|name| Some(name.strip_suffix(suffix)?.to_string())).collect()
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
            let codec = Codec::Packed(scheme);
            self.join(&stored, format!("{module}.weight"), entry.shape.into(), dtype, codec)
                .map_err(|reason| broken(path, &first, reason))?;
        }
        Ok(())
    }

    /// Adds an adapter to its base: the weight becomes the base of the module, and the factors become parts under the
    /// names of a base and of factors over it. `path` is the file of the adapter.
    ///
    /// # Errors
    /// Another tensor has one of these names.
    pub fn adapt(&mut self, adapter: Vec<TensorInfo>, path: &Path) -> Result<()> {
        for info in adapter {
            let of_gguf = || {
                let (weight, factor) = gguf::split_factor(&info.name)?;
                Some((weight.strip_suffix(".weight")?, factor))
            };
            let Some((module, factor)) = peft::parse(&info.name).or_else(of_gguf) else { continue };
            let taken = |reason| broken(path, &info.name, reason);
            for tensor in ["weight", "bias"] {
                self.rename(&format!("{module}.{tensor}"), format!("{module}.{BASE}.{tensor}")).map_err(taken)?;
            }
            let [a, b] = factors_of(module);
            let name = if factor == Factor::A { a } else { b };
            self.expect_free(&name).map_err(taken)?;
            self.order.push(name.clone());
            self.tensors.insert(name.clone(), TensorInfo { name, ..info });
        }
        Ok(())
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
