//! The invariants of `docs/architecture.md` that can be read off the source.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Rooms whose files must not import each other in circles.
const WITHOUT_CIRCLES: [&str; 8] =
    ["compress", "calibrate", "checkpoint", "codecs", "operator", "approx", "store", "formats"];

/// Every Rust file below a folder of the repository.
fn rust_files(folder: &str) -> Vec<PathBuf> {
    let (mut folders, mut files) = (vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files
}

/// Every source file with its path below `src`, comments left out.
fn sources_with_tests() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        (path.strip_prefix(&root).unwrap().to_path_buf(), code.collect::<Vec<_>>().join("\n"))
    };
    let files: Vec<_> = rust_files("src").into_iter().map(read).collect();
    assert!(files.len() > 40, "the sources are found");
    files
}

/// The same with tests cut off.
fn sources() -> Vec<(PathBuf, String)> {
    let files = sources_with_tests().into_iter().filter(|(path, _)| path.file_stem().is_some_and(|s| s != "tests"));
    files.map(|(path, code)| (path, without_tests(&code).to_string())).collect()
}

fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests").next().unwrap()
}

fn room(path: &Path) -> String {
    let first = path.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_string()
}

/// The arrows of the architecture page: the rooms that each room may name.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md");
    let page = std::fs::read_to_string(page).unwrap();
    let block = page.split("## Arrows").nth(1).unwrap().split("```").nth(1).unwrap();
    let line = |line: &str| {
        let (from, to) = line.split_once("->")?;
        let names =
            |text: &str| text.split(',').map(|name| name.trim().to_string()).filter(|n| !n.is_empty()).collect();
        Some((from.trim().to_string(), names(to)))
    };
    block.lines().filter_map(line).collect()
}

/// Names that follow `crate::` in a file: `crate::model::{...}` and `crate::{model, text}` alike.
fn rooms_named(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + 7..];
        let listed = rest.strip_prefix('{').map_or(rest, |list| list.split('}').next().unwrap());
        let of = |text: &str| text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        if rest.starts_with('{') {
            names.extend(listed.split(',').map(of));
        } else {
            names.insert(of(listed));
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

#[test]
fn arrows_are_those_of_the_architecture_page() {
    let allowed = arrows();
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, code) in sources() {
        let room = room(&path);
        if room == "main" || room == "lib" {
            continue;
        }
        let own = found.entry(room.clone()).or_default();
        own.extend(rooms_named(&code).into_iter().filter(|name| *name != room));
    }
    let all: BTreeSet<&String> = found.keys().chain(allowed.keys()).collect();
    for room in all {
        assert_eq!(found.get(room), allowed.get(room), "what `{room}` names, and what docs/architecture.md says");
    }
    let circles = circles(&allowed);
    assert!(circles.is_empty(), "rooms in circles: {circles:?}");
}

