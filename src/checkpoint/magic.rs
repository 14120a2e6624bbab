//! Kinds of files by their first bytes, whatever their names: the one table for weights and for texts.

/// A kind of file.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// A noun phrase for messages: `a web page`.
    pub what: &'static str,
    /// The extension of such files, without its dot; empty for pointers and texts.
    pub ending: &'static str,
    /// The hint if such a file was given as weights.
    mend: &'static str,
}

const DOWNLOAD: &str =
    "the site answered with a page (a login, or an error) that was saved under this name; download the file itself";
const TEXT_GIVEN: &str =
    "the site answered with a page (a login, or an error) that was saved under this name, or another file was meant";
const TORCH: &str =
    "get the safetensors of the model, or convert it: transformers' `save_pretrained` writes `model.safetensors`";
const UNPACK: &str = "unpack it first";
const ELSEWHERE: &str = "get the file again from its source";

/// Extensions of files that weights are read from.
pub const WEIGHTS: [&str; 2] = ["safetensors", "gguf"];

const fn kind(what: &'static str, ending: &'static str, mend: &'static str) -> Kind {
    Kind { what, ending, mend }
}

/// The first bytes of the pointer that Git LFS leaves in place of a file that was not fetched.
pub(super) const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

static MAGIC: [(&[u8], Kind); 29] = [
    (b"PAR1", kind("a Parquet file", "parquet", ELSEWHERE)),
    (b"\x1f\x8b", kind("packed with gzip", "gz", UNPACK)),
    (b"\x28\xb5\x2f\xfd", kind("packed with zstd", "zst", UNPACK)),
    (b"BZh", kind("packed with bzip2", "bz2", UNPACK)),
    (b"\xfd7zXZ\0", kind("packed with xz", "xz", UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", kind("a 7z archive", "7z", UNPACK)),
    (
        b"PK\x03\x04",
        kind(
            "a zip archive",
            "zip",
            "PyTorch's files are such archives: if it is one, give it a name that ends in `.bin`",
        ),
    ),
    (b"\x80\x02", kind("a pickle of Python", "bin", TORCH)),
    (b"\x80\x03", kind("a pickle of Python", "bin", TORCH)),
    (b"\x80\x04", kind("a pickle of Python", "bin", TORCH)),
    (b"\x80\x05", kind("a pickle of Python", "bin", TORCH)),
    (b"\x89HDF\r\n\x1a\n", kind("an HDF5 file", "h5", TORCH)),
    (b"\x93NUMPY", kind("a NumPy array", "npy", ELSEWHERE)),
    (b"GGUF\x01\0\0\0", kind("a GGUF file", "gguf", ELSEWHERE)),
    (b"GGUF\x02\0\0\0", kind("a GGUF file", "gguf", ELSEWHERE)),
    (b"GGUF\x03\0\0\0", kind("a GGUF file", "gguf", ELSEWHERE)),
    (b"lmgg", kind("a GGML file", "ggml", ELSEWHERE)),
    (b"ARROW1", kind("an Arrow file", "arrow", ELSEWHERE)),
    (b"SQLite format 3\0", kind("a database", "sqlite", ELSEWHERE)),
    (b"%PDF-", kind("a PDF document", "pdf", ELSEWHERE)),
    (b"{\\rtf", kind("an RTF document", "rtf", ELSEWHERE)),
    (b"\x7fELF", kind("a program", "so", ELSEWHERE)),
    (LFS_POINTER, kind("a Git LFS pointer to a file that was not downloaded", "", "run `git lfs pull`")),
    (b"<!doctype html", kind("a web page", "html", DOWNLOAD)),
    (b"<html", kind("a web page", "html", DOWNLOAD)),
    (b"<?xml", kind("markup", "xml", DOWNLOAD)),
    (b"<!--", kind("markup", "html", DOWNLOAD)),
    (b"<svg", kind("markup", "svg", DOWNLOAD)),
    (b"<rss", kind("markup", "rss", DOWNLOAD)),
];

pub(super) static SAFETENSORS: Kind = kind("a safetensors file", "safetensors", ELSEWHERE);
static ZEROS: Kind = kind("a file of zeros", "", "the download was interrupted; get the file again from its source");
static TEXT: Kind = kind("a text", "", TEXT_GIVEN);

/// Bytes that are examined.
const START: usize = 64;

impl Kind {
    /// The kind of a file with a magic number; `None` for texts and for kinds that are not in the table.
    pub fn of(bytes: &[u8]) -> Option<&'static Self> {
        let start = &bytes[..bytes.len().min(START)];
        let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
        let is_of = |magic: &[u8]| match magic.first() {
            // Markup, in any letter case and after blanks.
            Some(b'<') => text.get(..magic.len()).is_some_and(|text| text.eq_ignore_ascii_case(magic)),
            _ => start.starts_with(magic),
        };
        let found = MAGIC.iter().find(|(magic, _)| is_of(magic));
        if let Some((_, kind)) = found {
            return Some(kind);
        }
        let header = start.first_chunk().map(|&length| u64::from_le_bytes(length));
        let is_safetensors = header.is_some_and(|n| n > 1 && n < bytes.len() as u64) && start.get(8) == Some(&b'{');
        is_safetensors.then_some(&SAFETENSORS)
    }

    /// The kind of a file that should hold weights but does not: this includes texts, and files of zeros.
    pub fn of_no_weights(bytes: &[u8]) -> Option<&'static Self> {
        let start = &bytes[..bytes.len().min(START)];
        let is_text = |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~') || !byte.is_ascii();
        let other = || match start {
            [] => None,
            start if start.len() == START && start.iter().all(|&byte| byte == 0) => Some(&ZEROS),
            // The sample may end within a character.
            start if start.iter().all(is_text) => match std::str::from_utf8(start) {
                Err(error) if error.error_len().is_some() => None,
                _ => Some(&TEXT),
            },
            _ => None,
        };
        Self::of(bytes).or_else(other)
    }

    /// The hint if files with these extensions were expected.
    pub fn hint(&self, endings: &[&str]) -> String {
        if endings.contains(&self.ending) { self.renamed() } else { self.mend.into() }
    }

    /// The hint to give it the right extension, if that is one of `endings`.
    pub fn name_hint(&self, endings: &[&str]) -> Option<String> {
        endings.contains(&self.ending).then(|| self.renamed())
    }

    fn renamed(&self) -> String {
        format!("give it a name that ends in `.{}`", self.ending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_first_bytes() {
        for (bytes, expected) in [
            (&b"\n <!DOCTYPE html><html>"[..], "a web page"),
            (b"\xef\xbb\xbf<HTML>", "a web page"),
            (b"PK\x03\x04\x14\0", "a zip archive"),
            (b"\x80\x02\x8a\x0al\xfc", "a pickle of Python"),
            (b"GGUF\x03\0\0\0", "a GGUF file"),
            (b"PAR1\x15\0", "a Parquet file"),
            (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer to a file that was not downloaded"),
            (b"\x02\0\0\0\0\0\0\0{}", "a safetensors file"),
            (&[0; 99], "a file of zeros"),
            (b"Entry not found", "a text"),
            (b"{\"error\": \"gated\"}", "a text"),
            ("Zugriff verweigert: für dieses Modell ist eine Anmeldung nötig, s. Lizenz …".as_bytes(), "a text"),
        ] {
            let found = Kind::of_no_weights(bytes).map(|kind| kind.what);
            assert_eq!(found, Some(expected), "{}", String::from_utf8_lossy(bytes));
        }
        for bytes in [&b""[..], &[1, 2, 3], &[0; 9], &[255; 80], b"\x10\0\0\0\0\0\0\0{\"a\":"] {
            assert_eq!(Kind::of_no_weights(bytes), None, "{bytes:?}");
        }
        for prose in ["The file begins with PAR1", "GGUF is a format", "bzh", "<poem>"] {
            assert_eq!(Kind::of(prose.as_bytes()), None, "{prose}");
        }
        let hint = |bytes: &[u8], endings: &[&str]| Kind::of(bytes).unwrap().hint(endings);
        assert_eq!(hint(b"GGUF\x03\0\0\0", &WEIGHTS), "give it a name that ends in `.gguf`");
        assert_eq!(hint(b"GGUF\x03\0\0\0", &["parquet"]), ELSEWHERE);
    }
}
