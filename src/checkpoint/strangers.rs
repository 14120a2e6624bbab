//! Files that lrc did not write, in folders that it would replace or work in: they are never removed.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::error::{OutputError, Result, io};
use super::place;
use super::reader::read_file;
use super::work::{JOB, LOCK, MOVING, OUTPUT, PIECES, REPLACED, SCRATCH, TORN};

/// Refuses to replace an earlier output with files that its run did not write.
///
/// # Errors
/// [`OutputError::Strangers`], with the first of them.
pub(super) fn refuse_in_output(output: &Path, mark: &str) -> Result<()> {
    let mut strangers = in_output(output, mark)?.into_iter();
    match strangers.next() {
        None => Ok(()),
        Some(first) => Err(OutputError::Strangers { path: output.into(), first, others: strangers.count() }.into()),
    }
}

/// The files of an output that its report does not list. A folder that holds only such files is named once;
/// empty folders do not count.
fn in_output(output: &Path, mark: &str) -> Result<Vec<String>> {
    let report: Option<Value> =
        read_file(&output.join(mark)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let listed = report.as_ref().and_then(|report| report.get("output_files")?.as_object());
    let listed = listed.into_iter().flat_map(|files| files.keys().cloned());
    // The report of a sweep lists no files; its page has the same name.
    let page = Path::new(mark).with_extension("html").to_string_lossy().into_owned();
    let own: BTreeSet<String> = listed.chain([mark.to_string(), page]).collect();
    let mut strangers = Vec::new();
    for name in place::output_names(output)? {
        walk(output, Path::new(&name), &own, &mut strangers)?;
    }
    Ok(strangers)
}

fn walk(output: &Path, at: &Path, own: &BTreeSet<String>, strangers: &mut Vec<String>) -> Result<()> {
    let (path, name) = (output.join(at), at.to_string_lossy().into_owned());
    if !fs::symlink_metadata(&path).map_err(io("look at", &path))?.is_dir() {
        strangers.extend((!own.contains(&name)).then_some(name));
        return Ok(());
    }
    let mut within = Vec::new();
    for inner in place::names_in(&path)? {
        walk(output, &at.join(inner), own, &mut within)?;
    }
    let holds_own = own.iter().any(|file| Path::new(file).starts_with(at));
    if holds_own {
        strangers.append(&mut within)
    } else {
        strangers.extend((!within.is_empty()).then(|| name + "/"))
    }
    Ok(())
}

/// Refuses a work folder that holds files no run leaves in one.
///
/// # Errors
/// [`OutputError::Unusable`].
pub(super) fn refuse_in_work(target: &Path, partial: &Path) -> Result<()> {
    const OWN: [&str; 7] = [LOCK, JOB, PIECES, OUTPUT, SCRATCH, MOVING, REPLACED];
    let is_own = |name: &OsString| {
        let name = name.to_string_lossy();
        // A file under construction, or one that a network file system keeps until it is closed.
        let is_torn = name.strip_suffix(TORN).is_some_and(|stem| OWN.contains(&format!("{stem}.json").as_str()));
        OWN.contains(&name.as_ref()) || is_torn || name.starts_with(".nfs")
    };
    let is_strange = match fs::symlink_metadata(partial) {
        Err(_) => false,
        Ok(found) if !found.is_dir() => true,
        Ok(_) => !place::names_in(partial)?.iter().all(is_own),
    };
    if is_strange {
        let reason = format!("`{}` is where its run would work, and holds what lrc did not write", partial.display());
        return Err(place::unusable(target, reason));
    }
    Ok(())
}

/// Refuses a path that is neither an earlier output nor the remains of one.
///
/// # Errors
/// [`OutputError::Unusable`].
pub(super) fn refuse_in_replaced(target: &Path, replaced: &Path, mark: &str) -> Result<()> {
    let is_own = match fs::symlink_metadata(replaced) {
        Err(_) => true,
        Ok(found) => found.is_dir() && (place::is_vacant(replaced) || in_output(replaced, mark)?.is_empty()),
    };
    if is_own {
        return Ok(());
    }
    let place = replaced.display();
    let reason = format!("`{place}` is where the earlier output would wait, and holds what lrc did not write");
    Err(place::unusable(target, reason))
}

/// Removes an earlier output. Its report goes last, because it identifies the rest.
pub(super) fn remove_output(output: &Path, mark: &str) -> Result<()> {
    let remove = |path: &Path| {
        let is_folder = fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
        let removed = if is_folder { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.map_err(io("remove", path))
    };
    for name in place::names_in(output)?.iter().filter(|name| *name != mark) {
        remove(&output.join(name))?;
    }
    if output.join(mark).exists() {
        remove(&output.join(mark))?;
    }
    fs::remove_dir(output).map_err(io("remove", output))
}

#[cfg(test)]
mod tests {
    use super::super::work::replaced_of;
    use super::*;

    const MARK: &str = "report.json";

    fn put(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn what_a_report_does_not_list_is_named_and_a_folder_of_it_once() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path();
        put(output, MARK, r#"{"output_files": {"weights": "", "assets/a": "", "gone": ""}}"#);
        for name in ["report.html", "weights", "assets/a"] {
            put(output, name, "");
        }
        fs::create_dir_all(output.join("3_Normalize/empty")).unwrap();
        fs::create_dir(output.join("lost+found")).unwrap();
        refuse_in_output(output, MARK).unwrap();
        for name in ["notes.txt", ".git/config", "photos/2024/a", "photos/b", "assets/theirs"] {
            put(output, name, "");
        }
        assert_eq!(in_output(output, MARK).unwrap(), [".git/", "assets/theirs", "notes.txt", "photos/"]);
        let error = refuse_in_output(output, MARK).unwrap_err().to_string();
        assert!(error.contains("holds `.git/` and 3 more"), "{error}");
        // A truncated report lists nothing.
        put(output, MARK, "{\"output_f");
        assert!(in_output(output, MARK).unwrap().contains(&"weights".into()));
    }

    #[test]
    fn an_output_that_is_half_removed_is_still_known() {
        let folder = tempfile::tempdir().unwrap();
        let (target, replaced) = (folder.path().join("out"), replaced_of(&folder.path().join("out.partial")));
        let check = || refuse_in_replaced(&target, &replaced, MARK);
        check().unwrap();
        put(&replaced, "thesis.txt", "all of it");
        assert!(check().unwrap_err().to_string().contains("out.partial-replaced`"));
        fs::remove_file(replaced.join("thesis.txt")).unwrap();
        check().unwrap();
        put(&replaced, MARK, r#"{"output_files": {"a": "", "b/c": ""}}"#);
        put(&replaced, "b/c", "");
        check().unwrap();
        remove_output(&replaced, MARK).unwrap();
        assert!(!replaced.exists());
    }
}
