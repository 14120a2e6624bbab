//! The data of a GGUF file: where each tensor is, checked when it is read, and a writer that
//! takes tensors in any order.

use std::collections::BTreeMap;
use std::io::{self, Seek, SeekFrom, Write};

use super::element::Element;
use super::header::{Entry, GgufTensor, Header, write};
use super::stacks::matrix_name;
use super::value::Value;

/// Why a file cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// A sentence that says what is wrong with its header.
    Header(String),
    /// The header describes more bytes than there are.
    Truncated {
        /// Bytes up to the end of the tensor.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
}

impl Header {
    /// First byte of a tensor, and one past its last byte, in a file of `len` bytes.
    ///
    /// # Errors
    /// The tensor is not within the file, or its rows are not made of whole blocks.
    pub fn place(&self, entry: &Entry, element: Element, len: usize) -> Result<(usize, usize), Damage> {
        let Entry { name, shape, offset, .. } = entry;
        let n_elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if n_elements.is_none_or(|n| n > len * 8) {
            return Err(Damage::Header(format!("tensor `{name}` of shape {shape:?} is larger than the file")));
        }
        if let (Element::Block(block), cols) = (element, shape.last().copied().unwrap_or(1))
            && !block.divides(cols)
        {
            let reason =
                format!("rows of {cols} values of tensor `{name}` are not made of whole blocks of `{}`", block.name);
            return Err(Damage::Header(reason));
        }
        let begin = self.data_begin.saturating_add(*offset).min(len as u64) as usize;
        let end = begin + element.n_bytes(shape) as usize;
        if end > len {
            return Err(Damage::Truncated { expected: end as u64, found: len as u64 });
        }
        Ok((begin, end))
    }
}

/// Checks that no two tensors, each with its place and name, share a byte.
///
/// # Errors
/// A sentence that names two of them that do.
pub fn expect_apart(mut places: Vec<((usize, usize), &str)>) -> Result<(), String> {
    places.sort_unstable();
    match places.array_windows().find(|[((_, end), _), ((begin, _), _)]| begin < end) {
        Some([(_, first), (_, second)]) => Err(format!("tensors `{first}` and `{second}` overlap")),
        None => Ok(()),
    }
}

/// Writes a file tensor by tensor, in any order; stacks of experts matrix by matrix, see [`matrix_name`].
#[derive(Debug)]
pub struct Writer<F> {
    file: F,
    /// Offset and size of every tensor that is still to come.
    slots: BTreeMap<String, (u64, u64)>,
}

impl<F: Write + Seek> Writer<F> {
    /// Writes the header. The file has its full size already, [`super::file_bytes`]; what is in it stays.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn begin(mut file: F, metadata: &[(String, Value)], tensors: &[GgufTensor]) -> io::Result<Self> {
        let (header, offsets) = write(metadata, tensors);
        file.write_all(&header)?;
        Ok(Self {
            file,
            slots: tensors.iter().zip(offsets).flat_map(|(tensor, offset)| slots(tensor, offset)).collect(),
        })
    }

    /// Marks a tensor as written by an earlier run.
    pub fn skip(&mut self, name: &str) {
        self.slots.remove(name);
    }

    /// Writes the bytes of one tensor at its place.
    ///
    /// # Errors
    /// The file cannot be written.
    ///
    /// # Panics
    /// When `name` was not announced, was written before, or has another size: faults of the caller.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (offset, len) =
            self.slots.remove(name).unwrap_or_else(|| panic!("invariant: tensor `{name}` is written once"));
        assert_eq!(bytes.len() as u64, len, "invariant: tensor `{name}` has its announced size");
        self.file.seek(SeekFrom::Start(offset))?;
        self.file.write_all(bytes)
    }

    /// The whole file.
    ///
    /// # Panics
    /// When an announced tensor was never written: a fault of the caller.
    pub fn finish(self) -> F {
        assert!(self.slots.is_empty(), "invariant: tensor `{:?}` was written", self.slots.keys().next());
        self.file
    }
}

