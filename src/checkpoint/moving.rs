//! The last step of an output whose folder has to stay: finished files are moved up into it, and files of an earlier
//! output out of it. `moving.json` lists the files, so that the next run can undo an interrupted move.

use std::cmp::Reverse;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::{CheckpointError, io};
use super::paths::CONFIG_FILE;
use super::place::{self, Existing, create_file};
use super::work::{MOVING, OUTPUT, REPLACED, TORN};

type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// Moves finished files into the target, and the files that they replace out of it.
pub(super) fn move_up(target: &Path, partial: &Path, mark: &str, existing: Existing) -> Result<()> {
    if existing == Existing::Refuse && !place::is_vacant(target) {
        // Somebody wrote into it meanwhile.
        return Err(place::foreign(target));
    }
    let moves = moves(target, partial, mark)?;
    let output = partial.join(OUTPUT);
    let move_all = || -> Result<()> {
        moves.iter().try_for_each(|(from, to)| rename(from, to))?;
        fs::remove_dir(&output).map_err(io("remove", &output))
    };
    move_all().inspect_err(|_| {
        let _ = undo(target, partial);
    })
}

/// The files to move, as (from, to), also listed in a file for [`undo`]. A folder looks complete only with its mark and
/// its config: an earlier output loses them first, the new one gets them last.
fn moves(target: &Path, partial: &Path, mark: &str) -> Result<Vec<(PathBuf, PathBuf)>> {
    let (output, replaced) = (partial.join(OUTPUT), partial.join(REPLACED));
    let comes_last = |name: &OsStr| (name == mark, name == CONFIG_FILE);
    let mut new = place::names_in(&output)?;
    new.sort_by_key(|name| comes_last(name));
    let mut old = place::output_names(target)?;
    old.sort_by_key(|name| Reverse(comes_last(name)));
    fs::create_dir_all(&replaced).map_err(io("create", &replaced))?;
    let names: Vec<String> = new.iter().map(|name| name.to_string_lossy().into_owned()).collect();
    write_whole(&partial.join(MOVING), Value::from(names).to_string().as_bytes())?;
    let out = old.iter().map(|name| (target.join(name), replaced.join(name)));
    Ok(out.chain(new.iter().map(|name| (output.join(name), target.join(name)))).collect())
}

/// Whether a run was killed while it moved files into its target.
pub(super) fn is_midway(partial: &Path) -> bool {
    partial.join(MOVING).is_file() && partial.join(OUTPUT).is_dir()
}

/// Undoes [`move_up`], complete or not.
pub(super) fn undo(target: &Path, partial: &Path) -> Result<()> {
    let (moving, output, replaced) = (partial.join(MOVING), partial.join(OUTPUT), partial.join(REPLACED));
    place::refuse_links(partial)?;
    let bytes = fs::read(&moving).map_err(io("read", &moving))?;
    let names: Vec<String> = serde_json::from_slice(&bytes).unwrap_or_default();
    fs::create_dir_all(&output).map_err(io("create", &output))?;
    // A file that was not moved yet belongs to the earlier output.
    let is_name = |name: &&String| Path::new(name).file_name().is_some_and(|own| own == name.as_str());
    for name in names.iter().filter(is_name) {
        if target.join(name).exists() && !output.join(name).exists() {
            rename(&target.join(name), &output.join(name))?;
        }
    }
    if replaced.is_dir() {
        for name in place::names_in(&replaced)? {
            rename(&replaced.join(&name), &target.join(&name))?;
        }
    }
    fs::remove_file(&moving).map_err(io("remove", &moving))
}

/// Renames, with an error that names the file.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(io("rename", from))
}

/// Writes a small file of the work folder, whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let torn = path.with_extension(&TORN[1..]);
    let mut file = create_file(&torn).map_err(io("create", &torn))?;
    file.write_all(bytes).map_err(io("write", &torn))?;
    file.sync_all().map_err(io("sync", &torn))?;
    rename(&torn, path)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
        let names = place::output_names(folder).unwrap();
        names.iter().map(|name| (name.to_str().unwrap().into(), fs::read(folder.join(name)).unwrap())).collect()
    }

    #[test]
    fn a_last_step_that_is_cut_short_is_undone_wherever_it_was() {
        for has_earlier in [false, true] {
            for done in 0.. {
                let folder = tempfile::tempdir().unwrap();
                let (target, partial) = (folder.path(), folder.path().join(place::WITHIN));
                let output = partial.join(OUTPUT);
                fs::create_dir_all(&output).unwrap();
                for name in ["weights", CONFIG_FILE, "mark", "z"] {
                    fs::write(output.join(name), "new").unwrap();
                }
                for name in ["weights", "mark", "gone"].iter().filter(|_| has_earlier) {
                    fs::write(target.join(name), "old").unwrap();
                }
                let before = (content(target), content(&output));
                let moves = moves(target, &partial, "mark").unwrap();
                for (from, to) in &moves[..done] {
                    rename(from, to).unwrap();
                    let is_whole = target.join("mark").exists();
                    let found = content(target);
                    let is_of_one =
                        |age: &str, n: usize| found.len() == n && found.values().all(|is| is == age.as_bytes());
                    assert!(!is_whole || is_of_one("new", 4) || is_of_one("old", 3), "{found:?}");
                }
                assert!(is_midway(&partial));
                undo(target, &partial).unwrap();
                assert_eq!((content(target), content(&output)), before);
                assert!(!is_midway(&partial));
                if done == moves.len() {
                    break;
                }
            }
        }
    }
}
