//! Arrays, kept in memory up to a cap and beyond it in an unnamed file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::journal::{Array, Place};
use super::values::Values;

/// Stores arrays without loss. The file disappears with the process, however that ends.
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
    Memory(Values),
    File {
        offset: u64,
        len: usize,
        type_name: &'static str,
    },
    /// In a journal, which keeps it anyway.
    Journal(Place),
}

impl Spool {
    /// Keeps up to `memory_bytes` in memory; the file, if one is needed, is made in `folder`.
    pub fn new(memory_bytes: usize, folder: PathBuf) -> Self {
        Self { folder, memory_left: memory_bytes, file: None, file_bytes: 0, holes: BTreeMap::new() }
    }

    /// Keeps an array of a journal in memory or in its place, one that was not read in its place, and any other array in
    /// memory or in the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn push(&mut self, array: impl Into<Array>) -> Result<Spooled> {
        let (values, place) = match array.into() {
            Array::New(values) => (values, None),
            Array::Kept(values, place) => (values, Some(place)),
            Array::Unread(place) => return Ok(Spooled::Journal(place)),
        };
        let n_bytes = values.n_bytes();
        if n_bytes <= self.memory_left {
            self.memory_left -= n_bytes;
            return Ok(Spooled::Memory(values));
        }
        if let Some(place) = place {
            return Ok(Spooled::Journal(place));
        }
        let hole = self.holes.get_mut(&n_bytes).and_then(Vec::pop);
        let offset = hole.unwrap_or(self.file_bytes);
        if hole.is_none() {
            self.file_bytes += n_bytes as u64;
        }
        self.write(offset, &values)?;
        Ok(Spooled::File { offset, len: n_bytes, type_name: values.type_name() })
    }

    /// # Errors
    /// The file or the piece cannot be read.
    pub fn get(&mut self, spooled: &Spooled) -> Result<Values> {
        match spooled {
            Spooled::Memory(values) => Ok(values.clone()),
            Spooled::Journal(place) => place.read(),
            Spooled::File { offset, len, type_name } => {
                let file = self.file.as_mut().expect("invariant: spooled arrays have a file");
                let mut bytes = vec![0; *len];
                let read = file.seek(SeekFrom::Start(*offset)).and_then(|_| file.read_exact(&mut bytes));
                read.with_context(|| format!("reading a work file in `{}`", self.folder.display()))?;
                Ok(Values::decode(type_name, &bytes).expect("invariant: what was written is decoded"))
            }
        }
    }

    /// Frees the place of an array.
    pub fn release(&mut self, spooled: Spooled) {
        match spooled {
            Spooled::Memory(values) => self.memory_left += values.n_bytes(),
            Spooled::File { offset, len, .. } => self.holes.entry(len).or_default().push(offset),
            Spooled::Journal(_) => {}
        }
    }

    /// Replaces an array by one of the same length and type.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set(&mut self, spooled: &mut Spooled, values: Values) -> Result<()> {
        match spooled {
            Spooled::Memory(old) => *old = values,
            Spooled::File { offset, .. } => self.write(*offset, &values)?,
            // The journal keeps its own pieces.
            Spooled::Journal(_) => *spooled = self.push(values)?,
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, values: &Values) -> Result<()> {
        let context = || format!("writing a work file in `{}`", self.folder.display());
        if self.file.is_none() {
            self.file = Some(tempfile::tempfile_in(&self.folder).with_context(context)?);
        }
        let file = self.file.as_mut().expect("invariant: the file was just made");
        let written = file.seek(SeekFrom::Start(offset)).and_then(|_| values.for_each_run(|run| file.write_all(run)));
        written.with_context(context)
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
            assert_eq!(spool.get(array).unwrap(), Values::F32(vec![i as f32; 6]));
            spool.set(array, vec![-0.0, 1.0, 2.0, 3.0, 4.0, 10.0 + i as f32].into()).unwrap();
        }
        for (i, array) in arrays.iter().enumerate() {
            assert_eq!(spool.get(array).unwrap().f32s().unwrap()[5], 10.0 + i as f32);
        }
        // Other types are restored too, from memory and from the file.
        for memory in [1000, 0] {
            let bytes: Vec<u8> = (0..=250).collect();
            let mut spool = Spool::new(memory, folder.path().into());
            let kept = spool.push(bytes.clone()).unwrap();
            assert_eq!(spool.get(&kept).unwrap().bytes().unwrap(), bytes);
        }
        // Released places are reused, in memory and on disk.
        for array in arrays.drain(..).rev() {
            spool.release(array);
        }
        let again: Vec<Spooled> = (0..3).map(|i| spool.push(vec![i as f32; 6]).unwrap()).collect();
        assert!(matches!(again[0], Spooled::Memory(_)));
        assert_eq!(spool.file_bytes, 2 * 24);
        assert!((0..3).all(|i| spool.get(&again[i]).unwrap() == Values::F32(vec![i as f32; 6])));
    }
}
