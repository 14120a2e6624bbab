//! A position in the bytes of a GGUF file. Every count and length comes from the file, so that none sizes an allocation
//! before it is known to fit into the bytes that are left.

/// Deeper arrays of arrays are refused.
const MAX_DEPTH: usize = 4;

/// GGUF's numbers for the types of metadata.
pub(super) mod kind {
    pub const U32: u32 = 4;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const TEXT: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const F64: u32 = 12;
}

/// The bytes of a file, and the position of the reader.
pub(super) struct Bytes<'a> {
    pub file: &'a [u8],
    pub at: usize,
}

impl<'a> Bytes<'a> {
    pub fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let end = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n)).filter(|&end| end <= self.file.len());
        let end = end.ok_or_else(|| {
            let left = self.file.len() - self.at;
            format!("its header announces {n} bytes at byte {}, and {left} are left", self.at)
        })?;
        let taken = &self.file[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.take(N as u64)?;
        Ok(taken.try_into().expect("invariant: as many bytes were taken"))
    }

    pub fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn text(&mut self) -> Result<String, String> {
        let len = self.u64()?;
        Ok(String::from_utf8_lossy(self.take(len)?).into_owned())
    }

    pub fn skip_value(&mut self, kind: u32, depth: usize) -> Result<(), String> {
        if let Some(size) = size_of(kind) {
            return self.take(size).map(drop);
        }
        match kind {
            kind::TEXT => {
                let len = self.u64()?;
                self.take(len).map(drop)
            }
            kind::ARRAY if depth < MAX_DEPTH => {
                let (of, len) = (self.u32()?, self.u64()?);
                match size_of(of) {
                    Some(size) => self.take(len.saturating_mul(size)).map(drop),
                    // Each value takes bytes, so the end of the file bounds the loop.
                    None => (0..len).try_for_each(|_| self.skip_value(of, depth + 1)),
                }
            }
            kind::ARRAY => Err("its metadata are nested too deeply".into()),
            other => Err(format!("its metadata have a value of type {other}, which is unknown")),
        }
    }
}

/// Bytes of a value of fixed size.
pub(super) fn size_of(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
