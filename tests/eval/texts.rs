//! Documents, prose, pipes, and files that are not text.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use crate::common::{FIXTURE, HELD_OUT, command, lrc, ok, path};
use serde_json::Value;

use super::{JSONL, PARQUET, figures};

fn packed(bytes: &[u8], ending: &str) -> Vec<u8> {
    if ending == "zst" {
        return zstd::encode_all(bytes, 1).unwrap();
    }
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn documents_are_documents_under_every_name_of_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str| std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let (lines, parquet) = (read(JSONL), read(PARQUET));
    let eval = |text: &str| ok(&["eval", FIXTURE, "--text", text, "--seq-len", "64", "--json"]).json();
    let expected = figures(&eval(JSONL));
    let texts = String::from_utf8(lines.clone()).unwrap();
    let array = format!("\u{feff}[\n{}\n]", texts.trim_end().replace("\n", ",\n"));
    let first_with_nan = texts.replacen("{", "{\"score\": NaN, \"n\": -Infinity, ", 1);
    for (name, bytes) in [
        ("a.JSONL", lines.clone()),
        ("a.ndjson", lines.clone()),
        ("a.NDJSON.GZ", packed(&lines, "gz")),
        ("lines.json", lines.clone()),
        ("array.Json", array.clone().into_bytes()),
        ("array.json.zst", packed(array.as_bytes(), "zst")),
        ("bom.jsonl", format!("\u{feff}{texts}").into_bytes()),
        ("nan.jsonl", first_with_nan.into_bytes()),
        ("a.PARQUET", parquet.clone()),
        ("a.parquet.gz", packed(&parquet, "gz")),
    ] {
        let text = folder.path().join(name);
        std::fs::write(&text, &bytes).unwrap();
        let report = eval(path(&text));
        assert_eq!(figures(&report), expected, "{name}");
        assert_eq!(report["text_sha256"], sha256(&bytes), "{name}: of the bytes as they lie there");
    }
    let prose = read(HELD_OUT);
    let text = folder.path().join("prose.txt.zst");
    std::fs::write(&text, packed(&prose, "zst")).unwrap();
    assert_eq!(figures(&eval(path(&text))), figures(&eval(HELD_OUT)));
}

const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n";

#[test]
fn documents_without_a_text_are_left_out_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let lines = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(JSONL)).unwrap();
    let text = folder.path().join("a.jsonl");
    let n = lines.lines().count() + 2;
    std::fs::write(&text, format!("{{\"text\": null}}\n{lines}{{\"text\": \"\"}}\n")).unwrap();
    let eval = |text: &str| ok(&["eval", FIXTURE, "--text", text, "--seq-len", "64", "--json"]);
    let run = eval(path(&text));
    assert_eq!(figures(&run.json()), figures(&eval(JSONL).json()));
    assert!(run.stderr.contains(&format!("2 of {n} documents of")), "{}", run.stderr);
    assert!(!eval(JSONL).stderr.contains("left out"));
}

