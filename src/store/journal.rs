//! Finished pieces of a long run, kept on disk, so that a run that was killed resumes after the last of them.
//!
//! Each piece is one file with a few values as JSON, and arrays. It appears whole or not at all (it is written under
//! another name and renamed), and a checksum detects one that a power cut truncated. The same job makes the same
//! pieces, so that a stored piece replaces a new one; the caller that opens a journal must make sure that the job is
//! the same.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::values::Values;
use crate::checkpoint::create_file;

/// The folder of the pieces; the default keeps none.
#[derive(Debug, Default)]
pub struct Journal {
    folder: Option<PathBuf>,
    /// What the names of its files begin with.
    prefix: &'static str,
}

/// An array, and its place in the journal if there is one.
#[derive(Debug, Clone)]
pub struct Array {
    /// The array itself, in memory.
    pub values: Values,
    /// The place where it can be read again; `None` if no journal has it.
    pub place: Option<Place>,
}

/// A place in a file of a journal, which does not change as long as the piece is kept.
#[derive(Debug, Clone)]
pub struct Place {
    path: Arc<PathBuf>,
    offset: u64,
    len: usize,
    type_name: &'static str,
}

/// A finished piece.
#[derive(Debug)]
pub struct Piece {
    /// The JSON that was stored with the arrays.
    pub fields: Value,
    arrays: std::vec::IntoIter<Array>,
}

impl Piece {
    /// Takes the next array.
    ///
    /// # Errors
    /// There is none left.
    pub fn take(&mut self) -> Result<Array> {
        self.arrays.next().context("a stored piece has too few arrays")
    }

    /// The arrays that are left.
    pub fn rest(self) -> Vec<Array> {
        self.arrays.collect()
    }
}

impl<V: Into<Values>> From<V> for Array {
    /// An array that no journal has.
    fn from(values: V) -> Self {
        Self { values: values.into(), place: None }
    }
}

impl Place {
    /// # Errors
    /// The file is gone or cannot be read.
    pub fn read(&self) -> Result<Values> {
        let context = || format!("reading `{}`", self.path.display());
        let mut file = File::open(&*self.path).with_context(context)?;
        file.seek(SeekFrom::Start(self.offset)).with_context(context)?;
        let mut bytes = vec![0; self.len];
        file.read_exact(&mut bytes).with_context(context)?;
        Values::decode(self.type_name, &bytes).context("invariant: what was written is decoded")
    }
}

/// Length of a header and checksum of what follows, in front of the header.
const PREFIX: usize = 12;

impl Journal {
    /// Keeps pieces in `folder`, which exists.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder: Some(folder), prefix: "" }
    }

    /// The journal of a part of the run, whose keys are apart from all others.
    #[must_use]
    pub fn within(self, prefix: &'static str) -> Self {
        Self { prefix, ..self }
    }

    /// Whether pieces are kept.
    pub fn keeps(&self) -> bool {
        self.folder.is_some()
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join(format!("{}{key}", self.prefix)))
    }

    /// The piece `key`, if an earlier run finished it; else the result of `make`, which is kept.
    ///
    /// # Errors
    /// The error of `make`, or the piece cannot be written.
    pub fn piece(&self, key: &str, make: impl FnOnce() -> Result<(Value, Vec<Values>)>) -> Result<Piece> {
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
    /// The piece cannot be read.
    pub fn get(&self, key: &str) -> Result<Option<Piece>> {
        let Some(path) = self.path(key).filter(|path| path.is_file()) else { return Ok(None) };
        let bytes = fs::read(&path).with_context(|| format!("reading `{}`", path.display()))?;
        let piece = parse(&bytes, &path);
        if piece.is_none() {
            tracing::warn!("`{}` is damaged and will be recomputed", path.display());
        }
        Ok(piece)
    }

    /// Keeps a piece.
    ///
    /// # Errors
    /// The disk is full or cannot be written.
    pub fn put(&self, key: &str, fields: Value, arrays: Vec<Values>) -> Result<Piece> {
        let Some(path) = self.path(key) else {
            let arrays: Vec<Array> = arrays.into_iter().map(Array::from).collect();
            return Ok(Piece { fields, arrays: arrays.into_iter() });
        };
        let stored: Vec<(&str, usize)> = arrays.iter().map(|values| (values.type_name(), values.n_bytes())).collect();
        let header = json!({"fields": fields, "arrays": stored}).to_string();
        write(&path, &header, &arrays).with_context(|| format!("writing `{}`", path.display()))?;
        let shared = Arc::new(path);
        let mut offset = (PREFIX + header.len()) as u64;
        let place = |values: Values| {
            let len = values.n_bytes();
            let place = Place { path: Arc::clone(&shared), offset, len, type_name: values.type_name() };
            offset += len as u64;
            Array { values, place: Some(place) }
        };
        let arrays: Vec<Array> = arrays.into_iter().map(place).collect();
        Ok(Piece { fields, arrays: arrays.into_iter() })
    }

    /// Removes a piece that no later step needs.
    pub fn remove(&self, key: &str) {
        if let Some(path) = self.path(key) {
            // If it cannot be removed now, it is removed with the folder.
            let _ = fs::remove_file(path);
        }
    }
}

