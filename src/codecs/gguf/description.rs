//! The description of a model in a GGUF file: metadata by key, and small tensors. Values are read from the file
//! when they are asked for. A model may be split into several files, of which the first has the metadata.

use super::super::cast::{self, Dtype};
use super::bytes::{Bytes, kind, size_of};
use super::element::Element;
use super::header::{Entry, Header, Place};

/// The metadata and the names of tensors of a file.
#[derive(Debug, Clone, Copy)]
pub struct Description<'a> {
    file: &'a [u8],
    header: &'a Header,
    others: &'a [(&'a [u8], Header)],
}

impl<'a> Description<'a> {
    /// `header` is the header of the whole file `file`.
    pub fn new(file: &'a [u8], header: &'a Header) -> Self {
        Self { file, header, others: &[] }
    }

    /// With the other files of the same model, each with its header.
    #[must_use]
    pub fn with_others(self, others: &'a [(&'a [u8], Header)]) -> Self {
        Self { others, ..self }
    }

    /// The tensors of all files, in their order.
    pub fn tensors(&self) -> impl Iterator<Item = &'a Entry> {
        self.files().flat_map(|(_, header)| &header.tensors)
    }

    /// The tensor of a name.
    pub fn tensor(&self, name: &str) -> Option<&'a Entry> {
        self.tensors().find(|entry| entry.name == name)
    }

    fn files(&self) -> impl Iterator<Item = (&'a [u8], &'a Header)> {
        let others = self.others.iter().map(|(file, header)| (*file, header));
        std::iter::once((self.file, self.header)).chain(others)
    }

    /// Every key of the metadata.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.header.values.keys().map(String::as_str)
    }

    fn place(&self, key: &str) -> Option<Place> {
        self.header.values.get(key).copied()
    }

    /// A text.
    pub fn text(&self, key: &str) -> Option<String> {
        let place = self.place(key).filter(|place| place.kind == kind::TEXT)?;
        self.at(place.begin).text().ok()
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Option<bool> {
        let place = self.place(key).filter(|place| place.kind == kind::BOOL)?;
        self.file.get(place.begin).map(|&byte| byte != 0)
    }

    /// A number of any type.
    pub fn number(&self, key: &str) -> Option<f64> {
        let place = self.place(key)?;
        number(&mut self.at(place.begin), place.kind)
    }

    /// A whole number that is not negative. An array of equal numbers, one for each block, counts as that number.
    pub fn count(&self, key: &str) -> Option<u64> {
        let number = match self.numbers(key) {
            Some(numbers) => {
                let first = *numbers.first()?;
                numbers.iter().all(|&number| number == first).then_some(first)?
            }
            None => self.number(key)?,
        };
        // Above it not every number is a float of 64 bits.
        const LARGEST: f64 = (1u64 << 53) as f64;
        (number.fract() == 0.0 && (0.0..=LARGEST).contains(&number)).then_some(number as u64)
    }

    /// An array of numbers or truth values.
    pub fn numbers(&self, key: &str) -> Option<Vec<f64>> {
        let (of, len, mut bytes) = self.array(key)?;
        size_of(of)?;
        // The header was read to its end, so that the array is in the file.
        (0..len).map(|_| number(&mut bytes, of)).collect()
    }

    /// The length of an array.
    pub fn length(&self, key: &str) -> Option<u64> {
        self.array(key).map(|(_, len, _)| len)
    }

    /// An array of texts.
    pub fn texts(&self, key: &str) -> Option<Vec<String>> {
        let (of, len, mut bytes) = self.array(key)?;
        if of != kind::TEXT {
            return None;
        }
        (0..len).map(|_| bytes.text().ok()).collect()
    }

    /// The values of a vector of f32.
    pub fn vector(&self, name: &str) -> Option<Vec<f32>> {
        let (file, header, entry) = self
            .files()
            .find_map(|(file, header)| Some((file, header, header.tensors.iter().find(|entry| entry.name == name)?)))?;
        let element = Element::Plain(Dtype::F32);
        let is_vector = entry.shape.len() == 1 && entry.type_id == element.type_id();
        let (begin, end) = is_vector.then(|| header.place(entry, element, file.len()))?.ok()?;
        cast::decode(Dtype::F32, &file[begin..end])
    }

    fn at(&self, at: usize) -> Bytes<'a> {
        Bytes { file: self.file, at }
    }

    /// The type and length of an array, and the position of its first element.
    fn array(&self, key: &str) -> Option<(u32, u64, Bytes<'a>)> {
        let place = self.place(key).filter(|place| place.kind == kind::ARRAY)?;
        let mut bytes = self.at(place.begin);
        Some((bytes.u32().ok()?, bytes.u64().ok()?, bytes))
    }
}

