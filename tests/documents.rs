//! Runs the commands of the documents: every `sh` block of README, `docs/commands.md` and `docs/choosing.md` line by
//! line in a folder where `MODEL` and `ENCODER` are fixtures, and the script of `docs/ci.md` unchanged.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{self, FIXTURE, HELD_OUT, TRAIN, finish, path};

fn read(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The blocks of a language.
fn blocks(document: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    document.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_string()).collect()
}

/// Commands of a block, with continued lines joined and comments removed.
fn commands(block: &str) -> Vec<String> {
    let joined = block.replace("\\\n", " ");
    let cut = joined.lines().map(|line| line.split(" #").next().unwrap().trim());
    cut.filter(|line| !line.is_empty()).map(String::from).collect()
}

/// A folder with the files that the documents name, where `lrc` is the binary under test.
struct Reader {
    folder: tempfile::TempDir,
}

impl Reader {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let project = Path::new(env!("CARGO_MANIFEST_DIR"));
        common::copy(FIXTURE, &at("MODEL"));
        // A model whose linears have biases.
        common::copy("fixtures/pico/bert", &at("ENCODER"));
        let copies = [
            (TRAIN, "text.txt"),
            ("fixtures/text/documents.jsonl", "documents.jsonl"),
            ("tests/oracles/sentencepiece.gguf", "MODEL.gguf"),
            ("fixtures/pico/tokenizer-wordpiece.json", "ENCODER/tokenizer.json"),
        ];
        for (from, to) in copies {
            std::fs::copy(project.join(from), at(to)).unwrap();
        }
        let held_out = read(HELD_OUT);
        let (start, _) = held_out.split_at(held_out.floor_char_boundary(20_000));
        ["held-out.txt", "wiki.test.raw"].iter().for_each(|name| std::fs::write(at(name), start).unwrap());
        std::fs::write(at("recipe.toml"), "method = \"svd\"\n").unwrap();
        let reader = Self { folder };
        let runs = reader.run("lrc calibrate MODEL --text text.txt -o stats.safetensors --samples 8");
        assert_eq!(runs.code, 0, "{}", runs.stderr);
        // Without its report, it is a model that another tool quantized.
        let runs = reader
            .run("lrc compress MODEL -o QUANTIZED --quant rtn-int4-g32 --format gptq && rm QUANTIZED/lrc-report.json");
        assert_eq!(runs.code, 0, "{}", runs.stderr);
        reader
    }

    fn run(&self, line: &str) -> common::Run {
        let binary = PathBuf::from(env!("CARGO_BIN_EXE_lrc"));
        let search = format!("{}:{}", path(binary.parent().unwrap()), std::env::var("PATH").unwrap());
        let mut bash = Command::new("bash");
        bash.args(["-c", line]).current_dir(self.folder.path()).env("PATH", search);
        finish(bash.env(common::THREADS[0], common::THREADS[1]))
    }

    /// Runs a command of a document, after removing the output of an earlier one with the same name.
    fn follow(&self, line: &str) -> Result<(), String> {
        if !line.contains("--force")
            && let Some(out) = line.split(" -o ").nth(1).and_then(|rest| rest.split_whitespace().next())
        {
            // A full dry run keeps its work for its own recipe only.
            let _ = std::fs::remove_dir_all(self.folder.path().join(format!("{out}.partial")));
            let out = self.folder.path().join(out);
            let _ = if out.is_dir() { std::fs::remove_dir_all(&out) } else { std::fs::remove_file(&out) };
        }
        let reads = line.contains("--calibration") || line.starts_with("lrc heal ");
        // Sizes are adapted to the fixture: it has 1.7 MB, a context of 128 tokens, and rows shorter than a group of
        // 128.
        let line = line.replace("350MiB", "900kB").replace("seq-len 1024", "seq-len 128");
        let line = line.replace("gptq-int4 ", "gptq-int4-g32 ").replace("q4_k ", "q4_0 ");
        // A few windows, and one pass over them, are enough to run the command.
        let line = line.replace("--samples 128", "--samples 16");
        let few = [
            (reads, "--samples 8"),
            (line.starts_with("lrc heal "), "--epochs 1"),
            (line.starts_with("lrc eval ") || line.starts_with("lrc sweep "), "--max-windows 8"),
        ];
        let is_given = |flag: &str| line.contains(flag.split(' ').next().unwrap());
        let more = few.into_iter().filter(|&(applies, flag)| applies && !is_given(flag) && !line.contains('|'));
        let line = more.fold(line.clone(), |line, (_, flag)| format!("{line} {flag}"));
        let run = self.run(&line);
        if run.code == 0 { Ok(()) } else { Err(format!("{line}\n{}", run.stderr)) }
    }
}

fn follow_all(document: &str) -> usize {
    let reader = Reader::new();
    let blocks = blocks(&read(document), "sh");
    let commands: Vec<String> = blocks.iter().flat_map(|block| commands(block)).collect();
    // Commands that build and test the project are not run, because one of them runs this test.
    let ours = commands.iter().filter(|line| line.starts_with("lrc "));
    let failed: Vec<String> = ours.clone().filter_map(|line| reader.follow(line).err()).collect();
    assert!(failed.is_empty(), "{document}:\n{}", failed.join("\n"));
    ours.count()
}

#[test]
fn every_command_of_the_readme_works() {
    assert!(follow_all("README.md") >= 2);
}

#[test]
fn every_example_of_a_command_works() {
    assert!(follow_all("docs/commands.md") > 40);
}

#[test]
fn every_command_of_the_guide_works() {
    assert!(follow_all("docs/choosing.md") >= 3);
}

#[test]
fn the_script_for_ci_passes_and_fails_by_its_gates() {
    let reader = Reader::new();
    let document = read("docs/ci.md");
    let scripts = blocks(&document, "bash");
    assert_eq!(scripts.len(), 1);
    std::fs::write(reader.folder.path().join("compress-and-gate.sh"), &scripts[0]).unwrap();
    assert!(blocks(&document, "yaml")[0].contains("bash compress-and-gate.sh"));
    let run = |gates: &str, out: &str| {
        reader.run(&format!("{gates} bash compress-and-gate.sh MODEL text.txt held-out.txt {out}"))
    };
    let passed = run("", "passed");
    assert_eq!(passed.code, 0, "{}", passed.stderr);
    assert!(reader.folder.path().join("passed/lrc-report.html").is_file());
    let eval = std::fs::read_to_string(reader.folder.path().join("eval.json")).unwrap();
    let kl = serde_json::from_str::<serde_json::Value>(&eval).unwrap()["kl"]["mean"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 0.05);
    let lossy = run(&format!("MAX_KL={}", kl / 2.0), "lossy");
    assert_eq!(lossy.code, 3, "{}", lossy.stderr);
    assert!(lossy.stderr.contains("`--fail-if kl.mean > "), "{}", lossy.stderr);
    let large = run("MAX_BYTES=1kB", "large");
    assert_eq!(large.code, 3, "{}", large.stderr);
    assert!(large.stderr.contains("`--fail-if size_bytes > 1kB`"), "{}", large.stderr);
}
