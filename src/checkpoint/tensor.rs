//! Tensors as the headers describe them, and how each is made from the tensors that are stored.
//!
//! Quantized, renamed and reordered tensors are presented as the weights that they encode: `X.weight`, however the
//! file stores it.

use std::sync::Arc;

use super::computed::Computed;
use crate::codecs::cast::{self, Dtype};
use crate::codecs::float8;
use crate::codecs::gguf::{Arrangement, Element};
use crate::codecs::layout::{Decoded, Decoder, Stored};
use crate::codecs::packed;
use crate::quantize::{Blocks, Quantized, Scheme, Storage};

/// A tensor of a checkpoint: name, dtype, shape and place.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// The name under which it is presented, which may differ from the name in the file.
    pub name: String,
    /// The dtype of its values; for quantized weights the dtype before quantization.
    pub dtype: Dtype,
    /// Weights of linears are (out, in), or (in, out) in families with Conv1D.
    pub shape: Vec<usize>,
    /// Index of the shard among the shards of the checkpoint.
    pub shard_idx: usize,
    /// First byte in the shard's file.
    pub begin: usize,
    /// One past the last byte in the shard's file.
    pub end: usize,
    /// How it is made from stored tensors; `None` if the file stores it as it is. It has the place of the
    /// first stored tensor.
    pub(super) encoded: Option<Box<Encoded>>,
    /// Elements from one to the next, in each dimension, if the file does not have them in row-major order.
    pub(super) strides: Option<Box<[usize]>>,
}

impl TensorInfo {
    /// Bytes in the files, with everything that it is decoded from.
    pub fn n_bytes(&self) -> u64 {
        match (&self.encoded, &self.strides) {
            (Some(encoded), _) => encoded.n_bytes(),
            (None, None) => (self.end - self.begin) as u64,
            (None, Some(_)) => self.n_elements() * self.dtype.bitsize() as u64 / 8,
        }
    }

    /// How its values are encoded; `None` for floats.
    pub fn storage(&self) -> Option<Storage> {
        self.encoded.as_ref().and_then(|encoded| encoded.storage())
    }

    /// Whether its bytes in the file differ from the plain bytes of its dtype and shape.
    pub fn is_encoded(&self) -> bool {
        self.encoded.is_some()
    }

    /// Whether it is floats in the layout of the file: stored as they are, or computed from tensors that are.
    pub fn is_plain(&self) -> bool {
        self.encoded.as_ref().is_none_or(|encoded| encoded.is_plain())
    }

    /// The tensor in a checkpoint that has `n` more shards before its own.
    pub(super) fn after(mut self, n: usize) -> Self {
        self.shard_idx += n;
        if let Some(encoded) = &mut self.encoded {
            encoded.stored = std::mem::take(&mut encoded.stored).into_iter().map(|info| info.after(n)).collect();
        }
        self
    }

    /// Its values, decoded from the stored bytes that `read` gives; `None` if sizes do not match, or it has no floats.
    fn floats(&self, read: &dyn Fn(&TensorInfo) -> Vec<u8>) -> Option<Vec<f32>> {
        match self.encoded.as_ref().map(|encoded| encoded.decode(&self.shape, read)) {
            None => cast::decode(self.dtype, &read(self)),
            Some(Some(Decoded::Values(values))) => Some(values),
            Some(Some(Decoded::Quantized(matrix))) => Some(matrix.dequantize()),
            Some(None) => None,
        }
    }

    /// Whether it is made of some rows of a stored matrix.
    pub fn is_picked(&self) -> bool {
        self.encoded.as_ref().is_some_and(|encoded| encoded.is_picked())
    }

    /// Whether the files hold codes for it, shown or not.
    pub fn is_coded(&self) -> bool {
        self.encoded.as_ref().is_some_and(|encoded| encoded.words().is_some())
    }

    /// Whether its values are computed from codes, and shown as plain floats.
    pub fn is_dequantized(&self) -> bool {
        self.encoded.as_ref().is_some_and(|encoded| encoded.shows == Shows::Values)
    }

    /// Whether it is a matrix (out, in) in every family: codes, shown or not, and rows of a stored matrix. Others have
    /// the order of their family.
    pub fn is_out_in(&self) -> bool {
        self.is_picked() || self.is_coded()
    }

    /// Whether it is a stack of floats whose matrices can be read apart.
    pub fn is_divisible(&self) -> bool {
        cast::is_float(self.dtype) && self.matrix(0, String::new()).is_some()
    }

