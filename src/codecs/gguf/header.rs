//! The header of a GGUF file: versions 2 and 3 are read, version 3 is written.
//!
//! The writer is our own because candle's needs all tensors at once, and the reader because
//! candle's trusts the file.

use std::collections::BTreeMap;

use super::bytes::{Bytes, kind};
use super::element::Element;
use super::value::{Value, put_text};

/// The tensors that a file describes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// The tensors in the order of the file.
    pub tensors: Vec<Entry>,
    /// First byte of the data of all tensors.
    pub data_begin: u64,
    /// Where the file has each value of its metadata.
    pub(super) values: BTreeMap<String, Place>,
}

/// A value of the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// GGUF's number for its type.
    pub kind: u32,
    /// Its first byte.
    pub begin: usize,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// llama.cpp's name: `blk.0.attn_q.weight`.
    pub name: String,
    /// (out, in), as everywhere here.
    pub shape: Vec<usize>,
    /// GGUF's number for its type.
    pub type_id: u32,
    /// Relative to `data_begin`.
    pub offset: u64,
}

const MAGIC: &[u8] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_DIMENSIONS: u32 = 4;

/// Whether a file begins with GGUF's magic.
pub fn is_begun(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

/// Why a file is of a kind that is not read; `None` if it is of a known version, or is damaged.
pub fn unread(file: &[u8]) -> Option<String> {
    let version = u32::from_le_bytes(*file.strip_prefix(MAGIC)?.first_chunk()?);
    match version {
        2 | 3 => None,
        1 | 4..=99 => Some(format!("it has version {version} of GGUF, and versions 2 and 3 are read")),
        swapped if (1..=99).contains(&swapped.swap_bytes()) => {
            Some("it has the byte order of big-endian machines".into())
        }
        _ => None,
    }
}

/// Reads the header of a whole file.
///
/// # Errors
/// The header is damaged; the error is a sentence.
pub fn read(file: &[u8]) -> Result<Header, String> {
    let mut bytes = Bytes { file, at: 0 };
    if bytes.take(4)? != MAGIC {
        return Err("it does not begin with `GGUF`".into());
    }
    let version = bytes.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("it has version {version}, expected 2 or 3"));
    }
    let (n_tensors, n_values) = (bytes.u64()?, bytes.u64()?);
    let mut alignment = DEFAULT_ALIGNMENT;
    let (mut values, mut twice) = (BTreeMap::new(), None);
    for _ in 0..n_values {
        let (key, kind) = (bytes.text()?, bytes.u32()?);
        let place = Place { kind, begin: bytes.at };
        match (key.as_str(), kind) {
            ("general.alignment", kind::U32) => alignment = bytes.u32()?.into(),
            (_, kind) => bytes.skip_value(kind, 0)?,
        }
        if values.insert(key.clone(), place).is_some() {
            twice = twice.or(Some(key));
        }
    }
    if let Some(key) = twice {
        return Err(format!("it has `{key}` twice"));
    }
    if !alignment.is_power_of_two() {
        return Err(format!("`general.alignment` is {alignment}, which is not a power of two"));
    }
    let mut tensors: Vec<Entry> = Vec::new();
    for _ in 0..n_tensors {
        tensors.push(entry(&mut bytes)?);
    }
    let mut names: Vec<&str> = tensors.iter().map(|entry| entry.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("it describes tensor `{}` twice", twice[0]));
    }
    if let Some(Entry { name, offset, .. }) = tensors.iter().find(|entry| !entry.offset.is_multiple_of(alignment)) {
        return Err(format!("tensor `{name}` begins at data offset {offset}, which is not a multiple of {alignment}"));
    }
    let data_begin = (bytes.at as u64).next_multiple_of(alignment);
    Ok(Header { tensors, data_begin, values })
}

/// The description of one tensor.
fn entry(bytes: &mut Bytes<'_>) -> Result<Entry, String> {
    let name = bytes.text()?;
    let n_dimensions = bytes.u32()?;
    if !(1..=MAX_DIMENSIONS).contains(&n_dimensions) {
        return Err(format!("tensor `{name}` has {n_dimensions} dimensions"));
    }
    let size = |size: u64| usize::try_from(size).map_err(|_| format!("tensor `{name}` has a dimension of {size}"));
    let mut shape = (0..n_dimensions).map(|_| size(bytes.u64()?)).collect::<Result<Vec<_>, _>>()?;
    shape.reverse();
    if shape.contains(&0) {
        return Err(format!("tensor `{name}` is empty, and has shape {shape:?}"));
    }
    Ok(Entry { shape, type_id: bytes.u32()?, offset: bytes.u64()?, name })
}

