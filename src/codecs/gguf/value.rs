//! A value of the metadata that is written.

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// GGUF type 4.
    U32(u32),
    /// GGUF type 6.
    F32(f32),
    /// GGUF type 7.
    Bool(bool),
    /// GGUF type 8, UTF-8.
    Text(String),
    /// An array of type 8.
    Texts(Vec<String>),
    /// An array of type 6.
    F32s(Vec<f32>),
    /// An array of type 5.
    I32s(Vec<i32>),
}

impl Value {
    pub(super) fn write(&self, to: &mut Vec<u8>) {
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
                put_text(to, v);
            }
            Self::Texts(v) => {
                array(to, 8, v.len());
                v.iter().for_each(|v| put_text(to, v));
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

/// A text with its length before it.
pub(super) fn put_text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}
