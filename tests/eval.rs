//! Conventions, texts and gates of `lrc eval`.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use crate::common::{self, FIXTURE, HELD_OUT, command, lrc, ok, path};
use serde_json::{Value, json};

const JSONL: &str = "fixtures/text/documents.jsonl";
const PARQUET: &str = "fixtures/text/documents.parquet";

/// Values of the tools themselves; `tests/oracles/conventions.py` made them.
fn oracle() -> Value {
    serde_json::from_str(include_str!("oracles/conventions.json")).unwrap()
}

#[test]
fn conventions_give_the_numbers_of_their_tools() {
    let oracle = oracle();
    let check = |text: &str, convention: &str, of: &str, more: &[&str]| {
        let args = [&["eval", FIXTURE, "--text", text, "--convention", convention, "--json"], more].concat();
        let report = ok(&args).json();
        let expected = &oracle[of];
        for (field, theirs) in [
            ("ppl", "ppl"),
            ("bits_per_byte", "bits_per_byte"),
            ("scored_tokens", "tokens"),
            ("scored_words", "words"),
            ("scored_bytes", "bytes"),
        ] {
            let Some(expected) = expected[theirs].as_f64() else { continue };
            let found = report[field].as_f64().unwrap();
            // llama.cpp prints four digits after the point, and has a kernel of its own.
            let tolerance = if of == "llamacpp" { 2e-4 } else { 1e-6 };
            assert!((found / expected - 1.0).abs() < tolerance, "{of}, {text}: {field} is {found}, theirs {expected}");
        }
        assert!(expected["ppl"].is_number(), "{of} has a value");
    };
    for text in [JSONL, PARQUET] {
        check(text, "gptq", "gptq", &["--seq-len", "128"]);
        check(text, "hf-strided", "hf-strided", &["--seq-len", "128", "--stride", "50"]);
        check(text, "lm-eval", "lm-eval", &["--seq-len", "128"]);
        check(text, "lm-eval", "lm-eval without BOS", &["--bos", "never"]);
    }
    let seq_len = oracle["llamacpp"]["seq_len"].to_string();
    check(HELD_OUT, "llamacpp", "llamacpp", &["--seq-len", &seq_len]);
}

#[test]
fn all_conventions_stand_side_by_side_and_can_be_gated() {
    let all = ok(&["eval", FIXTURE, "--text", JSONL, "--convention", "all", "--json"]).json();
    let names: Vec<&String> = all.as_object().unwrap().keys().collect();
    assert_eq!(names, ["gptq", "hf-strided", "llamacpp", "lm-eval"]);
    for name in names {
        let one = ok(&["eval", FIXTURE, "--text", JSONL, "--convention", name, "--json"]).json();
        assert_eq!((&all[name]["ppl"], &all[name]["convention"]), (&one["ppl"], &Value::from(name.as_str())));
    }
    let gated = lrc(&["eval", FIXTURE, "--text", JSONL, "--convention", "all", "--fail-if", "lm-eval.ppl > 2"]);
    assert_eq!(gated.code, 3);
    assert!(gated.stderr.contains("--fail-if `lm-eval.ppl > 2`: `lm-eval.ppl` is 2.52"), "{}", gated.stderr);
    assert!(gated.stdout.contains("hf-strided"), "the report is printed all the same");
}

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