/// A tensor to write. Its shape is (out, in), as everywhere here; GGUF reverses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// llama.cpp's name: `blk.0.attn_q.weight`.
    pub name: String,
    /// The type of its values.
    pub element: Element,
    /// (out, in).
    pub shape: Vec<usize>,
}

impl GgufTensor {
    /// Bytes of its values, without padding.
    pub fn n_bytes(&self) -> u64 {
        self.element.n_bytes(&self.shape)
    }
}

/// The header of a file, padded to the start of its data, and the offset of every tensor in the file.
pub fn write(metadata: &[(String, Value)], tensors: &[GgufTensor]) -> (Vec<u8>, Vec<u64>) {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut bytes, key);
        value.write(&mut bytes);
    }
    let (mut offset, mut offsets) = (0u64, Vec::new());
    for tensor in tensors {
        put_text(&mut bytes, &tensor.name);
        bytes.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&d| bytes.extend((d as u64).to_le_bytes()));
        bytes.extend(tensor.element.type_id().to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        offsets.push(offset);
        offset = (offset + tensor.n_bytes()).next_multiple_of(DEFAULT_ALIGNMENT);
    }
    bytes.resize(bytes.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
    let begin = bytes.len() as u64;
    (bytes, offsets.into_iter().map(|offset| begin + offset).collect())
}

