//! Arrays that outgrow memory: kept there up to a cap, in an unnamed file past it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::checkpoint::cast::{self, Dtype};
use crate::journal::{Array, Place};

/// Keeps arrays of `f32` exactly. The file vanishes with the process, however it ends.
#[derive(Debug)]
pub(crate) struct Spool {
    folder: PathBuf,
    memory_left: usize,
    file: Option<File>,
    file_bytes: u64,
    /// Places in the file that were released, by length.
    holes: BTreeMap<usize, Vec<u64>>,
}

/// An array in a [`Spool`].
#[derive(Debug)]
pub(crate) enum Spooled {
    Memory(Vec<f32>),
    File {
        offset: u64,
        len: usize,
    },
    /// In a journal, which has it in any case.
    Journal(Place),
}

/// Bytes as the bit patterns of floats, with which nothing is computed.
pub(crate) fn words(bytes: &[u8]) -> Vec<f32> {
    let word = |chunk: &[u8]| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        f32::from_bits(u32::from_le_bytes(word))
    };
    bytes.chunks(4).map(word).collect()
}

/// The first `len` bytes of what [`words`] was made of.
pub(crate) fn bytes_of(words: &[f32], len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

impl Spool {
    /// Keeps up to `memory_bytes` in memory; the file, if one is needed, is made in `folder`.
    pub fn new(memory_bytes: usize, folder: PathBuf) -> Self {
        Self { folder, memory_left: memory_bytes, file: None, file_bytes: 0, holes: BTreeMap::new() }
    }

    pub fn push(&mut self, values: Vec<f32>) -> Result<Spooled> {
        let n_bytes = values.len() * 4;
        if n_bytes <= self.memory_left {
            self.memory_left -= n_bytes;
            return Ok(Spooled::Memory(values));
        }
        let hole = self.holes.get_mut(&values.len()).and_then(Vec::pop);
        let offset = hole.unwrap_or(self.file_bytes);
        if hole.is_none() {
            self.file_bytes += n_bytes as u64;
        }
        let spooled = Spooled::File { offset, len: values.len() };
        self.write(&spooled, &values)?;
        Ok(spooled)
    }

    /// Keeps an array of a journal: in memory, or where it is.
    pub fn push_array(&mut self, array: Array) -> Result<Spooled> {
        match array.place {
            Some(place) if array.values.len() * 4 > self.memory_left => Ok(Spooled::Journal(place)),
            _ => self.push(array.values),
        }
    }

    /// The first `len` bytes of what was kept of [`words`].
    pub fn get_bytes(&mut self, spooled: &Spooled, len: usize) -> Result<Vec<u8>> {
        Ok(bytes_of(&self.get(spooled)?, len))
    }

    pub fn get(&mut self, spooled: &Spooled) -> Result<Vec<f32>> {
        match spooled {
            Spooled::Memory(values) => Ok(values.clone()),
            Spooled::Journal(place) => place.read(),
            Spooled::File { offset, len } => {
                let file = self.file.as_mut().expect("invariant: spooled arrays have a file");
                let mut bytes = vec![0; len * 4];
                let read = file.seek(SeekFrom::Start(*offset)).and_then(|_| file.read_exact(&mut bytes));
                read.with_context(|| format!("read a work file in `{}`", self.folder.display()))?;
                Ok(cast::decode(Dtype::F32, &bytes).expect("invariant: f32 is a float dtype"))
            }
        }
    }

    /// Gives the place of an array back.
    pub fn release(&mut self, spooled: Spooled) {
        match spooled {
            Spooled::Memory(values) => self.memory_left += values.len() * 4,
            Spooled::File { offset, len } => self.holes.entry(len).or_default().push(offset),
            Spooled::Journal(_) => {}
        }
    }

    /// Replaces an array by one of the same length.
    pub fn set(&mut self, spooled: &mut Spooled, values: Vec<f32>) -> Result<()> {
        match spooled {
            Spooled::Memory(old) => {
                *old = values;
                Ok(())
            }
            Spooled::File { .. } => self.write(spooled, &values),
            // The journal keeps what it has.
            Spooled::Journal(_) => {
                *spooled = self.push(values)?;
                Ok(())
            }
        }
    }

    fn write(&mut self, spooled: &Spooled, values: &[f32]) -> Result<()> {
        let Spooled::File { offset, .. } = spooled else { return Ok(()) };
        let context = || format!("write a work file in `{}`", self.folder.display());
        if self.file.is_none() {
            self.file = Some(tempfile::tempfile_in(&self.folder).with_context(context)?);
        }
        let file = self.file.as_mut().expect("invariant: the file was just made");
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        file.seek(SeekFrom::Start(*offset)).and_then(|_| file.write_all(&bytes)).with_context(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_past_the_cap_come_back_from_disk() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(24, folder.path().into());
        let mut arrays: Vec<Spooled> = (0..3).map(|i| spool.push(vec![i as f32; 6]).unwrap()).collect();
        assert!(matches!(arrays[0], Spooled::Memory(_)) && matches!(arrays[2], Spooled::File { .. }));
        for (i, array) in arrays.iter_mut().enumerate() {
            assert_eq!(spool.get(array).unwrap(), [i as f32; 6]);
            spool.set(array, vec![f32::NAN.copysign(i as f32), 1.0, 2.0, 3.0, 4.0, 10.0 + i as f32]).unwrap();
        }
        for (i, array) in arrays.iter().enumerate() {
            assert_eq!(spool.get(array).unwrap()[5], 10.0 + i as f32);
        }
        // Bit patterns of all kinds come back, from memory and from the file.
        for memory in [1000, 0] {
            let bytes: Vec<u8> = (0..=250).collect();
            let mut spool = Spool::new(memory, folder.path().into());
            let kept = spool.push(words(&bytes)).unwrap();
            assert_eq!(spool.get_bytes(&kept, bytes.len()).unwrap(), bytes);
        }
        // Released places are used again, in memory and on disk.
        for array in arrays.drain(..).rev() {
            spool.release(array);
        }
        let again: Vec<Spooled> = (0..3).map(|i| spool.push(vec![i as f32; 6]).unwrap()).collect();
        assert!(matches!(again[0], Spooled::Memory(_)));
        assert_eq!(spool.file_bytes, 2 * 24);
        assert!((0..3).all(|i| spool.get(&again[i]).unwrap() == [i as f32; 6]));
    }
}
