//! An array of one of the types that pieces of work are made of.

use anyhow::{Result, bail};

/// Values of one type.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Matrices and hidden states.
    F32(Vec<f32>),
    /// Error curves, and figures that enter reports.
    F64(Vec<f64>),
    /// Permutations.
    I32(Vec<i32>),
    /// Codes.
    U8(Vec<u8>),
}

/// Number of bytes of values that are converted at a time.
const CHUNK: usize = 1 << 16;

impl Values {
    /// The name of the type in headers of pieces.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::F64(_) => "f64",
            Self::I32(_) => "i32",
            Self::U8(_) => "u8",
        }
    }

    /// Bytes that they take.
    pub fn n_bytes(&self) -> usize {
        match self {
            Self::F32(values) => 4 * values.len(),
            Self::F64(values) => 8 * values.len(),
            Self::I32(values) => 4 * values.len(),
            Self::U8(values) => values.len(),
        }
    }

    /// Calls `write` with all bytes in order, little-endian, in chunks.
    ///
    /// # Errors
    /// The error of `write`.
    pub(super) fn for_each_run<E>(&self, mut write: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut run = Vec::with_capacity(8 * CHUNK);
        let mut encoded = |run: &mut Vec<u8>| {
            let written = write(run);
            run.clear();
            written
        };
        match self {
            Self::F32(values) => values.chunks(CHUNK).try_for_each(|chunk| {
                run.extend(chunk.iter().flat_map(|v| v.to_le_bytes()));
                encoded(&mut run)
            }),
            Self::F64(values) => values.chunks(CHUNK).try_for_each(|chunk| {
                run.extend(chunk.iter().flat_map(|v| v.to_le_bytes()));
                encoded(&mut run)
            }),
            Self::I32(values) => values.chunks(CHUNK).try_for_each(|chunk| {
                run.extend(chunk.iter().flat_map(|v| v.to_le_bytes()));
                encoded(&mut run)
            }),
            Self::U8(values) => write(values),
        }
    }

    /// The inverse of [`Self::for_each_run`]; `None` if the type is unknown or the length is not a multiple of its
    /// size.
    pub(super) fn decode(type_name: &str, bytes: &[u8]) -> Option<Self> {
        fn whole<const N: usize, T>(bytes: &[u8], value: fn([u8; N]) -> T) -> Option<Vec<T>> {
            let (values, rest) = bytes.as_chunks::<N>();
            rest.is_empty().then(|| values.iter().map(|&bytes| value(bytes)).collect())
        }
        Some(match type_name {
            "f32" => Self::F32(whole(bytes, f32::from_le_bytes)?),
            "f64" => Self::F64(whole(bytes, f64::from_le_bytes)?),
            "i32" => Self::I32(whole(bytes, i32::from_le_bytes)?),
            "u8" => Self::U8(bytes.to_vec()),
            _ => return None,
        })
    }

    fn other(&self, expected: &str) -> Result<std::convert::Infallible> {
        bail!("a stored piece has an array of {}, expected {expected}", self.type_name())
    }

    /// The values, if they are of this type.
    ///
    /// # Errors
    /// They are of another type.
    pub fn f32s(self) -> Result<Vec<f32>> {
        match self {
            Self::F32(values) => Ok(values),
            other => match other.other("f32")? {},
        }
    }

    /// The values, if they are of this type.
    ///
    /// # Errors
    /// They are of another type.
    pub fn f64s(self) -> Result<Vec<f64>> {
        match self {
            Self::F64(values) => Ok(values),
            other => match other.other("f64")? {},
        }
    }

    /// The values, if they are of this type.
    ///
    /// # Errors
    /// They are of another type.
    pub fn i32s(self) -> Result<Vec<i32>> {
        match self {
            Self::I32(values) => Ok(values),
            other => match other.other("i32")? {},
        }
    }

    /// The values, if they are of this type.
    ///
    /// # Errors
    /// They are of another type.
    pub fn bytes(self) -> Result<Vec<u8>> {
        match self {
            Self::U8(values) => Ok(values),
            other => match other.other("u8")? {},
        }
    }
}

impl From<Vec<f32>> for Values {
    fn from(values: Vec<f32>) -> Self {
        Self::F32(values)
    }
}

impl From<Vec<f64>> for Values {
    fn from(values: Vec<f64>) -> Self {
        Self::F64(values)
    }
}

impl From<Vec<i32>> for Values {
    fn from(values: Vec<i32>) -> Self {
        Self::I32(values)
    }
}

impl From<Vec<u8>> for Values {
    fn from(values: Vec<u8>) -> Self {
        Self::U8(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_comes_back_from_its_bytes() {
        let long: Vec<f32> = (0..2 * CHUNK + 3).map(|i| i as f32 - 7.5).collect();
        let exact = vec![f64::MIN_POSITIVE, -0.1, f64::from_bits(0x7ff0_0000_0000_0001), 1e300];
        for values in [long.into(), exact.into(), vec![i32::MIN, -1, 7].into(), (0..=250).collect::<Vec<u8>>().into()] {
            let values: Values = values;
            let mut bytes = Vec::new();
            let mut collect = |run: &[u8]| {
                bytes.extend_from_slice(run);
                Ok::<_, std::io::Error>(())
            };
            values.for_each_run(&mut collect).unwrap();
            assert_eq!(bytes.len(), values.n_bytes());
            let again = Values::decode(values.type_name(), &bytes).unwrap();
            assert_eq!(format!("{again:?}"), format!("{values:?}"));
        }
        assert!(Values::decode("f64", &[0; 12]).is_none() && Values::decode("f16", &[0; 12]).is_none());
        assert!(Values::from(vec![1.0f32]).f64s().unwrap_err().to_string().contains("f32, expected f64"));
    }
}
