//! The invariants of `docs/architecture.md` that can be read off the source.

use std::path::{Path, PathBuf};

/// What a room may name of the crate, besides itself. `error`, `progress` and `spool` are named by all but the leaves.
const ARROWS: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "calibrate",
            "checkpoint",
            "compress",
            "eval",
            "export",
            "formats",
            "inspect",
            "journal",
            "model",
            "report",
            "text",
            "error",
            "progress",
        ],
    ),
    (
        "compress",
        &[
            "calibrate",
            "eval",
            "model",
            "formats",
            "quantize",
            "report",
            "linalg",
            "checkpoint",
            "text",
            "error",
            "progress",
            "spool",
            "journal",
        ],
    ),
    ("eval", &["model", "text", "report", "checkpoint", "error", "progress"]),
    ("inspect", &["compress", "model", "report", "linalg", "checkpoint", "error", "progress"]),
    ("calibrate", &["model", "text", "linalg", "checkpoint", "error", "progress", "spool", "journal"]),
    ("export", &["formats", "model", "quantize", "report", "checkpoint", "progress"]),
    ("formats", &["model", "codecs", "quantize", "linalg", "checkpoint", "error"]),
    ("model", &["linalg", "codecs", "checkpoint", "error", "progress", "spool", "journal"]),
    ("report", &["checkpoint", "error"]),
    ("text", &["checkpoint", "error"]),
    ("checkpoint", &["codecs", "quantize", "progress"]),
    ("codecs", &["quantize", "linalg"]),
    ("quantize", &["linalg"]),
    ("linalg", &[]),
    ("spool", &["checkpoint", "journal"]),
    ("journal", &["checkpoint"]),
    ("error", &["checkpoint", "linalg"]),
    ("progress", &[]),
];

/// Every source file with its path below `src`, tests cut off.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut files) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests").next().unwrap().to_string();
                files.push((path.strip_prefix(&root).unwrap().to_path_buf(), code));
            }
        }
    }
    assert!(files.len() > 40, "the sources are found");
    files
}

fn room(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_string()
}

fn lines_with(needles: &[&str], except: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for (path, code) in sources().iter().filter(|(path, _)| !except(path)) {
        for line in code.lines().filter(|l| !l.trim_start().starts_with("//")) {
            if needles.iter().any(|n| line.contains(n)) {
                found.push(format!("{}: {}", path.display(), line.trim()));
            }
        }
    }
    found
}

#[test]
fn arrows_point_one_way() {
    let mut seen = 0;
    for (path, code) in sources() {
        let room = room(&path);
        if room == "main" || room == "lib" {
            continue;
        }
        let (_, allowed) =
            ARROWS.iter().find(|(name, _)| *name == room).unwrap_or_else(|| panic!("`{room}` has no arrows"));
        for (at, _) in code.match_indices("crate::") {
            let name: String = code[at + 7..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            seen += 1;
            assert!(name == room || allowed.contains(&name.as_str()), "{} names `{name}`", path.display());
        }
    }
    assert!(seen > 50);
    // No circles: following arrows never leads back.
    fn reaches(from: &str, to: &str) -> bool {
        let (_, next) = ARROWS.iter().find(|(name, _)| *name == from).unwrap();
        next.iter().any(|n| *n == to || reaches(n, to))
    }
    assert!(ARROWS.iter().all(|(room, _)| !reaches(room, room)));
}

#[test]
fn the_mathematics_does_no_input_or_output() {
    let is_elsewhere = |p: &Path| {
        let is_kernel = ["compress/metric.rs", "compress/low_rank.rs"].iter().any(|k| p == Path::new(k));
        !(is_kernel || p.starts_with("linalg") || p.starts_with("compress/allocate"))
    };
    assert_eq!(
        lines_with(&["std::fs", "std::io", "crate::checkpoint", ".weight\""], is_elsewhere),
        Vec::<String>::new()
    );
}
