//! The kind of a text: from the ending of its name, in upper or lower case; for a pipe, from its first bytes. A name
//! that contradicts the first bytes is an error.

use std::path::Path;

use super::shape::{self, ENDINGS};
use crate::checkpoint::magic;
use crate::error::Failure;

/// The format of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One document.
    Plain,
    /// An array of documents, or one document per line.
    Json,
    Parquet,
}

/// The compression of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Gzip,
    Zstd,
}

impl Packing {
    /// The packing in the ending of a name, and the name without it.
    fn of_name(name: &str) -> (Self, &str) {
        let endings = [(".gz", Self::Gzip), (".gzip", Self::Gzip), (".zst", Self::Zstd), (".zstd", Self::Zstd)];
        let found = endings.iter().find_map(|(ending, packing)| Some((*packing, name.strip_suffix(ending)?)));
        found.unwrap_or((Self::None, name))
    }

    fn ending(self) -> &'static str {
        match self {
            Self::None => "txt",
            Self::Gzip => "gz",
            Self::Zstd => "zst",
        }
    }
}

/// Endings of supported files other than prose.
const READ: [&str; 3] = ["parquet", "gz", "zst"];

impl Packing {
    /// Checks that a file is compressed as its name says.
    ///
    /// # Errors
    /// It is not.
    pub fn expect(self, path: &Path, bytes: &[u8]) -> Result<(), Failure> {
        if self == Self::None { Ok(()) } else { expect(path, bytes, self.ending()) }
    }
}

impl Kind {
    /// Checks that a decompressed file has the format in its name.
    ///
    /// # Errors
    /// It does not.
    pub fn expect(self, path: &Path, bytes: &[u8]) -> Result<(), Failure> {
        expect(path, bytes, if self == Self::Parquet { "parquet" } else { "txt" })
    }
}

/// Checks that the first bytes begin a file with the ending `expected`.
fn expect(path: &Path, bytes: &[u8], expected: &str) -> Result<(), Failure> {
    let Some(found) = magic::Kind::of(bytes).filter(|found| found.ending != expected) else { return Ok(()) };
    let is_packed = |name: Result<(Packing, Kind), Failure>| name.is_ok_and(|(packing, _)| packing != Packing::None);
    let hint = match found.ending {
        // A Git LFS pointer.
        "" => found.hint(&READ),
        "gz" | "zst" if is_packed(of_name(path)) => "decompress it until it is compressed once".into(),
        _ => found.name_hint(&READ).unwrap_or_else(|| ENDINGS.into()),
    };
    Err(Failure::unsupported(format!("`{}` is not a text: it is {}", path.display(), found.what)).hint(hint))
}

/// The packing and kind in the name of a file.
///
/// # Errors
/// It is the name of a table or archive that is not supported.
pub(super) fn of_name(path: &Path) -> Result<(Packing, Kind), Failure> {
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let (packing, name) = Packing::of_name(&name);
    if Packing::of_name(name).0 != Packing::None {
        let message = format!("`{}` is compressed more than once, by its name", path.display());
        return Err(Failure::unsupported(message).hint("decompress it until it is compressed once"));
    }
    let kind = match name.rsplit_once('.').map_or("", |(_, ending)| ending) {
        "jsonl" | "ndjson" | "json" => Kind::Json,
        "parquet" => Kind::Parquet,
        ending @ ("csv" | "tsv" | "arrow" | "feather" | "orc" | "avro" | "xlsx" | "tar" | "tgz" | "zip" | "bz2"
        | "xz" | "7z" | "html" | "htm" | "xml" | "svg" | "yaml" | "yml" | "toml") => {
            let message = format!("`{}` ends in `.{ending}`, which is not a supported kind of text", path.display());
            return Err(Failure::unsupported(message).hint(ENDINGS));
        }
        _ => Kind::Plain,
    };
    Ok((packing, kind))
}

/// The compression of a pipe, from its first bytes.
pub(super) fn of_bytes(bytes: &[u8]) -> Packing {
    match magic::Kind::of(bytes).map(|found| found.ending) {
        Some("gz") => Packing::Gzip,
        Some("zst") => Packing::Zstd,
        _ => Packing::None,
    }
}

/// The kind of the decompressed content of a pipe.
pub(super) fn of_content(bytes: &[u8]) -> Kind {
    if magic::Kind::of(bytes).is_some_and(|found| found.ending == "parquet") {
        Kind::Parquet
    } else if std::str::from_utf8(bytes).is_ok_and(shape::is_documents) {
        Kind::Json
    } else {
        Kind::Plain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_upper_and_lower_case() {
        for (name, expected) in [
            ("a.txt", (Packing::None, Kind::Plain)),
            ("wiki.test.raw", (Packing::None, Kind::Plain)),
            ("a.JSONL", (Packing::None, Kind::Json)),
            ("a.ndjson", (Packing::None, Kind::Json)),
            ("a.Json.GZ", (Packing::Gzip, Kind::Json)),
            ("a.parquet.zst", (Packing::Zstd, Kind::Parquet)),
            ("a.txt.gz", (Packing::Gzip, Kind::Plain)),
            ("json", (Packing::None, Kind::Plain)),
        ] {
            assert_eq!(of_name(Path::new(name)).unwrap(), expected, "{name}");
        }
        for name in ["a.csv", "a.TSV.gz", "a.tar.zst", "a.zip", "a.jsonl.gz.gz", "a.gz.zst", "a.txt.ZST.gz"] {
            assert!(of_name(Path::new(name)).is_err(), "{name}");
        }
    }

    #[test]
    fn first_bytes_that_contradict_the_name_are_errors() {
        let gzip = &b"\x1f\x8b\x08"[..];
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0";
        for (name, bytes, expected, hint) in [
            ("x.txt", &b"PAR1\0\0"[..], "a Parquet file", "`.parquet`"),
            ("x.jsonl", b"PAR1\0\0", "a Parquet file", "`.parquet`"),
            ("x.txt", gzip, "packed with gzip", "`.gz`"),
            ("x.jsonl", gzip, "packed with gzip", "`.gz`"),
            ("x.parquet", gzip, "packed with gzip", "`.gz`"),
            ("x.jsonl.gz", gzip, "packed with gzip", "compressed once"),
            ("x.txt", b"\x28\xb5\x2f\xfd", "packed with zstd", "`.zst`"),
            ("x.txt", pointer, "a Git LFS pointer", "git lfs pull"),
            ("x.jsonl", pointer, "a Git LFS pointer", "git lfs pull"),
            ("x.parquet", pointer, "a Git LFS pointer", "git lfs pull"),
            ("x.txt", b"%PDF-1.7", "a PDF document", "`.jsonl`"),
            ("x.txt", b"\xef\xbb\xbf<!DOCTYPE html><html>", "a web page", "`.jsonl`"),
        ] {
            let (_, kind) = of_name(Path::new(name)).unwrap();
            let error = kind.expect(Path::new(name), bytes).unwrap_err();
            assert!(error.message.contains(expected), "{name}: {}", error.message);
            assert!(error.hint.unwrap().contains(hint), "{name}: {hint}");
        }
        let packed = |bytes| Packing::Gzip.expect(Path::new("x.jsonl.gz"), bytes);
        packed(gzip).unwrap();
        packed(b"{\"text\": 1}").unwrap();
        assert!(packed(pointer).is_err() && packed(b"\x28\xb5\x2f\xfd").is_err());
        Kind::Parquet.expect(Path::new("x.parquet"), b"PAR1").unwrap();
        Kind::Plain.expect(Path::new("x.txt"), b"The file begins with PAR1").unwrap();
    }
}
