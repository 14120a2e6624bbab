//! The invariants of `docs/architecture.md` that can be read off the source.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lrc::operator::Kind;

/// Every file below a folder of the repository whose name ends so.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let (mut folders, mut files) = (vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
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
    let files: Vec<_> = files("src", "rs").into_iter().map(read).collect();
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

/// Names that follow `crate::` in a file: `crate::model::{...}` and `crate::{model::{a, b}, text}` alike.
fn rooms_named(code: &str) -> BTreeSet<String> {
    let paths = code.match_indices("crate::").flat_map(|(at, _)| tree(&code[at..]));
    paths.filter_map(|path| path.into_iter().nth(1)).collect()
}

#[test]
fn rooms_are_found_in_nested_imports() {
    for (code, expected) in [
        ("use crate::model::{a::{b, c}, d};", &["model"][..]),
        ("use crate::{\n    model::{a, b::{self, C}},\n    text,\n};\nuse crate::store;", &["model", "store", "text"]),
        ("fn f(x: &crate::error::Failure) { crate::report::show(x) }", &["error", "report"]),
    ] {
        assert_eq!(rooms_named(code).iter().map(String::as_str).collect::<Vec<_>>(), expected, "{code}");
    }
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

/// Every module by its path, `compress::fits::shared`, with its code.
fn modules() -> BTreeMap<String, String> {
    let module = |path: &Path| {
        let text = path.with_extension("").to_str().unwrap().replace(std::path::MAIN_SEPARATOR, "::");
        text.strip_suffix("::mod").unwrap_or(&text).to_string()
    };
    sources().into_iter().map(|(path, code)| (module(&path), code)).collect()
}

/// The modules of the same room that each module names. The items of a `mod.rs` belong to its module, re-exports included;
/// so a `mod.rs` may name the modules that it declares, or these may name it, but not both.
fn imports(modules: &BTreeMap<String, String>) -> BTreeMap<String, BTreeSet<String>> {
    let owner =
        |path: &[String]| (1..=path.len()).rev().map(|n| path[..n].join("::")).find(|m| modules.contains_key(m));
    let is_same_room = |a: &str, b: &str| a.split("::").next() == b.split("::").next();
    let named = |(name, code): (&String, &String)| {
        let owners = paths(name, code).into_iter().filter_map(|path| owner(&path));
        (name.clone(), owners.filter(|owner| owner != name && is_same_room(owner, name)).collect())
    };
    modules.iter().map(named).collect()
}

/// Paths that begin with `super`, `crate`, `self` or a module that the file declares, from the root of the crate.
fn paths(module: &str, code: &str) -> Vec<Vec<String>> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let declared = code.lines().filter_map(|line| line.trim_end().strip_suffix(';')?.rsplit_once("mod "));
    let mut first: BTreeSet<&str> =
        declared.filter(|(before, _)| !before.contains('"')).map(|(_, name)| name).collect();
    first.extend(["super", "crate", "self"]);
    let mut found = Vec::new();
    for (at, _) in code.match_indices("::") {
        let begin = code[..at].rfind(|c| !is_name(c)).map_or(0, |before| before + 1);
        // `pub(in crate::room)` names nobody.
        if !first.contains(&code[begin..at]) || [":", "(in "].iter().any(|before| code[..begin].ends_with(before)) {
            continue;
        }
        for path in tree(&code[begin..]) {
            let mut base: Vec<String> = module.split("::").map(String::from).collect();
            let mut path = path.into_iter().peekable();
            if path.next_if(|name| name == "crate").is_some() {
                base.clear();
            }
            while path.next_if(|name| name == "super").is_some() {
                base.pop();
            }
            base.extend(path.filter(|name| name != "self"));
            found.push(base);
        }
    }
    found
}

/// The paths in the text of an import: `a::{b, c::{d, self}}` has `a::b`, `a::c::d` and `a::c::self`.
fn tree(text: &str) -> Vec<Vec<String>> {
    let text = text.trim_start();
    let end = text.find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | ':'))).unwrap_or(text.len());
    let base: Vec<String> = text[..end].split("::").filter(|name| !name.is_empty()).map(String::from).collect();
    if !(text[..end].ends_with("::") && text[end..].starts_with('{')) {
        return vec![base];
    }
    let paths = items(&text[end + 1..]).into_iter().flat_map(tree);
    paths.map(|path| base.iter().cloned().chain(path).collect()).collect()
}

