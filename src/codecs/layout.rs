//! Quantized weights as other tools store them: which tensors make one weight, and how its
//! values are computed from them.
//!
//! A [`Method`] is what `quantization_config` names. It has one or more [`CodeLayout`]s, and finds a weight by the
//! suffix of a tensor that every weight in the layout has.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::cast::Dtype;
use crate::quantize::{Quantized, Scheme};

/// A quantization of other tools.
#[derive(Debug)]
pub struct Method {
    /// `quant_method` in the settings.
    pub name: &'static str,
    /// Refuses settings that describe a layout which is not read. The text follows the name of the method in a message.
    pub expect: fn(&Map<String, Value>) -> Result<(), String>,
    /// Its layouts; a tensor that one of them takes is not offered to the next.
    pub layouts: &'static [CodeLayout],
}

/// The tensors of one weight. Their names are a stem with suffixes.
#[derive(Debug)]
pub struct CodeLayout {
    /// The suffix of a tensor that every weight in this layout has.
    pub key: &'static str,
    /// The suffixes of all tensors that it may have. The first names the place of the weight in the file.
    pub parts: &'static [&'static str],
    /// The suffix of the weight that they make.
    pub shown: &'static str,
    /// Shape, dtype and arithmetic, from headers and settings.
    pub describe: fn(&Fields<'_>) -> Result<Described, String>,
}

/// A stored tensor, as its header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// The dtype in the file.
    pub dtype: Dtype,
    /// The shape in the file.
    pub shape: Vec<usize>,
}

/// The stored tensors of one weight by their suffixes, and the settings of its checkpoint.
pub struct Fields<'a> {
    /// `quantization_config`.
    pub settings: &'a Map<String, Value>,
    /// A tensor by its suffix.
    pub find: &'a dyn Fn(&str) -> Option<Field>,
    /// The bytes of a tensor by its suffix; empty if there is none. Only small tensors that describe others are read.
    pub read: &'a dyn Fn(&str) -> Vec<u8>,
}

impl Fields<'_> {
    /// A tensor that must be there.
    pub(super) fn need(&self, suffix: &str) -> Result<Field, String> {
        (self.find)(suffix).ok_or_else(|| format!("its `{}` is absent", name_of(suffix)))
    }

    /// The shape of a matrix of this dtype that must be there.
    pub(super) fn matrix(&self, suffix: &str, dtype: Dtype) -> Result<[usize; 2], String> {
        let part = self.need(suffix)?;
        let name = name_of(suffix);
        if part.dtype != dtype {
            return Err(format!("its `{name}` has dtype {:?}, expected {dtype:?}", part.dtype));
        }
        <[usize; 2]>::try_from(part.shape.as_slice()).map_err(|_| format!("its `{name}` is not a matrix"))
    }

    /// Checks the shape of a tensor that must be there; its dtype is returned.
    pub(super) fn expect(&self, suffix: &str, shape: &[usize]) -> Result<Dtype, String> {
        let part = self.need(suffix)?;
        if part.shape == shape {
            return Ok(part.dtype);
        }
        Err(format!("its `{}` has shape {:?}, expected {shape:?}", name_of(suffix), part.shape))
    }

    /// The values of a vector of integers, if it is there; negative ones become the largest number.
    pub(super) fn integers(&self, suffix: &str) -> Option<Vec<usize>> {
        let clamped = |v: i64| usize::try_from(v).unwrap_or(usize::MAX);
        let (dtype, bytes) = ((self.find)(suffix)?.dtype, (self.read)(suffix));
        match dtype {
            Dtype::I64 => Some(bytes.as_chunks::<8>().0.iter().map(|&b| clamped(i64::from_le_bytes(b))).collect()),
            Dtype::I32 => {
                Some(bytes.as_chunks::<4>().0.iter().map(|&b| clamped(i32::from_le_bytes(b).into())).collect())
            }
            _ => None,
        }
    }

    /// A positive number of the settings.
    pub(super) fn setting(&self, key: &str) -> Option<usize> {
        usize::try_from(self.settings.get(key)?.as_u64()?).ok().filter(|&n| n > 0)
    }
}