/// Writes a piece under another name, and renames it.
fn write(path: &Path, header: &str, arrays: &[Values]) -> std::io::Result<()> {
    // Names have dots, and what follows the last one tells them apart.
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let mut file = BufWriter::with_capacity(1 << 20, create_file(&partial)?);
    let mut checksum = crc32fast::Hasher::new();
    file.write_all(&[0; PREFIX])?;
    checksum.update(header.as_bytes());
    file.write_all(header.as_bytes())?;
    for values in arrays {
        values.for_each_run(|run| {
            checksum.update(run);
            file.write_all(run)
        })?;
    }
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&checksum.finalize().to_le_bytes())?;
    file.into_inner()?;
    fs::rename(&partial, path)
}

/// A piece from its file; `None` if it is truncated.
fn parse(bytes: &[u8], path: &Path) -> Option<Piece> {
    let (length, rest) = bytes.split_at_checked(8)?;
    let (checksum, rest) = rest.split_at_checked(4)?;
    if crc32fast::hash(rest) != u32::from_le_bytes(checksum.try_into().ok()?) {
        return None;
    }
    let n_header = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
    let (header, mut values) = rest.split_at_checked(n_header)?;
    let mut header: Value = serde_json::from_slice(header).ok()?;
    let stored: Vec<(String, usize)> = serde_json::from_value(header.get_mut("arrays")?.take()).ok()?;
    let path = Arc::new(path.to_path_buf());
    let mut arrays = Vec::new();
    let mut offset = (PREFIX + n_header) as u64;
    for (type_name, len) in stored {
        let (own, others) = values.split_at_checked(len)?;
        values = others;
        let own = Values::decode(&type_name, own)?;
        let place = Place { path: Arc::clone(&path), offset, len, type_name: own.type_name() };
        arrays.push(Array { values: own, place: Some(place) });
        offset += len as u64;
    }
    Some(Piece { fields: header.get_mut("fields")?.take(), arrays: arrays.into_iter() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_whose_names_differ_after_a_dot_are_written_at_the_same_time() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::new(folder.path().into());
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let journal = &journal;
                scope.spawn(move || {
                    for i in 0..32 {
                        let values = vec![vec![thread as f32; 4096].into()];
                        journal.put(&format!("experts.{thread}-{i}"), json!(null), values).unwrap();
                    }
                });
            }
        });
        for (thread, i) in (0..8).flat_map(|thread| (0..32).map(move |i| (thread, i))) {
            let piece = journal.get(&format!("experts.{thread}-{i}")).unwrap().unwrap();
            assert_eq!(piece.rest()[0].values, vec![thread as f32; 4096].into());
        }
    }

    #[test]
    fn pieces_come_back_and_torn_ones_are_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::new(folder.path().into());
        let exact = vec![f64::MIN_POSITIVE, -0.1, 1e300];
        let make =
            || Ok((json!({"n": 3}), vec![vec![1.5f32, -0.0].into(), Vec::<u8>::new().into(), exact.clone().into()]));
        let made = journal.piece("a", make).unwrap();
        let unmade = || -> Result<(Value, Vec<Values>)> { panic!("it is there") };
        let found = Journal::new(folder.path().into()).piece("a", unmade).unwrap();
        assert_eq!(found.fields, json!({"n": 3}));
        let (made, found) = (made.rest(), found.rest());
        assert_eq!((found.len(), found[2].values.clone().f64s().unwrap()), (3, exact.clone()));
        for (made, found) in made.iter().zip(&found) {
            assert_eq!(made.values, found.values);
            assert_eq!(found.place.as_ref().unwrap().read().unwrap(), found.values);
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
        assert!(!journal.has("a") && Journal::default().piece("a", make).unwrap().rest()[0].place.is_none());
        assert!(journal.put("b", Value::Null, Vec::new()).unwrap().take().is_err());
    }
}
