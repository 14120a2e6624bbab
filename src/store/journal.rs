//! Finished pieces of a long run, kept on disk, so that a run that was killed resumes after the last of them.
//!
//! Each piece is one file with a few values as JSON, and arrays. It appears whole or not at all (it is written under
//! another name and renamed), and a checksum detects one that a power cut truncated. The same job makes the same
//! pieces, so that a stored piece replaces a new one; the caller that opens a journal must make sure that the job is
//! the same.

use std::collections::BTreeMap;
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
    /// Pieces of the same job in other folders, by file name.
    others: BTreeMap<String, PathBuf>,
}

/// An array, in memory or in a journal.
#[derive(Debug, Clone)]
pub enum Array {
    /// In memory alone.
    New(Values),
    /// In memory, and in a journal, where it can be read again.
    Kept(Values, Place),
    /// In a journal alone.
    Unread(Place),
}

impl Array {
    /// # Errors
    /// The journal cannot be read.
    pub fn read(self) -> Result<Values> {
        match self {
            Self::New(values) | Self::Kept(values, _) => Ok(values),
            Self::Unread(place) => place.read(),
        }
    }
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
        Self::New(values.into())
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
        Self { folder: Some(folder), ..Self::default() }
    }

    /// The same journal with the finished pieces of `folders`, which are read and never changed: what is put or removed
    /// is in its own folder.
    ///
    /// # Errors
    /// A folder cannot be read.
    pub fn with_pieces_of(mut self, folders: &[PathBuf]) -> Result<Self> {
        for folder in folders {
            let context = || format!("reading `{}`", folder.display());
            for entry in fs::read_dir(folder).with_context(context)? {
                let entry = entry.with_context(context)?;
                self.others.insert(entry.file_name().to_string_lossy().into_owned(), entry.path());
            }
        }
        Ok(self)
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

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The path of a piece in its own folder.
    fn path(&self, key: &str) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join(self.name(key)))
    }

    /// The file of a finished piece, its own first.
    fn found(&self, key: &str) -> Option<PathBuf> {
        self.path(key).filter(|path| path.is_file()).or_else(|| self.others.get(&self.name(key)).cloned())
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
        self.found(key).is_some()
    }

    /// Whether the finished piece `key` is in a folder that this journal may not change.
    pub fn is_of_others(&self, key: &str) -> bool {
        self.found(key).is_some_and(|path| self.path(key) != Some(path))
    }

    /// # Errors
    /// The piece cannot be read, or one of another folder is damaged.
    pub fn get(&self, key: &str) -> Result<Option<Piece>> {
        let Some(path) = self.found(key) else { return Ok(None) };
        let bytes = fs::read(&path).with_context(|| format!("reading `{}`", path.display()))?;
        let piece = parse(&bytes, &path);
        if piece.is_none() && self.is_of_others(key) {
            return Err(damaged(&path));
        }
        if piece.is_none() {
            tracing::warn!("`{}` is damaged and will be recomputed", path.display());
        }
        Ok(piece)
    }

    /// Like [`Self::get`], but arrays of another folder are not read, so that no checksum of them is compared.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn unread(&self, key: &str) -> Result<Option<Piece>> {
        let Some(path) = self.found(key).filter(|_| self.is_of_others(key)) else { return self.get(key) };
        let context = || format!("reading `{}`", path.display());
        let mut file = File::open(&path).with_context(context)?;
        let len = file.metadata().with_context(context)?.len();
        let mut prefix = [0; PREFIX];
        let n_header = file.read_exact(&mut prefix).ok().and_then(|()| header_length(&prefix));
        let Some(n_header) = n_header.filter(|&n| (n as u64) < len) else { return Err(damaged(&path)) };
        let mut header = vec![0; n_header];
        file.read_exact(&mut header).with_context(context)?;
        let ends = |places: &[Place]| places.last().is_none_or(|last| last.offset + last.len as u64 == len);
        let found = described(&header, &path).filter(|(_, places)| ends(places));
        let (fields, places) = found.ok_or_else(|| damaged(&path))?;
        let arrays: Vec<Array> = places.into_iter().map(Array::Unread).collect();
        Ok(Some(Piece { fields, arrays: arrays.into_iter() }))
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
            Array::Kept(values, place)
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

/// The error for a piece that this journal may not replace.
fn damaged(path: &Path) -> anyhow::Error {
    let folder = path.parent().unwrap_or(path).display();
    anyhow::anyhow!(
        "`{}` is damaged: remove `{folder}`, and make it again with the command that made it",
        path.display()
    )
}

