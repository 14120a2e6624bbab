//! Checks strings of users and of possibly hostile servers, before they become part of a path or a URL.

/// Longest name that is taken from a server, in bytes.
const LONGEST: usize = 255;

/// `org/name` in the characters that the hub allows.
pub(super) fn is_hub_id(model: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    model.split_once('/').is_some_and(|(org, name)| is_part(org) && is_part(name))
}

/// A branch, a tag, a commit or `refs/pr/1`: the cache has a file of this name.
pub(super) fn is_revision(revision: &str) -> bool {
    let is_part = |part: &str| !part.is_empty() && part != ".";
    revision.len() <= LONGEST
        && !revision.contains("..")
        && revision.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))
        && revision.split('/').all(is_part)
}

/// The full hash of a commit: the cache has a folder of this name.
#[cfg(any(feature = "hub", test))]
pub(super) fn is_commit(commit: &str) -> bool {
    commit.len() == 40 && is_hex(commit)
}

/// An ETag without its quotes: a git hash, a sha256, or the hash that S3 computes for a multipart upload. The cache
/// has a file of this name.
#[cfg(any(feature = "hub", test))]
pub(super) fn is_etag(etag: &str) -> bool {
    etag.len() <= LONGEST && etag.split('-').all(|part| !part.is_empty() && is_hex(part))
}

#[cfg(any(feature = "hub", test))]
pub(super) fn is_sha256(hash: &str) -> bool {
    hash.len() == 64 && is_hex(hash)
}

/// A file of a repository, in folders or not: the cache has a link of this name in a snapshot.
#[cfg(any(feature = "hub", test))]
pub(super) fn is_file(name: &str) -> bool {
    use std::path::{Component, Path};

    let is_part = |part: &str| !part.is_empty() && part.len() <= LONGEST && part != "." && part != "..";
    name.split('/').all(is_part)
        && !name.contains(|c: char| c == '\\' || c.is_control() || (cfg!(windows) && c == ':'))
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(any(feature = "hub", test))]
fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A received string, shortened and escaped for a one-line error.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 100;
    let mut shown: String = text.chars().take(MOST).flat_map(char::escape_debug).collect();
    if text.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(is_legal: fn(&str) -> bool, legal: &[&str], others: &[&str]) {
        for text in legal {
            assert!(is_legal(text), "{text}");
        }
        for text in others {
            assert!(!is_legal(text), "{text}");
        }
    }

    const HOSTILE: &[&str] =
        &["", ".", "..", "/tmp/x", "../x", "a/../../x", "a//b", "a/", "\\\\host\\x", "..\\x", "a\nb", "a\0"];

    #[test]
    fn hub_ids_are_told_from_paths() {
        check(is_hub_id, &["org/name", "HuggingFaceTB/SmolLM2-135M"], &["name", "./org/name", "a/b/c", "org/"]);
        check(is_hub_id, &[], HOSTILE);
    }

    #[test]
    fn revisions_stay_in_their_folder() {
        check(is_revision, &["main", "v1.0", "refs/pr/5", "feature/x-y_z"], &["a..b", "~/x", "a b", "main?x", "é"]);
        check(is_revision, &[], HOSTILE);
    }

    #[test]
    fn names_of_a_server_stay_in_their_folder() {
        let (sha1, sha256) = ("0123456789abcdef0123456789abcdef01234567", "0".repeat(64));
        check(is_commit, &[sha1], &["main", &sha1.to_uppercase(), &sha256]);
        check(
            is_etag,
            &[sha1, &sha256, "d41d8cd98f00b204e9800998ecf8427e-12"],
            &["x", "-", "a.incomplete", &"a".repeat(300)],
        );
        check(is_file, &["config.json", "1_Pooling/config.json", ".gitattributes", "a b…c..d.txt"], &[]);
        for is_legal in [is_commit, is_etag, is_file] {
            check(is_legal, &[], HOSTILE);
        }
        assert!(is_sha256(&sha256) && !is_sha256(sha1));
    }
}
