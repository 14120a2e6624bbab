//! Finished pieces of a long run, kept on disk, so that a run that was killed goes on from the last of them.
//!
//! One file a piece: a few values as JSON, and arrays. A piece appears whole or not at all (it is written under another name
//! and renamed), and a checksum tells one that a power cut tore. The same job makes the same pieces, so that one may be
//! taken for the other; who opens a journal makes sure that it is the same job.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::checkpoint::create_file;

/// Where pieces are kept; the default keeps none.
#[derive(Debug, Default)]
pub struct Journal {
    folder: Option<PathBuf>,
}

/// An array, and its place in the journal if there is one.
#[derive(Debug, Clone)]
pub struct Array {
    pub values: Vec<f32>,
    pub place: Option<Place>,
}

/// A place in a file of a journal, which is not changed as long as the journal is in use.
#[derive(Debug, Clone)]
pub struct Place {
    path: Arc<PathBuf>,
    offset: u64,
    len: usize,
}

/// A finished piece.
#[derive(Debug)]
pub struct Piece {
    pub fields: Value,
    pub arrays: Vec<Array>,
}

impl Array {
    /// `f64`s as the bit patterns of floats, with which nothing is computed.
    pub fn bits(values: &[f64]) -> Vec<f32> {
        values.iter().flat_map(|v| [v.to_bits() as u32, (v.to_bits() >> 32) as u32].map(f32::from_bits)).collect()
    }

    /// What [`Self::bits`] was made of.
    pub fn f64s(&self) -> Vec<f64> {
        let word = |v: f32| u64::from(v.to_bits());
        self.values
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&[low, high]| f64::from_bits(word(low) | (word(high) << 32)))
            .collect()
    }
}

impl Place {
    /// # Errors
    /// The file is gone, or the disk refuses.
    pub fn read(&self) -> Result<Vec<f32>> {
        let context = || format!("read `{}`", self.path.display());
        let mut file = File::open(&*self.path).with_context(context)?;
        file.seek(SeekFrom::Start(self.offset)).with_context(context)?;
        let mut bytes = vec![0; 4 * self.len];
        file.read_exact(&mut bytes).with_context(context)?;
        Ok(floats(&bytes))
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// Length of a header and checksum of what follows, in front of the header.
const PREFIX: usize = 12;

impl Journal {
    /// Keeps pieces in `folder`, which exists.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder: Some(folder) }
    }

    /// Whether pieces are kept.
    pub fn keeps(&self) -> bool {
        self.folder.is_some()
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join(key))
    }

    /// The piece `key`, if an earlier run finished it, or else that of `make`, which is kept.
    ///
    /// # Errors
    /// That of `make`, or the disk refuses.
    pub fn piece(&self, key: &str, make: impl FnOnce() -> Result<(Value, Vec<Vec<f32>>)>) -> Result<Piece> {
        match self.get(key)? {
            Some(piece) => Ok(piece),
            None => {
                let (fields, arrays) = make()?;
                self.put(key, fields, arrays)
            }
        }
    }

    /// Whether the piece `key` is finished.
    pub fn has(&self, key: &str) -> bool {
        self.path(key).is_some_and(|path| path.is_file())
    }

    /// # Errors
    /// The disk refuses.
    pub fn get(&self, key: &str) -> Result<Option<Piece>> {
        let Some(path) = self.path(key).filter(|path| path.is_file()) else { return Ok(None) };
        let bytes = fs::read(&path).with_context(|| format!("read `{}`", path.display()))?;
        let piece = parse(&bytes, &path);
        if piece.is_none() {
            tracing::warn!("`{}` is torn: it is made again", path.display());
        }
        Ok(piece)
    }