/// The number at a position; `None` if the type is none of numbers.
fn number(bytes: &mut Bytes<'_>, of: u32) -> Option<f64> {
    Some(match of {
        kind::F32 => f32::from_le_bytes(bytes.array().ok()?).into(),
        kind::F64 => f64::from_le_bytes(bytes.array().ok()?),
        0 => u8::from_le_bytes(bytes.array().ok()?).into(),
        1 => i8::from_le_bytes(bytes.array().ok()?).into(),
        2 => u16::from_le_bytes(bytes.array().ok()?).into(),
        3 => i16::from_le_bytes(bytes.array().ok()?).into(),
        kind::U32 => u32::from_le_bytes(bytes.array().ok()?).into(),
        5 => i32::from_le_bytes(bytes.array().ok()?).into(),
        kind::BOOL => f64::from(u8::from(bytes.array::<1>().ok()?[0] != 0)),
        10 => u64::from_le_bytes(bytes.array().ok()?) as f64,
        11 => i64::from_le_bytes(bytes.array().ok()?) as f64,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::header::{GgufTensor, read, write};
    use super::super::value::Value;
    use super::*;

    #[test]
    fn values_are_read_as_they_were_written() {
        let metadata = [
            ("text".to_string(), Value::Text("a b".into())),
            ("texts".into(), Value::Texts(vec!["x".into(), "".into(), "ß".into()])),
            ("numbers".into(), Value::F32s(vec![1.0, -0.5])),
            ("equal".into(), Value::I32s(vec![3, 3, 3])),
            ("unequal".into(), Value::I32s(vec![3, 4])),
            ("flag".into(), Value::Bool(true)),
            ("count".into(), Value::U32(7)),
            ("real".into(), Value::F32(0.5)),
        ];
        let shape = vec![3];
        let tensors = [GgufTensor { name: "v".into(), element: Element::Plain(Dtype::F32), shape }];
        let (mut file, _) = write(&metadata, &tensors);
        file.extend([1.0f32, 2.0, 3.0].map(f32::to_le_bytes).as_flattened());
        let header = read(&file).unwrap();
        let description = Description::new(&file, &header);
        assert_eq!(description.text("text").as_deref(), Some("a b"));
        assert_eq!(description.texts("texts").unwrap(), ["x", "", "ß"]);
        assert_eq!(description.length("texts"), Some(3));
        assert_eq!(description.numbers("numbers"), Some(vec![1.0, -0.5]));
        assert_eq!(description.flag("flag"), Some(true));
        assert_eq!(["count", "equal"].map(|key| description.count(key)), [Some(7), Some(3)]);
        assert_eq!(["unequal", "real", "texts", "absent"].map(|key| description.count(key)), [None; 4]);
        assert_eq!(["real", "count", "text"].map(|key| description.number(key)), [Some(0.5), Some(7.0), None]);
        assert_eq!(description.vector("v"), Some(vec![1.0, 2.0, 3.0]));
        assert_eq!(description.vector("w"), None);
        assert_eq!(description.keys().count(), metadata.len());
    }
}