/// The names under which a tensor at `offset` is written, each with its offset and size.
fn slots(tensor: &GgufTensor, offset: u64) -> Vec<(String, (u64, u64))> {
    let n = if tensor.shape.len() == 3 { tensor.shape[0] } else { 0 };
    let matrices: Option<Vec<String>> = (0..n).map(|index| matrix_name(&tensor.name, index)).collect();
    match matrices {
        Some(names) if n > 0 => {
            let size = tensor.n_bytes() / n as u64;
            names.into_iter().zip(0..).map(|(name, index)| (name, (offset + index * size, size))).collect()
        }
        _ => vec![(tensor.name.clone(), (offset, tensor.n_bytes()))],
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::super::cast::Dtype;
    use super::super::{file_bytes, read};
    use super::*;
    use crate::quantize::BlockType;

    #[test]
    fn tensors_written_in_any_order_are_at_their_places() {
        let block = BlockType::named("q8_0").unwrap();
        let tensors = [
            GgufTensor { name: "a".into(), element: Element::Plain(Dtype::F32), shape: vec![3, 5] },
            GgufTensor { name: "b".into(), element: Element::Block(block), shape: vec![4, 64] },
        ];
        let metadata = [("general.architecture".to_string(), Value::Text("x".into()))];
        let len = file_bytes(&metadata, &tensors) as usize;
        let mut writer = Writer::begin(Cursor::new(vec![0; len]), &metadata, &tensors).unwrap();
        for (i, tensor) in tensors.iter().enumerate().rev() {
            writer.write(&tensor.name, &vec![i as u8 + 1; tensor.n_bytes() as usize]).unwrap();
        }
        let file = writer.finish().into_inner();
        assert_eq!(file.len(), len);
        let header = read(&file).unwrap();
        let mut places = Vec::new();
        for (i, (entry, tensor)) in header.tensors.iter().zip(&tensors).enumerate() {
            let (begin, end) = header.place(entry, tensor.element, file.len()).unwrap();
            assert!(begin % 32 == 0 && (end - begin) as u64 == tensor.n_bytes());
            assert!(file[begin..end].iter().all(|&byte| byte == i as u8 + 1));
            places.push(((begin, end), entry.name.as_str()));
        }
        assert_eq!(expect_apart(places.clone()), Ok(()));
        places[0].0.1 = places[1].0.0 + 1;
        assert_eq!(expect_apart(places), Err("tensors `a` and `b` overlap".into()));
    }

    #[test]
    fn stacks_are_written_matrix_by_matrix() {
        let element = Element::Plain(Dtype::F32);
        let tensors = [GgufTensor { name: "blk.0.ffn_up_exps.weight".into(), element, shape: vec![3, 2, 5] }];
        let len = file_bytes(&[], &tensors) as usize;
        let mut writer = Writer::begin(Cursor::new(vec![0; len]), &[], &tensors).unwrap();
        writer.skip("blk.0.ffn_up_exps.1.weight");
        for index in [2u8, 0] {
            writer.write(&format!("blk.0.ffn_up_exps.{index}.weight"), &[index + 1; 40]).unwrap();
        }
        let file = writer.finish().into_inner();
        let header = read(&file).unwrap();
        let (begin, end) = header.place(&header.tensors[0], element, file.len()).unwrap();
        assert_eq!(file[begin..end], [[1; 40], [0; 40], [3; 40]].concat());
    }

    #[test]
    fn tensors_outside_of_the_file_are_refused() {
        let block = Element::Block(BlockType::named("q8_0").unwrap());
        let header = Header { data_begin: 64, ..Header::default() };
        let place = |shape: &[usize], offset, element| {
            header.place(&Entry { name: "a".into(), shape: shape.into(), type_id: 0, offset }, element, 128)
        };
        let plain = Element::Plain(Dtype::F32);
        assert_eq!(place(&[4, 4], 0, plain), Ok((64, 128)));
        assert_eq!(place(&[4, 5], 0, plain), Err(Damage::Truncated { expected: 144, found: 128 }));
        assert_eq!(place(&[4, 4], u64::MAX, plain), Err(Damage::Truncated { expected: 192, found: 128 }));
        for (shape, element, expected) in
            [(vec![1 << 40, 1 << 40], plain, "larger than the file"), (vec![2, 40], block, "whole blocks of `q8_0`")]
        {
            let Err(Damage::Header(reason)) = place(&shape, 0, element) else { panic!("{shape:?} is refused") };
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