#[test]
fn data_under_the_name_of_prose_is_refused_with_the_right_name() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str| std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let (lines, parquet) = (read(JSONL), read(PARQUET));
    for (name, bytes, expected, hint) in [
        ("a.csv", b"id,text\n1,a\n".to_vec(), "ends in `.csv`", "`.jsonl`"),
        ("a.TSV.gz", packed(b"id\ttext\n", "gz"), "ends in `.tsv`", "`.jsonl`"),
        ("a.txt", lines.clone(), "contains JSON", "to end in `.jsonl`"),
        ("a.raw", lines.clone(), "contains JSON", "to end in `.jsonl`"),
        ("a", b"[{\"text\": \"a\"}]".to_vec(), "contains JSON", "to end in `.jsonl`"),
        ("b.txt.gz", packed(&lines, "gz"), "contains JSON", "to end in `.jsonl`"),
        ("b.txt", parquet, "a Parquet file", "ends in `.parquet`"),
        ("c.txt", packed(b"a", "gz"), "packed with gzip", "ends in `.gz`"),
        ("d.txt", packed(b"a", "zst"), "packed with zstd", "ends in `.zst`"),
        ("e.txt", POINTER.to_vec(), "a Git LFS pointer", "git lfs pull"),
        ("e.jsonl", POINTER.to_vec(), "a Git LFS pointer", "git lfs pull"),
        ("e.parquet", POINTER.to_vec(), "a Git LFS pointer", "git lfs pull"),
        ("e.jsonl.gz", POINTER.to_vec(), "a Git LFS pointer", "git lfs pull"),
        ("f.jsonl.gz", lines.clone(), "cannot be decompressed", ""),
        ("g.jsonl.gz.gz", packed(&packed(&lines, "gz"), "gz"), "compressed more than once", "compressed once"),
        ("g.jsonl.gz", packed(&packed(&lines, "gz"), "gz"), "packed with gzip", "compressed once"),
        ("g.jsonl.zst", packed(&packed(&lines, "gz"), "zst"), "packed with gzip", "compressed once"),
        (
            "h.jsonl",
            b"{\"text\": null}\n{\"text\": \"\"}\n".to_vec(),
            "`text` is empty or null in every document",
            "--field",
        ),
        ("h.json", b"[{\"text\": null}]".to_vec(), "`text` is empty or null in every document", "--field"),
        ("i.txt", [b"\xef\xbb\xbf", &lines[..]].concat(), "contains JSON", "to end in `.jsonl`"),
        ("i.md", b"- text: Once\n- text: Twice\n".to_vec(), "contains YAML", "put it in the `text` of a document"),
        (
            "j.txt",
            b"id\ttext\n1\tOnce\n2\tTwice\n".to_vec(),
            "is a tab-separated table",
            "put it in the `text` of a document",
        ),
        (
            "k.txt",
            b"id,text\n1,Once\n2,Twice\n".to_vec(),
            "is a comma-separated table",
            "put it in the `text` of a document",
        ),
        (
            "l.txt.gz",
            packed(b"{'text': 'a'}\n{'text': 'b'}\n", "gz"),
            "contains Python literals",
            "put it in the `text` of",
        ),
        ("m.txt", b"\"{\\\"text\\\": 1}\"\n\"a\\n\"\n".to_vec(), "contains JSON", "put it in the `text` of a document"),
        (
            "n.txt",
            b"<p>Once</p>\n<p>Twice</p>\n".to_vec(),
            "contains HTML or XML",
            "put it in the `text` of a document",
        ),
    ] {
        let text = folder.path().join(name);
        std::fs::write(&text, bytes).unwrap();
        let run = lrc(&["eval", FIXTURE, "--text", path(&text)]);
        assert_eq!(run.code, 4, "{name}: {}", run.stderr);
        let error = run.stderr.lines().find(|line| line.starts_with("error:")).unwrap();
        assert!(error.contains(name) && error.contains(expected), "{name}: {}", run.stderr);
        assert!(
            hint.is_empty() || run.stderr.contains("hint: ") && run.stderr.contains(hint),
            "{name}: {}",
            run.stderr
        );
    }
}

/// Runs `lrc eval` with bytes on its standard input.
fn eval_of_stdin(bytes: &[u8], more: &[&str]) -> Value {
    let args = [&["eval", FIXTURE, "--text", "/dev/stdin", "--seq-len", "64", "--json"], more].concat();
    let mut child = command(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).unwrap()
}