/// Bytes of a file with this header and its data.
pub fn file_bytes(metadata: &[(String, Value)], tensors: &[GgufTensor]) -> u64 {
    let (header, offsets) = write(metadata, tensors);
    let end = |(offset, tensor): (&u64, &GgufTensor)| (offset + tensor.n_bytes()).next_multiple_of(DEFAULT_ALIGNMENT);
    offsets.iter().zip(tensors).next_back().map_or(header.len() as u64, end)
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::Content;

    use super::super::super::cast::Dtype;
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    /// A file with one value and one tensor.
    fn file(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        let mut bytes = [MAGIC, &3u32.to_le_bytes(), &1u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
        bytes.extend([text(key), kind.to_le_bytes().to_vec(), value.to_vec()].concat());
        bytes.extend([text("a"), 2u32.to_le_bytes().to_vec()].concat());
        bytes.extend([3u64, 2].map(u64::to_le_bytes).concat());
        bytes.extend([0u32.to_le_bytes().to_vec(), 64u64.to_le_bytes().to_vec()].concat());
        bytes
    }

    fn check(bytes: &[u8], expected: &str) {
        let reason = read(bytes).unwrap_err();
        assert!(reason.contains(expected), "`{reason}` does not contain `{expected}`");
    }

    #[test]
    fn headers_are_read_in_their_order() {
        let found = read(&file("general.alignment", kind::U32, &64u32.to_le_bytes())).unwrap();
        assert_eq!(found.tensors, [Entry { name: "a".into(), shape: vec![2, 3], type_id: 0, offset: 64 }]);
        assert!(found.data_begin.is_multiple_of(64));
        let texts = [kind::TEXT.to_le_bytes().to_vec(), 2u64.to_le_bytes().to_vec(), text("x"), text("yz")].concat();
        assert_eq!(read(&file("names", kind::ARRAY, &texts)).unwrap().tensors, found.tensors);
    }

    #[test]
    fn announced_sizes_are_bounded_by_the_file() {
        for alignment in [0u32, 3, 48] {
            check(&file("general.alignment", kind::U32, &alignment.to_le_bytes()), "not a power of two");
        }
        check(b"GGU", "4 bytes");
        check(b"GGML\x03\0\0\0", "does not begin");
        check(&file("a", 99, &[]), "type 99");
        let mut many = file("a", 0, &[1]);
        many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        check(&many, "are left");
        many[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        check(&many, "are left");
        check(&file("a", kind::TEXT, &u64::MAX.to_le_bytes()), "are left");
        for of in [0, kind::TEXT, kind::ARRAY, 12] {
            let huge = [of.to_le_bytes().to_vec(), (u64::MAX / 2).to_le_bytes().to_vec()].concat();
            assert!(read(&file("a", kind::ARRAY, &huge)).is_err());
        }
        let nested: Vec<u8> =
            (0..9).flat_map(|_| [kind::ARRAY.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat()).collect();
        check(&file("a", kind::ARRAY, &nested), "nested too deeply");
        let mut twice = file("a", 0, &[1]);
        twice[8] = 2;
        twice.extend_from_within(twice.len() - 41..);
        check(&twice, "tensor `a` twice");
    }

    #[test]
    fn files_survive_a_round_trip_and_another_reader_agrees() {
        let block = crate::quantize::BlockType::named("q8_0").unwrap();
        let tensors = [
            GgufTensor { name: "token_embd.weight".into(), element: Element::Plain(Dtype::F32), shape: vec![3, 5] },
            GgufTensor { name: "blk.0.attn_q.weight".into(), element: Element::Block(block), shape: vec![4, 64] },
        ];
        let metadata = [
            ("general.architecture".to_string(), Value::Text("x".into())),
            ("a".into(), Value::Texts(vec!["x".into(), "yz".into()])),
            ("b".into(), Value::F32s(vec![1.0])),
            ("c".into(), Value::I32s(vec![-1, 2])),
            ("d".into(), Value::Bool(true)),
            ("e".into(), Value::U32(7)),
            ("f".into(), Value::F32(0.5)),
        ];
        let (mut file, offsets) = write(&metadata, &tensors);
        file.resize(file_bytes(&metadata, &tensors) as usize, 0);
        let header = read(&file).unwrap();
        let theirs = Content::read(&mut std::io::Cursor::new(&file)).unwrap();
        assert_eq!(theirs.metadata["e"].to_u32().unwrap(), 7);
        assert_eq!(theirs.metadata["c"].to_vec().unwrap().len(), 2);
        assert_eq!(theirs.tensor_data_offset, header.data_begin);
        assert_eq!(header.tensors.len(), tensors.len());
        for ((entry, tensor), offset) in header.tensors.iter().zip(&tensors).zip(offsets) {
            assert_eq!((&entry.name, &entry.shape), (&tensor.name, &tensor.shape));
            assert_eq!((entry.type_id, header.data_begin + entry.offset), (tensor.element.type_id(), offset));
            let theirs = &theirs.tensor_infos[&entry.name];
            assert_eq!((theirs.shape.dims(), theirs.offset), (entry.shape.as_slice(), entry.offset));
        }
    }

    proptest::proptest! {
        #[test]
        fn headers_survive_a_round_trip(texts in proptest::collection::vec("[a-zß.]{0,9}", 0..4),
                                        numbers in proptest::collection::vec(proptest::prelude::any::<i32>(), 0..4),
                                        shapes in proptest::collection::vec(proptest::collection::vec(1usize..9, 1..5), 0..5)) {
            let metadata = [
                ("texts".to_string(), Value::Texts(texts)),
                ("numbers".into(), Value::I32s(numbers.clone())),
                ("floats".into(), Value::F32s(numbers.iter().map(|&n| n as f32).collect())),
                ("bool".into(), Value::Bool(numbers.is_empty())),
            ];
            let element = Element::Plain(Dtype::F16);
            let tensor = |(i, shape): (usize, Vec<usize>)| GgufTensor { name: format!("t.{i}"), element, shape };
            let tensors: Vec<GgufTensor> = shapes.into_iter().enumerate().map(tensor).collect();
            let (file, offsets) = write(&metadata, &tensors);
            let header = read(&file).unwrap();
            let found = header.tensors.iter().map(|t| (t.name.as_str(), &t.shape, t.type_id, header.data_begin + t.offset));
            let expected = tensors.iter().zip(&offsets).map(|(t, &at)| (t.name.as_str(), &t.shape, element.type_id(), at));
            proptest::prop_assert!(found.eq(expected));
        }

        #[test]
        fn damaged_headers_never_panic(noise in proptest::collection::vec(proptest::prelude::any::<(usize, u8)>(), 1..6)) {
            let mut bytes = file("general.alignment", kind::U32, &64u32.to_le_bytes());
            for (at, byte) in noise {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            let _ = read(&bytes);
        }
    }
}
