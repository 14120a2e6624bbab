//! The streams: data on stdout, the rest on stderr, color and bars on terminals alone; completions and manual pages.

use std::path::Path;
use std::process::Command;

use crate::common::{self, FIXTURE, TRAIN, command, finish, ok, path};
use serde_json::Value;

/// A compression with every stage, into a folder of its own.
fn compress(more: &[&str]) -> common::Run {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let args = [
        "compress",
        FIXTURE,
        "-o",
        path(&out),
        "--keep",
        "0.8",
        "--calibration",
        TRAIN,
        "--samples",
        "8",
        "--sequential",
    ];
    ok(&[&args[..], more].concat())
}

#[test]
fn stderr_says_as_much_as_was_asked_for() {
    let plain = compress(&[]);
    assert_eq!(plain.stderr, "", "no bars where stderr is not a terminal, and nothing to warn of");
    let quiet = compress(&["-q"]);
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""));
    let verbose = compress(&["-v"]).stderr;
    for stage in ["calibrate: 4096 tokens", "decompose: 28 matrices", "anchor: 4096 tokens", "write: "] {
        assert!(verbose.contains(stage), "{verbose}");
    }
    let more = compress(&["-vv"]).stderr;
    assert!(!verbose.contains("model.layers.2.mlp.up_proj") && more.contains("model.layers.2.mlp.up_proj"), "{more}");
    assert!(!more.contains('\u{1b}'), "no escapes where stderr is not a terminal");
}

#[test]
fn logs_can_be_lines_of_json() {
    let run = compress(&["-v", "--log-format", "json", "--json"]);
    let lines: Vec<Value> = run.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let decomposed = lines.iter().find(|l| l["message"] == "decompose: 28 matrices").unwrap();
    assert!(decomposed["level"] == "INFO" && decomposed["seconds"].as_f64().unwrap() >= 0.0);
    assert_eq!(run.json()["linear"]["count"], 28, "the report alone is on stdout");
}