#[cfg(unix)]
#[test]
fn pipes_are_read_once_and_known_by_their_content() {
    let read = |name: &str| std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let eval = |text: &str| figures(&ok(&["eval", FIXTURE, "--text", text, "--seq-len", "64", "--json"]).json());
    let (prose, documents) = (eval(HELD_OUT), eval(JSONL));
    let (lines, packed_lines) = (read(JSONL), packed(&read(JSONL), "gz"));
    for (bytes, expected) in
        [(&read(HELD_OUT), &prose), (&lines, &documents), (&packed_lines, &documents), (&read(PARQUET), &documents)]
    {
        let report = eval_of_stdin(bytes, &[]);
        assert_eq!(&figures(&report), expected);
        assert_eq!(report["text_sha256"], sha256(bytes), "the hash is that of the bytes that were read");
    }
    // Several conventions share one read of the pipe.
    let all = eval_of_stdin(&lines, &["--convention", "all"]);
    assert_eq!(figures(&all["gptq"]), documents);
    assert_eq!(all["lm-eval"]["text_sha256"], sha256(&lines));
    // A pipe from `<(…)` in a shell.
    let substituted = std::process::Command::new("bash")
        .args(["-c", "\"$0\" eval \"$1\" --text <(cat \"$2\") --seq-len 64 --json"])
        .args([env!("CARGO_BIN_EXE_lrc"), FIXTURE, HELD_OUT])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&substituted.stdout).unwrap();
    assert_eq!((figures(&report), &report["text_sha256"]), (prose, &Value::from(sha256(&read(HELD_OUT)))));
}

#[cfg(unix)]
#[test]
fn a_named_pipe_is_read_to_its_end_and_never_waited_for_in_vain() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let writer = {
        let pipe = pipe.clone();
        let bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(HELD_OUT)).unwrap();
        std::thread::spawn(move || std::fs::write(pipe, bytes).unwrap())
    };
    let report = ok(&["eval", FIXTURE, "--text", path(&pipe), "--seq-len", "64", "--json"]).json();
    writer.join().unwrap();
    assert_eq!(
        report["scored_bytes"],
        ok(&["eval", FIXTURE, "--text", HELD_OUT, "--seq-len", "64", "--json"]).json()["scored_bytes"]
    );
    let started = std::time::Instant::now();
    for (args, code) in [
        (&["eval", FIXTURE, "--text", path(&pipe)][..], 4),
        (&["compress", FIXTURE, "-o", path(&folder.path().join("out")), "--recipe", path(&pipe)], 2),
    ] {
        let run = lrc(args);
        assert_eq!(run.code, code, "{}", run.stderr);
        assert!(
            run.stderr.contains("error: the pipe `")
                && run.stderr.contains(path(&pipe))
                && run.stderr.contains("has no writer"),
            "{}",
            run.stderr
        );
    }
    assert!(started.elapsed().as_secs() < 60);
    let endless = lrc(&["eval", FIXTURE, "--text", "/dev/zero"]);
    assert!(endless.code == 2 && endless.stderr.contains("`/dev/zero` is a device"), "{}", endless.stderr);
    let within = lrc(&["eval", FIXTURE, "--text", path(folder.path())]);
    assert!(within.code == 2 && within.stderr.contains("is a folder, expected a text file"), "{}", within.stderr);
}

#[test]
fn texts_that_are_no_texts_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_string()
    };
    for (text, field, expected) in [
        (JSONL.to_string(), "body", "line 1 of `fixtures/text/documents.jsonl` has no string `body`"),
        (PARQUET.to_string(), "body", "has no column `body`; its columns are id, text"),
        (PARQUET.to_string(), "id", "column `id` of `fixtures/text/documents.parquet` is not text"),
        (write("a.parquet", "no parquet"), "text", "a.parquet` cannot be read"),
        (write("a.jsonl", "{\"text\": \"a\"}\n{"), "text", "line 2 of"),
        (write("b.jsonl", "\n"), "text", "is empty"),
    ] {
        let run = lrc(&["eval", FIXTURE, "--text", &text, "--field", field]);
        assert_eq!(run.code, 4, "{text}: {}", run.stderr);
        assert!(run.stderr.contains(expected), "{text}: {}", run.stderr);
    }
}