/// Sets of nodes that lead to each other.
fn circles(edges: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<BTreeSet<String>> {
    let reachable = |from: &String| {
        let (mut seen, mut open) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(node) = open.pop() {
            for next in edges.get(&node).into_iter().flatten() {
                if seen.insert(next.clone()) {
                    open.push(next.clone());
                }
            }
        }
        seen
    };
    let reach: BTreeMap<&String, BTreeSet<String>> = edges.keys().map(|node| (node, reachable(node))).collect();
    let circle = |node: &&String| -> BTreeSet<String> {
        let back = |other: &&&String| reach[**other].contains(*node);
        reach.keys().filter(|other| reach[node].contains(**other)).filter(back).map(|other| (*other).clone()).collect()
    };
    edges.keys().map(|node| circle(&node)).filter(|circle| !circle.is_empty()).collect()
}

/// Modules of a room by path, `compress::fits::shared`, each with the modules that it names.
fn imports(room: &str) -> BTreeMap<String, BTreeSet<String>> {
    let module = |path: &Path| {
        let text = path.with_extension("").to_str().unwrap().replace(std::path::MAIN_SEPARATOR, "::");
        text.strip_suffix("::mod").unwrap_or(&text).to_string()
    };
    let files: BTreeMap<String, String> = sources()
        .into_iter()
        .map(|(path, code)| (module(&path), code))
        .filter(|(name, _)| name == room || name.starts_with(&format!("{room}::")))
        .collect();
    let find = |path: &[&str]| (1..=path.len()).rev().map(|n| path[..n].join("::")).find(|m| files.contains_key(m));
    let of = |(name, code): (&String, &String)| {
        let mut named = BTreeSet::new();
        for path in paths(name, code) {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            named.extend(find(&path).filter(|target| target != name));
        }
        (name.clone(), named)
    };
    files.iter().map(of).collect()
}

/// Paths that begin with `super` or `crate`, from the root of the crate.
fn paths(module: &str, code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    for (at, _) in code.match_indices("super::").chain(code.match_indices("crate::")) {
        if code[..at].ends_with("::") || code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let is_path = |c: &char| c.is_alphanumeric() || matches!(c, '_' | ':');
        let text: String = code[at..].chars().take_while(is_path).collect();
        let mut base: Vec<String> = module.split("::").map(String::from).collect();
        let mut parts = text.split("::").filter(|part| !part.is_empty()).peekable();
        if parts.next_if_eq(&"crate").is_some() {
            base.clear();
        }
        while parts.next_if_eq(&"super").is_some() {
            base.pop();
        }
        base.extend(parts.map(String::from));
        match code[at + text.len()..].strip_prefix('{') {
            Some(list) => {
                let names = list.split('}').next().unwrap().split(',');
                let first = |name: &str| name.trim().split(|c: char| !is_path(&c)).next().unwrap().to_string();
                let with = |name: &str| {
                    let name = first(name);
                    base.iter().cloned().chain(name.split("::").map(String::from)).collect()
                };
                paths.extend(names.map(with));
            }
            None => paths.push(base),
        }
    }
    paths
}

#[test]
fn files_of_a_room_are_in_no_circle() {
    for room in WITHOUT_CIRCLES {
        let edges = imports(room);
        assert!(edges.values().any(|named| !named.is_empty()) || edges.len() < 3, "`{room}` is read");
        let circles = circles(&edges);
        assert!(circles.is_empty(), "files of `{room}` in circles: {circles:?}");
    }
    let chain = |pairs: &[(&str, &str)]| {
        let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, to) in pairs {
            edges.entry((*to).into()).or_default();
            edges.entry((*from).into()).or_default().insert((*to).into());
        }
        circles(&edges).len()
    };
    assert_eq!((chain(&[("a", "b"), ("b", "c")]), chain(&[("a", "b"), ("b", "c"), ("c", "a")])), (0, 1));
}

fn lines_with(needles: &[&str], sources: &[(PathBuf, String)], except: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for (path, code) in sources.iter().filter(|(path, _)| !except(path)) {
        let hits = code.lines().filter(|line| needles.iter().any(|needle| line.contains(needle)));
        found.extend(hits.map(|line| format!("{}: {}", path.display(), line.trim())));
    }
    found
}

#[test]
fn only_operators_know_their_parts() {
    let needles = [
        "Pivot,",
        "Pivot {",
        "Pivot)",
        "::Pivot",
        "Monarch",
        "\"lr_",
        ".lr_",
        "lr_order",
        "Size::Rank",
        "Size::Blocks",
    ];
    // Adapters are presented as factors, under names that their codec has.
    let is_known = |p: &Path| p.starts_with("operator") || p == Path::new("codecs/peft.rs");
    assert_eq!(lines_with(&needles, &sources_with_tests(), is_known), Vec::<String>::new());
}