/// Runs under a terminal of its own.
fn on_a_terminal(line: &str, no_color: bool) -> String {
    let mut script = Command::new("script");
    script.args(["-qec", line, "/dev/null"]).current_dir(env!("CARGO_MANIFEST_DIR")).env("TERM", "xterm-256color");
    script.env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE");
    if no_color {
        script.env("NO_COLOR", "1");
    }
    let output = script.output().expect("this test needs `script` (util-linux)");
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[cfg(target_os = "linux")]
#[ignore = "needs `script` (util-linux)"]
fn terminals_have_bars_and_color_and_can_do_without() {
    const COLOR: &str = "\u{1b}[48;5;";
    let lrc = env!("CARGO_BIN_EXE_lrc");
    let inspect = format!("{lrc} inspect {FIXTURE}");
    let shown = on_a_terminal(&inspect, false);
    assert!(shown.contains(COLOR) && shown.contains("inspect ") && !shown.contains('▓'), "{shown}");
    let plain = on_a_terminal(&inspect, true);
    assert!(!plain.contains(COLOR) && plain.contains('▓'), "{plain}");
    let quiet = on_a_terminal(&format!("{inspect} -q"), false);
    assert!(!quiet.contains("eta"), "{quiet}");
}

/// Two screens of 24 lines and 80 columns; what is seldom needed is left to `--help`.
#[test]
fn short_helps_fit_two_screens() {
    let help = |command: &str, flag: &str| finish(common::command(&[command, flag]).env("COLUMNS", "80")).stdout;
    for command in [
        "compress",
        "plan",
        "task",
        "finish",
        "delta",
        "calibrate",
        "sweep",
        "eval",
        "truncate",
        "export",
        "heal",
        "generate",
        "inspect",
        "completions",
        "man",
    ] {
        let short = help(command, "-h");
        assert!(short.starts_with(char::is_uppercase) && short.lines().count() <= 48, "{command}:\n{short}");
        // A flag is one line: what continues in the next has no flag of its own.
        let is_flag = |line: &&str| line.trim_start().starts_with('-');
        let flags = short.lines().skip_while(|line| !line.starts_with("Options:")).filter(|line| line.starts_with(' '));
        let wrapped: Vec<&str> = flags.filter(|line| !is_flag(line)).collect();
        assert!(wrapped.is_empty(), "{command}: {wrapped:?}");
        // The texts before the flags are wrapped by hand.
        let long = help(command, "--help");
        let about = long.split("Usage:").next().unwrap();
        assert!(about.lines().all(|line| line.chars().count() <= 80), "{about}");
    }
    let short = help("compress", "-h");
    let headings: Vec<&str> = short.lines().filter(|line| line.ends_with(':') && !line.starts_with(' ')).collect();
    let expected =
        ["Arguments:", "Options:", "Model:", "Budget:", "Method:", "Quantization:", "Calibration:", "Output:"];
    assert_eq!(headings, expected);
    let long = help("compress", "--help");
    let dry_run = long.split("--dry-run[=<DEPTH>]").nth(1).unwrap().split("--force").next().unwrap();
    assert!(dry_run.contains("- plan: ") && dry_run.contains("- full: "), "{dry_run}");
}

#[test]
fn shells_complete_every_command_and_flag() {
    let script = ok(&["completions", "bash"]).stdout;
    for word in ["compress", "truncate", "--fail-if", "--log-format", "hf-strided"] {
        assert!(script.contains(word), "{word}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lrc");
    std::fs::write(&file, script).unwrap();
    // The completions that bash offers for `lrc ev` and `lrc eval --conv`.
    let complete = |words: &str, last: &str, index: usize| {
        let line = format!(
            "source {}; COMP_WORDS=({words}); COMP_CWORD={index}; _lrc lrc '{last}' ''; echo ${{COMPREPLY[@]}}",
            path(&file)
        );
        finish(Command::new("bash").args(["-c", &line])).stdout
    };
    assert_eq!(complete("lrc ev", "ev", 1).trim(), "eval");
    assert_eq!(complete("lrc eval --conv", "--conv", 2).trim(), "--convention");
    for shell in ["zsh", "fish", "powershell", "elvish"] {
        assert!(ok(&["completions", shell]).stdout.contains("fail-if"), "{shell}");
    }
}

#[test]
fn every_command_has_a_manual_page() {
    let folder = tempfile::tempdir().unwrap();
    ok(&["man", "-o", path(folder.path())]);
    let help = ok(&["--help"]).stdout;
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names: Vec<&str> = commands.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert!(names.len() > 8);
    for name in names.into_iter().filter(|name| *name != "help") {
        let page = std::fs::read_to_string(folder.path().join(format!("lrc-{name}.1"))).unwrap();
        assert!(page.starts_with(".ie") && page.contains(".SH OPTIONS"), "{name}");
    }
    assert!(ok(&["man"]).stdout.contains("Exit codes"));
}

/// The command of the card, in a folder where model and text have the names that it uses.
#[test]
fn the_card_tells_how_the_same_bytes_are_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    common::copy(FIXTURE, &at("tiny-llama"));
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::copy(project.join(TRAIN), at("train.txt")).unwrap();
    let shared = ["--calibration", TRAIN, "--samples", "8", "-q"];
    let recipes: [&[&str]; 3] = [
        &["--keep", "0.8", "--exclude", "*.0.mlp.*", "--elastic", "--max-shard-size", "500kB"],
        &["--quant", "gptq-int4-g32", "--compensate", "eora", "--compensate-rank", "4", "--sequential=false"],
        &["--bits", "4.5", "--quant", "rtn-int3-g32,rtn-int8-g32", "--compensate", "kfac", "--quant-factors", "int8"],
    ];
    for recipe in recipes {
        let out = at("first");
        ok(&[&["compress", FIXTURE, "-o", path(&out), "--force"], recipe, &shared].concat());
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        assert!(card.starts_with("---\nlibrary_name: transformers\ntags:\n- lrc\n"), "{card}");
        assert!(!card.contains("fixtures/"), "no paths of the author's");
        let line = card.lines().find(|line| line.starts_with("lrc compress")).unwrap();
        let line = line.replacen("lrc", env!("CARGO_BIN_EXE_lrc"), 1) + " -q --force";
        let mut bash = Command::new("bash");
        assert_eq!(finish(bash.args(["-c", &line]).current_dir(folder.path())).code, 0, "{line}");
        let again = at("OUT");
        let weights: Vec<_> = std::fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
        let weights: Vec<_> = weights.iter().filter(|name| path(Path::new(name)).contains("safetensors")).collect();
        assert!(!weights.is_empty());
        for name in weights {
            assert!(std::fs::read(out.join(name)).unwrap() == std::fs::read(again.join(name)).unwrap(), "{name:?}");
        }
    }
}

#[test]
fn the_card_names_its_base_where_the_hub_can_find_it() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    common::copy(FIXTURE, &model);
    let config = model.join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    for (name, front) in
        [("org/Model-1.5b", "---\nbase_model: org/Model-1.5b\n"), ("../path/of mine", "---\nlibrary_name")]
    {
        json["_name_or_path"] = name.into();
        std::fs::write(&config, json.to_string()).unwrap();
        ok(&["compress", path(&model), "-o", path(&out), "--quant", "rtn-int4-g32", "-q", "--force"]);
        let card = std::fs::read_to_string(out.join("README.md")).unwrap();
        assert!(card.starts_with(front), "{card}");
        assert_eq!(card.contains("base_model_relation: quantized"), name.starts_with("org"));
    }
    let run =
        finish(command(&["export", path(&out), "--format", "gguf", "-o", path(&folder.path().join("g"))]).arg("-q"));
    assert_eq!(run.code, 0, "{}", run.stderr);
    let card = std::fs::read_to_string(folder.path().join("g/README.md")).unwrap();
    assert!(card.contains("library_name: llama.cpp") && card.contains("llama-cli -m model.gguf"), "{card}");
}
