//! Every argument of the command line is declared in one place, whatever number of commands take it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use lrc::cli::Cli;

fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let folder = std::fs::read_dir(root.join("cli")).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = folder.chain([root.join("compress/options.rs")]).collect();
    let name = |path: &Path| path.strip_prefix(&root).unwrap().display().to_string();
    files.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// The ids of the arguments that a file declares: fields of structs that derive `Args` or `Parser`, and rows of
/// `recipe_options!`.
fn declared(code: &str) -> Vec<String> {
    let bodies = |begin: &str| -> Vec<String> {
        let rest = code.split(begin).skip(1).filter_map(|rest| rest.split_once(" {\n"));
        rest.map(|(_, body)| body.split("\n}").next().unwrap().to_string()).collect()
    };
    let mut structs = bodies("#[derive(Debug, Args)]");
    structs.extend(bodies("#[derive(Debug, clap::Parser)]"));
    structs.extend(code.split("\nrecipe_options! {\n").skip(1).map(|rest| rest.split("\n}").next().unwrap().into()));
    structs.iter().flat_map(|body| fields(body)).collect()
}

/// The fields of a struct but for those that other structs declare.
fn fields(body: &str) -> Vec<String> {
    let (mut found, mut is_flattened) = (Vec::new(), false);
    for line in body.lines().filter_map(|line| line.strip_prefix("    ")) {
        is_flattened |= line.starts_with("#[command(flatten)]") || line.starts_with("#[command(subcommand)]");
        let name = line.trim_start_matches("pub ").split_once(": ").map(|(name, _)| name);
        if let Some(name) = name.filter(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '_')) {
            if !is_flattened {
                found.push(name.to_string());
            }
            is_flattened = false;
        }
    }
    found
}

/// Arguments by the files that declare them, a file once for each declaration.
fn declarations(sources: &[(String, String)]) -> BTreeMap<String, Vec<&str>> {
    let mut places: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (name, code) in sources {
        for id in declared(code) {
            places.entry(id).or_default().push(name);
        }
    }
    places
}

#[test]
fn every_argument_is_declared_once() {
    let sources = sources();
    let mut places = declarations(&sources);
    let commands = Cli::command();
    let all = commands.get_subcommands().chain([&commands]).flat_map(|command| command.get_arguments());
    let known: BTreeSet<&str> = all.map(|argument| argument.get_id().as_str()).collect();
    assert!(known.len() > 60, "{known:?}");
    let read: BTreeSet<&str> = places.keys().map(String::as_str).collect();
    assert_eq!(read, known, "arguments in the source, and of the commands");
    places.retain(|_, files| files.len() > 1);
    assert_eq!(places, BTreeMap::new(), "arguments that are declared twice");
}

#[test]
fn a_second_declaration_is_found() {
    let code = "#[derive(Debug, Args)]\n#[command(x)]\nstruct A {\n    /// Help: of a\n    #[arg(long)]\n    pub a: bool,\n\n    \
                #[command(flatten)]\n    b: B,\n}\n\n#[derive(Debug, Args)]\npub(super) struct B {\n    a: bool,\n    c: usize,\n}\n";
    let sources = [("x.rs".to_string(), code.to_string())];
    let expected = BTreeMap::from([("a".to_string(), vec!["x.rs"; 2]), ("c".to_string(), vec!["x.rs"])]);
    assert_eq!(declarations(&sources), expected);
}