/// The figures that tell one text from another.
fn figures(report: &Value) -> Value {
    json!([report["nll_sum"], report["scored_tokens"], report["total_tokens"], report["documents"]])
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
    // In several conventions, from what was read the first time.
    let all = eval_of_stdin(&lines, &["--convention", "all"]);
    assert_eq!(figures(&all["gptq"]), documents);
    assert_eq!(all["lm-eval"]["text_sha256"], sha256(&lines));
    // `<(…)` of a shell.
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
fn conversations_go_through_the_chat_template_of_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    common::copy(FIXTURE, &model);
    let chat = |user: &str, answer: &str| {
        json!({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}).to_string()
    };
    let texts = String::from_utf8(std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(JSONL)).unwrap()).unwrap();
    let texts: Vec<String> = texts
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().trim().to_string())
        .collect();
    let write = |name: &str, content: String| {
        let text = folder.path().join(name);
        std::fs::write(&text, content).unwrap();
        path(&text).to_string()
    };
    let pairs: Vec<&[String]> = texts.chunks_exact(2).collect();
    assert!(pairs.len() > 2);
    let chats = write("chats.jsonl", pairs.iter().map(|p| chat(&p[0], &p[1]) + "\n").collect());
    let rendered = pairs
        .iter()
        .map(|p| json!({"text": format!("<s>user: {}\nassistant: {}</s>\n", p[0], p[1])}).to_string() + "\n");
    let rendered = write("rendered.jsonl", rendered.collect());

    let absent = lrc(&["eval", path(&model), "--text", &chats]);
    assert!(absent.code == 4 && absent.stderr.contains("has no chat template"), "{}", absent.stderr);
    assert!(absent.stderr.contains("hint: ") && absent.stderr.contains("chat_template.jinja"), "{}", absent.stderr);

    let template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}";
    let config = model.join("tokenizer_config.json");
    let mut fields: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    fields["chat_template"] = json!([{"name": "tool_use", "template": "-"}, {"name": "default", "template": template}]);
    std::fs::write(&config, fields.to_string()).unwrap();
    for convention in ["gptq", "lm-eval"] {
        let eval = |text: &str| {
            let args = ["eval", path(&model), "--text", text, "--convention", convention, "--seq-len", "64", "--json"];
            figures(&ok(&args).json())
        };
        assert_eq!(eval(&chats), eval(&rendered), "{convention}");
        // The file goes before the field, as in transformers.
        std::fs::write(model.join("chat_template.jinja"), template.replace("m.role", "m.role | upper")).unwrap();
        assert_ne!(eval(&chats), eval(&rendered), "{convention}");
        std::fs::remove_file(model.join("chat_template.jinja")).unwrap();
    }
    // The template brings its BOS, and the tokenizer does not put a second in front.
    let once = write("once.txt", format!("<s>{}", texts.join(" ")));
    let without = write("without.txt", texts.join(" "));
    let tokens = |text: &str| ok(&["eval", path(&model), "--text", text, "--json"]).json()["total_tokens"].clone();
    assert_eq!(tokens(&once), tokens(&without));

    std::fs::write(model.join("chat_template.jinja"), "{{ raise_exception('only the system may speak') }}").unwrap();
    let refused = lrc(&["eval", path(&model), "--text", &chats]);
    assert_eq!(refused.code, 4, "{}", refused.stderr);
    for expected in ["chat_template.jinja", "line 1 of", "chats.jsonl", "only the system may speak"] {
        assert!(refused.stderr.contains(expected), "{expected}: {}", refused.stderr);
    }
    // A template that fills memory is stopped.
    for grows in ["n.x ~ n.x", "[n.x, n.x] | join", "n.x * 16", "n.x.replace('a', n.x)", "n.l + n.l"] {
        let template = format!(
            "{{% set n = namespace(x='abcd', l=[1]) %}}{{% for i in range(99) %}}{{% set n.{} = {grows} %}}{{% endfor %}}{{{{ n }}}}",
            if grows.contains("n.l") { "l" } else { "x" }
        );
        std::fs::write(model.join("chat_template.jinja"), template).unwrap();
        let started = std::time::Instant::now();
        let stopped = lrc(&["eval", path(&model), "--text", &chats]);
        assert_eq!(stopped.code, 4, "{grows}: {}", stopped.stderr);
        for expected in
            ["chat_template.jinja` does not end, or needs too much memory", "line 1 of", "chats.jsonl", "hint: "]
        {
            assert!(stopped.stderr.contains(expected), "{grows}: {}", stopped.stderr);
        }
        assert!(started.elapsed().as_secs() < 60, "{grows}");
    }
    std::fs::write(model.join("chat_template.jinja"), "{{ raise_exception('only the system may speak') }}").unwrap();
    // Statistics and compression read texts in the same way.
    let statistics = folder.path().join("stats.safetensors");
    let run = lrc(&[
        "calibrate",
        path(&model),
        "--text",
        &chats,
        "-o",
        path(&statistics),
        "--samples",
        "4",
        "--seq-len",
        "32",
    ]);
    assert!(run.code == 4 && run.stderr.contains("only the system may speak"), "{}", run.stderr);
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

#[test]
fn gates_end_with_code_3_and_unknown_fields_before_any_work() {
    let eval = |model: &str, gates: &[&str]| {
        let gates = gates.iter().flat_map(|gate| ["--fail-if", gate]);
        let args: Vec<&str> =
            ["eval", model, "--text", HELD_OUT, "--max-windows", "2", "-q"].into_iter().chain(gates).collect();
        lrc(&args)
    };
    assert_eq!(eval(FIXTURE, &["ppl > 100", "size_bytes > 4GiB"]).code, 0);
    let failed = eval(FIXTURE, &["ppl > 1", "size_bytes > 1MiB", "ppl > 100"]);
    assert_eq!(failed.code, 3);
    for gate in ["ppl > 1", "size_bytes > 1MiB"] {
        assert!(failed.stderr.contains(&format!("--fail-if `{gate}`: ")), "{}", failed.stderr);
    }
    assert!(!failed.stderr.contains("ppl > 100"));
    // The model is not even looked for.
    for (gate, expected) in [
        ("perplexity > 1", "the report has no field `perplexity`"),
        ("kl.mean > 1", "`--reference MODEL` measures it"),
        ("text > 1", "`text` is not a number"),
    ] {
        let run = eval("no/such/model", &[gate]);
        assert_eq!(run.code, 2, "{}", run.stderr);
        assert!(run.stderr.contains(expected), "{}", run.stderr);
    }
    assert_eq!(eval(FIXTURE, &["ppl"]).code, 2);
    let stride = lrc(&["eval", FIXTURE, "--text", HELD_OUT, "--stride", "8"]);
    assert!(stride.code == 2 && stride.stderr.contains("`--stride` has no effect with `--convention gptq`"));
}