    /// One matrix of a stack, under this name; `None` if it is encoded, but only as a whole.
    pub(super) fn matrix(&self, index: usize, name: String) -> Option<Self> {
        let (&n, shape) = self.shape.split_first().filter(|(n, _)| **n > 0)?;
        let encoded = match &self.encoded {
            Some(encoded) => Some(Box::new(encoded.matrix(index)?)),
            None => None,
        };
        let (begin, end, strides) = match &self.strides {
            None => {
                let n_bytes = (self.end - self.begin) / n;
                (self.begin + index * n_bytes, self.begin + (index + 1) * n_bytes, None)
            }
            Some(strides) => {
                let n_bytes = strides[0] * self.dtype.bitsize() / 8;
                let behind = (n - 1 - index) * n_bytes;
                (self.begin + index * n_bytes, self.end - behind, Some(strides[1..].into()))
            }
        };
        let shape = shape.to_vec();
        Some(Self { name, shape, begin, end, encoded, strides, ..self.clone() })
    }

    /// Whether the file has its elements in row-major order.
    pub(super) fn is_in_order(&self) -> bool {
        self.strides.is_none()
    }

    /// The product of the shape.
    pub fn n_elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }
}

/// Whether sizes can be computed without overflow: an empty tensor may claim any dimensions besides its zero.
pub(super) fn is_sane(shape: &[usize]) -> bool {
    let n = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
    n.is_some_and(|n| n <= 1 << 48)
}

/// How a tensor is made from stored ones.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Encoded {
    codec: Codec,
    stored: Vec<TensorInfo>,
    shows: Shows,
}

/// Whether codes can be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shows {
    /// Formats may keep them.
    Codes,
    /// Only the values that they encode.
    Values,
}

/// A stored tensor of floats behind another.
pub(super) struct Behind<'a> {
    pub info: &'a TensorInfo,
    /// Where its floats are in its bytes.
    pub place: Place,
}

