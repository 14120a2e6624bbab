//! Tensors as the headers describe them, and how each is made from the tensors that are stored.
//!
//! Quantized, renamed and reordered tensors are presented as the weights that they encode: `X.weight`, however the
//! file stores it.

use super::computed::Computed;
use crate::codecs::cast::{self, Dtype};
use crate::codecs::gguf::{Arrangement, Element};
use crate::codecs::{compressed_tensors, gptq, packed};
use crate::quantize::{Blocks, Grouped, Quantized, Scheme, Storage};

/// A tensor of a checkpoint: name, dtype, shape and place.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// The name under which it is presented, which may differ from the name in the file.
    pub name: String,
    /// The dtype of its values; for quantized weights the dtype before quantization.
    pub dtype: Dtype,
    /// Weights of linears are (out, in), or (in, out) in families with Conv1D.
    pub shape: Vec<usize>,
    /// Index of the shard among those of the checkpoint.
    pub shard_idx: usize,
    /// First byte in the shard's file.
    pub begin: usize,
    /// One past the last byte in the shard's file.
    pub end: usize,
    /// How it is made from stored tensors; `None` if the file stores it as it is. The place is that of the first
    /// stored tensor.
    pub(super) encoded: Option<Box<Encoded>>,
    /// The values of a vector of integers that describes other tensors.
    pub(super) row_of_i64: Vec<usize>,
}

impl TensorInfo {
    /// Bytes in the files, with everything that it is decoded from.
    pub fn n_bytes(&self) -> u64 {
        self.encoded.as_ref().map_or((self.end - self.begin) as u64, |encoded| encoded.n_bytes())
    }

    /// How its values are encoded; `None` for floats.
    pub fn storage(&self) -> Option<Storage> {
        self.encoded.as_ref().and_then(|encoded| encoded.storage())
    }

    /// Whether its bytes in the file differ from those of its dtype and shape.
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
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Codec {
    Packed(Scheme),
    CompressedTensors(Scheme),
    Gptq(Scheme),
    /// Floats or blocks of GGUF, in another arrangement.
    Rows(Element, Arrangement),
    /// Some rows of a matrix of floats.
    Picked(Rows),
    /// Floats computed from several tensors.
    Computed(Computed),
}

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

/// A decoded tensor.
pub(super) enum Decoded {
    Quantized(Quantized),
    Values(Vec<f32>),
}

impl Encoded {
    pub fn new(codec: Codec, stored: Vec<TensorInfo>) -> Self {
        Self { codec, stored }
    }

    pub fn rows(element: Element, arrangement: Arrangement, from: TensorInfo) -> Self {
        Self::new(Codec::Rows(element, arrangement), vec![from])
    }

    /// Some rows of a stored matrix.
    pub fn picked(rows: Rows, from: TensorInfo) -> Self {
        Self::new(Codec::Picked(rows), vec![from])
    }

    pub fn is_picked(&self) -> bool {
        matches!(self.codec, Codec::Picked(_))
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
        match (self.codec, self.stored.first().map(|from| from.shape.as_slice())) {
            (Codec::Picked(rows), Some(&[m, n])) => {
                all / (if rows.is_transposed { n } else { m }).max(1) as u64 * rows.count as u64
            }
            // The model itself: what is subtracted is not part of it.
            (Codec::Computed(Computed::Difference), _) => self.stored.first().map_or(0, TensorInfo::n_bytes),
            _ => all,
        }
    }

    pub fn storage(&self) -> Option<Storage> {
        match self.codec {
            Codec::Packed(scheme) | Codec::CompressedTensors(scheme) | Codec::Gptq(scheme) => {
                Some(Storage::Grouped(scheme))
            }
            Codec::Rows(Element::Block(block_type), _) => Some(Storage::Block(block_type)),
            Codec::Rows(Element::Plain(_), _) | Codec::Picked(_) | Codec::Computed(_) => None,
        }
    }

    /// Whether [`Self::storage`] is final: GPTQ shows only when its zeros are read whether they are symmetric.
    pub fn is_known_from_header(&self) -> bool {
        !matches!(self.codec, Codec::Gptq(_))
    }

    /// Decodes a tensor of `shape` from the stored ones, whose bytes `read` gives; `None` if their sizes do not match.
    pub fn decode(&self, shape: &[usize], read: &dyn Fn(&TensorInfo) -> Vec<u8>) -> Option<Decoded> {
        let (&cols, leading) = shape.split_last()?;
        let rows: usize = leading.iter().product();
        let stored = || -> Vec<(Dtype, Vec<u8>)> { self.stored.iter().map(|info| (info.dtype, read(info))).collect() };
        let grouped = |matrix: Option<Grouped>| matrix.map(|matrix| Decoded::Quantized(Quantized::Grouped(matrix)));
        match self.codec {
            Codec::Packed(scheme) => grouped(packed::read([rows, cols], scheme, &stored())),
            Codec::CompressedTensors(scheme) => grouped(compressed_tensors::read([rows, cols], scheme, &stored())),
            Codec::Gptq(scheme) => grouped(gptq::read([rows, cols], scheme, &stored())),
            Codec::Picked(picked) => {
                let whole = self.stored.first()?;
                let &[_, width] = whole.shape.as_slice() else { return None };
                Some(Decoded::Values(picked.of(&whole.floats(read)?, width)))
            }
            Codec::Computed(computed) => {
                let parts = self.stored.iter().map(|info| info.floats(read)).collect::<Option<Vec<_>>>()?;
                computed.of(parts).map(Decoded::Values)
            }
            Codec::Rows(element, arrangement) => {
                // A vector is a matrix of one column.
                let (rows, cols) = if leading.is_empty() { (cols, 1) } else { (rows, cols) };
                let bytes = arrangement.to_model(&read(self.stored.first()?), rows);
                match element {
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