    /// Keeps a piece.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn put(&self, key: &str, fields: Value, arrays: Vec<Vec<f32>>) -> Result<Piece> {
        let Some(path) = self.path(key) else {
            let arrays = arrays.into_iter().map(|values| Array { values, place: None }).collect();
            return Ok(Piece { fields, arrays });
        };
        let lengths: Vec<usize> = arrays.iter().map(Vec::len).collect();
        let header = json!({"fields": fields, "lengths": lengths}).to_string();
        let partial = path.with_extension("partial");
        let write = || -> std::io::Result<()> {
            let mut file = BufWriter::with_capacity(1 << 20, create_file(&partial)?);
            let mut checksum = crc32fast::Hasher::new();
            file.write_all(&[0; PREFIX])?;
            let mut both = |file: &mut BufWriter<File>, bytes: &[u8]| {
                checksum.update(bytes);
                file.write_all(bytes)
            };
            both(&mut file, header.as_bytes())?;
            for values in &arrays {
                for chunk in values.chunks(1 << 16) {
                    let bytes: Vec<u8> = chunk.iter().flat_map(|v| v.to_le_bytes()).collect();
                    both(&mut file, &bytes)?;
                }
            }
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&checksum.finalize().to_le_bytes())?;
            file.into_inner()?;
            fs::rename(&partial, &path)
        };
        write().with_context(|| format!("write `{}`", path.display()))?;
        let shared = Arc::new(path);
        let mut offset = (PREFIX + header.len()) as u64;
        let place = |values: Vec<f32>| {
            let place = Place { path: Arc::clone(&shared), offset, len: values.len() };
            offset += 4 * values.len() as u64;
            Array { values, place: Some(place) }
        };
        Ok(Piece { fields, arrays: arrays.into_iter().map(place).collect() })
    }

    /// Throws a piece away that no later one is made of.
    pub fn remove(&self, key: &str) {
        if let Some(path) = self.path(key) {
            // What cannot be removed now goes with the folder.
            let _ = fs::remove_file(path);
        }
    }
}

/// A piece from its file; none where it is torn.
fn parse(bytes: &[u8], path: &Path) -> Option<Piece> {
    let (length, rest) = bytes.split_at_checked(8)?;
    let (checksum, rest) = rest.split_at_checked(4)?;
    if crc32fast::hash(rest) != u32::from_le_bytes(checksum.try_into().ok()?) {
        return None;
    }
    let n_header = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
    let (header, mut values) = rest.split_at_checked(n_header)?;
    let mut header: Value = serde_json::from_slice(header).ok()?;
    let lengths: Vec<usize> = serde_json::from_value(header.get_mut("lengths")?.take()).ok()?;
    let path = Arc::new(path.to_path_buf());
    let mut arrays = Vec::new();
    let mut offset = (PREFIX + n_header) as u64;
    for len in lengths {
        let (own, others) = values.split_at_checked(len.checked_mul(4)?)?;
        values = others;
        arrays.push(Array { values: floats(own), place: Some(Place { path: Arc::clone(&path), offset, len }) });
        offset += 4 * len as u64;
    }
    Some(Piece { fields: header.get_mut("fields")?.take(), arrays })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_back_and_torn_ones_are_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::new(folder.path().into());
        let exact = [f64::MIN_POSITIVE, -0.1, f64::from_bits(0x7ff0_0000_0000_0001), 1e300];
        let make = || Ok((json!({"n": 3}), vec![vec![1.5, -0.0], Vec::new(), Array::bits(&exact)]));
        let made = journal.piece("a", make).unwrap();
        let unmade = || -> Result<(Value, Vec<Vec<f32>>)> { panic!("it is there") };
        let found = Journal::new(folder.path().into()).piece("a", unmade).unwrap();
        assert_eq!((&found.fields, found.arrays.len()), (&json!({"n": 3}), 3));
        assert_eq!(found.arrays[2].f64s().iter().map(|v| v.to_bits()).collect::<Vec<_>>(), exact.map(f64::to_bits));
        for (made, found) in made.arrays.iter().zip(&found.arrays) {
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&made.values), bits(&found.values));
            assert_eq!(bits(&found.place.as_ref().unwrap().read().unwrap()), bits(&found.values));
        }
        let path = folder.path().join("a");
        let whole = fs::read(&path).unwrap();
        for torn in [&whole[..5], &whole[..whole.len() - 1], &[]] {
            fs::write(&path, torn).unwrap();
            assert!(journal.get("a").unwrap().is_none());
        }
        journal.piece("a", make).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole);
        journal.remove("a");
        assert!(!journal.has("a") && Journal::default().piece("a", make).unwrap().arrays[0].place.is_none());
    }
}