/// The length of the header, from what is in front of it.
fn header_length(prefix: &[u8; PREFIX]) -> Option<usize> {
    let (length, _) = prefix.split_first_chunk::<8>()?;
    usize::try_from(u64::from_le_bytes(*length)).ok()
}

/// The fields of a header, and the places of its arrays.
fn described(header: &[u8], path: &Path) -> Option<(Value, Vec<Place>)> {
    let mut offset = (PREFIX + header.len()) as u64;
    let mut header: Value = serde_json::from_slice(header).ok()?;
    let stored: Vec<(String, usize)> = serde_json::from_value(header.get_mut("arrays")?.take()).ok()?;
    let path = Arc::new(path.to_path_buf());
    let mut places = Vec::with_capacity(stored.len());
    for (type_name, len) in stored {
        let type_name = Values::decode(&type_name, &[])?.type_name();
        places.push(Place { path: Arc::clone(&path), offset, len, type_name });
        offset = offset.checked_add(len as u64)?;
    }
    Some((header.get_mut("fields")?.take(), places))
}

/// A piece from its file; `None` if it is truncated.
fn parse(bytes: &[u8], path: &Path) -> Option<Piece> {
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX>()?;
    let (_, checksum) = prefix.split_first_chunk::<8>()?;
    if crc32fast::hash(rest) != u32::from_le_bytes(checksum.try_into().ok()?) {
        return None;
    }
    let (fields, places) = described(rest.get(..header_length(prefix)?)?, path)?;
    let array = |place: Place| {
        let begin = usize::try_from(place.offset).ok()?;
        let values = Values::decode(place.type_name, bytes.get(begin..begin.checked_add(place.len)?)?)?;
        Some(Array::Kept(values, place))
    };
    let arrays: Vec<Array> = places.into_iter().map(array).collect::<Option<_>>()?;
    Some(Piece { fields, arrays: arrays.into_iter() })
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
            assert_eq!(piece.rest()[0].clone().read().unwrap(), vec![thread as f32; 4096].into());
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
        assert_eq!((found.len(), found[2].clone().read().unwrap().f64s().unwrap()), (3, exact.clone()));
        for (made, found) in made.into_iter().zip(found) {
            let Array::Kept(values, place) = found else { panic!("it is in the journal") };
            assert_eq!(made.read().unwrap(), values);
            assert_eq!(place.read().unwrap(), values);
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
        assert!(!journal.has("a") && matches!(Journal::default().piece("a", make).unwrap().rest()[0], Array::New(_)));
        assert!(journal.put("b", Value::Null, Vec::new()).unwrap().take().is_err());
    }

    #[test]
    fn pieces_of_other_folders_are_read_and_never_changed() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let values = |v: f32| vec![vec![v; 3].into(), vec![v; 2].into()];
        Journal::new(other.path().into()).put("a", json!(["x", "y"]), values(1.0)).unwrap();
        let file = other.path().join("a");
        let before = fs::read(&file).unwrap();
        let journal = Journal::new(own.path().into()).with_pieces_of(&[other.path().into()]).unwrap();
        let second = |piece: Option<Piece>| piece.unwrap().rest().remove(1).read().unwrap();
        assert_eq!(second(journal.get("a").unwrap()), vec![1.0f32; 2].into());
        let unread = journal.unread("a").unwrap().unwrap();
        assert_eq!(unread.fields, json!(["x", "y"]));
        let arrays = unread.rest();
        assert!(matches!(arrays[..], [Array::Unread(_), Array::Unread(_)]));
        assert_eq!(arrays[0].clone().read().unwrap(), vec![1.0f32; 3].into());
        // The own piece comes first, and only that is removed.
        journal.put("a", Value::Null, values(2.0)).unwrap();
        assert_eq!(second(journal.get("a").unwrap()), vec![2.0f32; 2].into());
        assert!(matches!(journal.unread("a").unwrap().unwrap().rest()[0], Array::Kept(..)));
        journal.remove("a");
        assert!(journal.has("a") && fs::read(&file).unwrap() == before);
        assert!(journal.unread("b").unwrap().is_none() && !journal.has("b"));
        for torn in [&before[..before.len() - 1], &before[..13], &before[..5]] {
            fs::write(&file, torn).unwrap();
            assert!(journal.get("a").is_err() && journal.unread("a").is_err(), "{}", torn.len());
        }
    }
}