/// The last word of a suffix, for messages.
pub(crate) fn name_of(suffix: &str) -> &str {
    suffix.trim_start_matches(['.', '_'])
}

/// A weight that stored tensors make.
#[derive(Debug)]
pub struct Described {
    /// The shape of the weight, (out, in) for a matrix.
    pub shape: Vec<usize>,
    /// The dtype of the weight before quantization; the dtype of the model if the files do not say.
    pub dtype: Option<Dtype>,
    /// Computes its values.
    pub decoder: Arc<dyn Decoder>,
}

/// The bytes of the stored tensors of one weight, by suffix.
#[derive(Debug, Default)]
pub struct Stored(pub Vec<(&'static str, Dtype, Vec<u8>)>);

impl Stored {
    /// Dtype and bytes of a tensor.
    pub fn get(&self, suffix: &str) -> Option<(Dtype, &[u8])> {
        self.0.iter().find(|(name, ..)| *name == suffix).map(|(_, dtype, bytes)| (*dtype, bytes.as_slice()))
    }

    /// The values of a tensor of floats.
    pub(super) fn floats(&self, suffix: &str) -> Option<Vec<f32>> {
        let (dtype, bytes) = self.get(suffix)?;
        super::float8::decode(dtype, bytes)
    }
}

/// A decoded weight.
#[derive(Debug, PartialEq)]
pub enum Decoded {
    /// Codes in groups or blocks, which other formats may keep.
    Quantized(Quantized),
    /// Row-major values.
    Values(Vec<f32>),
}

/// The tensor with the scales of a weight, one a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scales {
    /// Its suffix.
    pub suffix: &'static str,
    /// Whether it is (n_groups, out), and not (out, n_groups).
    pub is_transposed: bool,
}

/// The arithmetic of one weight.
pub trait Decoder: fmt::Debug + Send + Sync {
    /// The weight from its stored tensors; `None` if their sizes do not match.
    fn decode(&self, stored: &Stored) -> Option<Decoded>;

    /// The scheme of its codes if other formats may keep them, as far as headers show it.
    fn scheme(&self) -> Option<Scheme> {
        None
    }

    /// Where the scales of its codes are, if they are those of [`Self::scheme`]; `None` for layouts that `lrc` does not
    /// write.
    fn scales(&self) -> Option<Scales> {
        None
    }

    /// Whether [`Self::scheme`] is final; otherwise values decide whether the codes are symmetric.
    fn is_known_from_header(&self) -> bool {
        true
    }

    /// The decoder of one matrix of a stack, whose stored tensors are the stack's at one index
    /// of their first dimension.
    fn of_one(&self) -> Option<Arc<dyn Decoder>> {
        None
    }

    /// Bits and groups for the report: `int4-g128-asym`.
    fn words(&self) -> String;
}

#[cfg(test)]
pub(super) use tests::{described, stored_of};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codecs::cast;

    /// Describes tensors in memory with the layout of this key.
    pub fn described(
        method: &Method,
        key: &str,
        tensors: &[(&'static str, Dtype, Vec<usize>, Vec<u8>)],
        settings: &Value,
    ) -> Result<Described, String> {
        let layout = method.layouts.iter().find(|layout| layout.key == key).unwrap();
        let found = |suffix: &str| tensors.iter().find(|(name, ..)| *name == suffix);
        for (name, dtype, shape, bytes) in tensors {
            assert!(layout.parts.contains(name), "{name}");
            assert_eq!(cast::n_bytes(*dtype, shape.iter().product()), Some(bytes.len() as u64), "{name}");
        }
        (layout.describe)(&Fields {
            settings: settings.as_object().unwrap(),
            find: &|suffix| found(suffix).map(|(_, dtype, shape, _)| Field { dtype: *dtype, shape: shape.clone() }),
            read: &|suffix| found(suffix).map_or(Vec::new(), |(.., bytes)| bytes.clone()),
        })
    }

    /// The same tensors as a decoder takes them.
    pub fn stored_of(tensors: &[(&'static str, Dtype, Vec<usize>, Vec<u8>)]) -> Stored {
        Stored(tensors.iter().map(|(name, dtype, _, bytes)| (*name, *dtype, bytes.clone())).collect())
    }
}