/// Where floats are in the bytes of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// One after the other, in this dtype.
    Rows(Dtype, Arrangement),
    /// The same of a matrix in the other order.
    Transposed(Dtype),
    /// In blocks of codes.
    Blocks(Arrangement),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Codec {
    Packed(Scheme),
    /// A layout of another tool; the suffixes of its stored tensors.
    Foreign(Arithmetic, Vec<&'static str>),
    /// Floats or blocks of GGUF, in another arrangement.
    Rows(Element, Arrangement),
    /// Floats of GGUF, stored as (out, in) and presented as (in, out).
    Transposed(Dtype),
    /// Some rows of a matrix of floats.
    Picked(Rows),
    /// Floats computed from several tensors.
    Computed(Computed),
}

/// The decoder of a layout. Only clones are equal.
#[derive(Debug, Clone)]
pub(super) struct Arithmetic(pub Arc<dyn Decoder>);

impl PartialEq for Arithmetic {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Arithmetic {}

/// Some rows of a larger matrix (or columns, if it is stored transposed): runs of `run`, one every `stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Index of the first row.
    pub first: usize,
    /// Number of rows in all runs.
    pub count: usize,
    /// Adjacent rows per run.
    pub run: usize,
    /// Rows from the start of one run to the start of the next.
    pub stride: usize,
    /// The larger matrix is stored as (in, out).
    pub is_transposed: bool,
}

impl Rows {
    /// The values of these rows, row-major, from a larger matrix whose stored rows have `width` values.
    fn of(self, values: &[f32], width: usize) -> Vec<f32> {
        let row = |i: usize| -> Vec<f32> {
            match self.is_transposed {
                false => values[i * width..(i + 1) * width].to_vec(),
                true => values.iter().skip(i).step_by(width).copied().collect(),
            }
        };
        self.indices().flat_map(row).collect()
    }

    /// The rows in order.
    pub fn indices(self) -> impl Iterator<Item = usize> {
        let run = self.run.max(1);
        (0..self.count).map(move |row| self.first + row / run * self.stride + row % run)
    }
}

impl Encoded {
    pub fn new(codec: Codec, stored: Vec<TensorInfo>) -> Self {
        Self { codec, stored, shows: Shows::Codes }
    }

    pub fn rows(element: Element, arrangement: Arrangement, from: TensorInfo) -> Self {
        Self::new(Codec::Rows(element, arrangement), vec![from])
    }

    /// A matrix of floats in the other order.
    pub fn transposed(dtype: Dtype, from: TensorInfo) -> Self {
        Self::new(Codec::Transposed(dtype), vec![from])
    }

    /// Some rows of a stored matrix.
    pub fn picked(rows: Rows, from: TensorInfo) -> Self {
        Self::new(Codec::Picked(rows), vec![from])
    }

    pub fn is_picked(&self) -> bool {
        matches!(self.codec, Codec::Picked(_))
    }

    /// The same with its codes hidden.
    pub fn dequantized(self) -> Self {
        Self { shows: Shows::Values, ..self }
    }

    /// A tensor of floats that is computed from others, in the layout of the first.
    pub fn computed(how: Computed, from: Vec<TensorInfo>) -> Self {
        Self::new(Codec::Computed(how), from)
    }

    /// Whether its values are floats in the layout of the file.
    fn is_plain(&self) -> bool {
        matches!(self.codec, Codec::Computed(_)) && self.stored.first().is_some_and(TensorInfo::is_plain)
    }

    pub fn n_bytes(&self) -> u64 {
        let all: u64 = self.stored.iter().map(TensorInfo::n_bytes).sum();
        match (&self.codec, self.stored.first().map(|from| from.shape.as_slice())) {
            (Codec::Picked(rows), Some(&[m, n])) => {
                all / (if rows.is_transposed { n } else { m }).max(1) as u64 * rows.count as u64
            }
            // The model itself: what is subtracted is not part of it.
            (Codec::Computed(Computed::Difference), _) => self.stored.first().map_or(0, TensorInfo::n_bytes),
            (Codec::Computed(Computed::Selected(entries)), _) => {
                all / entries.of.max(1) as u64 * entries.indices.len() as u64
            }
            _ => all,
        }
    }

    pub fn storage(&self) -> Option<Storage> {
        if self.shows == Shows::Values {
            return None;
        }
        match &self.codec {
            Codec::Packed(scheme) => Some(Storage::Grouped(*scheme)),
            Codec::Foreign(Arithmetic(decoder), _) => decoder.scheme().map(Storage::Grouped),
            Codec::Rows(Element::Block(block_type), _) => Some(Storage::Block(*block_type)),
            Codec::Rows(Element::Plain(_), _) | Codec::Transposed(_) | Codec::Picked(_) | Codec::Computed(_) => None,
        }
    }

    /// The layout of its codes in words, whether they are shown or not; `None` if there are none.
    pub fn words(&self) -> Option<String> {
        match &self.codec {
            Codec::Packed(scheme) => Some(scheme.to_string()),
            Codec::Foreign(Arithmetic(decoder), _) => Some(decoder.words()),
            Codec::Rows(Element::Block(block_type), _) => Some(block_type.name.into()),
            Codec::Rows(Element::Plain(_), _) | Codec::Transposed(_) => None,
            Codec::Picked(_) | Codec::Computed(_) => self.stored.first()?.encoded.as_ref()?.words(),
        }
    }

    /// Whether [`Self::storage`] is final: GPTQ shows only when its zeros are read whether they are symmetric.
    pub fn is_known_from_header(&self) -> bool {
        match &self.codec {
            Codec::Foreign(Arithmetic(decoder), _) => self.shows == Shows::Values || decoder.is_known_from_header(),
            _ => true,
        }
    }

    /// The stored tensor with the floats that it is made of while its codes stay: scales of codes, or all values.
    /// `None` for layouts that `lrc` does not write, and for values that are computed from several tensors.
    pub fn behind(&self, shape: &[usize]) -> Option<Behind<'_>> {
        let n_floats: usize = match (self.storage(), shape) {
            (Some(storage), &[rows, cols]) => storage.scales_shape(rows, cols)?.iter().product(),
            (Some(_), _) => return None,
            (None, _) => shape.iter().product(),
        };
        let as_they_are = |dtype| Place::Rows(dtype, Arrangement::Same);
        let (info, place) = match &self.codec {
            _ if self.shows == Shows::Values => return None,
            Codec::Packed(_) => {
                let scales = self.stored.get(packed::SCALES_AT)?;
                (scales, as_they_are(scales.dtype))
            }
            Codec::Foreign(Arithmetic(decoder), suffixes) => {
                let scales = decoder.scales()?;
                let info = self.stored.get(suffixes.iter().position(|&suffix| suffix == scales.suffix)?)?;
                (info, if scales.is_transposed { Place::Transposed(info.dtype) } else { as_they_are(info.dtype) })
            }
            Codec::Rows(Element::Plain(dtype), arrangement) => {
                (self.stored.first()?, Place::Rows(*dtype, *arrangement))
            }
            Codec::Rows(Element::Block(_), arrangement) => {
                return Some(Behind { info: self.stored.first()?, place: Place::Blocks(*arrangement) });
            }
            Codec::Transposed(dtype) => (self.stored.first()?, Place::Transposed(*dtype)),
            Codec::Picked(_) | Codec::Computed(_) => return None,
        };
        let is_whole = cast::is_float(info.dtype) && info.is_in_order() && info.n_elements() == n_floats as u64;
        is_whole.then_some(Behind { info, place })
    }

    /// One matrix of a stack; `None` if it is only encoded as a whole.
    fn matrix(&self, index: usize) -> Option<Self> {
        let Codec::Foreign(Arithmetic(decoder), suffixes) = &self.codec else { return None };
        let codec = Codec::Foreign(Arithmetic(decoder.of_one()?), suffixes.clone());
        let stored = self.stored.iter().map(|info| info.matrix(index, info.name.clone())).collect::<Option<_>>()?;
        Some(Self { codec, stored, shows: self.shows })
    }

    /// Decodes a tensor of `shape` from the stored ones, whose bytes `read` gives; `None` if their sizes do not match.
    pub fn decode(&self, shape: &[usize], read: &dyn Fn(&TensorInfo) -> Vec<u8>) -> Option<Decoded> {
        let decoded = self.decode_codes(shape, read)?;
        Some(match decoded {
            Decoded::Quantized(matrix) if self.shows == Shows::Values => Decoded::Values(matrix.dequantize()),
            decoded => decoded,
        })
    }

    fn decode_codes(&self, shape: &[usize], read: &dyn Fn(&TensorInfo) -> Vec<u8>) -> Option<Decoded> {
        let (&cols, leading) = shape.split_last()?;
        let rows: usize = leading.iter().product();
        match &self.codec {
            Codec::Packed(scheme) => {
                let stored: Vec<(Dtype, Vec<u8>)> = self.stored.iter().map(|info| (info.dtype, read(info))).collect();
                let matrix = packed::read([rows, cols], *scheme, &stored)?;
                Some(Decoded::Quantized(Quantized::Grouped(matrix)))
            }
            Codec::Foreign(Arithmetic(decoder), suffixes) => {
                let parts = suffixes.iter().zip(&self.stored);
                let stored = Stored(parts.map(|(&suffix, info)| (suffix, info.dtype, read(info))).collect());
                let decoded = decoder.decode(&stored)?;
                let n_values = match &decoded {
                    Decoded::Quantized(_) => rows * cols,
                    Decoded::Values(values) => values.len(),
                };
                (n_values == rows * cols).then_some(decoded)
            }
            Codec::Picked(picked) => {
                let whole = self.stored.first()?;
                let &[_, width] = whole.shape.as_slice() else { return None };
                Some(Decoded::Values(picked.of(&whole.floats(read)?, width)))
            }
            Codec::Computed(computed) => {
                // Factors of adapters may be floats of 8 bits, without a scale.
                let floats = |info: &TensorInfo| match info.dtype {
                    Dtype::F8_E4M3 => float8::decode(info.dtype, &read(info)),
                    _ => info.floats(read),
                };
                let parts = self.stored.iter().map(floats).collect::<Option<Vec<_>>>()?;
                computed.of(parts).map(Decoded::Values)
            }
            Codec::Transposed(dtype) => {
                let values = cast::decode(*dtype, &read(self.stored.first()?))?;
                let row = |i| values.iter().skip(i).step_by(rows.max(1)).copied();
                Some(Decoded::Values((0..rows).flat_map(row).collect()))
            }
            Codec::Rows(element, arrangement) => {
                // A vector is a matrix of one column.
                let (rows, cols) = if leading.is_empty() { (cols, 1) } else { (rows, cols) };
                let bytes = arrangement.to_model(&read(self.stored.first()?), rows);
                match *element {
                    Element::Plain(dtype) => cast::decode(dtype, &bytes).map(Decoded::Values),
                    Element::Block(block_type) if bytes.len() as u64 == block_type.n_bytes(rows, cols) => {
                        Some(Decoded::Quantized(Quantized::Block(Blocks { rows, cols, block_type, bytes })))
                    }
                    Element::Block(_) => None,
                }
            }
        }
    }
}