#[test]
fn the_device_enters_once() {
    // Tensors are made on the device of other tensors, or on the host by its name there, and values leave through
    // `to_host`.
    let needles = ["Device::Cpu", "Device::new_cuda", "to_vec1", "to_vec2", "to_vec3", "to_scalar"];
    assert_eq!(lines_with(&needles, &sources(), |p: &Path| p == Path::new("device.rs")), Vec::<String>::new());
}

#[test]
fn the_mathematics_does_no_input_or_output() {
    let is_elsewhere =
        |p: &Path| !(p.starts_with("approx") || p.starts_with("linalg") || p.starts_with("compress/allocate"));
    let needles = ["std::fs", "std::io", "crate::checkpoint", ".weight\""];
    assert_eq!(lines_with(&needles, &sources(), is_elsewhere), Vec::<String>::new());
}

/// Everything about a family is in its table: files and byte layouts are the same for all.
#[test]
fn checkpoints_and_codecs_name_no_family() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = vec![source.join("checkpoint"), source.join("codecs")];
    let mut n_files = 0;
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            paths.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        n_files += 1;
        let text = std::fs::read_to_string(&path).unwrap();
        // An example may open a fixture.
        let lines = text.lines().filter(|line| !line.contains("\"fixtures/"));
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
        let words: Vec<&str> = lines.flat_map(|line| line.split(|c| !is_word(c))).collect();
        for family in lrc::model::architectures::known_types() {
            assert!(!words.iter().any(|word| word.eq_ignore_ascii_case(family)), "{} names `{family}`", path.display());
        }
    }
    assert!(n_files > 40);
}

#[test]
fn files_and_functions_fit_a_screen_or_a_few() {
    const FILE_LINES: usize = 450;
    const FUNCTION_LINES: usize = 70;
    const NAMED_CLOSURES: usize = 2;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut too_long = Vec::new();
    for path in ["src", "tests", "benches", "examples"].into_iter().flat_map(rust_files) {
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(root).unwrap();
        let n_lines = text.lines().count();
        if n_lines > FILE_LINES {
            too_long.push(format!("{}: {n_lines} lines", name.display()));
        }
        // Tests name what they check with closures.
        let n_own = if name.starts_with("src") { without_tests(&text).lines().count() } else { 0 };
        let lines: Vec<&str> = text.lines().collect();
        for (at, body) in functions(&lines) {
            if body.len() > FUNCTION_LINES {
                too_long.push(format!("{}:{}: a function of {} lines", name.display(), at + 1, body.len()));
            }
            let n_closures = body.iter().filter(|line| names_a_closure(line)).count();
            if n_closures > NAMED_CLOSURES && at < n_own && !name.ends_with("tests.rs") {
                too_long.push(format!("{}:{}: {n_closures} named closures", name.display(), at + 1));
            }
        }
    }
    assert_eq!(too_long, Vec::<String>::new());
}

/// The functions of a file: where each begins, and its lines.
fn functions<'a>(lines: &'a [&'a str]) -> impl Iterator<Item = (usize, &'a [&'a str])> {
    lines.iter().enumerate().filter_map(|(at, line)| {
        let code = line.trim_start();
        let is_function = code.split(' ').take(4).any(|word| word == "fn") && !code.trim_end().ends_with(';');
        if !is_function || code.starts_with("//") {
            return None;
        }
        let close = format!("{}}}", " ".repeat(line.len() - code.len()));
        let end = lines[at..].iter().position(|line| **line == *close).unwrap_or(0);
        Some((at, &lines[at..=at + end]))
    })
}

/// Whether a line is `let name = |...` or `let name = move |...`.
fn names_a_closure(line: &str) -> bool {
    let Some((name, value)) = line.trim_start().strip_prefix("let ").and_then(|rest| rest.split_once(" =")) else {
        return false;
    };
    let value = value.trim_start().trim_start_matches("&mut ").trim_start_matches("move ");
    !name.contains(['(', ':']) && value.starts_with('|')
}
