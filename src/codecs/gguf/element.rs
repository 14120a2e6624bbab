//! The element type of a tensor in a GGUF file.

use super::super::cast::{self, Dtype};
use crate::quantize::BlockType;

/// The type of the values of a tensor in a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// One value after the other.
    Plain(Dtype),
    /// Quantized blocks along the rows.
    Block(BlockType),
}

impl Element {
    /// GGUF's number for a type that is written.
    ///
    /// # Panics
    /// If it is not a float type, which callers rule out.
    pub fn type_id(self) -> u32 {
        match self {
            Self::Plain(Dtype::F32) => 0,
            Self::Plain(Dtype::F16) => 1,
            Self::Plain(Dtype::BF16) => 30,
            Self::Plain(other) => unreachable!("invariant: only float tensors are written, got {other:?}"),
            Self::Block(block) => block.id,
        }
    }

    /// The inverse of [`Self::type_id`]; `None` for types that are not read.
    pub fn of_type_id(id: u32) -> Option<Self> {
        match id {
            0 => Some(Self::Plain(Dtype::F32)),
            1 => Some(Self::Plain(Dtype::F16)),
            30 => Some(Self::Plain(Dtype::BF16)),
            id => BlockType::of_id(id).map(Self::Block),
        }
    }

    /// Bytes of a tensor of this shape, (out, in) for a matrix.
    pub fn n_bytes(self, shape: &[usize]) -> u64 {
        match (self, shape.split_last()) {
            (Self::Block(block), Some((&cols, rows))) => block.n_bytes(rows.iter().product(), cols),
            (Self::Block(_), None) => 0,
            (Self::Plain(dtype), _) => {
                cast::n_bytes(dtype, shape.iter().product()).expect("invariant: an output tensor fits in memory")
            }
        }
    }
}

/// Names of types that are not read, by their numbers.
const UNREAD: [(u32, &str); 17] = [
    (9, "q8_1"),
    (19, "iq1_s"),
    (24, "i8"),
    (25, "i16"),
    (26, "i32"),
    (27, "i64"),
    (28, "f64"),
    (29, "iq1_m"),
    (31, "q4_0_4_4"),
    (32, "q4_0_4_8"),
    (33, "q4_0_8_8"),
    (34, "tq1_0"),
    (35, "tq2_0"),
    (36, "iq4_nl_4_4"),
    (39, "mxfp4"),
    (40, "nvfp4"),
    (41, "q1_0"),
];

/// The name of a type that is not read, for messages: "`iq1_s`", or its number.
pub fn type_name(id: u32) -> String {
    let known = UNREAD.iter().find(|(other, _)| *other == id);
    known.map_or_else(|| format!("{id}, which is unknown"), |(_, name)| format!("`{name}`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{BLOCK_TYPES, READ_TYPES};

    #[test]
    fn type_ids_are_read_back() {
        let plain = [Dtype::F32, Dtype::F16, Dtype::BF16].map(Element::Plain);
        for element in plain.into_iter().chain(BLOCK_TYPES.into_iter().chain(READ_TYPES).map(Element::Block)) {
            assert_eq!(Element::of_type_id(element.type_id()), Some(element));
        }
        assert_eq!(Element::of_type_id(99), None);
    }
}