/// The items of a list, up to its closing brace.
fn items(list: &str) -> Vec<&str> {
    let (mut depth, mut begin, mut items) = (0, 0, Vec::new());
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            ',' | '}' if depth == 0 => {
                items.push(list[begin..at].trim());
                begin = at + 1;
                if c == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    items.retain(|item| !item.is_empty());
    items
}

#[test]
fn files_of_a_room_are_in_no_circle() {
    let edges = imports(&modules());
    assert!(edges.values().map(BTreeSet::len).sum::<usize>() > 200, "imports are read");
    let circles = circles(&edges);
    assert!(circles.is_empty(), "files in circles: {circles:?}");
}

#[test]
fn circles_are_found() {
    let check = |files: &[(&str, &str)], expected: usize| {
        let modules = files.iter().map(|(name, code)| (name.to_string(), code.to_string())).collect();
        let circles = circles(&imports(&modules));
        assert_eq!(circles.len(), expected, "{files:?}: {circles:?}");
    };
    let (a, b) = (("r::a", "use super::b::{self, B};"), ("r::b", "fn f() -> super::c::C {}"));
    check(&[("r", "mod a;\nmod b;\nmod c;\npub use a::A;"), a, b, ("r::c", "pub(in crate::r) struct C;")], 0);
    check(&[a, b, ("r::c", "use crate::{q::Q, r::{a::A, d::D}};")], 1);
    // A `mod.rs` and a module that it declares, by a re-export and in an expression.
    check(&[("r", "mod a;\npub use a::A;\npub struct Job;"), ("r::a", "use super::Job;")], 1);
    check(&[("r", "pub mod a;\nfn f() { a::run() }"), ("r::a", "use super::super::r::*;")], 1);
    check(&[("r", "mod a;\npub struct Job;"), ("r::a", "use super::Job;")], 0);
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
    let capitalized = |kind: Kind| format!("{}{}", kind.name()[..1].to_uppercase(), &kind.name()[1..]);
    let types = Kind::layouts().map(capitalized).filter(|name| name != "Factors");
    let types =
        types.flat_map(|name| [format!("{name},"), format!("{name} {{"), format!("{name})"), format!("::{name}")]);
    let parts = ["\"lr_", ".lr_", "lr_order", "Size::Rank", "Size::Blocks"].map(String::from);
    let needles: Vec<String> = types.chain(parts).collect();
    let needles: Vec<&str> = needles.iter().map(String::as_str).collect();
    let is_known = |p: &Path| p.starts_with("operator");
    assert_eq!(lines_with(&needles, &sources_with_tests(), is_known), Vec::<String>::new());
    // In Python, the classes of structures know them.
    assert!(!include_str!("../src/formats/modeling_lrc_model.py").contains("lr_"));
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
    let rust = ["src", "tests", "benches", "examples"].into_iter().flat_map(|folder| files(folder, "rs"));
    for path in rust.chain(files("src", "py")) {
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.strip_prefix(root).unwrap();
        let n_lines = text.lines().count();
        if n_lines > FILE_LINES {
            too_long.push(format!("{}: {n_lines} lines", name.display()));
        }
        // Tests name what they check with closures.
        let n_own = if name.starts_with("src") { without_tests(&text).lines().count() } else { 0 };
        let lines: Vec<&str> = text.lines().collect();
        for (at, length) in python_functions(&lines).filter(|_| name.extension().is_some_and(|e| e == "py")) {
            if length > FUNCTION_LINES {
                too_long.push(format!("{}:{}: a function of {length} lines", name.display(), at + 1));
            }
        }
        for (at, body) in functions(&lines) {
            if body.len() > FUNCTION_LINES {
                too_long.push(format!("{}:{}: a function of {} lines", name.display(), at + 1, body.len()));
            }
            let n_closures = (0..body.len()).filter(|&at| names_a_closure(&body[at..])).count();
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

/// The functions of a file in Python: where each begins, and its number of lines, up to the last that is indented
/// further.
fn python_functions<'a>(lines: &'a [&'a str]) -> impl Iterator<Item = (usize, usize)> {
    let indent = |line: &str| line.len() - line.trim_start().len();
    lines.iter().enumerate().filter(|(_, line)| line.trim_start().starts_with("def ")).map(move |(at, line)| {
        // A signature over several lines ends in one that closes it at the same indentation.
        let is_outside = |next: &&&str| {
            let is_end_of_signature = next.trim_start().starts_with(')');
            !next.trim().is_empty() && indent(next) <= indent(line) && !is_end_of_signature
        };
        let rest = &lines[at + 1..];
        let end = rest.iter().position(|next| is_outside(&next)).unwrap_or(rest.len());
        let n_blank = rest[..end].iter().rev().take_while(|line| line.trim().is_empty()).count();
        (at, 1 + end - n_blank)
    })
}

#[test]
fn the_length_of_a_function_in_python_is_found() {
    let code = "class A:\n    def f(self):\n        x = 1\n\n        return x\n\n    def g(\n        self,\n    ):\n        pass\n\n\ndef h():\n    pass\n";
    let lines: Vec<&str> = code.lines().collect();
    assert_eq!(python_functions(&lines).collect::<Vec<_>>(), [(1, 4), (6, 4), (12, 2)]);
}

/// Whether lines begin with `let name = |...` or `let name = move |...`, in one line or two.
fn names_a_closure(lines: &[&str]) -> bool {
    let line = lines[0].trim_start();
    let Some((name, value)) = line.strip_prefix("let ").and_then(|rest| rest.split_once(" =")) else {
        return false;
    };
    let value = if value.is_empty() { lines.get(1).copied().unwrap_or_default() } else { value };
    let is_closure =
        |value: &str| value.trim_start().trim_start_matches("&mut ").trim_start_matches("move ").starts_with('|');
    match value.trim_start().strip_prefix('(') {
        Some(values) if name.trim_start().starts_with('(') => values.split(", ").any(is_closure),
        _ => !name.contains(['(', ':']) && is_closure(value),
    }
}

#[test]
fn named_closures_are_found_in_one_line_or_two() {
    for lines in [
        &["let f = |x| x;"][..],
        &["    let mut f = move |x| {"],
        &["let f =", "    |x: usize| x;"],
        &["let (n, f) = (3, |x| x);"],
    ] {
        assert!(names_a_closure(lines), "{lines:?}");
    }
    for lines in [&["let x = y || z;"][..], &["let x =", "    y || z;"], &["let (x, y) = |z| z;"], &["f(|x| x)"]] {
        assert!(!names_a_closure(lines), "{lines:?}");
    }
}
