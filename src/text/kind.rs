//! What a text is: by the ending of its name, in any case of its letters; of a pipe, by its first bytes. A name that does not
//! fit its content is refused, for markup that is scored as prose gives a figure that means nothing.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::json::parse_as_null;
use crate::checkpoint::magic;
use crate::error::Failure;

/// What documents are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The whole is one document.
    Plain,
    /// An array of documents, or a document a line.
    Json,
    Parquet,
}

/// What a file is packed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Gzip,
    Zstd,
}

const ENDINGS: &str =
    "documents are read from `.jsonl`, `.ndjson`, `.json` and `.parquet`, packed as `.gz` or `.zst` or not";

/// Endings of texts that are no prose.
const READ: [&str; 3] = ["parquet", "gz", "zst"];

/// Lines of a text that must all be JSON objects for it to be taken for documents.
const N_LINES: usize = 10;

/// What the name of a file says.
///
/// # Errors
/// It ends as a table or an archive does that is not read.
pub(super) fn of_name(path: &Path) -> Result<(Packing, Kind), Failure> {
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let (name, packing) = if let Some(rest) = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".gzip")) {
        (rest, Packing::Gzip)
    } else if let Some(rest) = name.strip_suffix(".zst").or_else(|| name.strip_suffix(".zstd")) {
        (rest, Packing::Zstd)
    } else {
        (name.as_str(), Packing::None)
    };
    let kind = match name.rsplit_once('.').map_or("", |(_, ending)| ending) {
        "jsonl" | "ndjson" | "json" => Kind::Json,
        "parquet" => Kind::Parquet,
        ending @ ("csv" | "tsv" | "arrow" | "feather" | "orc" | "avro" | "xlsx" | "tar" | "tgz" | "zip" | "bz2"
        | "xz" | "7z" | "html" | "htm" | "xml" | "svg" | "yaml" | "yml" | "toml") => {
            let message = format!("`{}` ends in `.{ending}`, which is not read as a text", path.display());
            return Err(Failure::unsupported(message).hint(ENDINGS));
        }
        _ => Kind::Plain,
    };
    Ok((packing, kind))
}

/// What a pipe holds, by its first bytes.
pub(super) fn of_bytes(bytes: &[u8]) -> Packing {
    if bytes.starts_with(b"\x1f\x8b") {
        Packing::Gzip
    } else if bytes.starts_with(b"\x28\xb5\x2f\xfd") {
        Packing::Zstd
    } else {
        Packing::None
    }
}

/// The kind of what a pipe holds, when it is unpacked.
pub(super) fn of_content(bytes: &[u8]) -> Kind {
    if bytes.starts_with(b"PAR1") {
        Kind::Parquet
    } else if std::str::from_utf8(bytes).is_ok_and(is_json) {
        Kind::Json
    } else {
        Kind::Plain
    }
}

/// Refuses what has the first bytes of another format than its name says.
///
/// # Errors
/// It has.
pub(super) fn refuse_other(path: &Path, expected: &str, bytes: &[u8]) -> Result<(), Failure> {
    let Some(found) = magic::Kind::of(bytes) else { return Ok(()) };
    let message = format!("`{}` is not a {expected}, but {}", path.display(), found.what);
    Err(Failure::unsupported(message).hint(found.name_hint(&READ).unwrap_or_else(|| ENDINGS.into())))
}

/// Refuses what is no prose under the name of prose.
///
/// # Errors
/// The first bytes are those of a known format, or the lines are JSON.
pub(super) fn expect_prose(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    refuse_other(path, "text", bytes)?;
    if std::str::from_utf8(bytes).is_ok_and(is_json) {
        let message = format!("`{}` holds JSON, which would be scored with all its braces and quotes", path.display());
        return Err(
            Failure::unsupported(message).hint("give it a name that ends in `.jsonl` to have its documents read")
        );
    }
    Ok(())
}

/// Whether a text is documents: its first lines are all objects of JSON, or it is an array of objects or strings.
fn is_json(text: &str) -> bool {
    let text = text.trim_start_matches('\u{feff}').trim_start();
    match text.as_bytes().first() {
        Some(b'{') => {
            let mut lines = text.lines().filter(|line| !line.trim().is_empty()).take(N_LINES);
            let is_object =
                |line: &str| line.trim_start().starts_with('{') && parse_as_null::<Value>(line.as_bytes()).is_ok();
            lines.all(is_object)
        }
        Some(b'[') => parse_as_null::<Value>(text.as_bytes()).is_ok_and(|value| {
            value
                .as_array()
                .is_some_and(|values| !values.is_empty() && values.iter().all(|v| v.is_object() || v.is_string()))
        }),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_it_holds_in_any_case() {
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
        for name in ["a.csv", "a.TSV.gz", "a.tar.zst", "a.zip"] {
            assert!(of_name(Path::new(name)).is_err(), "{name}");
        }
    }

    #[test]
    fn prose_is_not_taken_for_data() {
        let check = |text: &[u8]| expect_prose(Path::new("x.txt"), text).map_err(|e| e.message);
        for prose in [
            "",
            "[1] Smith, J. A title.",
            "{ is a brace",
            "{\n  \"a\": 1\n}\n",
            "[\"a\", and so on]",
            "[]",
            "{\"a\": 1}\nis an object",
            "1\n2\n3",
            "The file begins with PAR1",
            "<poem>",
            "\"quoted\"",
        ] {
            check(prose.as_bytes()).unwrap();
        }
        for data in [
            &b"PAR1\0\0"[..],
            b"\x1f\x8b\x08",
            b"\x28\xb5\x2f\xfd",
            b"{\"text\": \"a\"}\n{\"text\": NaN}\n",
            b"\xef\xbb\xbf{\"text\": \"a\"}",
            b"[{\"text\": \"a\"},\n {\"text\": \"b\"}]",
            b"<!DOCTYPE html><html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        ] {
            assert!(check(data).is_err(), "{}", String::from_utf8_lossy(data));
        }
    }
}
